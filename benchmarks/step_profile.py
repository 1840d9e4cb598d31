"""Where the time of one update goes on ONNX Runtime, by operator.

    python benchmarks/step_profile.py [--net ds_cnn] [--update W3] [--repeats 100] [--out FILE]

The update is one of ``step_latency.py``; its worst case by time over the forward pass for as many MACs is the default. The runtime's own
profiler times each operator of ``learn``, which makes small ones slower than they are. Operators of one type are also split by the size of
what they write, as a large map's cost is its memory traffic and a small one's the call.

Writes ``benchmarks/results/step_profile.json``.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table
from update_cases import SHAPES, UPDATES, case
from update_engines import Step

from edgecl.figures import machine

OUT = Path(__file__).parent / "results" / "step_profile.json"
SMALL = 1 << 12
"""Values that an operator writes, up to which its call is most of its time."""


def events(step: Step, repeats: int) -> list[dict[str, Any]]:
    """What the runtime's profiler says about ``learn``, run from the initial state on the case's sample."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(step.path / "learn.onnx", options, providers=["CPUExecutionProvider"])
        values = {f"state.{name}": value for name, value in step.engine.state().items()}
        values |= {**step.given, "z": step.engine.run("encode", step.x)["z"], "target": np.array([3])}
        feeds = {i.name: values[i.name].reshape(i.shape) for i in session.get_inputs()}
        for _ in range(repeats):
            session.run(None, feeds)
        return list(json.loads(Path(session.end_profiling()).read_text()))


def by_operator(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Microseconds and count by type of operator, those that write much apart; the longest first."""
    times: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, tuple[str, bool]] = {}
    for event in found:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            written = sum(prod(shape) for output in event["args"]["output_type_shape"] for shape in output.values())
            times[event["name"]].append(event["dur"])
            kinds[event["name"]] = (event["args"]["op_name"], written > SMALL)
    rows: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for name, durations in times.items():
        rows[kinds[name]].append(statistics.median(durations[len(durations) // 10 :]))
    table = [{"operator": kind, "large": large, "count": len(us), "us": sum(us)} for (kind, large), us in rows.items()]
    return sorted(table, key=lambda row: -float(str(row["us"])))


def main() -> None:
    """Profile, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="ds_cnn", choices=list(SHAPES))
    parser.add_argument("--update", default="W3", choices=list(UPDATES))
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    step = Step(case(args.net, args.update), "onnx")
    rows = by_operator(events(step, args.repeats))
    step.close()
    result = {"net": args.net, "update": args.update, "rows": rows, "repeats": args.repeats}
    result |= {"versions": {name: version(name) for name in ("edgecl", "onnxruntime")}, "machine": machine()}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("operator", "writes", "count", "us", "share", title=f"{args.net} {args.update}")
    whole = sum(row["us"] for row in rows)
    for row in rows[:24]:
        size = f"more than {SMALL}" if row["large"] else "less"
        table.add_row(row["operator"], size, str(row["count"]), f"{row['us']:.0f}", f"{row['us'] / whole:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
