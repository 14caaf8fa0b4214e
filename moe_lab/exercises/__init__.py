"""Checks for the exercises of the notebooks, one file per notebook. A check says *what* is wrong."""

from moe_lab.exercises.verdict import verdict

__all__ = ["verdict"]
