"""Time of one update, side by side: edgecl's step graphs, PyTorch, and the runtimes that are built for training.

    python benchmarks/step_latency.py [--nets resnet20 ...] [--updates W1 ...] [--engines eager ...] [--repeats 60] [--out FILE]

The same update of the same weights by eager PyTorch, ``torch.compile``, ONNX Runtime's own training build, ExecuTorch's training
extension, and edgecl's bundles on stock ONNX Runtime and ExecuTorch: one sample in, new weights out, one thread. First every engine
makes one update, and the new weights are compared. Then they take turns (A B C A B C ...); a ratio is the median over the turns in which
both took part. A turn is two updates, of which the second is timed: on a device one engine runs, so that its weights and code stay in the
processor's caches, and a ratio must not depend on which other engines were measured. An engine whose updates take longer than
``--seconds`` together takes part in the first turns only. The forward pass is that of the network with all of its weights frozen, on
stock ONNX Runtime.

The training build runs in a process and an environment of its own, which this command makes (``--environment``). It is given the frozen
weights both as its documentation has it (``frozen_params``) and as constants of the model, which is faster.

Writes ``benchmarks/results/step_latency.json`` after each case; rows of other networks and updates stay.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from update_cases import SHAPES, UPDATES, Case, case, distance
from update_engines import TRAINING_VERSION, Eager, Engine, ExecutorchTraining, Forward, OnnxTraining, Step, training_environment

from edgecl.figures import machine

OUT = Path(__file__).parent / "results" / "step_latency.json"
FARTHEST = 1e-3
"""Two engines' updates of a tensor may differ by this share of the update."""

RATIOS = [
    ("onnx", "ort_training"), ("onnx", "ort_training_constants"), ("onnx", "eager"), ("onnx", "compile"), ("onnx", "forward"),
    ("executorch", "executorch_training"), ("executorch", "eager"),
]  # fmt: skip
"""Whose time is divided by whose."""


def engines(environment: Path) -> dict[str, Callable[[Case], Engine]]:
    """How to make each engine, by name."""
    return {
        "onnx": lambda of: Step(of, "onnx"),
        "eager": lambda of: Eager(of),
        "compile": lambda of: Eager(of, compiled=True),
        "ort_training": lambda of: OnnxTraining(of, training_environment(environment)),
        "ort_training_constants": lambda of: OnnxTraining(of, training_environment(environment), listed=False),
        "executorch": lambda of: Step(of, "executorch"),
        "executorch_training": ExecutorchTraining,
        "forward": Forward,
    }


def measure(of: Case, makers: dict[str, Callable[[Case], Engine]], repeats: int, seconds: float) -> dict[str, Any]:
    """Compare and time the engines on one case."""
    made = {name: make(of) for name, make in makers.items()}
    try:
        apart = compare(of, made)
        times: dict[str, list[float]] = {name: [] for name in made}
        for turn in range(repeats):
            for name, engine in made.items():
                if sum(times[name]) < 1e3 * seconds or turn < 3:
                    engine.update(turn % 10)
                    times[name].append(engine.update(turn % 10) * 1e3)
        step = made["onnx"]
        assert isinstance(step, Step)
        steps = step.manifest.steps
        return {
            "net": of.net,
            "update": of.update,
            "trained_tensors": len(of.trained),
            "trained_values": sum(tensor.numel() for tensor in step.weights().values()),
            "update_macs": steps["encode"].canonical_macs + steps["learn"].canonical_macs,
            "forward_macs": made["forward"].macs if isinstance(made.get("forward"), Forward) else None,
            "export_seconds": step.export_seconds,
            "activations_peak": step.manifest.ledger["activations_peak"],
            "distance": apart,
            "ms": {name: statistics.median(found[len(found) // 10 :]) for name, found in times.items()},
            "turns": {name: len(found) for name, found in times.items()},
            "ratio": {f"{a}/{b}": ratio(times[a], times[b]) for a, b in RATIOS if a in times and b in times},
        }
    finally:
        for engine in made.values():
            engine.close()


def compare(of: Case, made: dict[str, Engine]) -> dict[str, float]:
    """How far each engine's first update is from eager PyTorch's, as a share of it."""
    learning = {name: engine for name, engine in made.items() if name != "forward"}
    start = Eager(of).weights()
    for engine in made.values():
        engine.update(of.label)
    reference = made["eager"].weights()
    apart = {name: distance(engine.weights(), reference, start) for name, engine in learning.items()}
    far = {name: value for name, value in apart.items() if not value <= FARTHEST}
    if far:
        raise RuntimeError(f"{of.net} {of.update}: updates differ from eager PyTorch's by more than {FARTHEST:g} of their size: {far}")
    return apart


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over the turns that both took, without the first tenth."""
    pairs = list(zip(ours, theirs, strict=False))
    return statistics.median(a / b for a, b in pairs[len(pairs) // 10 :])


def main() -> None:
    """Measure every case, and write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--updates", nargs="+", default=list(UPDATES), choices=list(UPDATES))
    parser.add_argument("--engines", nargs="+", help="besides onnx, eager and forward; default: all")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=10.0, help="for one engine on one case")
    parser.add_argument("--environment", type=Path, default=Path(".onnxruntime-training"))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    makers = engines(args.environment)
    if args.engines is not None:
        makers = {name: make for name, make in makers.items() if name in ("onnx", "eager", "forward", *args.engines)}
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for net, update in product(args.nets, args.updates):
        row = measure(case(net, update), makers, args.repeats, args.seconds)
        rows = [r for r in rows if (r["net"], r["update"]) != (net, update)] + [row]
        rows.sort(key=lambda r: (list(SHAPES).index(r["net"]), r["update"]))
        result = {
            "rows": rows,
            "repeats": args.repeats,
            "threads": 1,
            "versions": {name: version(name) for name in ("edgecl", "torch", "onnxruntime", "executorch")}
            | {"onnxruntime-training": TRAINING_VERSION},
            "machine": machine(),
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        Console().print(f"{net} {update}: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in row["ms"].items()))


if __name__ == "__main__":
    main()
