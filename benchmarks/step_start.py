"""Start-up: time to export MobileNetV2's updates, and from loading a bundle to the first prediction in a fresh process.

    python benchmarks/step_start.py [--net mobilenet_v2] [--updates W1 W3] [--processes 7] [--out FILE]

The updates are those of ``step_latency.py``, on ONNX Runtime. Export is measured as a user calls it, every gate included, and what the
gates take of it stands beside. Loading reads, checks and optimises all graphs of the bundle; importing the packages is not part of it.

Writes ``benchmarks/results/step_start.json``.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from update_cases import SHAPES, UPDATES, case
from update_engines import bundle_of, prepared_of

import edgecl_export.bundle
from edgecl.figures import machine

OUT = Path(__file__).parent / "results" / "step_start.json"

CHILD = """
import json, sys, time
import numpy as np
start = time.perf_counter()
from edgecl_device import Learner
imported = time.perf_counter()
learner = Learner.load(sys.argv[1])
loaded = time.perf_counter()
learner.predict(np.zeros(json.loads(sys.argv[2]), np.float32))
print(json.dumps({"import": imported - start, "load": loaded - imported, "first_prediction": time.perf_counter() - imported}))
"""


def measure(net: str, update: str, processes: int) -> dict[str, Any]:
    """Seconds of an export and of starts from it."""
    gates = []
    verify = edgecl_export.bundle.verify

    def timed(*args: Any) -> Any:
        start = perf_counter()
        try:
            return verify(*args)
        finally:
            gates.append(perf_counter() - start)

    edgecl_export.bundle.verify = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            prepared = prepared_of(case(net, update))
            start = perf_counter()
            exported = bundle_of(prepared, Path(folder) / "bundle", "onnx")
            seconds = perf_counter() - start
            command = [sys.executable, "-c", CHILD, str(exported.path), json.dumps(SHAPES[net])]
            found = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(processes)]
    finally:
        edgecl_export.bundle.verify = verify
    starts = {name: statistics.median(one[name] for one in found) for name in found[0]}
    return {"net": net, "update": update, "export": seconds, "gates": gates[0], **starts}


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="mobilenet_v2", choices=list(SHAPES))
    parser.add_argument("--updates", nargs="+", default=["W1", "W3"], choices=list(UPDATES))
    parser.add_argument("--processes", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(args.net, update, args.processes) for update in args.updates]
    result = {"rows": rows, "processes": args.processes, "machine": machine()}
    result["versions"] = {name: version(name) for name in ("edgecl", "torch", "onnxruntime")}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        text = f"export {row['export']:.1f} s (gates {row['gates']:.1f}), load to first prediction {row['first_prediction']:.2f} s"
        Console().print(f"{row['net']} {row['update']}: {text}")


if __name__ == "__main__":
    main()
