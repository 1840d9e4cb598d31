"""The command ``edgecl-device``: look at a bundle, check it, run a stream through it."""

import argparse
import hashlib
import io
import json
import os
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgecl_device.adapt_checks import ADAPT
from edgecl_device.checks import as_inputs, as_weight, check_manifest
from edgecl_device.errors import EdgeclError, InputError, StepMissingError, UpdateRefusedError
from edgecl_device.generator import Generator
from edgecl_device.learner import Learner
from edgecl_device.manifest import Array, Manifest, TargetSpec, TensorSpec, read_manifest
from edgecl_device.reports import Prediction
from edgecl_device.targets import example_target, target_of
from edgecl_device.trial import tried

_NO_STREAM = (OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)
CLEAR_LINE = "\r\x1b[K"
EXAMPLES = """examples:
  edgecl-device info bundle/                                  what is in it and what a step costs
  edgecl-device verify bundle/                                hashes, schema, one prediction, one update
  edgecl-device run bundle/ --data stream.npz                 predict, then learn, sample by sample
  edgecl-device run bundle/ --data stream.npz --store l.db    the same; the learner stays in l.db
  edgecl-device tasks bundle/ --store l.db                    the tasks of a learner, for methods that have them
  edgecl-device tasks bundle/ --store l.db --add kitchen --switch kitchen
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code.

    0; or 2 with one line on stderr after an error, 130 with one after Ctrl-C, 1 when nobody reads the output.
    """
    try:
        return _main(argv)
    except KeyboardInterrupt:
        _say("interrupted; with --store, what was learned is in the store")
        return 130


def _main(argv: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # class names may have what the terminal has not
    parser = argparse.ArgumentParser(
        "edgecl-device",
        description="Look at a bundle, check it, run a stream through it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | verify | run | tasks")
    for name, call, text in COMMANDS:
        command = commands.add_parser(name, help=text, description=text, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter)
        command.add_argument("bundle", type=Path, help="folder that edgecl export wrote")
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
        command.set_defaults(call=call)
    tasks_of = commands.choices["tasks"]
    tasks_of.add_argument("--store", type=Path, required=True, help="store file, made when there is none")
    tasks_of.add_argument("--add", metavar="NAME", help="add a task")
    tasks_of.add_argument("--like", metavar="NAME", help="the task that the added one is a copy of; without it the bundle's start")
    tasks_of.add_argument("--drop", metavar="NAME", help="drop a task that is not in use")
    tasks_of.add_argument("--switch", metavar="NAME", help="make a task the one in use; --add comes before it, --drop behind it")
    command = commands.choices["run"]
    command.add_argument("--data", type=Path, required=True, help="npz file with x [n, ...], y [n, ...] and, if wanted, weight [n]")
    command.add_argument("--store", type=Path, help="store file, made when there is none; without it nothing is kept")
    command.add_argument("--rows", type=Path, help="file of the replay rows, for a bundle that keeps them in one; goes with --store")
    command.add_argument("--limit", type=int, help="stop after so many samples")
    command.add_argument("--threads", type=int, default=1, help="threads inside one operator (default 1)")
    command.add_argument("--memory", default="fastest", help="fastest, balanced or smallest: memory that ONNX Runtime may spend on speed")
    args = parser.parse_args(argv)
    try:
        result = args.call(args)
    except EdgeclError as error:
        _say(str(error))
        return 2
    try:
        print(json.dumps(result, indent=1) if args.json else table(result), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again at the end
        if isinstance(error, BrokenPipeError):
            return 1
        _say(f"the output cannot be written ({error})")
        return 2
    return 0


def tasks(args: argparse.Namespace) -> dict[str, Any]:
    """The tasks of a learner, behind what is asked for."""
    if args.like is not None and args.add is None:
        raise InputError(f"--like: is for a task that --add adds, got {args.like!r} without one; pass --add NAME, too")
    manifest = read_manifest(args.bundle)
    if manifest.tasks is None:
        raise StepMissingError(f"BUNDLE: {manifest.method} keeps one state for everything, it has no tasks; export clr, which has")
    with Learner.load(args.bundle, args.store) as learner:
        if args.add is not None:
            learner.add_task(args.add, args.like)
        if args.switch is not None:
            learner.switch_task(args.switch)
        if args.drop is not None:
            learner.drop_task(args.drop)
        found = learner.tasks()
    rows = [
        {
            "task": name,
            "in_use": one.active,
            "bytes": one.nbytes,
            "samples": sum(one.class_counts.values()),
            "classes": list(one.class_counts),
        }
        for name, one in found.items()
    ]
    return {"task": learner.task, "tasks": rows}


def info(args: argparse.Namespace) -> dict[str, Any]:
    """The manifest in short."""
    manifest = read_manifest(args.bundle)
    check_manifest(manifest)
    steps = [
        {
            "step": name,
            "canonical_macs": step.canonical_macs,
            "executed_macs": step.executed_macs,
            "activation_bytes": step.activation_bytes,
            "inputs": " ".join(spec.name for spec in step.inputs),
        }
        for name, step in manifest.steps.items()
    ]
    inputs, replay = manifest.steps["encode"].inputs, manifest.replay
    return {
        "method": manifest.method,
        "config": manifest.config,
        "input": ", ".join(f"{x.name.removeprefix('x.')} " * (len(inputs) > 1) + f"{x.dtype} {list(x.shape)}" for x in inputs),
        "target": manifest.target.kind,
        "classes": f"{len(manifest.class_names)} named of {manifest.max_classes}",
        "class_names": list(manifest.class_names),
        "forgets": manifest.forgets,
        "tasks": manifest.tasks is not None,
        "replay": None if replay is None else f"{replay.capacity_bytes} bytes, {replay.policy}" + ", rows in a file" * replay.in_file,
        "state_bytes": sum(spec.nbytes for spec in manifest.state),
        "file_bytes": sum(entry.bytes for entry in manifest.files.values()),
        "log_capacity_bytes": manifest.log_capacity_bytes,
        "bundle_id": manifest.bundle_id,
        "steps": steps,
    }


def verify(args: argparse.Namespace) -> dict[str, Any]:
    """Load everything, predict and learn one made-up sample, keep nothing of it, and see that no file has changed."""
    manifest = read_manifest(args.bundle)
    before = _digest(args.bundle)
    checks = []
    with tried(args.bundle) as learner:
        checks.append({"check": "schema, hashes, state, graphs", "result": f"{len(manifest.files)} files"})
        seen = learner.predict(one_of({x.name: made_up(x) for x in manifest.steps["encode"].inputs}))
        checks.append({"check": "predict", "result": _told(seen)})
        if "learn" in manifest.steps:
            try:
                report = learner.learn(seen.sample_id, example_target(manifest))
                result = f"loss {report.loss:.6g}" if report.learned else "left out by its gate"
            except UpdateRefusedError as error:
                result = f"refused by its own check: {error}"
            checks.append({"check": "learn", "result": result})
        if ADAPT in manifest.steps:
            try:
                result = "updated" if learner.adapt(seen.sample_id).updated else "taken in"
            except (InputError, UpdateRefusedError) as error:  # without source samples no class is known
                result = f"refused by its own check: {error}"
            checks.append({"check": "adapt", "result": result})
    if _digest(args.bundle) != before:
        raise InputError(f"{args.bundle}: files changed while they were verified; close what writes there and verify again")
    checks.append({"check": "files unchanged", "result": "yes"})
    return {"bundle": str(args.bundle), "method": manifest.method, "valid": True, "checks": checks}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Predict, then learn or adapt to, every sample of a file, all of which are checked before the first."""
    if args.limit is not None and args.limit < 0:
        raise InputError(f"--limit: must be at least 0, got {args.limit}; leave it out to run everything")
    manifest = read_manifest(args.bundle)
    check_manifest(manifest)
    names = [spec.name for spec in manifest.steps["encode"].inputs]
    xs, ys = read_streams(args.data, names, manifest.target)
    n = len(ys) if args.limit is None else min(len(ys), args.limit)
    weights = read_weights(args.data, len(ys))[:n]
    kind = target_of(manifest.target, manifest.max_classes)
    check_stream({name: x[:n] for name, x in xs.items()}, ys[:n], weights, manifest)
    measured, refused = 0.0, 0
    by_class: dict[int, tuple[float, int]] = {}
    with Learner.load(args.bundle, args.store, threads=args.threads, rows=args.rows, memory=args.memory) as learner:
        start = time.perf_counter()
        for i in progress(n):
            target = kind.array(ys[i], ())
            with named(i):
                seen = learner.predict(one_of({name: x[i] for name, x in xs.items()}))
                try:
                    if "learn" in manifest.steps:
                        learner.learn(seen.sample_id, ys[i], weight=weights[i])
                    if ADAPT in manifest.steps:
                        seen = learner.adapt(seen.sample_id).prediction
                except UpdateRefusedError:
                    refused += 1
            found = kind.measured(seen.outcome, target)
            measured += found
            if manifest.target.kind == "class":
                hit, seen_of_class = by_class.get(int(target[0]), (0.0, 0))
                by_class[int(target[0])] = (hit + found, seen_of_class + 1)
        seconds = time.perf_counter() - start
        if args.store is not None:
            learner.save()  # what closing would write is then in the report
        report = learner.report()
    classes = [{"class": label, "samples": total, "prequential_accuracy": hit / total} for label, (hit, total) in sorted(by_class.items())]
    return {
        "method": report["method"],
        "samples": n,
        f"prequential_{kind.measure}": measured / n if n else None,
        "refused": refused,
        "samples_per_second": n / seconds if n else None,
        "macs": report["session"]["macs"],
        "bytes_written": report["session"]["bytes_written"],
        "learned_in_all": report["learned"],
        **({"adapted_in_all": report["adapted"], "updates_in_all": report["updates"]} if ADAPT in manifest.steps else {}),
        "classes": classes,
    }


def read_stream(path: Path) -> tuple[Array, Array]:
    """``x`` [n, ...] and integer ``y`` [n] of an npz file.

    Raises:
        InputError: when the file or one of them is missing or does not fit.
    """
    xs, ys = read_streams(path, ["x"], TargetSpec())
    return xs["x"], ys


def read_streams(path: Path, inputs: Sequence[str], target: TargetSpec) -> tuple[dict[str, Array], Array]:
    """The inputs [n, ...] by name, ``x`` or ``x.NAME``, and the targets ``y`` of an npz file: integers [n] for classes, else [n, ...].

    Raises:
        InputError: when the file or one of them is missing or does not fit.
    """
    found = _read_arrays(path, [*inputs, "y"], f"{', '.join(inputs)} and y")
    ys = found.pop("y")
    xs = {name: np.atleast_1d(x) for name, x in found.items()}
    n = len(xs[inputs[0]])
    if any(len(x) != n for x in xs.values()):
        raise InputError(f"{path}: inputs must have equally many samples, got {[len(x) for x in xs.values()]}; write them again")
    if target.kind != "class":
        if ys.ndim != len(target.shape) or len(ys) != n:
            wanted = f"[{', '.join(map(str, (n, *target.shape[1:])))}]"
            raise InputError(f"{path}: y must hold one {target.kind} target a sample, {wanted}, got {list(ys.shape)}; write y again")
    elif ys.ndim != 1 or n != len(ys) or ys.dtype.kind not in "iu":
        raise InputError(f"{path}: y must hold one integer a sample, got {ys.dtype} {list(ys.shape)} for {n} samples; write y again")
    return xs, ys


def one_of(inputs: dict[str, Array]) -> Any:
    """One sample as :meth:`edgecl_device.Learner.predict` takes it."""
    return inputs["x"] if "x" in inputs else {name.removeprefix("x."): x for name, x in inputs.items()}


def read_weights(path: Path, samples: int) -> list[Any]:
    """Sample weights ``weight`` [n] of an npz file, not checked each by itself; 1 for every sample when it has none.

    Raises:
        InputError: when the file cannot be read, or they are not one number a sample.
    """
    found = _read_arrays(path, ["weight"], "weight", needed=False).get("weight")
    if found is None:
        return [1.0] * samples
    if found.shape != (samples,) or found.dtype.kind not in "fiu":
        raise InputError(f"{path}: weight must hold one number a sample, got {found.dtype} {list(found.shape)}; write it again")
    return list(found)


def check_stream(xs: dict[str, Array], ys: Array, weights: Sequence[Any], manifest: Manifest) -> None:
    """Check every sample of a stream, its target and its weight.

    Raises:
        InputError: naming the first sample that does not fit.
    """
    inputs, target = manifest.steps["encode"].inputs, target_of(manifest.target, manifest.max_classes)
    taken = {spec.name for spec in manifest.steps["learn"].inputs} if "learn" in manifest.steps else set()
    for i, (y, weight) in enumerate(zip(ys, weights, strict=True)):
        with named(i):
            as_inputs(one_of({name: x[i] for name, x in xs.items()}), inputs)
            target.array(y, ())
            as_weight(weight, manifest.method, taken)


def _read_arrays(path: Path, names: Sequence[str], listed: str, needed: bool = True) -> dict[str, Array]:
    """Arrays of an npz file, those that it has where they are not ``needed``; errors call them ``listed``."""
    try:
        if path.exists() and not path.is_file():  # a device may have no end
            raise OSError("a folder or a device")
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as data:
            found = {name: data[name] for name in names if needed or name in data}
    except _NO_STREAM as error:
        raise InputError(f"{path}: must be an npz file with arrays {listed} ({error}); write one with numpy.savez") from error
    if not all(isinstance(array, np.ndarray) for array in found.values()):  # numpy hands out other members as bytes
        raise InputError(f"{path}: {listed} must be arrays; write them with numpy.savez")
    return found


@contextmanager
def named(sample: int) -> Iterator[None]:
    """Errors from inside begin with the sample's number."""
    try:
        yield
    except EdgeclError as error:
        raise type(error)(f"sample {sample}: {error}") from error


def made_up(spec: TensorSpec) -> Array:
    """A sample of middling values from a fixed seed: bytes, or numbers in [0, 1)."""
    generator = Generator(seed=1)
    size = int(np.prod(spec.shape, dtype=np.int64))
    values = np.array([generator.below(256) for _ in range(size)]).reshape(spec.shape)
    return (values if np.dtype(spec.dtype).kind in "iu" else values / 256).astype(spec.dtype)


def progress(n: int) -> Iterable[int]:
    """``range(n)``, with a line on stderr twice a second when that is a terminal."""
    last = time.perf_counter()
    show = _on_terminal()
    for i in range(n):
        if show and time.perf_counter() - last > 0.5:
            last = time.perf_counter()
            print(f"\r{i} of {n} samples", end="", file=sys.stderr, flush=True)
        yield i
    if show:
        print(CLEAR_LINE, end="", file=sys.stderr, flush=True)


def _told(seen: Prediction) -> str:
    if seen.outcome is None:
        return "no class yet"
    return f"class {seen.label}" if seen.label is not None else f"scores {list(seen.scores.shape)}"


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()  # None when it was closed: 2>&-


def _say(text: str) -> None:
    """One line on stderr, over the line of :func:`progress` when that is there."""
    if sys.stderr is not None:
        print(f"{CLEAR_LINE if _on_terminal() else ''}edgecl-device: {' '.join(text.split())}", file=sys.stderr)


def table(result: dict[str, Any]) -> str:
    """Plain text: one line a figure, then one table for every list of records.

    >>> print(table({"method": "ncm", "macs": 12000, "steps": [{"step": "learn", "macs": 64}]}))
    method  ncm
    macs    12,000
    <BLANKLINE>
    step   macs
    learn    64
    """
    figures = {key: value for key, value in result.items() if not _is_table(value)}
    width = max(map(len, figures), default=0)
    blocks = ["\n".join(f"{key:<{width}}  {_text(value)}" for key, value in figures.items())]
    for records in (value for value in result.values() if _is_table(value)):
        rows = [list(records[0]), *([_text(value) for value in record.values()] for record in records)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        right = [isinstance(value, (int, float)) for value in records[0].values()]
        lines = [[f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in zip(row, widths, right, strict=True)] for row in rows]
        blocks.append("\n".join("  ".join(line).rstrip() for line in lines))
    return "\n\n".join(blocks)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or "-"
    return ", ".join(map(str, value)) or "-" if isinstance(value, list) else str(value)


def _digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all files of a folder."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


COMMANDS = (
    ("info", info, "show a bundle"),
    ("verify", verify, "check a bundle"),
    ("run", run, "run a stream"),
    ("tasks", tasks, "show a learner's tasks, add, switch and drop them"),
)


if __name__ == "__main__":
    sys.exit(main())
