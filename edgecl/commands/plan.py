"""``edgecl plan``: where to cut, which method, which memory, within a budget and measured on the user's data."""

import json
import shlex
import sys
from contextlib import nullcontext, redirect_stdout
from importlib.resources import as_file, files
from io import BytesIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Any

import typer

from edgecl.console import console, progress
from edgecl.options import parse_bytes, parse_count
from edgecl.options import place as place_of
from edgecl.tables import fit
from edgecl_device.errors import InputError

Config = Annotated[
    Path | None, typer.Argument(metavar="[CONFIG]", help="A run's TOML file: data, scenario, model; by default that of edgecl run --init.")
]
Ram = Annotated[
    str | None, typer.Option(metavar="BYTES", help="Most RAM: state, second buffers, replay, activations, inputs, waiting features.")
]
Flash = Annotated[str | None, typer.Option(metavar="BYTES", help="Most flash: frozen weights, graphs, state.")]
Macs = Annotated[str | None, typer.Option(metavar="COUNT", help="Most multiply-accumulates to encode and learn one sample, as 5M.")]


def plan(
    config: Config = None,
    ram: Ram = None,
    flash: Flash = None,
    macs: Macs = None,
    at: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A cut to try, or several joined, as a,b; repeat for more.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method to try; repeat for more. All by default.")] = None,
    samples: Annotated[int, typer.Option(min=8, help="Most samples in use; a quarter of them is held out for validation.")] = 1000,
    seconds: Annotated[float, typer.Option(min=0, help="Time for measuring accuracy; no stream is begun after it.")] = 40.0,
    orders: Annotated[int, typer.Option(min=1, max=100, help="Stream orders of the best plans.")] = 3,
    pending: Annotated[
        int | None, typer.Option(min=1, max=1 << 20, help="Predictions that wait for a late label; else CONFIG's, or 1.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw accuracy against each cost.")] = None,
    write: Annotated[Path | None, typer.Option(metavar="TOML", help="Write the recommended plan as a file for edgecl run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Propose cut, method, trained tensors, codec and replay rows within a budget, by exact costs and accuracy measured on your data."""
    from edgecl.figures import threads
    from edgecl.planning import Limits, Settings
    from edgecl.planning import plan as look
    from edgecl.planning.plot import plan_figure
    from edgecl.planning.record import record
    from edgecl.planning.source import configs_of, source_of
    from edgecl.planning.toml import run_config
    from edgecl.runs import read_config
    from edgecl.runs.files import write_bytes

    limits = Limits(
        None if ram is None else parse_bytes("--ram", ram),
        None if flash is None else parse_bytes("--flash", flash),
        None if macs is None else parse_count("--macs", macs),
    )
    if plot is not None and plot.suffix.lower() != ".png":
        raise InputError(f"--plot: must end in .png, got {plot}; name such a file")
    for option, file in (("--plot", plot), ("--write", write)):
        if file is not None:
            _check_writable(option, file)
    if plot is not None and write is not None and plot.resolve() == write.resolve():
        raise InputError(f"--plot, --write: must be two files, got {plot} for both; choose another name for one")
    with nullcontext(config) if config is not None else as_file(files("edgecl.runs").joinpath("example.toml")) as path:
        read = read_config(path)
    device = read.device
    settings = Settings(
        engine=device.engine,
        pending=pending or (device.pending if "pending" in device.model_fields_set else 1),
        configs=configs_of(read, method or ()),
        at=[place_of(name) for name in at or ()],
        samples=samples,
        orders=orders,
        seconds=seconds,
    )
    with redirect_stdout(sys.stderr), progress(quiet=as_json) as step, threads(1):
        source = source_of(read, samples, step)
        found = look(source.network, source.data, source.scenario, limits, settings, step)
    result = record(found, settings, f"{read.model.name} on {read.data.name}, {read.scenario.name}")
    if plot is not None:
        image = BytesIO()
        plan_figure(result).savefig(image, dpi=150, format="png")
        write_bytes(plot, image.getvalue())
    if write is not None:
        write_bytes(write, run_config(read, found.best, settings, found.validation).encode())
    if as_json:
        print(json.dumps(result, indent=1))
        return
    _show(result, plot, write)


def _check_writable(option: str, file: Path) -> None:
    """Refuse, before anything is measured, a file that cannot be written."""
    try:
        if not file.parent.is_dir():
            raise InputError(f"{option}: must lie in an existing folder, got {file}; make {file.parent} first")
        if file.is_dir() or (option == "--write" and file.exists()):
            raise InputError(f"{option}: {file} exists; choose another name, or delete it")
        with NamedTemporaryFile(dir=file.parent, prefix=file.name):
            pass
    except OSError as error:
        raise InputError(f"{option}: {file} cannot be written ({error.strerror}); choose another file") from error


def _show(result: dict[str, Any], plot: Path | None, write: Path | None) -> None:
    from edgecl.planning.table import plan_table, remarks

    screen = console()
    screen.print(fit(plan_table(result), screen.width))
    screen.print()
    for line in remarks(result):
        screen.print(line, highlight=False)
    wrote = [f"Plot: {plot}."] if plot else []
    wrote += [f"Run it with: edgecl run {shlex.quote(str(write))}"] if write else []
    for line in [f"{result['seconds']:.0f} s.", *wrote]:
        screen.print(line, highlight=False)
