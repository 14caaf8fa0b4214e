"""Benchmarks: measured by hand and written down, never timed in a test. ``python -m moe_lab.bench cpu``."""
