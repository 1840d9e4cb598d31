"""Peak resident memory of a fresh process that loads an update and makes it 200 times.

    python benchmarks/step_memory.py [--nets mobilenet_v2 ...] [--updates W1 W3] [--repeats 3] [--environment FOLDER] [--out FILE]

The updates are those of ``step_latency.py``. edgecl's process has the device package alone (numpy, safetensors, ONNX Runtime) and learns
through ``edgecl_device.Learner``, once for each setting of its ``memory``. PyTorch's has autograd and SGD; that of ONNX Runtime's
training build loads artifacts made before, frozen weights as constants. Medians of the kernel's VmHWM over the repeats, which take turns;
beside it VmRSS right after the imports.

Writes ``benchmarks/results/step_memory.json``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from update_cases import SHAPES, UPDATES, case
from update_engines import TRAINING_VERSION, OnnxTraining, Step, training_environment

from edgecl.figures import machine
from edgecl_device.engines.onnx import MEMORY

OUT = Path(__file__).parent / "results" / "step_memory.json"
CHILD = Path(__file__).with_name("memory_child.py")


def measure(net: str, update: str, python: Path, repeats: int) -> dict[str, Any]:
    """Every engine's memory on one case, in bytes."""
    of = case(net, update)
    step, training = Step(of, "onnx"), OnnxTraining(of, python, listed=False)
    np.save(step.path.parent / "x.npy", of.x.numpy())
    commands = {f"edgecl, {memory}": [sys.executable, CHILD, "edgecl", step.path.parent, memory] for memory in MEMORY}
    commands |= {"eager": [sys.executable, CHILD, "eager", net, update], "ort_training": [python, CHILD, "ort_training", training.folder]}
    found: dict[str, list[dict[str, int]]] = {name: [] for name in commands}
    try:
        for _ in range(repeats):
            for name, command in commands.items():
                done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    finally:
        step.close()
        training.close()
    middle = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    return {"net": net, "update": update, "bytes": middle, "ledger": step.manifest.ledger}


def main() -> None:
    """Measure every case, and write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["mobilenet_v2"], choices=list(SHAPES))
    parser.add_argument("--updates", nargs="+", default=["W1", "W3"], choices=[name for name in UPDATES if name != "W6"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--environment", type=Path, default=Path(".onnxruntime-training"))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    python = training_environment(args.environment)
    rows = []
    for net, update in product(args.nets, args.updates):
        rows.append(measure(net, update, python, args.repeats))
        versions = {name: version(name) for name in ("edgecl", "torch", "onnxruntime")} | {"onnxruntime-training": TRAINING_VERSION}
        result = {"rows": rows, "repeats": args.repeats, "versions": versions, "machine": machine()}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        sizes = ", ".join(f"{name} {found['peak'] / 1e6:.0f} MB" for name, found in rows[-1]["bytes"].items())
        Console().print(f"{net} {update}: {sizes}")


if __name__ == "__main__":
    main()
