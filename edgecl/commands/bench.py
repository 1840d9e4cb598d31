"""``edgecl bench``: published comparisons, each from one command."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from edgecl.backbones import load_weights, resnet20
from edgecl.console import progress, show
from edgecl.preprocess import ImageU8
from edgecl.runs.files import write_json
from edgecl.streams import load_cifar10
from edgecl_device.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Published comparisons, each reproduced by one command; a run that was stopped goes on.")

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
"""Mean and standard deviation by which the published ResNets were trained."""

Quick = Annotated[bool, typer.Option("--quick", help="A small form that needs no files: minutes instead of hours.")]
Seeds = Annotated[int, typer.Option(min=1, max=100, help="Seeds; figures are means over them.")]
Jobs = Annotated[int, typer.Option(min=1, max=256, help="Processes that work at the same time, each on one thread.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result instead of tables.")]


@app.callback()
def _group() -> None:
    """Takes the names of comparisons."""


@app.command(epilog="Examples:\n\nedgecl bench tta --quick\n\nedgecl bench tta --data cifar-10-batches-bin --weights resnet20.th")
def tta(
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="CIFAR-10's binary files.")] = None,
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help="ResNet-20's weights for it, by akamaster.")] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the figures.")] = Path("bench-tta"),
    seeds: Seeds = 3,
    images: Annotated[int, typer.Option(min=2, max=10000, help="Test images, the first ones.")] = 2000,
    jobs: Jobs = 1,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Test-time adaptation on corrupted images: errors in batches and sample by sample, memory and MACs, with controls."""
    from edgecl.bench.quick import GREY, colour_fashion, small_network
    from edgecl.bench.tta import Plan, run_tta
    from edgecl.bench.tta_tables import cost_table, error_tables

    with redirect_stdout(sys.stderr), progress(quiet=as_json) as step:
        if quick:
            step("training a small network", 0, 1)
            chosen = Plan((48,), True, ("gaussian_noise", "contrast"), 96, 1, 4, 2, ("source", "TENT", "EcoTTA, detached"))
            found = run_tta(colour_fashion(), small_network(), GREY, chosen, out, jobs, step)
        else:
            if data is None or weights is None:
                raise InputError("--data, --weights: must be given, or --quick; edgecl.streams.fetch downloads CIFAR-10")
            net = resnet20().eval()
            load_weights(net, weights)
            found = run_tta(load_cifar10(data), net, ImageU8(*IMAGENET, "CHW"), Plan(images=images, seeds=seeds), out, jobs, step)
        write_json(out / "tta.json", found)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    show(*error_tables(found), cost_table(found))
    print(f"\nFigures: {out / 'tta.json'}")
