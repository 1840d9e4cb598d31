"""Results as text for people: numbers with units, and tables that read the same in colour, without it, and in a file."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgecl.profiling import Profile, SplitPoint
from edgecl.shown import KINDS, Shown

Row = Mapping[str, Any]

LEDGER_WORDS = {
    "frozen_weights": "frozen tensors of all steps",
    "codebooks": "tables of the replay codec, among the frozen tensors",
    "graphs": "graph files (flash)",
    "state": "what learning changes, once",
    "state_second_buffers": "second buffer of every tensor that a step writes",
    "adaptation_start": "copy of what adaptation changes, for resets",
    "activations_peak": "intermediate tensors of the largest step",
    "kept_for_backward": "of those, what the forward pass leaves for the backward pass",
    "kept_masks": "of those, masks",
    "replay": "replay memory, labels and bookkeeping included",
    "replay_file": "replay rows in a file (flash)",
    "inputs_outputs": "bound inputs and outputs of all steps",
    "pending_features": "features that wait for a delayed label, at most",
    "logged_features_per_update": "one sample as the log holds it; the store adds its own bytes",
    "beyond_trunk": "state once + replay + codebooks",
    "runtime_plan": "what the runtime reserves for tensors when it loads all steps, inputs and outputs included",
}
WIDE = 104
"""Columns from which the demo's table shows everything."""

SECTIONS = {"baseline": "Baselines", "method": "Learners", "offline": "Offline training"}


def si(count: float | None) -> str:
    """A count with three digits and a decimal unit.

    >>> [si(n) for n in (None, 620, 5_760, 675_648, 1_919_232, 999_999)]
    ['-', '620', '5.76 k', '676 k', '1.92 M', '1.00 M']
    """
    return _scaled(count, 1000, ("", "k", "M", "G", "T"))


def size(nbytes: float | None) -> str:
    """Bytes with three digits and a binary unit.

    >>> [size(n) for n in (40, 17_900, 1_373_264)]
    ['40 B', '17.5 KiB', '1.31 MiB']
    """
    return _scaled(nbytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def percent(fraction: float | None, deviation: float | None = None) -> str:
    """A fraction in percent, with its standard deviation.

    >>> percent(0.876), percent(0.876, 0.0042), percent(-0.0001)
    ('87.6', '87.6±0.4', '0.0')
    """
    return KINDS["class"].text(fraction, deviation)


def span(counts: Sequence[int]) -> str:
    """A count of each seed: one number where they are equal, else the least and the most.

    >>> span([1000, 1000]), span([900, 1000, 700])
    ('1,000', '700 to 1,000')
    """
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def _scaled(value: float | None, step: int, units: Sequence[str]) -> str:
    if value is None:
        return "-"
    power = 0
    while power < len(units) - 1 and abs(value) >= 0.9995 * step:
        value, power = value / step, power + 1
    digits = 0 if power == 0 else max(0, 2 - (abs(value) >= 9.995) - (abs(value) >= 99.95))
    return f"{value:.{digits}f} {units[power]}".strip()


def grid(columns: Sequence[str], *, title: str | None = None, caption: str | None = None) -> Table:
    """An empty table without frames. A heading that starts with ``>`` is that of numbers: right-aligned, never broken."""
    table = Table(
        title=title, caption=caption and f"\n{caption}", title_justify="left", caption_justify="left", title_style="bold", caption_style=""
    )
    table.box, table.show_edge, table.pad_edge, table.collapse_padding = SIMPLE_HEAD, False, False, True
    for i, heading in enumerate(columns):
        side: Literal["right", "left"] = "right" if heading.startswith(">") else "left"
        table.add_column(heading.removeprefix(">"), justify=side, overflow="fold", no_wrap=i == 0 or side == "right")
    return table


def fit(table: Table, width: int) -> Table:
    r"""Leave columns out from the right, all but two, until no number of the rest must be broken at ``width``; a note names them.

    >>> table = grid(("name", ">bytes", ">MACs"))
    >>> table.add_row("learn", "1,048,576", "2,097,152")
    >>> [column.header for column in fit(table, 20).columns], table.caption
    (['name', 'bytes'], '\nLeft out at this width: MACs.')
    """
    ruler, left_out = Console(width=10_000), list[str]()
    for column in table.columns:
        if column.no_wrap:
            lines = [line for text in (column.header, *column.cells) for line in str(text).splitlines()]
            column.min_width = max(map(cell_len, lines), default=0)
    while len(table.columns) > 2 and ruler.measure(table).minimum > width:
        left_out.insert(0, str(table.columns.pop().header).replace("\n", " "))
    if ruler.measure(table).minimum > width:  # even the first two columns: then the names fold
        table.columns[0].no_wrap, table.columns[0].min_width = False, None
    if left_out:
        table.caption = f"{table.caption or ''}\nLeft out at this width: {', '.join(left_out)}."
    return table


def legend(entries: Mapping[str, str]) -> Table:
    """Terms and what they mean, in two columns."""
    table = Table.grid(padding=(0, 2))
    for term, meaning in entries.items():
        table.add_row(term, meaning)
    return table


@dataclass(frozen=True)
class _Column:
    """A column of the demo's table: heading, text of a row, meaning, and whether a narrow terminal goes without it."""

    heading: str
    cell: Callable[[Row], str]
    meaning: str
    wide: bool = False


def _score_columns(shown: Shown) -> tuple[_Column, ...]:
    """The columns of scores, for one kind of target."""
    unit, word = f"\n{shown.unit}" if shown.unit else "", shown.word
    accuracy = shown.key == "accuracy"
    last = "label" if accuracy else "target"
    return (
        _Column(
            f"{word}{unit}",
            lambda row: shown.cell(row, shown.key),
            ("" if accuracy else f"{shown.meaning}, ") + "on all {test_samples} test samples after the stream; {seeds}",
        ),
        *(_Column(f"{f.heading}{unit}", lambda row, key=f.key: shown.cell(row, key), f.meaning) for f in shown.figures),  # type: ignore[misc]
        _Column(f"base{unit}", lambda row: shown.text(row.get(f"base_{shown.key}")), "the same, on the test samples of the base set"),
        _Column(
            f"forgot{unit}",
            lambda row: shown.text(row.get("forgetting")),
            f"forgetting: best earlier {word} on a task minus the last, mean over all tasks but the last ({{forgetting}})",
        ),
        _Column(
            f"preq.{unit}",
            lambda row: shown.text(row.get("prequential")),
            f"prequential {word}: each sample is predicted before it is learned; "
            f"{{order}}repeating the last {last} would give {{last_label}}",
        ),
    )


_COST_COLUMNS = (
    _Column("update\nMACs", lambda row: si(row.get("update_macs")), "multiply-accumulates of one update, without the trunk"),
    _Column("trunk\nMACs", lambda row: si(row.get("encode_macs")), "the same of the frozen trunk, which runs once a sample", True),
    _Column("beyond\ntrunk", lambda row: size(row.get("bytes")), "memory: state once + replay rows"),
    _Column(
        "second\nbuffers",
        lambda row: size(row.get("second_buffer_bytes")),
        "RAM on top of it: new state is written beside the old, so that a refused update changes nothing",
        True,
    ),
    _Column(
        "update\nwrites",
        lambda row: size(row.get("update_bytes")),
        "mean bytes that one update writes to the store's files on flash",
    ),
    _Column(
        "update\nms",
        lambda row: "-" if row.get("update_ms") is None else f"{row['update_ms']:.2f}",
        "median time of one update on this machine, trunk and store included",
    ),
)


_CLASSES_APART = ("class-incremental", "task-incremental")
"""Scenarios in which a class comes in one task only."""


def demo_table(result: Row, width: int = WIDE) -> Table:
    """The demo's rows in three sections: baselines, learners, offline training.

    Args:
        result: What :func:`edgecl.demo.run_demo` returns.
        width: Of the terminal; below :data:`WIDE` two columns are left out, and more where they do not fit. A column that no row
            has a value for, as that of a base set where there is none, is left out, too.
    """
    columns = [
        column
        for column in (*_score_columns(_shown(result)), *_COST_COLUMNS)
        if (width >= WIDE or not column.wide) and any(column.cell(row) != percent(None) for row in result["rows"])
    ]
    table = grid(("method, features", *(f">{column.heading}" for column in columns)), title=result["what"])
    for role, heading in SECTIONS.items():
        rows = [row for row in result["rows"] if row["role"] == role]
        if rows:
            table.add_row(Text(heading, "italic"))
        for row in rows:
            table.add_row(f"  {row['label']}", *(column.cell(row) for column in columns))
        table.add_section()
    return fit(table, width)


def demo_legend(result: Row, table: Table) -> Table:
    """What the columns of a :func:`demo_table` mean."""
    seeds, shown = result["seeds"], _shown(result)
    before = "last_label" if shown.key == "accuracy" else "last_target"
    last_label = next((shown.text(row[before]) for row in result["rows"] if before in row), "-")
    values = {
        "test_samples": span(result["test_samples"]),
        "seeds": "one seed" if seeds == 1 else f"mean of {seeds} seeds ± standard deviation",
        "forgetting": result["forgetting"],
        "order": "classes come task by task, so that " if result["scenario"] in _CLASSES_APART else "",
        "last_label": f"{last_label} {shown.unit}".strip(),
    }
    headers = {column.header for column in table.columns}
    columns = [column for column in (*_score_columns(shown), *_COST_COLUMNS) if column.heading in headers]
    entries = {column.heading.replace("\n", " ").removesuffix(" %"): column.meaning.format(**values) for column in columns}
    return legend(
        {**entries, "offline training": "on all samples at once, the stream's included, in many epochs; it does not run on the device"}
    )


def _shown(result: Row) -> Shown:
    """How a result is shown; one that says no kind of target is of classes."""
    return KINDS[result.get("kind", "class")]


def verdict(result: Row) -> list[str]:
    """The result in two lines: the best learner against offline training, and against naive fine-tuning.

    Differences are paired: taken within each seed, then averaged.
    """
    rows, shown = {row["label"]: row for row in result["rows"]}, _shown(result)

    def reached(row: Row) -> str:
        return f"{shown.text(row[shown.key])} {shown.unit}".strip()

    learners = [row for row in rows.values() if row["role"] != "offline" and row["method"] not in ("frozen", "finetune")]
    if not learners:
        return []
    best = max(learners, key=lambda row: row[shown.key])
    lines = []
    if best["joint"] in rows:
        joint = rows[best["joint"]]
        lines.append(
            f"Best: {best['label']}, {reached(best)}: {_difference(best, joint, shown)} {joint['label']} "
            f"({reached(joint)}), offline training on the same features."
        )
    naive = max((row for row in rows.values() if row["method"] == "finetune"), key=lambda row: row[shown.key], default=None)
    if naive is not None:
        lines.append(f"It is {_difference(best, naive, shown)} naive fine-tuning ({naive['label']}, {reached(naive)}).")
    return lines


def _difference(row: Row, other: Row, shown: Shown) -> str:
    pairs = [a - b for a, b in zip(row[f"{shown.key}_by_seed"], other[f"{shown.key}_by_seed"], strict=True)]
    mean = statistics.fmean(pairs)
    spread = f" ± {shown.text(statistics.stdev(pairs))}" if len(pairs) > 1 else ""
    if shown.text(mean) == shown.text(0.0):
        return "level with" + (spread and f" ({shown.points(0.0, spread)})")
    return f"{shown.points(abs(mean), spread)} {'above' if mean > 0 else 'below'}"


def methods_table(methods: Sequence[Row]) -> Table:
    """Every method with its steps and its defaults."""
    table = grid(("method", "what it is, and its defaults (--config KEY=VALUE)", "steps", "forgets\nexactly", "needs a\nsuffix"))
    table.caption = "\nneeds a suffix: uses the layers behind the cut, so that the model's head needs one output for each class"
    for row in methods:
        text = Text(row["summary"])
        if row["config"]:
            text.append("\n" + "  ".join(f"{key}={config_text(value)}" for key, value in row["config"].items()))
        steps = ", ".join(row["steps"]) if row["on_device"] else "(host only)"
        table.add_row(Text(row["method"], "bold"), text, steps, _yes(row["forgets_exactly"]), _yes(row["needs_suffix"]))
        table.add_section()
    return table


def config_text(value: Any) -> str:
    """A hyperparameter as ``--config`` reads it.

    >>> config_text((0.9, 0.999)), config_text(None), config_text(True)
    ('0.9,0.999', 'none', 'true')
    """
    if isinstance(value, (tuple, list)):
        return ",".join(map(config_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _yes(value: bool) -> str:
    return "yes" if value else "-"


def split_table(points: Sequence[SplitPoint], title: str) -> Table:
    """Where a model can be cut."""
    columns = ("--at", "features", ">values", ">trunk\nMACs", ">suffix\nMACs", ">trunk\nparameters", ">suffix\nparameters")
    table = grid(columns, title=title, caption="The trunk is frozen and runs once a sample; the suffix learns. Deeper names work, too.")
    for p in points:
        shapes = " + ".join("x".join(map(str, shape[1:])) for shape in p.features)
        count = sum(prod(shape) for shape in p.features)
        macs, parameters = (si(p.trunk_macs), si(p.suffix_macs)), (si(p.trunk_parameters), si(p.suffix_parameters))
        table.add_row(p.at, shapes, f"{count:,}", *macs, *parameters)
    return table


def cost_table(found: Profile, title: str) -> Table:
    """Work by step and phase: what the mathematics needs beside what the graph does."""
    columns = ("step", "phase", ">canonical\nMACs", ">executed\nMACs", ">ratio", ">elementwise", ">activations")
    caption = (
        "canonical: the mathematics of the step. executed: the graph that ships; ratio: executed by canonical, GAP where they differ. "
        "FLOPs are 2 x MACs; elementwise operations stand apart. activations: planned peak of intermediate tensors."
    )
    table = grid(columns, title=title, caption=caption)
    for step in found.steps:
        phases = list(dict.fromkeys([*step.canonical, *step.executed]))
        total = (si(step.canonical_macs), si(step.executed_macs), _gap(step.canonical_macs, step.executed_macs))
        table.add_row(Text(step.step, "bold"), "all", *total, si(step.elementwise), size(step.activation_bytes))
        for phase in phases if len(phases) > 1 else []:
            canonical, executed = step.canonical.get(phase, 0), step.executed.get(phase, 0)
            table.add_row("", f"  {phase}", si(canonical), si(executed), _gap(canonical, executed), "", "")
    return table


def _gap(canonical: int, executed: int) -> str:
    if canonical == executed:
        return "equal"
    return f"{executed / canonical:.3f} GAP" if canonical else "GAP"


def ledger_table(ledger: Mapping[str, Any]) -> Table:
    """Memory in bytes by name."""
    table = grid(("memory", ">bytes", ">rounded", "what"), caption=f"Not counted: {ledger['not_counted']}.")
    for name, value in ledger.items():
        if name != "not_counted":
            table.add_row(name, f"{value:,}", size(value), LEDGER_WORDS.get(name, ""))
    return table


def gates_table(gates: Sequence[Row]) -> Table:
    """What the checks of an export found; an export with a failed gate writes no bundle."""
    table = grid(("gate", "passed", "found"))
    for gate in gates:
        table.add_row(gate["name"], "✓ yes", gate["found"])
    return table
