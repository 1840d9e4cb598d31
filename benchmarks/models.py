"""Networks of the field at full size: export, parity, cost and time of one learning step, on both runtimes.

    python benchmarks/models.py [--out FILE] [--models gru,vit] [--engines onnx,executorch] [--repeats 50]

Each is cut before its last two blocks, which latent replay trains with two rows. Export includes every gate, so that a network that is in
the result has equal outputs and states on both sides. A step is timed alone, on one thread: latent in, new state out. Writes
``benchmarks/results/models.json``; rows of other networks and runtimes in that file stay.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learn_latency import inputs_of
from rich.console import Console
from torch import nn

from edgecl import prepare
from edgecl.backbones import BACKBONES
from edgecl.figures import machine
from edgecl.methods import LatentReplay
from edgecl.options import INPUTS
from edgecl_export import export
from edgecl_export.targets import target_of

CUTS = {"resnet18": "layer3", "mobilenet_v2": "features.15", "ds_cnn": "block2", "vit": "blocks.1", "cnn1d": "block1", "gru": "gru1"}
ENGINES = ("onnx", "executorch")
CLASSES = 10
OUT = Path(__file__).parent / "results" / "models.json"


def measure(name: str, engine: str, repeats: int) -> dict[str, Any]:
    """Export one network for one runtime and time its learning step."""
    make: Callable[..., nn.Module] = BACKBONES[name]
    x = np.random.default_rng(0).standard_normal((6, *INPUTS[name][1:])).astype(np.float32)
    config = LatentReplay.Config(rows_per_step=2, capacity_bytes=1 << 24)
    prepared = prepare(make(classes=CLASSES), at=CUTS[name], example=x[:1], method="latent_replay", classes=CLASSES, config=config)
    prepared.fit(x, np.arange(6) % 3)
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        exported = export(prepared, Path(scratch) / "bundle", engine=engine, ram_budget_bytes=1 << 30)
        seconds = time.perf_counter() - start
        target = target_of(engine).read(exported.path, exported.manifest).engine()
        target.load({key: value.numpy().copy() for key, value in prepared.state.items()})
        inputs = inputs_of(prepared)
        taken = {spec.name: inputs[spec.name] for spec in exported.manifest.steps["learn"].inputs}
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            target.run("learn", taken)
            times.append((time.perf_counter() - begin) * 1e3)
        target.close()
    learn = exported.manifest.steps["learn"]
    return {
        "model": name,
        "engine": engine,
        "cut": CUTS[name],
        "parity": next(gate.found for gate in exported.gates if gate.name == "parity"),
        "canonical_macs": learn.canonical_macs,
        "executed_macs": learn.executed_macs,
        "encode_macs": exported.manifest.steps["encode"].canonical_macs,
        "ledger": dict(exported.manifest.ledger),
        "export_seconds": seconds,
        "learn_ms": statistics.median(times[len(times) // 10 :]),
    }


def main() -> None:
    """Measure, and write JSON after each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CUTS))
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    before = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    rows = {(row["model"], row["engine"]): row for row in before}
    result: dict[str, Any] = {
        "rows": [],
        "repeats": args.repeats,
        "threads": 1,
        "versions": {name: version(name) for name in ("edgecl", "torch", "onnxruntime", "executorch")},
        "machine": machine(),
    }
    for name in args.models.split(","):
        for engine in args.engines.split(","):
            row = measure(name, engine, args.repeats)
            Console().print(f"{name} {engine}: export {row['export_seconds']:.1f} s, learn {row['learn_ms']:.2f} ms")
            rows[name, engine] = row
            result["rows"] = [rows[key] for key in product(CUTS, ENGINES) if key in rows]
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
