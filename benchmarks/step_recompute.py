"""Memory of an update against its work, where activations are computed again instead of kept.

    python benchmarks/step_recompute.py [--cases mobilenet_v2:W3 ...] [--engines onnx executorch] [--out FILE]

Writes ``benchmarks/results/step_recompute.json``.
"""

import argparse
import json
import statistics
import tempfile
from importlib.metadata import version
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from step_plan import onnx_use, session_of
from update_cases import case as case_of
from update_engines import prepared_of

from edgecl.figures import machine
from edgecl.graph.lowering import BuiltStep, build, within

OUT = Path(__file__).parent / "results" / "step_recompute.json"
CASES = ("mobilenet_v2:W3", "mobilenet_v2:W6", "resnet20:W3")
LIMITS = (None, 0.9, 0.75, 0.0)
REPEATS = 30


def times(steps: list[BuiltStep]) -> list[float]:
    """Time of each step over that of the first, medians of turns, on ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for number, step in enumerate(steps):
            (Path(folder) / str(number)).mkdir()
            runs.append(session_of(step, Path(folder) / str(number), profile=False))
        ratios: list[list[float]] = [[] for _ in steps]
        for _ in range(REPEATS):
            taken = []
            for session, binding in runs:
                start = perf_counter()
                session.run_with_iobinding(binding)
                taken.append(perf_counter() - start)
            for ratio, seconds in zip(ratios, taken, strict=True):
                ratio.append(seconds / taken[0])
        return [statistics.median(ratio) for ratio in ratios]


def measure(net: str, update: str, engine: str) -> dict[str, Any]:
    """One update at every limit."""
    step = build(prepared_of(case_of(net, update)), engine)["learn"]
    steps = [step if limit is None else within(step, int(limit * step.plan.arena_bytes)) for limit in LIMITS]
    found: list[dict[str, Any]] = [
        {"limit": limit, "arena": s.plan.arena_bytes, "macs": s.executed.total_macs, "elementwise": s.executed.elementwise}
        for limit, s in zip(LIMITS, steps, strict=True)
    ]
    if engine == "onnx":
        for row, s, ratio in zip(found, steps, times(steps), strict=True):
            row |= onnx_use(s) | {"time_ratio": ratio}
    return {"net": net, "update": update, "engine": engine, "limits": found}


def main() -> None:
    """Measure every case, and write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--engines", nargs="+", default=["onnx", "executorch"])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rows = []
    for engine, case in product(args.engines, args.cases):
        rows.append(measure(*case.split(":"), engine))
        versions = {name: version(name) for name in ("edgecl", "torch", "onnxruntime")}
        args.out.write_text(json.dumps({"rows": rows, "versions": versions, "machine": machine()}, indent=1) + "\n")
        Console().print(case, engine, [(r["limit"], r["arena"], r["macs"], r.get("time_ratio")) for r in rows[-1]["limits"]])


if __name__ == "__main__":
    main()
