"""ExecuTorch as a target: rules on the runtime itself, gates that must refuse, and an engine that must not trust its file."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from edgecl import METHODS, prepare
from edgecl.graph.lowering import build
from edgecl_device import Learner
from edgecl_device.engines import executorch as device
from edgecl_device.errors import BundleError, EdgeclError, InputError
from edgecl_device.manifest import read_manifest
from edgecl_export import ExportError, export
from edgecl_export.targets import executorch as target

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def exported(toy):
    """Latent replay's bundle: a depthwise, a pointwise and a linear layer learn, with replay rows beside them."""
    return toy.bundle("latent_replay", engine="executorch")


def test_one_program_has_every_step_and_the_trunk_runs_in_xnnpack(exported):
    bundle, _ = exported
    files = target.ExecutorchFiles(bundle.path, bundle.manifest)
    assert {step.file for step in bundle.manifest.steps.values()} == {"steps.pte"}
    assert {plan.name for plan in files.program.execution_plan} == set(bundle.manifest.steps)
    assert "XnnpackBackend" in files.operators("encode")
    assert not any("convolution" in kind for step in bundle.manifest.steps for kind in files.operators(step))


def test_the_ledger_is_the_files_size(exported):
    bundle, _ = exported
    size = (bundle.path / "steps.pte").stat().st_size
    ledger = bundle.manifest.ledger
    assert ledger["frozen_weights"] + ledger["graphs"] == size
    assert 0 < ledger["frozen_weights"] < size


def test_gate_kernels(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(target, "registered", lambda: device.registered() - {"aten::addmm.out", "XnnpackBackend"})
    with pytest.raises(
        ExportError, match=r"gate 'kernels': step 'encode' uses XnnpackBackend, which ExecuTorch has no kernel for; add a rule"
    ):
        export(toy.prepared("ncm"), tmp_path / "bundle", engine="executorch")
    assert list(tmp_path.iterdir()) == []


def test_gate_frozen_tensors(toy, tmp_path, monkeypatch):
    """One bit of a weight is other in the file than in the learner: too little for parity to see."""
    write = target.ExecutorchTarget.write

    def spoiled(self, steps, folder):
        files = write(self, steps, folder)
        path = folder / "steps.pte"
        content = path.read_bytes()
        kernel = next(t for t in steps["encode"].graph.constants().values() if t.dim() == 4)
        layouts = [kernel.permute(axes).contiguous().numpy().tobytes() for axes in ((0, 1, 2, 3), (0, 2, 3, 1), (1, 2, 3, 0))]
        weight = next(layout for layout in layouts if content.count(layout) == 1)
        path.write_bytes(content.replace(weight, bytes([weight[0] ^ 1]) + weight[1:]))
        return files

    monkeypatch.setattr(target.ExecutorchTarget, "write", spoiled)
    with pytest.raises(ExportError, match=r"gate 'frozen tensors': step 'encode': .* differs in the bundle"):
        export(toy.prepared("ncm"), tmp_path / "bundle", engine="executorch")


def test_frozen_tensors_are_found_without_a_search_through_the_file(exported):
    bundle, ready = exported
    files = target.ExecutorchFiles(bundle.path, bundle.manifest)
    files.content = b""
    constants = [t.contiguous().numpy() for step in build(ready, "executorch").values() for t in step.graph.constants().values()]
    assert all(files.holds("encode", constant) for constant in constants)
    vectors = [constant for constant in constants if constant.size > 1]
    assert len(vectors) > 5
    for constant in vectors:
        assert not files.holds("encode", np.concatenate([constant.reshape(-1), np.zeros(16, constant.dtype)])), "padding is no content"
        changed = constant.copy()
        changed.reshape(-1)[-1] += 1
        assert not files.holds("encode", changed)


def test_gate_parity(toy, tmp_path, monkeypatch):
    real = target.exported

    def wrong(graph):
        for node in list(graph.operators):
            if graph.name == "learn" and node.target is torch.ops.aten.sub.Tensor:
                node.target = torch.ops.aten.add.Tensor
                graph.module.recompile()
                break
        return real(graph)

    monkeypatch.setattr(target, "exported", wrong)
    with pytest.raises(ExportError, match=r"gate 'parity': step 'learn': .* differs from eager"):
        export(toy.prepared("finetune"), tmp_path / "bundle", engine="executorch")


def test_biases_learn_in_the_delegate(toy):
    """Forward and backward through frozen kernels: the portable convolution is naive, and the delegate packs no bias that changes."""
    trainable = [name for name, _ in toy.prepared("finetune").learner.suffix.named_parameters() if name.endswith("bias")]
    bundle, _ = toy.bundle("finetune", engine="executorch", trainable=tuple(trainable))
    kernels = target.ExecutorchFiles(bundle.path, bundle.manifest).operators("learn")
    assert not any("convolution" in kernel for kernel in kernels), kernels


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_every_optimiser_exports(toy, optimizer):
    """SGD's updates are in every other test; a bundle exists only when its gates held, parity among them."""
    bundle, _ = toy.bundle("finetune", engine="executorch", optimizer=optimizer, lr=1e-3)
    assert any(spec.name.startswith(optimizer) for spec in bundle.manifest.state)


def test_what_executorch_cannot_lower_is_one_error(toy, tmp_path, monkeypatch):
    def refuse():
        raise RuntimeError("no such layout")

    monkeypatch.setattr(target, "_partitioner", refuse)
    with pytest.raises(EdgeclError, match=r"ExecuTorch cannot lower these steps \(no such layout\); export for onnx"):
        export(toy.prepared("ncm"), tmp_path / "bundle", engine="executorch")
    assert list(tmp_path.iterdir()) == []


def edited(bundle, folder, change):
    """A manifest of the same file with one step changed."""
    manifest = read_manifest(bundle.path)
    step = manifest.steps["learn"]
    return dataclasses.replace(manifest, steps={**manifest.steps, "learn": change(step)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: dataclasses.replace(s, inputs=s.inputs[:-1]), r"input \d+ must be absent as the manifest says"),
        (lambda s: dataclasses.replace(s, state_in=s.state_in[::-1]), r"input 0 \(.*\) must be"),
        (lambda s: dataclasses.replace(s, outputs=s.outputs[1:]), r"output 0 \(.*\) must be"),
        (
            lambda s: dataclasses.replace(s, inputs=(dataclasses.replace(s.inputs[0], dtype="float64"), *s.inputs[1:])),
            r"input \d+ \(z\) must be",
        ),
    ],
)
def test_a_program_that_is_not_the_manifests_is_refused(exported, tmp_path, change, message):
    bundle, _ = exported
    with pytest.raises(BundleError, match=rf"steps\.pte: step 'learn': {message}"):
        device.ExecutorchEngine(bundle.path, edited(bundle, tmp_path, change))


def test_a_missing_step_and_a_damaged_program_are_refused(exported, tmp_path):
    bundle, _ = exported
    manifest = read_manifest(bundle.path)
    other = dataclasses.replace(manifest, steps={**manifest.steps, "adapt": manifest.steps["predict"]})
    with pytest.raises(BundleError, match=r"steps\.pte: ExecuTorch cannot load step 'adapt'"):
        device.ExecutorchEngine(bundle.path, other)
    (tmp_path / "steps.pte").write_bytes((bundle.path / "steps.pte").read_bytes()[:200])
    with pytest.raises(BundleError, match=r"steps\.pte: ExecuTorch cannot load step 'encode'"):
        device.ExecutorchEngine(tmp_path, manifest)


@pytest.mark.parametrize("threads", [0, 65, 1.5])
def test_threads_are_checked(exported, threads):
    with pytest.raises(InputError, match=r"^threads: "):
        Learner.load(exported[0].path, threads=threads)


def test_memory_is_planned_at_export(exported):
    with pytest.raises(InputError, match=r"^memory: must be fastest on ExecuTorch, which plans memory .*, got 'smallest'; leave it out"):
        Learner.load(exported[0].path, memory="smallest")


def test_the_engine_is_the_bundles_unless_another_is_asked_for(exported):
    path = exported[0].path
    with Learner.load(path) as learner:
        assert learner._engine.name == "executorch"
    with pytest.raises(BundleError, match="was exported for engine 'executorch', not 'onnx'; pass engine='executorch'"):
        Learner.load(path, engine="onnx")
    with pytest.raises(InputError, match="engine: must be one of onnx, executorch, got 'tflite'"):
        Learner.load(path, engine="tflite")


def test_without_the_package_the_error_names_it(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    device._executorch.cache_clear()
    with pytest.raises(EdgeclError, match=r"executorch is not installed; install it with: pip install 'edgecl\[executorch\]'"):
        Learner.load(exported[0].path)
    monkeypatch.undo()
    device._executorch.cache_clear()
    Learner.load(exported[0].path).close()


def test_loading_says_nothing(exported):
    """Neither ExecuTorch's notes on the processor nor its packages' on what they could not import."""
    code = f"from edgecl_device import Learner; Learner.load({str(exported[0].path)!r}).close(); print('done')"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("ridge", {"dtype": "float64", "drift": 0.99, "reflect": True}),
        ("slda", {"dtype": "float64"}),
        ("ridge", {"projection": 40}),
    ],
)
def test_precision_and_a_projection_of_analytic_methods(method, config, tmp_path):
    x = np.random.default_rng(0).standard_normal((60, 16)).astype(np.float32)
    y = np.arange(60) % 5
    model = nn.Sequential(nn.ReLU(), nn.Linear(16, 5))  # a trunk that rounds nothing
    ready = prepare(model, at="0", example=x[:1], method=method, classes=5, config=METHODS[method].Config(**config)).fit(x[:30], y[:30])
    state = ready.state
    with Learner.load(export(ready, tmp_path / "bundle", engine="executorch").path) as learner:
        for sample, label in zip(x[30:], y[30:], strict=True):
            z = torch.from_numpy(sample[None]).relu()
            state = {**state, **ready.learner.prime(state, z, torch.tensor([label]))[1]}
            learner.learn(sample, int(label))
        assert learner.report()["learned"] == 30
        ended = learner.state()
    for name, value in state.items():
        bar = 1e-14 if value.dtype == torch.float64 else 1e-5
        assert np.linalg.norm(ended[name] - value.numpy()) <= bar * value.norm().item(), name
