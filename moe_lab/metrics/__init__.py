"""Numbers about predictions and about routing. No model, no training."""
