"""What tables on pages are made of."""

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]


def conditions(result: Row) -> str:
    """Versions and machine in one sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    machine = result["machine"]
    return f"{versions}; {machine if isinstance(machine, str) else ', '.join(machine.values())}."


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table whose columns but the first are right-aligned."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])
