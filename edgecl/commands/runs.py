"""``edgecl run`` and ``edgecl report``: a whole comparison from one file, and a page to show."""

import json
import shlex
import sys
from contextlib import redirect_stdout
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from edgecl.console import progress, show_rows
from edgecl.figures import FORGETTING
from edgecl.shown import kind_of
from edgecl_device.errors import InputError

EXAMPLE = "run.toml"
REPORT = "report.html"
STOPPED = 130
"""Exit code after Ctrl-C, as shells have it."""

Config = Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help=f"A TOML file; with --init {EXAMPLE} by default.")]
Out = Annotated[Path | None, typer.Option(metavar="RUN", help="The run's folder; by default beside CONFIG, of its name, ending in .run.")]


def run(
    config: Config = None,
    out: Out = None,
    init: Annotated[bool, typer.Option("--init", help="Write a commented example to CONFIG, and run nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what an earlier run left in the folder, and start anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print run.json instead of a table.")] = False,
) -> None:
    """Run a configuration: data, network, budget, bundles, device runs, report. A run that was stopped goes on where it was."""
    if init:
        _init(config or Path(EXAMPLE))
        return
    if config is None:
        raise InputError("CONFIG: must be a TOML file, got nothing; write an example with: edgecl run --init")
    from edgecl.report import write_report
    from edgecl.runs import read_config
    from edgecl.runs import run as run_config

    read = read_config(config)
    folder = out or config.with_suffix(".run")
    try:
        with redirect_stdout(sys.stderr), progress(quiet=as_json) as step:
            result = run_config(read, config, folder, fresh=fresh, progress=step)
            step("writing the report", 0, 1)
            write_report([folder], folder / REPORT)
    except KeyboardInterrupt:
        words = ["edgecl", "run", str(config), *(("--out", str(out)) if out else ())]
        print(f"Stopped; what is done is in {folder}. Go on with: {shlex.join(words)}", file=sys.stderr)
        raise typer.Exit(STOPPED) from None
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        _show(result, folder)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs; several are compared on one page.")],
    out: Annotated[Path | None, typer.Option(metavar="HTML", help=f"The file to write; {REPORT} in the first folder by default.")] = None,
) -> None:
    """Write one self-contained HTML page: figures, plots, ledger, cost by layer, and the conditions of a run."""
    from edgecl.report import write_report

    path = out or runs[0] / REPORT
    write_report(runs, path)
    print(f"Wrote {path}")


def _init(path: Path) -> None:
    if path.exists():
        raise InputError(f"CONFIG: {path} exists; choose another name for the example, or delete it")
    example = files("edgecl.runs").joinpath("example.toml").read_text(encoding="utf-8")
    try:
        path.write_text(example, encoding="utf-8")
    except OSError as error:
        raise InputError(f"CONFIG: {path} cannot be written ({error.strerror}); name a file in a folder that is there") from error
    print(f"Wrote {path}. Run it with: edgecl run {shlex.quote(str(path))}")


def _show(result: dict[str, Any], folder: Path) -> None:
    """The demo's table, for any run."""
    view = {
        "what": result["title"] or result["what"],
        "rows": result["learners"],
        "kind": kind_of(result),
        "seeds": len(result["seeds"]),
        "test_samples": result["samples"]["test"],
        "scenario": result["config"]["scenario"]["name"],
        "forgetting": FORGETTING,
    }
    show_rows(view, f"Files: {folder / 'run.json'}, {folder / REPORT}")
