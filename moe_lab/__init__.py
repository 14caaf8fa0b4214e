"""moe_lab: models that decide, input by input, how much of themselves to run."""

__version__ = "0.1.0"
