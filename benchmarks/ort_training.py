"""The child of ``step_latency.py`` that runs ONNX Runtime's training build: makes artifacts, then answers requests on standard input."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.training import artifacts
from onnxruntime.training.api import CheckpointState, Module, Optimizer


def main(folder: Path, lr: float, listed: bool) -> None:
    """Answer ``ready``, a class (with the seconds of one update) and ``weights`` until the input ends."""
    onnxruntime.set_default_logger_severity(3)
    trained = json.loads((folder / "trained.json").read_text())
    model = onnx.load(folder / "loss.onnx")
    frozen = [tensor.name for tensor in model.graph.initializer if tensor.name not in trained] if listed else None
    artifacts.generate_artifacts(
        model, requires_grad=trained, frozen_params=frozen, optimizer=artifacts.OptimType.SGD, artifact_directory=str(folder)
    )
    for path in folder.glob("*_model.onnx"):  # today's onnx writes a format that this release does not read
        model = onnx.load(path)
        model.ir_version = min(model.ir_version, 10)
        onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    state = CheckpointState.load_checkpoint(folder / "checkpoint")
    module = Module(folder / "training_model.onnx", state, session_options=options)
    optimiser = Optimizer(folder / "optimizer_model.onnx", module)
    optimiser.set_learning_rate(lr)
    with np.load(folder / "inputs.npz") as found:
        inputs = [found[name] for name in found]
    for line in sys.stdin:
        request, answer = line.strip(), "yes"
        if request == "weights":
            np.savez(folder / "weights.npz", **{name: state.parameters[name].data for name in trained})
        elif request != "ready":
            inputs[-1][0] = 0
            inputs[-1][0, int(request)] = 1
            start = time.perf_counter()
            module(*inputs)
            optimiser.step()
            module.lazy_reset_grad()
            answer = str(time.perf_counter() - start)
        print(answer, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "listed")
