"""Rows as text."""

from __future__ import annotations

from moe_lab.bench.tables import render, render_all


def test_tables_are_aligned():
    text = render([{"a": "x", "b": 1.0}, {"a": "long", "b": 1000.0}], [("a", "name", ""), ("b", "value", ",.1f")])
    assert text.splitlines() == ["name    value", "x         1.0", "long  1,000.0"]


def test_a_table_of_all_columns_shows_what_is_missing_and_why():
    rows = [
        {"case": "one", "ms": 1.2345, "n": 32768},
        {"case": "two", "failed": "memory"},
        {"case": "3", "ms": 99.6},
    ]
    assert render_all(rows).splitlines() == [
        "case    ms      n",
        "one   1.23  32768",
        "two      -      -",
        "3      100      -",
        "two failed: memory",
    ]


def test_lists_and_quartiles_are_not_shown_and_a_number_of_failures_is_a_column():
    rows = [{"gate": "x", "ms": 1.0, "ms_q1": 0.5, "failed": 3, "plan": {"rows": 1}}, {"gate": "y", "tried": []}]
    assert render_all(rows).splitlines() == ["gate  ms  failed", "x      1       3", "y      -       -"]
