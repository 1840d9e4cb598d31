"""Tables of ``edgecl bench tta``."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from edgecl import tables

Row = Mapping[str, Any]


def error_tables(result: Row) -> list[Table]:
    """Mean errors over the corruptions, one table a protocol."""
    return [_errors(name, rows) for name, rows in result["tables"].items() if rows]


def _errors(name: str, rows: Sequence[Row]) -> Table:
    best = min(row["error"] for row in rows)
    rounds = "rounds" in rows[0]
    which = f" in pass {len(rows[0]['rounds'])}" if rounds else ""
    title = f"{name}: mean error over corruptions of {rows[0]['images']:,} images each{which}"
    first = ["first pass, %"] if rounds else []
    shown = tables.grid(["", *first, "error, %", "to the source", "to the best control"], title=title)
    for row in rows:
        began = [f"{row['rounds'][0]:.1f}"] if rounds else []
        error = f"{row['error']:.1f}" + ("" if row["error_sd"] is None else f" ± {row['error_sd']:.1f}")
        style = "bold" if row["error"] == best else None
        shown.add_row(row["label"], *began, error, *(_away(row, other) for other in (_source(rows), _control(rows))), style=style)
    return shown


def cost_table(result: Row) -> Table:
    """What an update of 64 rows costs."""
    columns = ["", "MACs a sample", "kept by PyTorch", "kept by the step", "of which masks", "state and rows"]
    shown = tables.grid(
        columns, title="an update of 64 rows", caption="kept: for the backward pass; by PyTorch's autograd, and by the ledger"
    )
    for row in result["costs"]:
        sizes = [tables.size(row.get(name)) for name in ("kept_by_pytorch", "kept", "kept_masks", "beyond_trunk")]
        shown.add_row(row["label"], tables.si(row["macs"]), *sizes)
    return shown


def _source(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row["role"] == "source"), None)


def _control(rows: Sequence[Row]) -> Row | None:
    return min((row for row in rows if row["role"] == "control"), key=lambda row: float(row["error"]), default=None)


def _away(row: Row, other: Row | None) -> str:
    return "-" if other is None or other is row else f"{row['error'] - other['error']:+.1f}"
