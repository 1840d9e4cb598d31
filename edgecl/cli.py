"""The command ``edgecl``: the demo, the methods, what a learner costs, and export.

Results go to stdout, progress and errors to stderr. An error is one line and exit code 2.
"""

import dataclasses
import importlib.util
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn

from edgecl import tables
from edgecl.backbones import BACKBONES, load_weights
from edgecl.learner import Problem
from edgecl.methods import METHODS
from edgecl.methods._suffix import SuffixLearner
from edgecl.prepare import Prepared, prepare
from edgecl.preprocess import ImageU8
from edgecl.profiling import Profile, profile, split_points
from edgecl.splitting import widen_head
from edgecl_device.cli import read_stream
from edgecl_device.errors import EdgeclError, InputError
from edgecl_device.manifest import Array, TensorSpec

INPUTS = {
    "small_cnn": (1, 1, 28, 28),
    "mobilenet_v2": (1, 3, 224, 224),
    **{f"resnet{n}": (1, 3, 32, 32) for n in (20, 32, 44, 56)},
}
"""Input of each backbone, [1, C, H, W]."""

Number = typing.TypeVar("Number", int, float)

WIDE = 100
"""Columns from which tables show everything; output that is not a terminal has more."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Continual learning on the device: prepare a learner, see what it costs, export it to a stock runtime.",
    epilog="Start with: edgecl demo",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        code = app(args=None if argv is None else list(argv), prog_name="edgecl", standalone_mode=False)
    except typer.TyperException as error:
        return _fail(f"{error.format_message().rstrip('.')}; see edgecl --help")
    except (EdgeclError, OSError) as error:
        return _fail(str(error))
    except typer.Abort:
        return _fail("stopped")
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    print(f"edgecl: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgecl {version('edgecl')}")
        raise typer.Exit


@app.callback()
def _root(
    wanted: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")] = False,
) -> None:
    """Takes the options that belong to no command."""


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"{', '.join(BACKBONES)}, or file.py:function that returns an nn.Module.")]
Method = Annotated[str, typer.Option(help=f"{', '.join(METHODS)}; see edgecl methods.")]
Classes = Annotated[int, typer.Option(min=2, help="Classes that the learner has room for, the new ones included.")]
Config = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A hyperparameter; repeat for more.")]
Weights = Annotated[Path | None, typer.Option(help="Weights: .pth, .th or .safetensors.")]
ModelClasses = Annotated[
    int | None, typer.Option(min=1, help="Classes that a backbone's weights were trained on, where not --classes; its head is widened.")
]
Layout = Annotated[str | None, typer.Option(metavar="LAYOUT", help="Take uint8 images, HWC, CHW or HW, and normalise them in the graph.")]
Mean = Annotated[str | None, typer.Option(help="With --preprocess-u8: mean by channel on the scale 0 to 1, as 0.49,0.48,0.45.")]
Std = Annotated[str | None, typer.Option(help="With --preprocess-u8: standard deviation by channel, as 0.25,0.24,0.26.")]
Input = Annotated[str | None, typer.Option(metavar="SHAPE", help="Shape of one raw sample with a batch of 1, as 1,3,32,32.")]
Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="Type of a raw sample: float32 or uint8.")]


@app.command(epilog="Examples: edgecl demo  |  edgecl demo --seeds 3 --out figures  |  edgecl demo --json > demo.json")
def demo(
    seeds: Annotated[int, typer.Option(min=1, help="Pretrainings and stream orders.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for demo.json, stream.png and cost.png.")] = Path("edgecl-demo"),
    as_json: Json = False,
) -> None:
    """Pretrain a small network on 6 classes, then learn 4 more, one sample at a time, on stock ONNX Runtime; compare all methods."""
    show_demo(seeds, out, as_json)


def show_demo(seeds: int, out: Path, as_json: bool, **options: Any) -> None:
    """Run the demo, write its files, print the result; ``options`` are those of :func:`edgecl.demo.run_demo`."""
    from edgecl.demo import SETTINGS, run_demo
    from edgecl.plots import save_plots

    out.mkdir(parents=True, exist_ok=True)
    with _progress(quiet=as_json) as step:
        total, done = seeds * (1 + len(options.get("settings", SETTINGS))), iter(range(10**9))
        result = run_demo(seeds, notice=lambda text: step(text, next(done), total), **options)
        step("drawing plots", total, total)
        text = json.dumps(result, indent=1)
        (out / "demo.json").write_text(text + "\n", encoding="utf-8")
        files = [out / "demo.json", *save_plots(json.loads(text), out)]
    if as_json:
        print(text)
        return
    console = _console()
    wide = console.width >= WIDE
    console.print(tables.demo_table(result, wide=wide))
    console.print()
    console.print(tables.demo_legend(result, wide=wide))
    console.print()
    for line in [*tables.verdict(result), f"{result['seconds']:.0f} s. Files: {', '.join(map(str, files))}"]:
        console.print(line, highlight=False, markup=False)


@app.command(epilog="Examples: edgecl methods  |  edgecl methods --json")
def methods(as_json: Json = False) -> None:
    """List the methods, their steps and the defaults of their hyperparameters."""
    found = []
    for name, kind in METHODS.items():
        suffix = issubclass(kind, SuffixLearner)
        learner = kind(Problem(TensorSpec("z", (1, 4), "float32"), 2), **({"suffix": nn.Linear(4, 2)} if suffix else {}))
        found.append(
            {
                "method": name,
                "summary": kind.summary,
                "steps": list(learner.steps),
                "on_device": name != "joint",
                "forgets_exactly": learner.forgets_exactly,
                "needs_suffix": suffix,
                "config": learner.config_dict(),
            }
        )
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _console().print(tables.methods_table(found))


@app.command(
    "profile",
    epilog="Examples: edgecl profile resnet20  |  edgecl profile resnet20 --at layer3 --method ridge --classes 20 --config gamma=1  |  "
    "edgecl profile net.py:build --input 1,1,40,100 --at conv3 --method latent_replay --classes 12",
)
def profile_(
    model: Model,
    at: Annotated[str | None, typer.Option(metavar="NAME", help="Last module of the frozen trunk; without it, list the places.")] = None,
    method: Method = "ridge",
    classes: Classes = 10,
    input: Input = None,
    dtype: Dtype = "float32",
    weights: Weights = None,
    model_classes: ModelClasses = None,
    preprocess_u8: Layout = None,
    mean: Mean = None,
    std: Std = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Show what every step of a learner costs in MACs and bytes, or, without --at, where the model can be cut."""
    net = load_model(model, classes, weights, model_classes)
    preprocess = preprocessing(preprocess_u8, mean, std)
    example = example_of(model, input, dtype, preprocess)
    title = f"{model}, input {'x'.join(map(str, example.shape))} {example.dtype}"
    if at is None:
        with _progress(quiet=as_json) as step, torch.no_grad():
            x = torch.tensor(example) if preprocess is None else preprocess(torch.tensor(example))
            points = split_points(net, x, progress=lambda done, total: step("looking for places to cut", done, total))
        if as_json:
            print(json.dumps([dataclasses.asdict(p) for p in points], indent=1))
        else:
            _console().print(tables.split_table(points, f"Where {title} can be cut"))
        return
    with _progress(quiet=as_json) as step:
        step("capturing and counting every step", 0, 1)
        prepared = _prepare(net, at, example, method, classes, config, preprocess)
        found = profile(prepared)
    if as_json:
        print(json.dumps(profile_record(found), indent=1))
        return
    console = _console()
    shapes = ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in found.features.items())
    console.print(tables.cost_table(found, f"{method} on {title}, cut at {at}: {shapes}, {classes} classes"))
    console.print()
    console.print(tables.ledger_table(found.ledger))


def profile_record(found: Profile) -> dict[str, Any]:
    """What ``edgecl profile --json`` prints."""
    steps = [{**dataclasses.asdict(s), "canonical_macs": s.canonical_macs, "executed_macs": s.executed_macs} for s in found.steps]
    return {**dataclasses.asdict(found), "steps": steps}


@app.command(
    epilog="Examples: edgecl export small_cnn --at pool --method ncm --classes 10 --out bundle  |  edgecl export resnet20 --weights "
    "resnet20.th --at layer3 --method ridge --classes 20 --preprocess-u8 HWC --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26 --data base.npz --out bundle"
)
def export(
    model: Model,
    at: Annotated[str, typer.Option(metavar="NAME", help="Last module of the frozen trunk; edgecl profile MODEL lists the places.")],
    out: Annotated[Path, typer.Option(metavar="BUNDLE", help="Folder to write.")],
    method: Method = "ridge",
    classes: Classes = 10,
    data: Annotated[Path | None, typer.Option(help="npz file with base samples x [n, ...] and y [n], taken in before export.")] = None,
    class_names: Annotated[str | None, typer.Option(help="Names of the first classes, as cat,dog,mug.")] = None,
    input: Input = None,
    dtype: Dtype = "float32",
    weights: Weights = None,
    model_classes: ModelClasses = None,
    preprocess_u8: Layout = None,
    mean: Mean = None,
    std: Std = None,
    config: Config = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
    as_json: Json = False,
) -> None:
    """Prepare a learner, take in base samples, and write a checked bundle for the device."""
    from edgecl_export import export as write  # the command drives the whole path; see pyproject.toml

    net = load_model(model, classes, weights, model_classes)
    preprocess = preprocessing(preprocess_u8, mean, std)
    xs, ys = (None, None) if data is None else read_stream(data)
    if xs is not None and not len(xs):
        raise InputError(f"--data: {data} must hold at least one sample; leave the option out to start from nothing")
    example = example_of(model, input, dtype, preprocess) if xs is None else xs[:1]
    with _progress(quiet=as_json) as step:
        prepared = _prepare(net, at, example, method, classes, config, preprocess, class_names.split(",") if class_names else ())
        if xs is not None and ys is not None:
            prepared.fit(xs, ys, progress=lambda done, total: step("taking in base samples", done, total))
        step("writing the bundle and checking it", 0, 1)
        found = write(prepared, out, overwrite=overwrite)
    gates = [{"name": gate.name, "found": gate.found} for gate in found.gates]
    if as_json:
        print(json.dumps({"path": str(found.path), "gates": gates, "ledger": found.manifest.ledger}, indent=1))
        return
    console = _console()
    console.print(tables.gates_table(gates))
    console.print()
    console.print(tables.ledger_table(found.manifest.ledger))
    console.print()
    console.print(f"Wrote {found.path}. Look at it with: edgecl-device info {found.path}", highlight=False, markup=False)


def load_model(model: str, classes: int, weights: Path | None = None, model_classes: int | None = None) -> nn.Module:
    """A backbone by name, or what a function in a file returns.

    Args:
        model: Name, or ``file.py:function``.
        classes: Outputs wanted of a backbone.
        weights: File of weights.
        model_classes: Outputs of a backbone in ``weights``; its last linear layer is then widened to ``classes``.

    Raises:
        InputError: when there is no such backbone, file or function, or it returns no module.
        WeightsError: when the weights do not fit.
    """
    net = BACKBONES[model](classes=model_classes or classes) if model in BACKBONES else _own_model(model, model_classes)
    if weights is not None:
        load_weights(net, weights)
    if model_classes is not None and model_classes < classes:
        net = widen_head(net, [name for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1], classes)
    return net


def _own_model(model: str, model_classes: int | None) -> nn.Module:
    file, _, function = model.rpartition(":")
    path = Path(file)
    if not file.endswith(".py") or not path.is_file():
        raise InputError(f"MODEL: must be one of {', '.join(BACKBONES)}, or file.py:function with an existing file, got {model!r}")
    if model_classes is not None:
        raise InputError(f"--model-classes: is for the backbones only, got it with {model!r}; widen the head in {function}()")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        net = getattr(module, function)()
    except Exception as error:  # the user's code may raise anything
        raise InputError(f"MODEL: {model} failed with {type(error).__name__}: {error}; it must be a function without arguments") from error
    if not isinstance(net, nn.Module):
        raise InputError(f"MODEL: {model} must return an nn.Module, got {type(net).__name__}")
    return net


def preprocessing(layout: str | None, mean: str | None, std: str | None) -> ImageU8 | None:
    """The normalisation that the options describe.

    Raises:
        InputError: when one of the three is missing or wrong.
    """
    if layout is None and mean is None and std is None:
        return None
    if layout is None or mean is None or std is None:
        raise InputError("--preprocess-u8, --mean, --std: go together, one of them is missing; give all three or none")
    return ImageU8(_numbers("--mean", mean, float), _numbers("--std", std, float), layout)


def example_of(model: str, shape: str | None, dtype: str, preprocess: ImageU8 | None) -> Array:
    """One raw sample of zeros.

    Raises:
        InputError: when shape or type are wrong, or no shape is known.
    """
    if dtype not in ("float32", "uint8"):
        raise InputError(f"--dtype: must be float32 or uint8, got {dtype!r}")
    if shape is not None:
        sizes = tuple(_numbers("--input", shape, int))
        if len(sizes) < 2 or sizes[0] != 1 or min(sizes) < 1:
            raise InputError(f"--input: must be a batch of 1 and positive sizes, as 1,3,32,32, got {shape!r}")
    elif model in INPUTS:
        _, c, h, w = INPUTS[model]
        sizes = {None: (1, c, h, w), "CHW": (1, c, h, w), "HWC": (1, h, w, c), "HW": (1, h, w)}[preprocess.layout if preprocess else None]
    else:
        raise InputError(f"--input: is needed for {model!r}; give the shape of one raw sample, as 1,3,32,32")
    return np.zeros(sizes, "uint8" if preprocess else dtype)


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: must be numbers separated by commas, got {text!r}") from None


def parse_config(method: str, pairs: Sequence[str]) -> Any:
    """A method's ``Config`` from ``key=value`` texts; tuples are separated by commas, ``none`` is None.

    Raises:
        InputError: on an unknown method or key, a repeated key, or a value of another type.

    >>> parse_config("finetune", ["lr=0.1", "trainable=fc.*,conv.*"]).trainable
    ('fc.*', 'conv.*')
    """
    if method not in METHODS:
        raise InputError(f"--method: must be one of {', '.join(METHODS)}, got {method!r}")
    kind = METHODS[method].Config
    hints = {field.name: typing.get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key not in hints or key in values:
            raise InputError(
                f"--config: must be KEY=VALUE, each key once, one of {', '.join(hints) or '(none)'} for {method}, got {pair!r}"
            )
        try:
            values[key] = _parsed(hints[key], text)
        except (ValueError, KeyError):
            wanted = getattr(hints[key], "__name__", str(hints[key])) if typing.get_origin(hints[key]) is None else str(hints[key])
            raise InputError(f"--config: {key} must be of type {wanted}, got {text!r}") from None
    return kind(**values)


def _parsed(hint: Any, text: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if text == "none" else _parsed(args[0], text)
    if origin is tuple:
        parts = text.split(",")
        if args[-1] is not Ellipsis and len(parts) != len(args):
            raise ValueError(text)
        return tuple(_parsed(args[0], part) for part in parts)
    if hint is bool:
        return {"true": True, "false": False}[text.lower()]
    return hint(text)


def _prepare(
    net: nn.Module,
    at: str,
    example: Array,
    method: str,
    classes: int,
    config: Sequence[str] | None,
    preprocess: nn.Module | None,
    class_names: Sequence[str] = (),
) -> Prepared:
    values = parse_config(method, config or ())
    return prepare(
        net, at=at, example=example, method=method, classes=classes, config=values, preprocess=preprocess, class_names=class_names
    )


def _console() -> Console:
    """Results on stdout, at the terminal's width; a pipe gets room for every table."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A line on stderr that says what runs and how far it is: a bar on a terminal, else a plain line for everything new."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        seen: set[str] = set()

        def line(text: str, done: int, total: int) -> None:
            if not quiet and text not in seen:
                seen.add(text)
                print(f"{text} ({done} of {total})" if total > 1 else text, file=sys.stderr, flush=True)

        yield line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting")
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
