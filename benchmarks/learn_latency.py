"""Time of one learning step on one thread: ONNX Runtime against eager PyTorch, interleaved, medians.

    python benchmarks/learn_latency.py [--repeats 400] [--out FILE]

Cases: ``ridge`` and ``slda`` at d=512 or 1280, K=100, without a delay and with 16 updates between two runs of ``refresh``, and
``latent_replay`` with r=8 on the demo's network. The step alone is timed (latent in, new state out, buffers bound), with its share
of ``refresh``: of both the median, the latter over the updates that it serves. Then PyTorch on tensors that lie ready: for the
first two the eager step function without a delay, for latent replay the update as one would write it by hand (autograd,
``torch.optim.SGD``), which is faster than the step function there. A copy of the whole state in NumPy is timed beside them: a step
that changes all of it can take no less, and it says how fast the machine's memory was.
Engine and step function are compared first. Writes ``benchmarks/results/learn_latency.json``.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from edgecl.engine import EagerEngine, to_tensor
from edgecl.figures import machine
from edgecl.learner import call_step
from edgecl.methods import METHODS, LatentReplay
from edgecl.prepare import Prepared, prepare
from edgecl.streams import fashion_mnist_subset
from edgecl.trees import unflatten_like
from edgecl_device.engines.onnx import OnnxEngine
from edgecl_device.manifest import read_manifest
from edgecl_export import export
from edgecl_export.verify import compare_step

OUT = Path(__file__).parent / "results" / "learn_latency.json"


def matrix_case(method: str, d: int, delay: int = 0) -> Prepared:
    """A method on d-dimensional features with room for 100 classes, 400 random samples learned."""
    generator = np.random.default_rng(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(d, 100))
    x = generator.standard_normal((400, d)).astype(np.float32)
    config = METHODS[method].Config(delay=delay)
    return prepare(model, at="0", example=x[:1], method=method, classes=100, config=config).fit(x, generator.integers(0, 100, 400))


def replay_case() -> Prepared:
    """Latent replay of the demo: 8 uint8 rows, the last convolution and the classifier trained."""
    from edgecl.backbones.small_cnn import SmallCnn
    from edgecl.demo import MEAN, STD
    from edgecl.preprocess import ImageU8

    data = fashion_mnist_subset()
    net, scale = SmallCnn(10), ImageU8([MEAN], [STD], "HW")
    prepared = prepare(
        net, at=SmallCnn.MAP, example=data.x[:1], method="latent_replay", classes=10, config=LatentReplay.Config(), preprocess=scale
    )
    return prepared.fit(data.x[:400], data.y[:400])


CASES: dict[str, tuple[Callable[[], Prepared], str]] = {
    "ridge d=512 K=100": (lambda: matrix_case("ridge", 512), "0.15 ms"),
    "ridge d=1280 K=100": (lambda: matrix_case("ridge", 1280), "0.3 ms"),
    "slda d=1280 K=100": (lambda: matrix_case("slda", 1280), "0.45 ms"),
    "ridge d=512 K=100, delay 16": (lambda: matrix_case("ridge", 512, 16), "0.15 ms"),
    "ridge d=1280 K=100, delay 16": (lambda: matrix_case("ridge", 1280, 16), "0.3 ms"),
    "slda d=1280 K=100, delay 16": (lambda: matrix_case("slda", 1280, 16), "0.45 ms"),
    "latent_replay r=8": (replay_case, "ratio 1"),
}
"""Every case and its target."""


def inputs_of(prepared: Prepared) -> dict[str, Any]:
    """Inputs of one learning step, replay rows included."""
    z, label = prepared.examples[0]
    values: dict[str, Any] = {
        "z": z.numpy(),
        "target": label,
        "weight": np.ones(1, np.float32),
        "lr": np.array(prepared.learner.default_lr, np.float32),
    }
    return {**values, **(prepared.memory.draw() if prepared.memory is not None else {})}


def time_case(name: str, prepared: Prepared, repeats: int) -> dict[str, Any]:
    """Median milliseconds of both engines and of their ratio."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = export(prepared, Path(scratch) / "bundle").path
        target = OnnxEngine(bundle, read_manifest(bundle))
        state = {key: value.numpy().copy() for key, value in prepared.state.items()}
        inputs = inputs_of(prepared)
        taken = {spec.name: inputs[spec.name] for spec in read_manifest(bundle).steps["learn"].inputs}
        compare_step("learn", state, inputs, EagerEngine(prepared.trunk, prepared.learner), target)
        target.load(state)
        tensors = unflatten_like(prepared.learner.inputs_of("learn"), {key: to_tensor(value) for key, value in inputs.items()})

        def on_onnx() -> None:
            target.run("learn", taken)

        def on_eager() -> None:
            with torch.no_grad():
                call_step(eager.learner, "learn", eager.state, tensors)

        eager = _without_delay(prepared)
        every = prepared.learner.refresh_every

        def refresh() -> None:
            if every:
                target.run("refresh", {})

        spare = copy.deepcopy(state)

        def copied() -> None:
            for key, value in state.items():
                np.copyto(spare[key], value)

        by_hand = plain_update(prepared.learner, tensors) if isinstance(prepared.learner, LatentReplay) else on_eager
        calls = (on_onnx, by_hand, copied, refresh)
        rounds = [[_time(call) * 1e3 for call in calls] for _ in track(range(repeats), name)][repeats // 10 :]
        target.close()
    learn_ms, eager_ms, copy_ms, refresh_ms = map(list, zip(*rounds, strict=True))
    share_ms = statistics.median(refresh_ms) / every if every else 0.0
    onnx_ms = [ms + share_ms for ms in learn_ms]
    quartiles = statistics.quantiles(onnx_ms, n=4)
    return {
        "case": name,
        "onnx_ms": statistics.median(onnx_ms),
        "onnx_ms_quartiles": [quartiles[0], quartiles[2]],
        "eager_ms": statistics.median(eager_ms),
        "copy_ms": statistics.median(copy_ms),
        "refresh_share_ms": share_ms,
        "ratio": statistics.median(a / b for a, b in zip(onnx_ms, eager_ms, strict=True)),
    }


def _without_delay(prepared: Prepared) -> Prepared:
    """The learner that keeps no change waiting."""
    learner = prepared.learner
    if not learner.refresh_every:
        return prepared
    return matrix_case(learner.name, learner.problem.feature_size)


def plain_update(learner: LatentReplay, inputs: Mapping[str, Any]) -> Callable[[], None]:
    """Latent replay's update with autograd and ``torch.optim.SGD``, all classes seen."""
    suffix = copy.deepcopy(learner.suffix)
    parameters = [suffix.get_parameter(name).requires_grad_(True) for name in learner.trained]
    optimiser = torch.optim.SGD(parameters, learner.default_lr)
    codec = learner.codecs[""]
    targets, real = torch.cat([inputs["target"], inputs["replay"]["target"]]), inputs["replay"]["weight"]

    def update() -> None:
        batch = torch.cat([codec.decode(codec.encode(inputs["z"])), codec.decode(inputs["replay"]["z"])])
        weights = torch.cat([inputs["weight"], real / real.sum()])
        loss = (nn.functional.cross_entropy(suffix(batch), targets, reduction="none") * weights).sum()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return update


def _time(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [{**time_case(name, make(), args.repeats), "target": target} for name, (make, target) in CASES.items()]
    result = {
        "rows": rows,
        "repeats": args.repeats,
        "threads": 1,
        "versions": {name: version(name) for name in ("edgecl", "torch", "onnxruntime")},
        "machine": machine(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("step", "ONNX Runtime, ms", "PyTorch, ms", "ratio", "copy, ms", "target", title="One learning step, one thread, batch 1")
    for row in rows:
        times = [f"{row[key]:.3f}" for key in ("onnx_ms", "eager_ms")]
        table.add_row(row["case"], *times, f"{row['ratio']:.2f}", f"{row['copy_ms']:.3f}", row["target"])
    Console().print(table)


if __name__ == "__main__":
    main()
