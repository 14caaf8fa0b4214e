"""Data sets by name: embedded ones that need no download, and real ones from the cache.

    >>> from moe_lab.datasets import load
    >>> data = load("planted-recommender", seed=0)
    >>> data.sizes
    {'train': 49686, 'valid': 7098, 'test': 6310}

`registry` says where each comes from and what may be done with it; ``moe-lab data fetch NAME`` gets the real ones.
"""

from moe_lab.datasets.base import Dataset, DatasetNotFound
from moe_lab.datasets.loading import available, load, names, options_of

__all__ = ["Dataset", "DatasetNotFound", "available", "load", "names", "options_of"]
