"""Features from several depths: against forward hooks on the model itself."""

import numpy as np
import pytest
import torch
from torch import fx, nn

from edgecl import METHODS, ImageU8, prepare, taps
from edgecl.backbones.small_cnn import SmallCnn
from edgecl.splitting import SplitError
from edgecl_device import Learner
from edgecl_export import export


class Residual(nn.Module):
    """Overwrites the output of ``conv`` in place, and returns a sum that no submodule returns."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.conv(x)) + x


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), Residual(), nn.Conv2d(4, 6, 3, stride=2), nn.Flatten(), nn.LazyLinear(5)).eval()


@pytest.fixture
def model():
    model = net()
    with torch.no_grad():
        model(torch.zeros(1, 2, 8, 8))
    return model


def hooked(model, names, x):
    """The same features from forward hooks, clones against later writes."""
    seen, handles = {}, []
    for name in names:
        handles.append(
            model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o.detach().clone().double()))
        )
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    means = [seen[name].flatten(2).mean(2) if seen[name].dim() > 2 else seen[name] for name in names]
    return torch.cat([m / m.norm(dim=1, keepdim=True) for m in means], 1)


@pytest.mark.parametrize("names", [["1"], ["0", "1", "2"], ["2", "0"], ["1.conv", "1"], ["4", "1.relu"], ["0", "3"]])
def test_features_are_those_of_hooks_on_the_model(model, names):
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    found = taps(model, names, x[:1])(x)
    torch.testing.assert_close(found.double(), hooked(model, names, x), rtol=1e-5, atol=1e-6)


def test_nothing_behind_the_deepest_tap_runs_and_the_model_stays(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = taps(model, ["1", "0"], torch.zeros(1, 2, 8, 8))
    assert not [node for node in found.graph.nodes if node.op == "call_module" and str(node.target) in ("2", "3", "4")]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(model) == 5


def test_the_input_stays():
    x = -torch.ones(1, 2)
    assert not taps(nn.Sequential(nn.ReLU(inplace=True), nn.Flatten()), ["0"], x)(x).any() and torch.equal(x, -torch.ones(1, 2))


def test_a_model_is_traced_once(model, monkeypatch):
    traces, trace = [], fx.Tracer.trace
    monkeypatch.setattr(fx.Tracer, "trace", lambda self, *args: traces.append(1) or trace(self, *args))
    prepare(model, at=["0", "1"], example=np.ones((1, 2, 8, 8), np.float32), method="finetune", classes=3)
    assert len(traces) == 1


def test_a_map_of_zeros_gives_zeros():
    features = taps(nn.Sequential(nn.ReLU(), nn.Flatten()), ["0"], torch.ones(1, 3, 2, 2))
    assert torch.equal(features(-torch.ones(2, 3, 2, 2)), torch.zeros(2, 3))


class Odd(nn.Module):
    """Calls a module twice and has one that returns a pair."""

    def __init__(self):
        super().__init__()
        self.twice, self.pair, self.out = nn.Linear(3, 3), Pair(), nn.Linear(3, 3)

    def forward(self, x):
        a, b = self.pair(self.twice(self.twice(x)))
        return self.out(a + b)


class Pair(nn.Module):
    def forward(self, x):
        return x, -x


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "must be different names"),
        ("out", "must be different names"),
        (["out", "out"], "must be different names"),
        (["out", 3], "must be different names"),
        (["nowhere"], "'nowhere' must be a module that is called once"),
        (["twice"], "'twice' must be a module that is called once"),
        (["out", "pair"], "'pair' must be a module that is called once and returns one tensor; choose some of: out"),
    ],
)
def test_wrong_names_are_refused(names, said):
    with pytest.raises(SplitError, match=f"at: .*{said}"):
        taps(Odd(), names, torch.ones(1, 3))


@pytest.mark.parametrize("module", [nn.Flatten(0), nn.Identity()])
def test_outputs_that_are_no_rows_of_features_are_refused(module):
    x = torch.ones(3) if isinstance(module, nn.Flatten) else torch.ones(1, 3, dtype=torch.float64)
    with pytest.raises(SplitError, match=r"at: the output of '0' must be float32 \[N, C\]"):
        taps(nn.Sequential(module, nn.ReLU()), ["0"], x)


@pytest.mark.parametrize("method", ["slda", "latent_replay"])
def test_prepared_with_several_names_a_learner_learns_on_the_device(method, tmp_path):
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    y = np.arange(40) % 4
    model = SmallCnn(10, generator=torch.Generator().manual_seed(0)).eval()
    config = METHODS[method].Config(lr=0.1) if method == "latent_replay" else None
    prepared = prepare(
        model, at=["block1", "block3"], example=x[:1], method=method, classes=6, config=config, preprocess=ImageU8([0.3], [0.4], "HW")
    ).fit(x[:20], y[:20])
    images = ImageU8([0.3], [0.4], "HW")(torch.tensor(x[20:]))
    z = torch.cat(prepared.encode(x[20:]))
    torch.testing.assert_close(z.double(), hooked(model, ["block1", "block3"], images), rtol=1e-4, atol=1e-6)
    bundle = export(prepared, tmp_path / "bundle")
    with Learner.load(bundle.path) as learner:
        reports = [learner.learn(image, int(label)) for image, label in zip(x[20:], y[20:], strict=True)]
    assert all(np.isfinite(report.loss) for report in reports)
