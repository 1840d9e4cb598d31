"""``edgecl bench``: published comparisons, each from one command."""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table

from edgecl.backbones import MobileNetV2, load_weights, resnet20
from edgecl.console import progress, show
from edgecl.preprocess import IMAGENET, ImageU8
from edgecl.runs.files import write_json
from edgecl.streams import load_cifar10, load_cifar100
from edgecl_device.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Published comparisons, each reproduced by one command; a run that was stopped goes on.")

Out = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Folder of the figures; default: bench-NAME.", show_default=False),
]
Quick = Annotated[bool, typer.Option("--quick", help="A small form of its own sizes that needs no files: minutes instead of hours.")]
Seeds = Annotated[int, typer.Option(min=1, max=100, help="Seeds; figures are means over them.")]
Device = Annotated[str, typer.Option(help="PyTorch's device, for what runs in PyTorch.")]
Jobs = Annotated[int, typer.Option(min=1, max=256, help="Processes that work at the same time, each on one thread.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result instead of tables.")]


class Part(StrEnum):
    """Parts of the comparison of test-time adaptation."""

    BATCHES = "batches"
    SINGLES = "singles"


class Net(StrEnum):
    """Networks for sparse training."""

    RESNET8 = "resnet8"
    RESNET20 = "resnet20"
    RESNET18 = "resnet18"


def _folder(out: Path | None, name: str, quick: bool) -> Path:
    return out or Path(f"bench-{name}{'-quick' if quick else ''}")


def _told(found: dict[str, Any], folder: Path, name: str, as_json: bool, *shown: Table) -> None:
    """Write a result, and print it, or its tables."""
    write_json(folder / f"{name}.json", found)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    show(*shown)
    print(f"\nFigures: {folder / f'{name}.json'}")


@app.command(epilog="Examples:\n\nedgecl bench tta --quick\n\nedgecl bench tta --data cifar-10-batches-bin --weights resnet20.th")
def tta(
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="CIFAR-10's binary files.")] = None,
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help="ResNet-20's weights for it, by akamaster.")] = None,
    out: Out = None,
    seeds: Seeds = 3,
    images: Annotated[int, typer.Option(min=2, max=10000, help="Test images, the first ones.")] = 2000,
    only: Annotated[Part | None, typer.Option(help="One part: in batches, or sample by sample; both by default.")] = None,
    device: Device = "cpu",
    jobs: Jobs = 1,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Test-time adaptation on corrupted images: errors in batches and sample by sample, memory and MACs, with controls."""
    from edgecl.bench.quick import GREY, colour_fashion, small_network
    from edgecl.bench.tta import Plan, run_tta
    from edgecl.bench.tta_tables import cost_table, error_tables

    def part(plan: Plan) -> Plan:
        if only is None:
            return plan
        return replace(plan, single=False) if only is Part.BATCHES else replace(plan, batches=())

    folder = _folder(out, "tta", quick)
    with redirect_stdout(sys.stderr), progress(quiet=as_json) as step:
        if quick:
            step("training a small network", 0, 1)
            lines = ("source", "TENT", "EcoTTA, detached")
            chosen = Plan((48,), True, ("gaussian_noise", "contrast"), 96, 1, 4, 2, lines, device)
            found = run_tta(colour_fashion(), small_network(), GREY, part(chosen), folder, jobs, step)
        else:
            if data is None or weights is None:
                raise InputError("--data, --weights: must be given, or --quick; edgecl.streams.fetch downloads CIFAR-10")
            net = resnet20().eval()
            load_weights(net, weights)
            plan = Plan(images=images, seeds=seeds, device=device)
            found = run_tta(load_cifar10(data), net, ImageU8(*IMAGENET, "CHW"), part(plan), folder, jobs, step)
    name = "tta" if only is None else f"tta-{only.value}"
    _told(found, folder, name, as_json, *error_tables(found), *([cost_table(found)] if found["costs"] else []))


@app.command(epilog="Examples:\n\nedgecl bench reprogram --quick\n\nedgecl bench reprogram --data data --weights mobilenet_v2.pth --jobs 2")
def reprogram(
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Holds the four sources, see docs/bench.md.")] = None,
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help="MobileNetV2's weights for ImageNet, by torchvision.")] = None,
    out: Out = None,
    shots: Annotated[int, typer.Option(min=2, max=5000, help="Training images a class, at most.")] = 50,
    tests: Annotated[int, typer.Option(min=1, max=1000, help="Test images a class, at most.")] = 50,
    epochs: Annotated[int, typer.Option(min=1, max=1000, help="Of training a task.")] = 12,
    jobs: Jobs = 1,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Channel-wise reprogramming: tasks of several sources on one frozen network, beside other ways to learn them."""
    from edgecl.bench.quick import settled
    from edgecl.bench.reprogram import Plan, run_reprogram, whole
    from edgecl.bench.reprogram_tables import device_table, memory_table, task_table
    from edgecl.bench.reprogram_tasks import CLASSES, sequence, small_sequence

    folder = _folder(out, "reprogram", quick)
    with redirect_stdout(sys.stderr), progress(quiet=as_json) as step:
        if quick:
            tasks, choice = small_sequence()
            net = whole(MobileNetV2(CLASSES, width=0.25, generator=torch.Generator().manual_seed(0)), CLASSES)
            settled(net, ImageU8(*IMAGENET, "CHW", (32, 32))(torch.from_numpy(np.concatenate([task.x for task in tasks]))))
            plan = Plan(size=32, epochs=2, choose=False, switches=8)
        else:
            if data is None or weights is None:
                raise InputError("--data, --weights: must be given, or --quick; edgecl.streams.fetch downloads the data")
            published = MobileNetV2()
            load_weights(published, weights)
            net, plan = whole(published, CLASSES), Plan(epochs=epochs)
            tasks, choice = sequence(data, shots, tests)
        found = run_reprogram(net, tasks, choice, plan, folder, jobs, step)
    _told(found, folder, "reprogram", as_json, task_table(found), device_table(found), memory_table(found))


@app.command(
    epilog="Examples:\n\nedgecl bench sparse --quick\n\nedgecl bench sparse --data data --jobs 2\n\n"
    "edgecl bench sparse --data data --net resnet18 --epochs 5 --device cuda"
)
def sparse(
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Holds cifar-10-batches-bin and cifar-100-binary.")] = None,
    out: Out = None,
    seeds: Annotated[int, typer.Option(min=0, max=100, help="Of accuracy; 0 for work and time alone.")] = 5,
    net: Annotated[Net, typer.Option(help="What learns.")] = Net.RESNET8,
    epochs: Annotated[int, typer.Option(min=1, max=1000, help="Passes over each task's images.")] = 1,
    device: Annotated[str, typer.Option(help="PyTorch's device; other than cpu, streams run in PyTorch.")] = "cpu",
    jobs: Jobs = 1,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Sparse training with replay: nominal work, measured time of an update, and accuracy beside dense training."""
    from edgecl.bench.quick import colour_squares
    from edgecl.bench.sparse import Plan, run_sparse
    from edgecl.bench.sparse_tables import accuracy_table, nominal_table, step_table

    folder = _folder(out, "sparse" if net is Net.RESNET8 else f"sparse-{net.value}", quick)
    with redirect_stdout(sys.stderr), progress(quiet=as_json) as step:
        if quick:
            names = ("dense, er", "structured 75%, er", "unstructured 75%, er")
            plan = Plan(net.value, 1, 1, 64 << 10, 10, (net.value,), ((0.75, 1),), 3, names, epochs, device)
            found = run_sparse(colour_squares(), colour_squares(), plan, folder, jobs, step)
        else:
            if data is None:
                raise InputError("--data: must be given, or --quick; edgecl.streams.fetch downloads CIFAR-10 and CIFAR-100")
            first, then = load_cifar100(data / "cifar-100-binary"), load_cifar10(data / "cifar-10-batches-bin")
            found = run_sparse(first, then, Plan(net.value, seeds=seeds, epochs=epochs, device=device), folder, jobs, step)
    _told(found, folder, "sparse", as_json, nominal_table(found), step_table(found), *([accuracy_table(found)] if found["rows"] else []))
