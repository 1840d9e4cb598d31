"""Dropout with drawn masks against autograd of a net that multiplies them in by hand, on both runtimes and after a crash."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgecl import METHODS, prepare
from edgecl.methods._dropout import GRAIN, Site
from edgecl_device import Learner
from edgecl_device.errors import InputError
from edgecl_device.manifest import DrawSpec
from edgecl_export import export

torch.set_num_threads(1)
X = np.random.default_rng(0).standard_normal((12, 2, 5, 5)).astype(np.float32)
Y = np.arange(12) % 3


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5, inplace=True)

    def forward(self, x):
        y = x * 2
        return self.drop(y) + y


def ready(*suffix, rows=2, **changes):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), *suffix)
    config = METHODS["latent_replay"].Config(rows_per_step=rows, codec="float32", lr=0.1, dropout=True, **changes)
    return prepare(net, at="1", example=X[:1], method="latent_replay", classes=3, config=config).fit(X[:6], Y[:6])


def both(**changes):
    """A dropout by channel and one by value, on 4 channels of 3x3."""
    return ready(nn.Dropout2d(0.25), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 3), **changes)


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_an_update_equals_autograd_with_masks_by_hand(average):
    prepared = both(average=average)
    learner, state = prepared.learner, prepared.state
    shapes = {draw.name: draw.shape for draw in learner.replay.draws}
    assert sorted(shapes.values()) == [(3, 4, 1, 1), (3, 6)]
    generator = torch.Generator().manual_seed(1)
    draw = {name: torch.randint(0, GRAIN, shape, generator=generator) for name, shape in shapes.items()}
    z = torch.rand(3, 4, 3, 3, generator=generator)
    replay = {"z": z[1:], "target": torch.tensor([1, 2]), "weight": torch.ones(2)}
    outputs, new = learner.learn(state, z[:1], torch.tensor([0]), torch.ones(1), torch.tensor(0.1), replay, draw)

    weights = {name: state[f"param.{name}"].clone().requires_grad_() for name in learner.trained}
    kernel, shift, matrix, bias = (weights[name] for name in learner.trained)
    channels, values = (next(draw[name] for name, s in shapes.items() if len(s) == rank) for rank in (4, 2))
    hidden = F.conv2d(z * (channels < 49152) / 0.75, kernel, shift).flatten(1)
    scores = F.linear(hidden * (values < 32768) / 0.5, matrix, bias)
    each = F.cross_entropy(scores, torch.tensor([0, 1, 2]), reduction="none")
    total = each[0] + each[1:].mean()
    total.backward()
    assert outputs["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    for name, weight in weights.items():
        assert torch.allclose(new[f"param.{name}"], weight.detach() - 0.1 * weight.grad, rtol=1e-5, atol=1e-6), name
    assert torch.allclose(outputs["scores"], learner.predict(state, z[:1])[0]["scores"], atol=1e-6), "predictions do not drop"


def test_what_is_changed_in_place_is_changed_for_its_views_too():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.drop, self.head = nn.Linear(36, 6), nn.Dropout(0.5), nn.Linear(3, 3)

        def forward(self, x):
            hidden = self.layer(x.flatten(1))
            view = hidden[:, :3]
            hidden += 1.0
            return self.head(self.drop(view))

    learner = ready(InPlace()).learner
    z, keep = torch.rand(3, 4, 3, 3), {site.draw.name: torch.ones(site.draw.shape) for site in learner._sites}
    assert torch.equal(learner._dropped({}, z, keep), learner.suffix(z))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_keep_their_share_and_the_mean(p):
    mask = Site(DrawSpec("drop", (GRAIN,), GRAIN), p).mask(torch.arange(GRAIN))
    assert (mask > 0).float().mean().item() == pytest.approx(1 - p, abs=1 / GRAIN)
    assert mask.double().mean().item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("runtime", ["onnx", "executorch"])
def test_the_gates_hold_and_a_crash_changes_nothing(runtime, tmp_path):
    export(both(), tmp_path / "bundle", engine=runtime)
    whole = Learner.load(tmp_path / "bundle", engine=runtime, store=tmp_path / "whole.db")
    cut = Learner.load(tmp_path / "bundle", engine=runtime, store=tmp_path / "cut.db")
    for i, (x, y) in enumerate(zip(X, Y, strict=True)):
        whole.learn(x[None], int(y))
        if i == 7:
            cut._store.close()  # as a killed process: nothing is written any more, the lock is free
            cut = Learner.load(tmp_path / "bundle", engine=runtime, store=tmp_path / "cut.db")
        cut.learn(x[None], int(y))
    assert np.array_equal(whole.predict(X[:1]).scores, cut.predict(X[:1]).scores)


@pytest.mark.parametrize(
    ("suffix", "rows", "words"),
    [
        ([nn.Flatten(), nn.Linear(36, 3)], 2, "dropout: must be False for a suffix that calls no nn.Dropout"),
        ([nn.Flatten(), nn.Dropout(1.0), nn.Linear(36, 3)], 2, "must keep a share, got p = 1"),
        ([nn.Flatten(), nn.Dropout1d(0.5), nn.Linear(36, 3)], 2, "must act on"),
        ([Shared(), nn.Flatten(), nn.Linear(36, 3)], 2, "'2.drop' must not be in place where its input is used again; give it inplace=F"),
        ([nn.AlphaDropout(0.5), nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3)], 2, "must be False for AlphaDropout, whose masks are"),
        ([nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3)], 30_000, "must draw at most 1,048,576 integers"),
    ],
)
def test_what_cannot_be_drawn_is_refused(suffix, rows, words):
    with pytest.raises(InputError, match=words):
        ready(*suffix, rows=rows)


class Function(nn.Module):
    """Drops by a function, as its ``how`` writes it."""

    def __init__(self, how, p=0.5):
        super().__init__()
        self.how, self.p = how, p
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.drop(x)
        if self.how == "self.training":
            return F.dropout(x, self.p, training=self.training)
        if self.how == "branch" and self.training:
            return F.dropout2d(x, self.p)
        if self.how == "torch":
            return torch.dropout(x, self.p, self.training)
        if self.how == "paths" and self.training:
            return x * x.new_empty(1).bernoulli_(self.p)
        if self.how == "off":
            return F.dropout(x, self.p, training=False)
        return x


@pytest.mark.parametrize(
    ("how", "name"), [("self.training", "dropout"), ("branch", "dropout2d"), ("torch", "dropout"), ("paths", "bernoulli_")]
)
def test_a_function_that_drops_in_training_is_named(how, name):
    """In the parts, which are traced in eval mode, it is off for good; beside modules that drop nobody would see it."""
    words = rf"^dropout: must be False for a suffix that calls {name} in training, in module '2\.0', got True, .*; make it an nn\.Dropout"
    with pytest.raises(InputError, match=words):
        ready(nn.Sequential(Function(how)), nn.Flatten(), nn.Linear(36, 3))


def test_a_function_that_drops_nothing_or_in_the_trunk_is_none_of_the_suffix():
    assert ready(Function("off"), Function("self.training", 0.0), nn.Flatten(), nn.Linear(36, 3)).learner.config.dropout
    net = nn.Sequential(Function("self.training"), nn.Flatten(), nn.Dropout(0.5), nn.Linear(50, 3))
    config = METHODS["latent_replay"].Config(dropout=True)
    assert prepare(net, at="1", example=X[:1], method="latent_replay", classes=3, config=config).learner.config.dropout
    plain = METHODS["latent_replay"].Config()
    net = nn.Sequential(nn.Flatten(), Function("self.training"), nn.Linear(50, 3))
    assert not prepare(net, at="0", example=X[:1], method="latent_replay", classes=3, config=plain).learner.config.dropout


def test_a_model_that_cannot_be_traced_in_training_mode_is_refused():
    class Branches(nn.Module):
        def forward(self, x):
            return x * 2 if self.training and x.sum() > 0 else x

    with pytest.raises(
        InputError, match=r"^dropout: must be False for a model that cannot be cut in training mode, got True \(model: cannot"
    ):
        ready(Branches(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3))
