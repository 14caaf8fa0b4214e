"""Experiments: ``run(config) -> Result``. The one place where data, models, gates and training meet."""
