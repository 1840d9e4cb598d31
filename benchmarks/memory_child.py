"""The child of ``step_memory.py``: loads one engine's update, makes it 200 times, and prints its resident memory."""

import json
import sys
from pathlib import Path

UPDATES = 200


def resident(name: str) -> int:
    """Bytes of this process by the kernel's name for them: VmRSS now, VmHWM at its peak."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def edgecl(folder: str, memory: str) -> int:
    """A bundle through the device's own loop."""
    import numpy as np
    import onnxruntime  # noqa: F401

    import edgecl_device

    imported = resident("VmRSS")
    x = np.load(Path(folder) / "x.npy")
    with edgecl_device.Learner.load(Path(folder) / "bundle", memory=memory) as learner:
        for i in range(UPDATES):
            learner.learn(x, i % 10)
    return imported


def eager(net: str, update: str) -> int:
    """PyTorch's autograd and SGD."""
    import torch
    from update_cases import LR, Loss, case, loss_inputs, trained_of

    imported = resident("VmRSS")
    torch.set_num_threads(1)
    of = case(net, update)
    module = Loss(of)
    inputs, trained = loss_inputs(of), trained_of(module)
    optimiser = torch.optim.SGD(list(trained.values()), LR)
    for _ in range(UPDATES):
        optimiser.zero_grad()
        module(*inputs).backward()
        optimiser.step()
    return imported


def ort_training(folder: str) -> int:
    """The training build, from artifacts that are there."""
    import numpy as np
    import onnxruntime
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    imported = resident("VmRSS")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    state = CheckpointState.load_checkpoint(Path(folder) / "checkpoint")
    module = Module(Path(folder) / "training_model.onnx", state, session_options=options)
    optimiser = Optimizer(Path(folder) / "optimizer_model.onnx", module)
    with np.load(Path(folder) / "inputs.npz") as found:
        inputs = [found[name] for name in found]
    for _ in range(UPDATES):
        module(*inputs)
        optimiser.step()
        module.lazy_reset_grad()
    return imported


if __name__ == "__main__":
    after_imports = {"edgecl": edgecl, "eager": eager, "ort_training": ort_training}[sys.argv[1]](*sys.argv[2:])
    print(json.dumps({"after_imports": after_imports, "peak": resident("VmHWM")}))
