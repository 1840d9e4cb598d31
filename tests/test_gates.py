"""Gates: each refuses what it is for, and none a learner that is right."""

import re

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import edgecl_export.bundle as bundle
from edgecl import METHODS, ImageU8, prepare
from edgecl.graph.lowering import build
from edgecl.methods.finetune import Finetune
from edgecl_device import BundleError
from edgecl_export import ExportError, export
from edgecl_export.onnx_ops import TRANSLATIONS
from edgecl_export.targets import onnx as targets

torch.set_num_threads(1)


@pytest.fixture
def spoil(monkeypatch):
    """Changes every model between the emitter and the file."""

    def install(change):
        real = targets.Emitter

        class Spoiled(real):
            def emit(self):
                model = super().emit()
                change(self.graph.name, model)
                return model

        monkeypatch.setattr(targets, "Emitter", Spoiled)

    return install


def replace_first(model, op_type, new_type, **attributes):
    """Another operator in place of the first of a kind."""
    node = next(n for n in model.graph if n.op_type == op_type)
    other = ir.node(new_type, [node.inputs[0]], attributes, outputs=[ir.Value(name=o.name + "_new") for o in node.outputs])
    model.graph.insert_before(node, other)
    for old, new in zip(node.outputs, other.outputs, strict=True):
        new.shape, new.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new)
    model.graph.remove(node)


def test_every_gate_reports_what_it_found(toy):
    exported, _ = toy.bundle("latent_replay")
    names = ["kernels", "no random operator", "state is input", "initial state", "parity", "frozen tensors", "loads"]
    assert [gate.name for gate in exported.gates] == names
    assert all(gate.found for gate in exported.gates)
    parity = next(gate.found for gate in exported.gates if gate.name == "parity")
    words = r"change \S+, outputs \S+, state \S+; (\d+) comparisons held the bare bars, (\d+) needed an allowance; states: (.*)"
    found = re.fullmatch(words, parity)
    assert found is not None
    assert int(found[1]) > 24 * 10 > int(found[2])
    assert found[3] == "encode 9, predict 25, learn 25", "24 of a trajectory and one of zeros; 8 raw samples and a random one"


def planted(monkeypatch, operator, change):
    """Another translation of an operator, in every step or in one."""
    good = TRANSLATIONS[operator]
    monkeypatch.setitem(TRANSLATIONS, operator, lambda emitter, node, *args, **kwargs: change(good, emitter, node, *args, **kwargs))


@pytest.mark.parametrize("fit", [False, True])
@pytest.mark.parametrize("step", ["forget", "relabel"])
@pytest.mark.parametrize("classes", [5, 100])
def test_gate_parity_compares_revisions_of_what_was_learned(tmp_path, monkeypatch, fit, step, classes):
    """From a state that has not learned the sample, both engines refuse, and a wrong step would pass."""

    def seven(good, emitter, node, added, left, right, beta=1, alpha=1):
        return good(emitter, node, added, left, right, beta, alpha * (7.0 if emitter.graph.name == step else 1.0))

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, classes))
    x = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    ready = prepare(model, at="1", example=x[:1], method="ridge", classes=classes)
    if fit:
        ready.fit(x, np.arange(40) % 2)
    parity = next(g.found for g in export(ready, tmp_path / "good").gates if g.name == "parity")
    counts = dict(part.split() for part in parity.split("states: ")[1].split(", "))
    assert [counts[name] for name in ("learn", "forget", "relabel")] == ["25"] * 3
    planted(monkeypatch, torch.ops.aten.addmm.default, seven)
    with pytest.raises(ExportError, match=f"gate 'parity': step '{step}': .* differs from eager"):
        export(ready, tmp_path / "bad")


@pytest.mark.parametrize("samples", [30, 1])
def test_statistics_of_rows_in_a_deep_network_pass_parity(tmp_path, samples):
    """Of the same rows again they change by roundings alone, which add up over the layers: no state may meet its last rows again."""
    torch.manual_seed(0)
    deep = [layer for _ in range(8) for layer in (nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))]
    head = [nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *deep, *head).eval()
    x, y = np.random.default_rng(0).normal(size=(30, 1, 12, 12)).astype(np.float32), np.arange(30) % 2
    config = METHODS["bn_stats"].Config(rows_per_step=16, every=16, statistics="rows")
    prepared = prepare(model, at="0", example=x[:1], method="bn_stats", classes=2, config=config).fit(x[:samples], y[:samples])
    found = {gate.name: gate.found for gate in export(prepared, tmp_path / "bundle").gates}
    assert "adapt 25" in found["parity"]


def test_what_a_single_sample_cannot_forget_two_alike_can(tmp_path):
    """A guard that refuses to let the last sample of a direction go: the gate learns another like it."""
    model = nn.Sequential(nn.Identity(), nn.Linear(64, 4))
    x = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)
    ready = prepare(model, at="0", example=x, method="ridge", classes=4, config=METHODS["ridge"].Config(tau=0.3))
    parity = next(g.found for g in export(ready, tmp_path / "bundle").gates if g.name == "parity")
    assert "forget 25, relabel 25" in parity


def test_gate_parity_refuses_a_step_that_is_never_compared(toy, tmp_path):
    """Features of such a length that the guard refuses every sample: the bundle would never learn."""
    toy.refused(
        tmp_path, toy.prepared("ridge", fit=False, gamma=1e-7, unit_norm=False), r"gate 'parity': step 'learn' could be .* from \d "
    )


@pytest.mark.parametrize("real", [False, True])
def test_gate_parity_encodes_more_than_one_sample(toy, tmp_path, monkeypatch, real):
    """A black image hides a transposed one."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10))
    x = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    x[0] = 0
    preprocess = ImageU8([0.5] * 3, [0.25] * 3, "HWC")
    ready = prepare(model, at="2", example=x[:1], method="ncm", classes=10, preprocess=preprocess)
    if real:
        ready.fit(x, np.arange(20) % 10)
        assert ready.samples.shape == (8, 8, 8, 3) and np.array_equal(ready.samples[[0, -1]], x[[0, -1]])
    planted(monkeypatch, torch.ops.aten.permute.default, lambda good, emitter, node, x, axes: emitter.op("Transpose", x, perm=[0, 3, 2, 1]))
    toy.refused(tmp_path, ready, "gate 'parity': step 'encode': z differs from eager")


def test_gate_kernels(toy, spoil, tmp_path):
    spoil(lambda step, model: replace_first(model, "Relu", "Swish") if step == "encode" else None)
    toy.refused(tmp_path, "ridge", r"gate 'kernels': step 'encode' uses Swish, opset 18, .*no kernel.*; add a rule")


def test_gate_no_random_operator(toy, spoil, tmp_path):
    spoil(lambda step, model: replace_first(model, "Relu", "RandomNormalLike") if step == "encode" else None)
    toy.refused(tmp_path, "ridge", r"gate 'no random operator': step 'encode' draws random numbers \(RandomNormalLike\)")


def test_gate_state_is_input_of_the_graph(toy, spoil, tmp_path):
    def bake(step, model):
        if step == "predict":
            value = next(v for v in model.graph.inputs if v.name == "state.readout")
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(np.zeros(value.shape.numpy(), np.float32), name=value.name)
            model.graph.initializers[value.name] = value

    spoil(bake)
    toy.refused(tmp_path, "ridge", r"gate 'state is input': step 'predict': \['state.readout'\] must be inputs")


@pytest.mark.parametrize("transposed", [False, True])
def test_gate_state_is_not_baked_in(toy, tmp_path, transposed):
    class Baked(Finetune):
        """Predicts with the weights that it was made with: eager and ONNX agree, and it never learns."""

        def predict(self, state, z):
            outputs, new = super().predict(state, z)
            weight, row = self.suffix.get_parameter("mid.3.weight").reshape(8, 6), z.reshape(1, -1)
            baked = torch.mm(row[:, :6], weight.t()) if transposed else torch.mm(row[:, :8], weight)
            return {"scores": outputs["scores"] + baked.sum(1, keepdim=True)}, new

    ready = toy.prepared("finetune")
    ready.learner = Baked(ready.learner.problem, ready.learner.config, suffix=ready.learner.suffix)
    toy.refused(tmp_path, ready, r"gate 'state is input': step 'predict' holds the values of state 'param.mid.3.weight' as a constant")


def test_gate_initial_state(toy, monkeypatch, tmp_path):
    real = bundle.save

    def spoiled(tensors):
        return real({name: array + np.float32(1e-6) if name == "readout" else array for name, array in tensors.items()})

    monkeypatch.setattr(bundle, "save", spoiled)
    toy.refused(tmp_path, "ridge", "gate 'initial state': 'readout' in the bundle differs")


def test_gate_parity(toy, spoil, tmp_path):
    spoil(lambda step, model: replace_first(model, "Clip", "Identity") if step == "learn" else None)
    toy.refused(tmp_path, "finetune", "gate 'parity': step 'learn': .* differs from eager by")


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("factor", [1.1, 0.9])
def test_gates_refuse_a_step_that_is_ten_percent_wrong(toy, spoil, tmp_path, trained, factor):
    """Also on a network that knows its samples, whose losses are all but zero."""

    def change(step, model):
        if step == "learn":
            lr = next(v for v in model.graph.inputs if v.name == "lr")
            users = list(lr.uses())
            scale = ir.Value(name="scale", shape=ir.Shape(()), type=lr.type, const_value=ir.tensor(np.float32(factor), name="scale"))
            model.graph.initializers["scale"] = scale
            wrong = ir.node("Mul", [lr, scale], outputs=[ir.Value(name="wrong_lr", shape=lr.shape, type=lr.type)])
            model.graph.insert_before(next(iter(model.graph)), wrong)
            for node, index in users:
                node.replace_input_with(index, wrong.outputs[0])

    net = toy.helpers.Net()
    x, y = toy.helpers.samples(60)
    if trained:
        optimiser = torch.optim.Adam(net.parameters(), 0.03)
        for _ in range(150):
            optimiser.zero_grad()
            loss = F.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y))
            loss.backward()
            optimiser.step()
        assert loss < 1e-3
    ready = prepare(net, at="stem", example=x[:1], method="latent_replay", classes=5, config=toy.config("latent_replay")).fit(x, y)
    export(ready, tmp_path / "right")
    (tmp_path / "wrong").mkdir()
    spoil(change)
    toy.refused(tmp_path / "wrong", ready, "gate 'parity': step 'learn': .* differs from eager by")


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_gates_refuse_an_altered_weight(toy, monkeypatch, tmp_path, size):
    """A large change is seen by parity, a small one by the comparison to the bit."""
    real = targets.WeightFile.place

    def altered(self, array):
        array = np.array(array)
        if array.dtype == np.float32 and array.size > 50:
            array.flat[0] *= 1 + np.float32(size)
        return real(self, array)

    monkeypatch.setattr(targets.WeightFile, "place", altered)
    toy.refused(tmp_path, "frozen", "gate '(parity|frozen tensors)'")


def test_frozen_tensors_are_read_once(toy, monkeypatch):
    """However many there are to look for."""
    exported, ready = toy.bundle("latent_replay")
    files = targets.OnnxFiles(exported.path, exported.manifest)
    read, tobytes = [], ir.ExternalTensor.tobytes
    monkeypatch.setattr(ir.ExternalTensor, "tobytes", lambda tensor: read.append(tensor.name) or tobytes(tensor))
    steps = build(ready)
    for _ in range(2):
        assert all(files.holds(name, t.contiguous().numpy()) for name, step in steps.items() for t in step.graph.constants().values())
    stored = [
        v for model in files.models.values() for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)
    ]
    assert len(read) == len(stored) > 0
    assert not files.holds("encode", np.full(3, 0.123, np.float32))


def test_gates_refuse_files_that_change_while_they_run(toy, monkeypatch, tmp_path):
    real = bundle.verify

    def late(folder, *rest):
        (folder / "weights.bin").write_bytes((folder / "weights.bin").read_bytes()[::-1])
        return real(folder, *rest)

    monkeypatch.setattr(bundle, "verify", late)
    toy.refused(tmp_path, "ridge", "weights.bin: SHA-256 differs", BundleError)


def test_gate_loads(toy, tmp_path):
    """A log that holds no sample: every graph is right, and yet nothing could be learned."""
    with pytest.raises(ExportError, match=r"gate 'loads': the device's loop refuses .*log_capacity_bytes: must be at least"):
        export(toy.prepared("ncm"), tmp_path / "bundle", log_capacity_bytes=10)
    assert list(tmp_path.iterdir()) == []


IDENTICAL = [("ncm", {}), ("slda", {}), ("ridge", {}), ("ridge", {"gamma": 1.0})]


@pytest.mark.parametrize(("method", "config"), IDENTICAL, ids=str)
@pytest.mark.parametrize("kind", ["identical", "nothing", "normal"])
def test_learners_of_odd_but_legitimate_samples_ship(tmp_path, method, config, kind):
    """Forty times one sample, none at all, six noisy ones."""
    model = nn.Sequential(nn.Identity(), nn.Linear(64, 4))
    x = np.random.default_rng(1).standard_normal((40, 64)).astype(np.float32)
    x = np.repeat(x[:1], 40, 0) if kind == "identical" else x[:6]
    ready = prepare(model, at="0", example=x[:1], method=method, classes=4, config=METHODS[method].Config(**config))
    export(ready if kind == "nothing" else ready.fit(x, np.arange(len(x)) % 4), tmp_path / "bundle")


def test_a_badly_conditioned_learner_is_told_the_mend(toy, tmp_path):
    model = nn.Sequential(nn.Identity(), nn.Linear(64, 4))
    x = np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32)
    config = METHODS["ridge"].Config(unit_norm=False, gamma=0.02)
    ready = prepare(model, at="0", example=x[:1], method="ridge", classes=4, config=config).fit(x, np.arange(6) % 4)
    toy.refused(tmp_path, ready, "gate 'parity': .*; if the learner is badly conditioned .* use unit_norm or float64; else report this")


def test_integers_that_are_indices(tmp_path):
    """The gates run on a sample that the model takes; other numbers may be no row of its table."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
            self.flat, self.head = nn.Flatten(), nn.Linear(32, 3)

        def forward(self, x):
            return self.head(self.flat(torch.index_select(self.table, 0, x.reshape(-1)).reshape(-1, 4, 8)))

    x = np.array([[0, 4, 1, 2], [3, 3, 0, 1]])
    export(prepare(Table(), at="flat", example=x[:1], classes=3).fit(x, np.array([0, 1])), tmp_path / "bundle")


def test_rows_of_one_sample_that_are_indices(tmp_path):
    """They are the same in every state, as others may be no row of the table."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.table, self.norm, self.head = nn.Identity(), nn.Embedding(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.norm(self.table(self.front(x))).mean(1))

    torch.manual_seed(0)
    x = np.array([[0, 4, 1, 2]])
    config = METHODS["tent"].Config(rows_per_step=4, every=4)
    prepared = prepare(Table(), at="front", example=x, method="tent", classes=3, config=config).fit(x, np.array([0]))
    found = {gate.name: gate.found for gate in export(prepared, tmp_path / "bundle").gates}
    assert "adapt 25" in found["parity"]
