"""Tables for reading, of the curves of a recorded GPU benchmark; what was asked of them is judged in `speed_claims`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from moe_lab.bench.roofline import OWN, Ceiling, against_ceiling, grouped_stage
from moe_lab.experiments.speed_claims import Recorded, rows_of, shape_of, sizes_text

VARIABLE = ("ours, any pattern", "ours, variable k", "ours, variable k, bounded")
"""Cases of the curve ``moe`` that find a token's pairs through their start, not through a fixed k."""


def _by_sizes(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Sizes as text -> rows, in the order in which they were measured."""
    tables: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        tables.setdefault(sizes_text(shape_of(row)), []).append(row)
    return tables


def _table(rows: Mapping[tuple, Mapping[str, Any]], names: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples(list(rows), names=names)
    return pd.DataFrame(list(rows.values()), index, columns=list(columns), dtype=float)


def stage_tables(stages: Recorded, ceiling: Ceiling) -> dict[str, pd.DataFrame]:
    """Sizes as text -> `against_ceiling` of the curve ``stages``, in the order in which they were measured."""
    return {sizes: against_ceiling(rows, stages.size, ceiling) for sizes, rows in _by_sizes(stages.rows).items()}


def product_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of the curve ``stages``: products of our own (`experts.kernels.product`) beside `grouped_mm`, each alone.

    Returns:
        Index (sizes, product), and "sum" for all products of these sizes; ms of both, and how many times faster ours
        is. Empty where ours did not run.
    """
    columns, table = ("grouped_mm, ms", "ours, ms"), {}
    for sizes, found in _by_sizes(rows).items():
        ms = {row["stage"]: row["ms"] for row in found}
        pairs = {grouped_stage(name): ms[name] for name in ms if OWN in name}
        of_sizes = [(name, ms[name], own) for name, own in pairs.items()]
        if of_sizes:
            of_sizes.append(("sum", *(sum(column) for column in zip(*(row[1:] for row in of_sizes), strict=True))))
        for name, grouped, own in of_sizes:
            table[sizes, name] = {**dict(zip(columns, (grouped, own), strict=True)), "times faster": grouped / own}
    return _table(table, ("sizes", "product"), (*columns, "times faster"))


def moe_table(
    rows: Sequence[Mapping[str, Any]], cases: Sequence[str] = ("dense", "ours", "plain", "ScatterMoE")
) -> pd.DataFrame:
    """Rows of the curve ``moe`` for reading: index (sizes, case); ms, TFLOP/s, of dense, of ScatterMoE, peak MiB."""
    columns = {"ms": "ms", "tflops": "TFLOP/s", "of_dense": "of dense", "of_scattermoe": "of ScatterMoE"}
    columns["peak_mib"] = "peak, MiB"
    table = {}
    for shape in dict.fromkeys(shape_of(row) for row in rows):
        found = rows_of(rows, shape)
        for case in cases:
            if case in found:
                table[sizes_text(shape), case] = {label: found[case].get(name) for name, label in columns.items()}
    return _table(table, ("sizes", "case"), columns.values())


def variable_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of the curve ``moe``: what it costs that a token may have any number of experts.

    Returns:
        Index (sizes, case of `VARIABLE`); "of fixed k" (throughput over that of "ours"), "ms more" (than "ours", at the
        same number of pairs), "quartiles, ms" (how far apart those of the case are), "peak, MiB".
    """
    table = {}
    for shape in dict.fromkeys(shape_of(row) for row in rows):
        found = rows_of(rows, shape)
        for case in VARIABLE:
            if case in found and "ours" in found:
                row, fixed = found[case], found["ours"]
                share = row["tflops"] / fixed["tflops"]
                table[sizes_text(shape), case] = {
                    "of fixed k": share,
                    "ms more": fixed["ms"] * (1 / share - 1),
                    "quartiles, ms": row["ms_q3"] - row["ms_q1"],
                    "peak, MiB": row["peak_mib"],
                }
    return _table(table, ("sizes", "case"), ("of fixed k", "ms more", "quartiles, ms", "peak, MiB"))


def power_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of the curve ``power``: what a step takes after a rest and under load, and what it draws.

    Returns:
        Index (sizes, case); "ms, rested", "ms, under load", "MHz", "W", "J per step"; "times the ms" (under load) and
        "times the J": those of the first case of its kind (a dense layer; a product without zeros) are 1.
    """
    table, first = {}, {}
    for row in rows:
        sizes, case = sizes_text(shape_of(row)), row["case"]
        of = first.setdefault((sizes, case.startswith("product")), row)
        table[sizes, case] = {
            "ms, rested": row["rested_ms"],
            "ms, under load": row["ms"],
            "MHz": row["mhz"],
            "W": row["watts"],
            "J per step": row["joules"],
            "times the ms": row["ms"] / of["ms"],
            "times the J": row["joules"] / of["joules"] if row["joules"] and of["joules"] else None,
        }
    columns = ("ms, rested", "ms, under load", "MHz", "W", "J per step", "times the ms", "times the J")
    return _table(table, ("sizes", "case"), columns)


def gate_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of the curve ``gates``: index case; a column of milliseconds for each size and sharpness."""
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        column = f"E {row['experts']}, k {row['k']}, sharpness {row['sharpness']:g}"
        table.setdefault(column, {})[row["case"]] = row.get("ms")
    return pd.DataFrame(table).rename_axis("ms")


def exit_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of the curve ``exits``: index (batch, case); ms, speed over two full networks, share of what was saved.

    Columns "over fastest full", "over eager full" (how many times as fast), "of the saved multiply-adds" (the former
    over the ratio of multiply-adds; only of cases with exits).
    """
    columns = {"ms": "ms", "speed_up": "over fastest full", "over_eager": "over eager full"}
    columns["reached"] = "of the saved multiply-adds"
    table = {
        (row["batch"], row["case"]): {label: row.get(name) for name, label in columns.items()}
        for row in rows
        if row.get("ms")
    }
    return _table(table, ("batch", "case"), columns.values())


def exit_costs(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of the curve ``exits``: what exits cost if nobody is taken out, and what taking rows out gives back.

    Returns:
        Index (batch, case with exits); ms of "no exits" (the full network, compiled or not as the case is), and of
        "exits, no rows taken out" and "exits, rows taken out", which were timed when the plan was chosen. Cases that
        tried no plan without taking rows out are left out.
    """
    full = {(row["batch"], row["case"]): row.get("ms") for row in rows}
    table = {}
    for row in rows:
        all_stay = [plan["ms"] for plan in row.get("tried") or () if plan["compact_from"] == 1]
        same = full.get((row["batch"], row["case"].replace("fast", "full", 1)))
        if all_stay and same:
            table[row["batch"], row["case"]] = {
                "no exits": same,
                "exits, no rows taken out": min(all_stay),
                "exits, rows taken out": row["plan"]["ms"],
            }
    return _table(table, ("batch", "case"), ("no exits", "exits, no rows taken out", "exits, rows taken out"))
