"""``edgecl bench``: published comparisons, each from one command."""

import json
import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from edgecl.backbones import MobileNetV2, load_weights, resnet20
from edgecl.console import progress, show
from edgecl.preprocess import ImageU8
from edgecl.runs.files import write_json
from edgecl.streams import load_cifar10, load_cifar100
from edgecl_device.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Published comparisons, each reproduced by one command; a run that was stopped goes on.")

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
"""Mean and standard deviation by which the published ResNets were trained."""

Quick = Annotated[bool, typer.Option("--quick", help="A small form that needs no files: minutes instead of hours.")]
Seeds = Annotated[int, typer.Option(min=1, max=100, help="Seeds; figures are means over them.")]
Jobs = Annotated[int, typer.Option(min=1, max=256, help="Processes that work at the same time, each on one thread.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result instead of tables.")]


class Net(StrEnum):
    """Networks for sparse training."""

    RESNET8 = "resnet8"
    RESNET20 = "resnet20"
    RESNET18 = "resnet18"


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


@app.command(epilog="Examples:\n\nedgecl bench reprogram --quick\n\nedgecl bench reprogram --data data --weights mobilenet_v2.pth --jobs 2")
def reprogram(
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Holds the four sources, see docs/bench.md.")] = None,
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help="MobileNetV2's weights for ImageNet, by torchvision.")] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the figures.")] = Path("bench-reprogram"),
    shots: Annotated[int, typer.Option(min=2, max=5000, help="Training images a class, at most.")] = 50,
    tests: Annotated[int, typer.Option(min=1, max=1000, help="Test images a class, at most.")] = 50,
    epochs: Annotated[int, typer.Option(min=1, max=1000, help="Of training a task.")] = 12,
    jobs: Jobs = 1,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Channel-wise reprogramming: tasks of several sources on one frozen network, beside other ways to learn them."""
    from edgecl.bench.quick import settled, whole
    from edgecl.bench.reprogram import MEAN, STD, Plan, run_reprogram
    from edgecl.bench.reprogram_tables import device_table, memory_table, task_table
    from edgecl.bench.reprogram_tasks import CLASSES, sequence, small_sequence

    with redirect_stdout(sys.stderr), progress(quiet=as_json) as step:
        if quick:
            tasks, choice = small_sequence()
            net = whole(MobileNetV2(CLASSES, width=0.25, generator=torch.Generator().manual_seed(0)), CLASSES)
            settled(net, ImageU8(MEAN, STD, "CHW", (32, 32))(torch.from_numpy(np.concatenate([task.x for task in tasks]))))
            plan = Plan(size=32, epochs=2, choose=False, switches=8)
        else:
            if data is None or weights is None:
                raise InputError("--data, --weights: must be given, or --quick; edgecl.streams.fetch downloads the data")
            published = MobileNetV2()
            load_weights(published, weights)
            net, plan = whole(published, CLASSES), Plan(epochs=epochs)
            tasks, choice = sequence(data, shots, tests)
        found = run_reprogram(net, tasks, choice, plan, out, jobs, step)
        write_json(out / "reprogram.json", found)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    show(task_table(found), device_table(found), memory_table(found))
    print(f"\nFigures: {out / 'reprogram.json'}")


@app.command(
    epilog="Examples:\n\nedgecl bench sparse --quick\n\nedgecl bench sparse --data data --jobs 2\n\n"
    "edgecl bench sparse --data data --net resnet18 --epochs 5 --device cuda"
)
def sparse(
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Holds cifar-10-batches-bin and cifar-100-binary.")] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the figures.")] = Path("bench-sparse"),
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

    with redirect_stdout(sys.stderr), progress(quiet=as_json) as step:
        if quick:
            names = ("dense, er", "structured 75%, er", "unstructured 75%, er")
            plan = Plan("resnet8", 1, 1, 64 << 10, 10, ("resnet8",), ((0.75, 1),), 3, names)
            found = run_sparse(colour_squares(), colour_squares(), plan, out, jobs, step)
        else:
            if data is None:
                raise InputError("--data: must be given, or --quick; edgecl.streams.fetch downloads CIFAR-10 and CIFAR-100")
            first, then = load_cifar100(data / "cifar-100-binary"), load_cifar10(data / "cifar-10-batches-bin")
            found = run_sparse(first, then, Plan(net.value, seeds=seeds, passes=epochs, device=device), out, jobs, step)
        write_json(out / "sparse.json", found)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    show(nominal_table(found), step_table(found), *([accuracy_table(found)] if found["rows"] else []))
    print(f"\nFigures: {out / 'sparse.json'}")
