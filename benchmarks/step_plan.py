"""Planned memory of an update against what the runtimes plan and use.

    python benchmarks/step_plan.py [--nets mobilenet_v2 ...] [--updates W1 ...] [--out FILE]

The step ``learn`` of every update of ``step_latency.py``: bytes of intermediate tensors at their peak, without inputs, state and outputs.

* ExecuTorch: the arena of the program with portable kernels alone, as its own planner makes it and as it ships; and the arena of the
  program with XNNPACK, inputs and outputs included, which holds nothing that the delegate takes for itself.
* ONNX Runtime: the largest figures of ``mem_bytes_requested_in_use`` and of ``mem_bytes_in_use``, which holds the allocator's rounding,
  after an operator in its own profile, less those before the first, with outputs bound and without memory patterns, which reserve
  everything at once.

Writes ``benchmarks/results/step_plan.json``.
"""

import argparse
import functools
import json
import tempfile
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from rich.console import Console
from update_cases import SHAPES, UPDATES, case
from update_engines import prepared_of

from edgecl.figures import machine
from edgecl.graph.lowering import BuiltStep, build
from edgecl.graph.memory import kept_for_backward, least_bytes
from edgecl_device.engines.onnx import EQUAL_OPERATORS_STAY, STATE_IN
from edgecl_export.targets.executorch import program_of
from edgecl_export.targets.onnx import OnnxTarget

OUT = Path(__file__).parent / "results" / "step_plan.json"


def ours(step: BuiltStep) -> dict[str, Any]:
    """What edgecl plans."""
    plan = step.plan
    kept = kept_for_backward(step.graph)
    return {"arena": plan.arena_bytes, "peak": plan.peak_bytes, "least": least_bytes(step.graph), "kept_for_backward": kept}


def executorch_plans(step: BuiltStep) -> dict[str, int]:
    """Arenas of one step's programs."""
    from executorch.exir.memory_planning import MemoryPlanningAlgorithmSuite, greedy
    from executorch.exir.passes import MemoryPlanningPass

    from edgecl_export.targets.planning import by_lifetimes

    sizes: dict[str, int] = {}

    def recorded(name: str, algorithm: Any) -> Any:
        @functools.wraps(algorithm)
        def plan(*args: Any) -> Any:
            result = algorithm(*args)
            sizes[name] = sum(result.bufsizes)
            return result

        return plan

    suite = MemoryPlanningAlgorithmSuite([recorded("own planner", greedy), recorded("by lifetimes", by_lifetimes)])
    planning = MemoryPlanningPass(suite, alloc_graph_input=False, alloc_graph_output=False)
    portable = program_of({"learn": step}, delegate=False, planning=planning)
    shipped = program_of({"learn": step})
    return {
        "own_planner": sizes["own planner"],
        "portable": sum(portable.executorch_program.execution_plan[0].non_const_buffer_sizes),
        "shipped": sum(shipped.executorch_program.execution_plan[0].non_const_buffer_sizes),
    }


def session_of(step: BuiltStep, folder: Path, *, profile: bool) -> tuple[Any, Any]:
    """ONNX Runtime's session of a step as the device has it, but without memory patterns, and a binding with zeros and all outputs."""
    OnnxTarget().write({"learn": step}, folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.add_session_config_entry(*EQUAL_OPERATORS_STAY)
    options.enable_profiling = profile
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(folder / "learn.onnx", options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for port in step.graph.inputs:
        name = STATE_IN + port.name if port.kind == "state" else port.name
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(port.spec.shape, port.spec.dtype)))
    for port, given in zip(step.graph.outputs, session.get_outputs(), strict=True):
        kind = np.dtype(port.spec.dtype).type
        binding.bind_ortvalue_output(given.name, onnxruntime.OrtValue.ortvalue_from_shape_and_type(given.shape, kind))
    return session, binding


def onnx_use(step: BuiltStep) -> dict[str, int]:
    """Most bytes asked for, and held by the allocator for them, after an operator of ONNX Runtime's second run; without those before it."""
    with tempfile.TemporaryDirectory() as folder:
        session, binding = session_of(step, Path(folder), profile=True)
        for _ in range(2):
            session.run_with_iobinding(binding)
        events = json.loads(Path(session.end_profiling()).read_text())
    args = [event["args"] for event in events if "mem_bytes_in_use" in event.get("args", {})]
    found = {}
    for name, key in (("requested", "mem_bytes_requested_in_use"), ("in_use", "mem_bytes_in_use")):
        second = [int(of[key]) for of in args[len(args) // 2 :]]
        found[name] = max(second) - min(second)
    return found


def measure(net: str, update: str) -> dict[str, Any]:
    """One update on both runtimes."""
    prepared = prepared_of(case(net, update))
    onnx, executorch = build(prepared, "onnx")["learn"], build(prepared, "executorch")["learn"]
    return {
        "net": net,
        "update": update,
        "onnx": ours(onnx) | onnx_use(onnx),
        "executorch": ours(executorch) | executorch_plans(executorch),
    }


def main() -> None:
    """Measure every case, and write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--updates", nargs="+", default=list(UPDATES), choices=list(UPDATES))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rows = []
    for net, update in product(args.nets, args.updates):
        rows.append(measure(net, update))
        versions = {name: version(name) for name in ("edgecl", "torch", "onnxruntime", "executorch")}
        args.out.write_text(json.dumps({"rows": rows, "versions": versions, "machine": machine()}, indent=1) + "\n")
        of = rows[-1]
        Console().print(
            f"{net} {update}: ExecuTorch {of['executorch']['arena'] / of['executorch']['portable']:.3f}, "
            f"ONNX Runtime {of['onnx']['least'] / of['onnx']['requested']:.3f}"
        )


if __name__ == "__main__":
    main()
