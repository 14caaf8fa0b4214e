"""`python -m moe_lab` is `moe-lab`."""

import sys

from moe_lab.cli import main

sys.exit(main())
