"""From a model to a learner: what is refused, what it says, and that nothing has changed afterwards."""

import numpy as np
import pytest
import torch
from torch import nn

from edgecl import METHODS, ImageU8, SplitError, prepare
from edgecl.engine import EagerEngine
from edgecl.trees import flatten_tree
from edgecl_device.errors import EdgeclError, InputError
from edgecl_export import export

torch.set_num_threads(1)

FITTED = list(METHODS)


def snapshot(toy, ready):
    memory = None if ready.memory is None else {k: v.tobytes() for k, v in ready.memory.snapshot().items()}
    return {k: v.tobytes() for k, v in toy.helpers.arrays(ready.state).items()}, memory, len(ready.examples)


def spoil_x(kind, x):
    if kind == "nan":
        x = x.copy()
        x[7, 0, 2, 2] = np.nan
    if kind == "infinity":
        x = np.where(np.arange(x.size).reshape(x.shape) == 99, np.float32(np.inf), x)
    wrong = {
        "list": x.tolist(),
        "tensor": torch.from_numpy(x),
        "scalar": np.float32(3),
        "size": x[:, :, :5],
        "rank": x[:, 0],
        "dtype": x.astype(np.float64),
        "integers": np.zeros(x.shape, np.uint8),
        "text": np.full(x.shape, "a"),
        "empty": x[:0],
        "overflow": np.full_like(x, 3e38),
        "too long": np.full_like(x, 1e21),  # finite, but their squares are not
        "masked": np.ma.masked_array(x, x > 1),
    }
    return wrong.get(kind, x)


X = {
    "list": "numpy array",
    "tensor": "numpy array",
    "scalar": "numpy array",
    "size": r"must be float32 \[N, 1, 8, 8\] as the example, got float32 \[60, 1, 5, 8\]",
    "rank": r"got float32 \[60, 8, 8\]",
    "dtype": r"got float64 \[60, 1, 8, 8\]",
    "integers": "got uint8",
    "text": "must hold numbers",
    "empty": "at least one sample",
    "nan": "values must be finite",
    "infinity": "values must be finite",
    "overflow": "features must be finite",
    "too long": "features must be finite, and so must their squares",
    "masked": "numpy array",
}


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("kind", X)
def test_fit_refuses_samples(toy, kind, fitted):
    x, y = toy.helpers.samples(60)
    ready = toy.prepared("latent_replay", fit=fitted)
    before = snapshot(toy, ready)
    bad = spoil_x(kind, x)
    with pytest.raises(InputError, match=f"^x: .*{X[kind]}.*; "):
        ready.fit(bad, y[:0] if kind == "empty" else y)
    assert snapshot(toy, ready) == before
    ready.fit(x, y)


@pytest.mark.parametrize("method", FITTED)
@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda y: y[:5], r"y: must be integers \[60\].*got int64 \[5\]"),
        (lambda y: y[:, None], r"y: must be integers \[60\].*got int64 \[60, 1\]"),
        (lambda y: y.astype(np.float32), "y: must be integers.*got float32"),
        (lambda y: y > 1, "y: must be integers.*got bool"),
        (lambda y: y.astype(str), "y: must be integers.*got <U"),
        (lambda y: y - 1, r"y: labels must be in \[0, 5\), got -1 to 3"),
        (lambda y: y + 1, r"y: labels must be in \[0, 5\), got 1 to 5"),
    ],
)
def test_fit_refuses_labels(toy, method, spoil, match):
    x, y = toy.helpers.samples(60)
    ready = toy.prepared(method)
    before = snapshot(toy, ready)
    with pytest.raises(InputError, match=f"^{match}.*; "):
        ready.fit(x, spoil(y))
    assert snapshot(toy, ready) == before


def test_fit_refuses_a_state_that_is_not_finite(toy):
    x, y = toy.helpers.samples(60)
    ready = toy.prepared("slda", unit_norm=False)
    before = snapshot(toy, ready)
    with pytest.raises(InputError, match=r"^x: sample \d+ must leave a finite state within the method's guard"):
        ready.fit(x * np.float32(3e17), y)
    assert snapshot(toy, ready) == before


def test_an_interrupted_fit_changes_nothing(toy):
    x, y = toy.helpers.samples(60)
    ready = toy.prepared("latent_replay")
    before = snapshot(toy, ready)

    def stop(done, total):
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ready.fit(x, y, progress=stop)
    assert snapshot(toy, ready) == before


# Their warm-up is on the samples of the first part alone.
@pytest.mark.parametrize("method", [name for name in FITTED if name not in ("affine_warmup", "ecotta")])
def test_fit_in_two_parts_equals_fit_at_once(toy, method):
    x, y = toy.helpers.samples(80)
    once, twice = toy.prepared(method, fit=False), toy.prepared(method, fit=False)
    seen = []
    once.fit(x, y, batch=1, progress=lambda done, total: seen.append((done, total)))
    if method == "latent_replay":
        # The first part fixes the codec's range, so both learners get the range of all.
        once.learner.codecs = twice.learner.codecs
        for codec in twice.learner.codecs.values():
            codec.fit(torch.cat(once.encode(x)))
        once, twice.learner.calibrate = toy.prepared(method, fit=False), lambda latents: None
        once.learner.codecs, once.learner.calibrate = twice.learner.codecs, lambda latents: None
        once.fit(x, y)
    twice.fit(x[:50], y[:50]).fit(x[50:], y[50:])
    for name, value in once.state.items():
        assert torch.allclose(value, twice.state[name], rtol=1e-5, atol=1e-6), name
    assert seen == [(i + 1, 80) for i in range(80)]
    if once.memory is not None:
        # rows of methods that adapt come from the stream alone
        assert once.memory.seen == twice.memory.seen == (80 if once.learner.adaptation is None else 0)
        assert snapshot(toy, once)[1] == snapshot(toy, twice)[1]
    assert len(twice.examples) == 32


def test_fit_gives_what_the_steps_give(toy):
    """One by one through the eager engine."""
    x, y = toy.helpers.samples(30)
    ready = toy.prepared("ridge", fit=False)
    engine = EagerEngine(ready.trunk, ready.learner)
    for sample, label in zip(x, y, strict=True):
        z = engine.run("encode", {"x": sample[None]})
        engine.run("learn", {**z, "target": np.array([label]), "weight": np.ones(1, np.float32)})
        engine.commit()
    ready.fit(x, y, batch=1)
    assert toy.helpers.same(toy.helpers.arrays(ready.state), engine.state())


def test_encode_gives_what_the_model_computes(toy):
    x, _ = toy.helpers.samples(10)
    net = toy.helpers.Net()
    ready = prepare(net, at="stem", example=x[:1], method="frozen", classes=5)
    with torch.no_grad():
        want = net(torch.from_numpy(x))
        got = torch.cat([ready.learner.suffix(z) for z in ready.encode(x, batch=3)])
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def go(toy, **changes):
    x, _ = toy.helpers.samples(1)
    arguments = {"model": toy.helpers.Net(), "at": "stem", "example": x, "method": "ridge", "classes": 5, **changes}
    return prepare(arguments.pop("model"), **arguments)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "icarl"}, r"method: must be one of frozen, .*ridge.*got 'icarl'"),
        ({"config": 3}, r"config: must be METHODS\['ridge'\]\.Config or None, got 3; "),
        ({"config": METHODS["ncm"].Config()}, r"config: must be METHODS\['ridge'\]\.Config"),
        ({"classes": 1}, "classes: must be an integer of 2 to 1,048,576, got 1; "),
        ({"classes": 2.0}, "classes: must be an integer"),
        ({"classes": True}, "classes: must be an integer"),
        ({"classes": 10**12}, "classes: must be an integer of 2 to"),
        ({"method": ["ridge"]}, "method: must be one of"),
        ({"example": [[1.0]]}, "example: must be a numpy array.*got list; "),
        ({"example": np.zeros((2, 1, 8, 8), np.float32)}, r"example: must have a batch dimension of 1, got .*\[2, 1, 8, 8\]; use x\[:1\]"),
        ({"example": np.zeros((1, 3, 8, 8), np.float32)}, r"example: must suit preprocess and model, got float32 \[1, 3, 8, 8\].*; "),
        ({"example": np.zeros((1, 1, 8, 8))}, "example: must suit preprocess and model, got float64"),
        ({"example": np.array([[None]])}, "example: must hold numbers, got object; "),
        ({"example": np.full((1, 1, 8, 8), np.nan, np.float32)}, "example: values must be finite"),
        ({"class_names": list("abcdef")}, "class_names: must be at most 5 names, got 6; raise classes"),
        ({"class_names": ["mug", "mug"]}, r"class_names: must be different names, got \['mug'\] more than once"),
        ({"class_names": [1, 2]}, r"class_names: must be a list of strings.*got \[1, 2\]"),
        ({"class_names": [None]}, r"class_names: must be a list of strings.*got \[None\]"),
        ({"class_names": 5}, "class_names: must be a list of strings.*got 5"),
        ({"class_names": ["mug", ""]}, "class_names: .*none of them empty"),
        ({"class_names": "mug"}, "class_names: .*got 'mug'"),
    ],
)
def test_prepare_refuses(toy, changes, match):
    with pytest.raises(InputError, match=f"^{match}"):
        go(toy, **changes)


def test_an_unknown_split_lists_the_names(toy):
    with pytest.raises(SplitError, match=r"no module named 'stm' is called by the model; choose one of: stem, ") as caught:
        go(toy, at="stm")
    assert all(name in str(caught.value) for name in ("stem.0", "mid", "mid.3"))
    assert isinstance(caught.value, EdgeclError)


def test_the_users_model_is_not_changed(toy):
    net = toy.helpers.Net().train()
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    x, y = toy.helpers.samples(20)
    ready = go(toy, model=net, method="finetune").fit(x, y)
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, kept[k]) for k, v in net.state_dict().items())
    assert not ready.trunk.training


def test_raw_bytes_and_several_tensors_across_the_cut():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(2, 4)

        def forward(self, x):
            a = self.first(x)
            return self.fc((self.second(a) + a).mean((2, 3))[:, :2])

    x = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    preprocess = ImageU8([0.5] * 3, [0.2] * 3, "HWC")
    ready = prepare(Skip(), at="second", example=x[:1], method="ncm", classes=3, preprocess=preprocess, class_names=("cup", "pot"))
    ready.fit(x, np.arange(6) % 3)
    assert set(flatten_tree({"z": ready.learner.problem.features})) == {f"z.{name}" for name in ready.learner.problem.features}
    assert len(ready.learner.problem.features) == 2
    assert ready.learner.problem.feature_size == 2 * 4 * 36
    assert ready.x.dtype == "uint8"
    assert ready.class_names == ("cup", "pot")


class Mixed(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.mix, self.out = mix, nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.mix(x))


class Centre(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True) + 1


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean(0, keepdim=True)


@pytest.mark.parametrize("mix", [Centre, Pooled])
def test_a_trunk_that_depends_on_its_batch_is_refused(mix):
    x = np.random.default_rng(0).standard_normal((10, 6)).astype(np.float32)
    ready = prepare(Mixed(mix()), at="mix", example=x[:1], classes=3)
    before = {name: tensor.clone() for name, tensor in ready.state.items()}
    with pytest.raises(InputError, match=r"^x: .*depends on the rest of its batch of 10; pass batch=1"):
        ready.fit(x, np.arange(10) % 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ready.state.items())
    ready.fit(x, np.arange(10) % 3, batch=1)
    assert torch.equal(torch.cat(ready.encode(x, batch=1)), torch.cat([mix()(torch.tensor(row[None])) for row in x]))


def test_arrays_of_any_layout(toy):
    """Reversed, Fortran order, read only, and of the other byte order: as their plain copies."""
    x, y = toy.helpers.samples(20)
    frozen = x.copy()
    frozen.flags.writeable = False
    want = toy.helpers.arrays(toy.prepared("ridge", fit=False).fit(x, y).state)
    for odd in (x[::-1][::-1], np.asfortranarray(x), frozen, x.astype(">f4")):
        ready = prepare(toy.helpers.Net(), at="stem", example=odd[:1], method="ridge", classes=5)
        assert toy.helpers.same(toy.helpers.arrays(ready.fit(odd, y).state), want)
    reverse = toy.helpers.arrays(toy.prepared("ridge", fit=False).fit(x[::-1], y[::-1]).state)
    assert all(np.allclose(a, want[name], rtol=1e-3, atol=1e-4) for name, a in reverse.items())


@pytest.mark.parametrize("batch", [0, -1, 0.5, "a"])
def test_a_batch_is_a_positive_integer(toy, batch):
    with pytest.raises(InputError, match=r"^batch: must be "):
        toy.prepared("ridge").fit(*toy.helpers.samples(4), batch=batch)


def test_labels_in_rows_of_several_lengths(toy):
    with pytest.raises(InputError, match=r"^y: must be integers \[2\].*rows of several lengths"):
        toy.prepared("ridge").fit(toy.helpers.samples(2)[0], [[1], [1, 2]])


@pytest.mark.parametrize("dtype", ["float16", "int8", "uint16", "uint32"])
def test_samples_of_types_that_no_runtime_has_are_refused(dtype):
    class Floats(nn.Module):
        def forward(self, x):
            return x.float()

    model = nn.Sequential(Floats(), nn.Linear(4, 3))
    with pytest.raises(InputError, match=f"^example: must be of float32, .*got {dtype}; convert"):
        prepare(model, at="0", example=np.ones((1, 4), dtype), classes=3)


def test_latents_of_types_that_no_runtime_has_are_refused():
    class Short(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.dtype = dtype

        def forward(self, x):
            return x.to(self.dtype)

    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        model = nn.Sequential(Short(dtype), Short(torch.float32), nn.Linear(4, 3))
        with pytest.raises(InputError, match=rf"^at: the latent z behind '0' is {name}, must be of float32"):
            prepare(model, at="0", example=np.ones((1, 4), np.float32), classes=3)
    double = nn.Sequential(nn.Identity(), nn.Linear(4, 3)).double()
    with pytest.raises(InputError, match=r"^z: must be float32 features, got 'float64'; convert the model"):
        prepare(double, at="0", example=np.ones((1, 4)), method="latent_replay", classes=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("weight", "methods"), [("stem.0.weight", FITTED), ("fc.weight", [name for name in FITTED if name not in ("ncm", "slda", "ridge")])]
)
def test_weights_that_are_not_finite_are_named(toy, value, weight, methods):
    net = toy.helpers.Net()
    net.get_parameter(weight).data.flatten()[3] = value
    for method in FITTED:
        if method in methods:
            with pytest.raises(InputError, match=rf"^model: weight '{weight}' must be finite, got NaN or infinity; load"):
                go(toy, model=net, method=method)
        else:
            go(toy, model=net, method=method)  # never uses the suffix


def test_infinite_masks_are_no_weights():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
            self.register_buffer("mask", torch.tensor([0.0, 0.0, -float("inf"), 0.0]))

        def forward(self, x):
            return self.last(torch.softmax(self.first(x) + self.mask, 1))

    prepare(Masked(), at="first", example=np.ones((1, 4), np.float32), method="finetune", classes=3)


def test_a_latent_without_values_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    net[0].weight, net[0].bias = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.zeros(0))
    net[2].weight = nn.Parameter(torch.zeros(3, 0))
    with pytest.raises(InputError, match=r"^at: the latent z behind '1' must hold a value, got \[1, 0\]; cut elsewhere"):
        prepare(net, at="1", example=np.ones((1, 4), np.float32), classes=3)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")
def test_a_model_of_a_mapping_is_refused_without_noise(capfd):
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(self.first(x["p"]))

    with pytest.raises(InputError, match=r"^example: must suit preprocess and model"):
        prepare(Mapped(), at="first", example=np.ones((1, 4), np.float32), classes=3)
    assert capfd.readouterr() == ("", "")


def test_fit_keeps_raw_samples_of_all_it_has_seen(toy):
    x, y = toy.helpers.samples(60)
    ready = toy.prepared("ncm", fit=False)
    assert np.array_equal(ready.samples, ready.example)
    ready.fit(x, y)
    assert ready.samples.shape == (8, *x.shape[1:]) and np.array_equal(ready.samples[[0, -1]], x[[0, -1]])
    assert np.array_equal(ready.example, x[:1])
    ready.samples[:] = 0
    assert x.any(), "they are copies"
    ready.fit(x[:3], y[:3])
    assert np.array_equal(ready.samples, x[:3])


class Raising(nn.Module):
    """Preprocessing of the user's own."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("error", [IndexError("no row 12"), KeyError("mode"), AssertionError("not uint8")])
def test_whatever_the_users_code_raises_for_the_example_is_an_input_error(error):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with pytest.raises(InputError, match=rf"^example: must suit preprocess and model, got float32 \[1, 4\] \({type(error).__name__}: "):
        prepare(model, at="0", example=np.ones((1, 4), np.float32), classes=3, preprocess=Raising(error))


@pytest.mark.parametrize("layer", [nn.Softmax(2), nn.Flatten(2)])
def test_a_dimension_that_the_example_lacks_is_an_input_error(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3))
    with pytest.raises(InputError, match=r"^example: must suit preprocess and model, .*IndexError: Dimension out of range"):
        prepare(model, at="0", example=np.ones((1, 4), np.float32), classes=3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_lazy_and_compiled_models_are_named_for_what_they_are():
    for model, message in (
        (nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3)), r"model: 0\.weight has no values yet.*; run the model once on a sample before"),
        (torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))), "model: is compiled, must be the plain module; pass model._orig"),
    ):
        with pytest.raises(SplitError, match=message):
            prepare(model, at="0", example=np.ones((1, 4), np.float32), classes=3)


def test_masks_must_be_a_mapping(toy):
    with pytest.raises(InputError, match=r"^masks: must be a mapping of parameter names to bool tensors, got list; pass a dict"):
        go(toy, method="finetune", masks=[1])


def test_an_operator_of_the_preprocessing_is_named_there(tmp_path):
    class Sort(nn.Module):
        def forward(self, x):
            return torch.sort(x)[0]

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    ready = prepare(model, at="0", example=np.ones((1, 4), np.float32), classes=3, preprocess=Sort())
    with pytest.raises(EdgeclError, match=r"^step 'encode': operator aten\.sort\.default in preprocess is not supported"):
        export(ready, tmp_path / "bundle")


class Counting(nn.Module):
    """Scales by how many inputs are not zero: a graph would keep the example's number."""

    def forward(self, x):
        return x * (1.0 + torch.nonzero(x).shape[0])


class Largest(nn.Module):
    """Reads a value out of a tensor."""

    def forward(self, x):
        return x * x.max().item()


@pytest.mark.parametrize(("layer", "operator"), [(Counting(), "nonzero"), (Largest(), "_local_scalar_dense")])
def test_numbers_and_shapes_made_of_values_are_refused_with_their_module(tmp_path, layer, operator):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), layer), nn.Linear(4, 3))
    with pytest.raises(EdgeclError, match=rf"aten\.{operator}.* in 1\.1 makes a number or a shape"):
        export(prepare(model, at="1", example=np.ones((1, 4), np.float32), classes=3), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


class Windows(nn.Module):
    def forward(self, x):
        return x.reshape(-1, 2)


@pytest.mark.parametrize("method", FITTED)
def test_a_latent_without_its_batch_dimension_is_refused(method):
    model = nn.Sequential(nn.Linear(4, 4), Windows(), nn.Linear(2, 3))
    with pytest.raises(
        InputError, match=r"^at: the latent z behind '1' must have the batch dimension of 1 in front, got \[2, 2\]; keep it"
    ):
        prepare(model, at="1", example=np.ones((1, 4), np.float32), method=method, classes=3)


def test_a_latent_that_is_not_finite_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    model[0].weight.data.fill_(3e38)
    with pytest.raises(InputError, match=r"^at: the latent z behind '1' must be finite, has NaN or infinity for the example; mend"):
        prepare(model, at="1", example=np.ones((1, 4), np.float32), classes=3)


def test_the_preprocessing_is_copied():
    preprocess = nn.Linear(4, 4).train()
    x = np.ones((1, 4), np.float32)
    ready = prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), at="0", example=x, classes=3, preprocess=preprocess)
    before = ready.encode(x)[0].clone()
    assert preprocess.training and all(p.requires_grad for p in preprocess.parameters())
    preprocess.weight.data.zero_()
    assert torch.equal(ready.encode(x)[0], before)


@pytest.mark.parametrize(
    ("mean", "std"), [(0.5, 0.25), (None, None), ("a", [1.0]), ([[0.5]], [0.5])]
)  # one value for the one channel must be a list, too
def test_means_that_are_no_lists_of_numbers_are_refused(mean, std):
    with pytest.raises(InputError, match=r"^mean, std: must be lists of numbers, one for each channel, got .*; pass \[0\.5\]"):
        ImageU8(mean, std)
