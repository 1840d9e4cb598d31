"""The page itself: what the template shows, and where it is written."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from edgecl.report import charts, views
from edgecl.report.svg import inline, style
from edgecl.runs.files import read_json, write_bytes
from edgecl.shown import KINDS, kind_of, shown_of
from edgecl.tables import si, size
from edgecl_device.errors import InputError

RESULT = "run.json"

NO_TEXT = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that no page may have, even escaped: control characters, and halves of others, as in a path that is not UTF-8."""

TABLE = "the numbers follow as a table"


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Write the page of one run or several.

    Args:
        folders: Of finished runs.
        path: The file.

    Raises:
        InputError: when a folder holds no finished run or a damaged one, or the file is no HTML file or cannot be written.
    """
    if path.suffix not in {".html", ".htm"}:  # and not, by a slip, the run itself
        raise InputError(f"--out: must end in .html, got {path}; name such a file")
    runs = [_read(folder) for folder in folders]
    try:
        text = page(runs)
    except (LookupError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        named = ", ".join(str(folder / RESULT) for folder in folders)
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"RUN: {named} must be as edgecl run writes it, got something else ({why}); run it again with --fresh") from error
    try:
        write_bytes(path, text.encode())
    except InputError as error:
        raise InputError(f"--out: {error}") from error


def page(runs: Sequence[dict[str, Any]]) -> str:
    """The page as text; ``runs`` are contents of ``run.json`` with the ``name`` and ``toml`` of each."""
    environment = Environment(
        loader=PackageLoader("edgecl.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    kinds = list(dict.fromkeys(kind_of(run) for run in runs))
    if len(kinds) > 1:
        raise InputError(f"RUN: must be runs of one kind of target, to be compared on one page, got {', '.join(kinds)}; write a page each")
    shown = [_run(run, f"r{i}") for i, run in enumerate(runs)]
    title = shown[0]["title"] if len(shown) == 1 else "Comparison of " + ", ".join(run["title"] for run in shown)
    template = environment.get_template("page.html.j2")
    found = template.render(title=title, runs=shown, columns=views.columns(kinds[0]), shown=KINDS[kinds[0]])
    return NO_TEXT.sub("\ufffd", found)


def _read(folder: Path) -> dict[str, Any]:
    if not (folder / RESULT).is_file():
        why = "is not finished; go on with it by edgecl run" if (folder / "start.json").exists() else "holds no run"
        raise InputError(f"RUN: must be the folder of a finished run, {folder} {why}")
    result = read_json(folder / RESULT)
    if "tasks_by_seed" not in result:
        raise InputError(
            f"RUN: {folder / RESULT} must be as edgecl run writes it, with the tasks of each seed, got none; delete that file and "
            "go on by edgecl run, which keeps what was learned, or run it again with --fresh"
        )
    config = folder / "config.toml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    return {**result, "name": folder.name, "toml": text}


def _run(result: dict[str, Any], key: str) -> dict[str, Any]:
    """What the template needs of one run."""
    device = [row for row in result["learners"] if row.get("profile")]
    with style():
        drawn = {
            "accuracy": inline(charts.accuracy_figure(result), f"{key}a", _accuracy_words(result)),
            "matrix": "",
            "ledger": "",
            "phases": "",
        }
        if device:
            drawn["matrix"] = inline(
                charts.matrix_figure(result), f"{key}m", f"Heat maps of the {shown_of(result).word} on each task; {TABLE}."
            )
            drawn["ledger"] = inline(charts.ledger_figure(result), f"{key}l", _bytes_words(device))
            drawn["phases"] = inline(charts.phase_figure(result), f"{key}p", _phase_words(device))
        bars = [
            inline(charts.layer_figure(row), f"{key}y{i}", f"MACs by layer of {row['label']}; {TABLE}.") for i, row in enumerate(device)
        ]
    return {
        "key": key,
        "title": result["title"] or result["name"],
        "name": result["name"],
        "what": result["what"],
        "summary": views.summary(result),
        "many": len(result["seeds"]) > 1,
        "seeds": len(result["seeds"]),
        "rows": views.learner_rows(result),
        **{name: Markup(svg) for name, svg in drawn.items()},
        "tasks": [task["name"] for task in result["tasks_by_seed"][0]],
        "alone": None if charts.shared_tasks(result) else f"seed {result['seeds'][0]} alone, as tasks differ between the seeds",
        "metrics": views.metrics(result),
        "curves": views.curves(result),
        "parts": views.parts(result),
        "each": views.EACH.get(kind_of(result), ""),
        "below": any(min(curve.get("met", [0])) < charts.LOWEST for row in result["learners"] for curve in row.get("curves", ())),
        "matrices": views.matrices(result),
        "ledgers": views.ledgers(result),
        "layers": [
            {"label": row["label"], "at": row["at"], "table": views.layers(row), "svg": Markup(svg)}
            for row, svg in zip(device, bars, strict=True)
        ],
        "conditions": views.conditions(result),
        "gates": [{"label": row["label"], "gates": row["gates"]} for row in device],
        "config": result["toml"] or json.dumps(result["config"], indent=1),
    }


def _accuracy_words(result: dict[str, Any]) -> str:
    shown = shown_of(result)
    ends = [f"{row['label']} ends at {shown.text(row[shown.key])} {shown.unit}".strip() for row in result["learners"]]
    return f"Line chart of test {shown.word} along the stream: {', '.join(ends)}."


def _bytes_words(rows: list[dict[str, Any]]) -> str:
    sums = [f"{row['label']} {size(sum(row['ledger'][name] for name in charts.LEDGER))}" for row in rows]
    return f"Stacked bars of memory: {', '.join(sums)}; {TABLE}."


def _phase_words(rows: list[dict[str, Any]]) -> str:
    sums = [f"{row['label']} {si(sum(sum(p.values()) for p in charts.layers_of(row).values()))}" for row in rows]
    return f"Stacked bars of MACs of one learned sample: {', '.join(sums)}."
