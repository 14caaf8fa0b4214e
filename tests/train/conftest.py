"""Lets the tests of this folder import their helpers (``one_weight``, ``killed_runs``) by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
