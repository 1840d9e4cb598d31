"""The command ``edgecl``: the demo, the methods, what a learner costs, export, plans, runs and their report.

Results go to stdout, progress and errors to stderr. An error is one line and exit code 2.
"""

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from edgecl import tables
from edgecl.backbones import BACKBONES
from edgecl.commands import bench, runs
from edgecl.commands import plan as planning
from edgecl.console import progress, show, show_rows
from edgecl.graph.rules import RULES
from edgecl.int8 import calibration_of
from edgecl.learner import Problem
from edgecl.methods import METHODS
from edgecl.methods._suffix import SuffixLearner
from edgecl.options import example_of, load_model, parse_bytes, parse_config, place, preprocessing
from edgecl.prepare import prepare
from edgecl.profiling import Profile, profile, split_points
from edgecl.targets import MOST_CLASSES
from edgecl_device.cli import read_stream
from edgecl_device.errors import EdgeclError, InputError
from edgecl_device.manifest import DEFAULT_PENDING, TensorSpec

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Continual learning on the device: prepare a learner, see what it costs, export it to a stock runtime.",
    epilog="Start with: edgecl demo",
)


def _examples(*commands: str) -> str:
    """The end of a help page; an empty line between commands keeps each on a line of its own."""
    return "\n\n".join(["Examples:", *commands])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as by `edgecl methods >&-`
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # for the rest of the process
    try:
        code = app(args=None if argv is None else list(argv), prog_name="edgecl", standalone_mode=False)
    except typer.TyperException as error:
        message = error.format_message().rstrip(".")  # none when the help was shown because there was no command
        return _fail(f"{message}; see edgecl --help") if message else 2
    except (EdgeclError, OSError) as error:
        return _fail(str(error))
    except SystemExit as error:  # not typer's, which returns a code
        return _fail(f"MODEL: its code ended the process (SystemExit: {error.code}); mend the file")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):  # torch has no type of its own for it
            raise
        return _fail("there is not enough memory for this; take fewer classes or a smaller model, or cut it further down")
    if code == runs.STOPPED:  # typer has taken the KeyboardInterrupt, without a word
        _fail("stopped")
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
Classes = Annotated[int, typer.Option(min=2, max=MOST_CLASSES, help="Classes that the learner has room for, the new ones included.")]
Config = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A hyperparameter; repeat for more.")]
Weights = Annotated[Path | None, typer.Option(help="Weights: .pth, .th or .safetensors.")]
ModelClasses = Annotated[
    int | None,
    typer.Option(
        min=1, max=MOST_CLASSES, help="Classes that a backbone's weights were trained on, where not --classes; its head is widened."
    ),
]
Layout = Annotated[str | None, typer.Option(metavar="LAYOUT", help="Take uint8 images, HWC, CHW or HW, and normalise them in the graph.")]
Mean = Annotated[str | None, typer.Option(help="With --preprocess-u8: mean by channel on the scale 0 to 1, as 0.49,0.48,0.45.")]
Std = Annotated[str | None, typer.Option(help="With --preprocess-u8: standard deviation by channel, as 0.25,0.24,0.26.")]
Resize = Annotated[str | None, typer.Option(metavar="H,W", help="With --preprocess-u8: height and width to resize to, as 96,96.")]
Engine = Annotated[str, typer.Option(help=f"The runtime on the device: {' or '.join(RULES)}.")]
Input = Annotated[str | None, typer.Option(metavar="SHAPE", help="Shape of one raw sample with a batch of 1, as 1,3,32,32.")]
Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="Type of a raw sample: float32 or uint8.")]


@app.command(
    epilog=_examples(
        "edgecl demo", "edgecl demo --seeds 3 --out figures", "edgecl demo --engine executorch", "edgecl demo --json > demo.json"
    )
)
def demo(
    seeds: Annotated[int, typer.Option(min=1, help="Pretrainings and stream orders.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for demo.json, stream.png and cost.png.")] = Path("edgecl-demo"),
    engine: Engine = "onnx",
    as_json: Json = False,
) -> None:
    """Pretrain a small network on 6 classes, then learn 4 more, one sample at a time, on a stock runtime; compare all methods."""
    show_demo(seeds, out, as_json, engine=engine)


def show_demo(seeds: int, out: Path, as_json: bool, **options: Any) -> None:
    """Run the demo, write its files, print the result; ``options`` are those of :func:`edgecl.demo.run_demo`."""
    from edgecl.demo import SETTINGS, run_demo
    from edgecl.plots import save_plots

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: {out} cannot be made ({error.strerror}); choose another folder") from error
    with progress(quiet=as_json) as step:
        total, done = seeds * (1 + len(options.get("settings", SETTINGS))), iter(range(10**9))
        result = run_demo(seeds, notice=lambda text: step(text, next(done), total), **options)
        step("drawing plots", total, total)
        text = json.dumps(result, indent=1)
        (out / "demo.json").write_text(text + "\n", encoding="utf-8")
        files = [out / "demo.json", *save_plots(json.loads(text), out)]
    if as_json:
        print(text)
        return
    show_rows(result, f"{result['seconds']:.0f} s. Files: {', '.join(map(str, files))}")


@app.command(epilog=_examples("edgecl methods", "edgecl methods --json"))
def methods(as_json: Json = False) -> None:
    """List the methods, their steps and the defaults of their hyperparameters."""
    found = []
    for name, kind in METHODS.items():
        suffix = issubclass(kind, SuffixLearner)
        net = nn.Sequential(nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)), nn.Flatten(), nn.Linear(2, 2))
        learner = kind(Problem(TensorSpec("z", (1, 2, 3, 3), "float32"), 2), **({"suffix": net} if suffix else {}))
        found.append(
            {
                "method": name,
                "summary": kind.summary,
                "steps": list(learner.steps),
                "on_device": not kind.host_only,
                "forgets_exactly": learner.forgets_exactly,
                "needs_suffix": suffix,
                "config": learner.config_dict(),
            }
        )
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(tables.methods_table(found))


@app.command(
    "profile",
    epilog=_examples(
        "edgecl profile resnet20",
        "edgecl profile resnet20 --at pool --method ridge --classes 20 --config gamma=1",
        "edgecl profile small_cnn --at block3 --method latent_replay --config lr=0.03 --config codec=float32",
        "edgecl profile net.py:build --input 1,1,40,100    (your own file: def build(), which returns the module)",
    ),
)
def profile_(
    model: Model,
    at: Annotated[
        str | None, typer.Option(metavar="NAME", help="Last module of the frozen trunk, or several, as a,b; without it, list the places.")
    ] = None,
    method: Method = "ridge",
    classes: Classes = 10,
    input: Input = None,
    dtype: Dtype = "float32",
    weights: Weights = None,
    model_classes: ModelClasses = None,
    preprocess_u8: Layout = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    config: Config = None,
    engine: Engine = "onnx",
    as_json: Json = False,
) -> None:
    """Show what every step of a learner costs in MACs and bytes, or, without --at, where the model can be cut."""
    values = parse_config(method, config or ())
    with redirect_stdout(sys.stderr):  # what the user's code prints is no result
        net = load_model(model, classes, weights, model_classes)
    preprocess = preprocessing(preprocess_u8, mean, std, resize)
    example = example_of(model, input, dtype, preprocess)
    title = f"{model}, input {'x'.join(map(str, example.shape))} {example.dtype}"
    if at is None:
        with redirect_stdout(sys.stderr), progress(quiet=as_json) as step, torch.no_grad():
            x = torch.tensor(example) if preprocess is None else preprocess(torch.tensor(example))
            points = split_points(net, x, progress=lambda done, total: step("looking for places to cut", done, total))
        if as_json:
            print(json.dumps([dataclasses.asdict(p) for p in points], indent=1))
        else:
            show(tables.split_table(points, f"Where {title} can be cut"))
        return
    with redirect_stdout(sys.stderr), progress(quiet=as_json) as step:
        step("capturing and counting every step", 0, 1)
        prepared = prepare(net, at=place(at), example=example, method=method, classes=classes, config=values, preprocess=preprocess)
        found = profile(prepared, engine)
    if as_json:
        print(json.dumps(profile_record(found), indent=1))
        return
    shapes = ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in found.features.items())
    cost = tables.cost_table(found, f"{method} on {title}, cut at {at}: {shapes}, {classes} classes")
    show(cost, tables.ledger_table(found.ledger))


def profile_record(found: Profile) -> dict[str, Any]:
    """What ``edgecl profile --json`` prints."""
    steps = [{**dataclasses.asdict(s), "canonical_macs": s.canonical_macs, "executed_macs": s.executed_macs} for s in found.steps]
    return {**dataclasses.asdict(found), "steps": steps}


@app.command(
    epilog=_examples(
        "edgecl export small_cnn --weights small.pth --at pool --method ncm --classes 10 --out bundle",
        "edgecl export resnet20 --weights resnet20.th --at pool --preprocess-u8 HWC --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26 --out u8",
        "edgecl export net.py:build --at conv3 --data base.npz --class-names yes,no --out own    (your own files)",
    ),
)
def export(
    model: Model,
    at: Annotated[
        str,
        typer.Option(metavar="NAME", help="Last module of the frozen trunk, or several, as a,b; edgecl profile MODEL lists the places."),
    ],
    out: Annotated[Path, typer.Option(metavar="BUNDLE", help="Folder to write.")],
    method: Method = "ridge",
    classes: Classes = 10,
    data: Annotated[Path | None, typer.Option(help="npz file with base samples x and their classes y, taken in before export.")] = None,
    class_names: Annotated[str | None, typer.Option(help="Names of the first classes, as cat,dog,mug.")] = None,
    input: Input = None,
    dtype: Dtype = "float32",
    weights: Weights = None,
    model_classes: ModelClasses = None,
    preprocess_u8: Layout = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    config: Config = None,
    engine: Engine = "onnx",
    ram_budget: Annotated[
        str,
        typer.Option(
            metavar="BYTES",
            help="RAM of the learner, as edgecl plan counts it: 64MiB, 500KB or a number. To fit, activations are computed again.",
        ),
    ] = "128MiB",
    trunk_dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="float32, or int8 for a frozen trunk in integers, calibrated on --data.")
    ] = "float32",
    rows_in_file: Annotated[
        bool, typer.Option("--rows-in-file", help="Keep replay rows in a file on the device, not in its RAM (edgecl-device run --rows).")
    ] = False,
    pending: Annotated[int, typer.Option(min=1, max=1 << 20, help="Predictions that may wait for a delayed label.")] = DEFAULT_PENDING,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
    as_json: Json = False,
) -> None:
    """Prepare a learner, take in base samples, and write a checked bundle for the device."""
    from edgecl_export import export as write  # the command drives the whole path; see pyproject.toml

    if out.exists() and not overwrite:
        raise InputError(f"--out: {out} exists; choose another folder or pass --overwrite")
    budget = parse_bytes("--ram-budget", ram_budget)
    values = parse_config(method, config or ())
    names = class_names.split(",") if class_names else ()
    with redirect_stdout(sys.stderr):
        net = load_model(model, classes, weights, model_classes)
    if model in BACKBONES and weights is None:
        print(f"note: {model} has random weights; pass --weights for trained ones", file=sys.stderr)
    preprocess = preprocessing(preprocess_u8, mean, std, resize)
    xs, ys = (None, None) if data is None else read_stream(data)
    if xs is not None and not len(xs):
        raise InputError(f"--data: {data} must hold at least one sample; leave the option out to start from nothing")
    if xs is None and getattr(values, "codec", "float32") != "float32":
        raise InputError(f"--data: is needed, {method} fits its {values.codec} codec to base samples; or pass --config codec=float32")
    if xs is None and trunk_dtype == "int8":
        raise InputError("--data: is needed, --trunk-dtype int8 is calibrated on base samples; or leave --trunk-dtype out")
    calibration = calibration_of(xs) if xs is not None and trunk_dtype == "int8" else None
    example = example_of(model, input, dtype, preprocess) if xs is None else xs[:1]
    with redirect_stdout(sys.stderr), progress(quiet=as_json) as step:
        prepared = prepare(
            net,
            at=place(at),
            example=example,
            method=method,
            classes=classes,
            config=values,
            preprocess=preprocess,
            class_names=names,
            trunk_dtype=trunk_dtype,
            calibration=calibration,
        )
        if xs is not None and ys is not None:
            prepared.fit(xs, ys, progress=lambda done, total: step("taking in base samples", done, total))
        step("writing the bundle and checking it", 0, 1)
        found = write(
            prepared,
            out,
            engine=engine,
            overwrite=overwrite,
            pending_capacity=pending,
            ram_budget_bytes=budget,
            rows_in_file=rows_in_file,
        )
    gates = [{"name": gate.name, "found": gate.found} for gate in found.gates]
    if as_json:
        replay = {} if prepared.memory is None else {"reconstruction": prepared.reconstruction}
        print(json.dumps({"path": str(out), "gates": gates, "ledger": found.manifest.ledger, **replay}, indent=1))
        return
    show(tables.gates_table(gates), tables.ledger_table(found.manifest.ledger))
    print(f"\nWrote {out}. Look at it with: edgecl-device info {shlex.quote(str(out))}")


app.command(
    epilog=_examples(
        "edgecl plan --ram 256KiB --flash 1MiB --macs 5M", "edgecl plan run.toml --ram 128KiB --plot plan.png --write planned.toml"
    )
)(planning.plan)
app.command(epilog=_examples("edgecl run --init", "edgecl run run.toml", "edgecl run run.toml --out elsewhere --fresh"))(runs.run)
app.command(epilog=_examples("edgecl report run.run", "edgecl report run.run other.run --out both.html"))(runs.report)
app.add_typer(bench.app, name="bench")


if __name__ == "__main__":
    sys.exit(main())
