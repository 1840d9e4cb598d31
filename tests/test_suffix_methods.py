"""finetune, latent_replay and joint against plain torch.optim references."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgecl import METHODS, prepare
from edgecl.methods import Finetune, Frozen, LatentReplay
from edgecl.methods._losses import cross_entropy
from edgecl.profiling import profile
from edgecl_device import Learner
from edgecl_device.errors import InputError
from edgecl_device.manifest import TensorSpec
from edgecl_export import export

torch.set_num_threads(1)

OPTIMISERS = {
    "sgd": lambda p, decay: torch.optim.SGD(p, 1.0),
    "momentum": lambda p, decay: torch.optim.SGD(p, 1.0, momentum=0.9),
    "adam": lambda p, decay: torch.optim.AdamW(p, 1.0, weight_decay=decay),
}
ROWS = 4


def exact(ready):
    """The learner and its state in float64, so that a reference differs by rounding only."""
    learner = copy.deepcopy(ready.learner)
    learner.suffix.double()
    return learner, {name: tensor.double() for name, tensor in ready.state.items()}


def latents(ready, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *ready.learner.problem.features.shape[1:], generator=generator, dtype=torch.float64) * 2


def allowed_scores(scores, allowed):
    return scores.masked_fill(~torch.as_tensor(allowed), -torch.inf)


class Reference:
    """The same update with autograd, torch.optim and -inf in place of masked scores."""

    def __init__(self, learner, make, decay, make_decoupled):
        self.net = copy.deepcopy(learner.suffix)
        parameters = dict(self.net.named_parameters())
        self.trained = {name: parameters[name].requires_grad_(True) for name in learner.trained}
        self.optimiser, self.decay = make(self.trained.values(), decay), decay if make_decoupled else 0.0

    def step(self, loss, lr):
        self.optimiser.param_groups[0]["lr"] = lr
        self.optimiser.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in self.trained.values():
                parameter.mul_(1 - lr * self.decay)
        self.optimiser.step()

    def check(self, state):
        for name, parameter in self.trained.items():
            assert torch.allclose(state[f"param.{name}"], parameter, rtol=1e-8, atol=1e-10), name


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_finetune_equals_torch(toy, optimizer, decay):
    ready = toy.prepared("finetune", optimizer=optimizer, weight_decay=decay)
    learner, state = exact(ready)
    reference = Reference(learner, OPTIMISERS[optimizer], decay, optimizer != "adam")
    seen = {0, 1}
    for i, z in enumerate(latents(ready, 25, 1)):
        z, label, weight, lr = z[None], (2 * i) % 5, 1.0 + i % 3, 0.02 / (1 + i % 4)
        seen.add(label)
        scores = allowed_scores(reference.net(z), [k in seen for k in range(5)])
        loss = weight * F.cross_entropy(scores, torch.tensor([label]))
        arguments = torch.tensor([label]), torch.tensor([weight]).double(), torch.tensor(lr, dtype=torch.float64)
        outputs, new = learner.learn(state, z, *arguments)
        state = {**state, **new}
        assert outputs["loss"].item() == pytest.approx(loss.item(), rel=1e-6, abs=1e-9)
        reference.step(loss, lr)
        reference.check(state)


@pytest.mark.parametrize("real", [ROWS, 2, 0])
@pytest.mark.parametrize("loss_name", ["er", "er-ace"])
@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_latent_replay_equals_torch(toy, optimizer, loss_name, real):
    """Zero-weight rows hold nonsense here, of a class that was never seen: they must not matter."""
    ready = toy.prepared("latent_replay", optimizer=optimizer, loss=loss_name, codec="float32", window=3, new_weight=0.7)
    learner, state = exact(ready)
    reference = Reference(learner, OPTIMISERS[optimizer], 0.0, False)
    seen, last = {0, 1}, {}
    stored = latents(ready, 40, 2)
    for i, z in enumerate(latents(ready, 12, 3)):
        z, label, weight, lr = z[None], [2, 2, 0, 3, 1][i % 5], 1.0 + i % 2, 0.02
        seen.add(label)
        last[label] = i
        recent = {k for k, when in last.items() if i - when < 3}
        recent = recent if len(recent) > 1 else seen
        rows, targets = stored[3 * i : 3 * i + ROWS].clone(), torch.tensor([i % 2, 1, 0, 2])[:ROWS]
        rows[real:], targets[real:] = 1e3, 4
        loss = (
            0.7
            * weight
            * F.cross_entropy(
                allowed_scores(reference.net(z), [k in (seen if loss_name == "er" else recent) for k in range(5)]), torch.tensor([label])
            )
        )
        if real:
            scores = allowed_scores(reference.net(rows[:real]), [k in seen for k in range(5)])
            loss = loss + F.cross_entropy(scores, targets[:real])
        replay = {"z": rows, "target": targets, "weight": (torch.arange(ROWS) < real).double()}
        arguments = torch.tensor([label]), torch.tensor([weight]).double(), torch.tensor(lr, dtype=torch.float64), replay
        outputs, new = learner.learn(state, z, *arguments)
        state = {**state, **new}
        assert outputs["loss"].item() == pytest.approx(loss.item(), rel=1e-6, abs=1e-9)
        reference.step(loss, lr)
        reference.check(state)


def test_the_running_average_predicts_before_and_in_learn(toy):
    """Against a running mean kept beside the steps: predict, and the scores of learn, are those of the averaged network."""
    decay = 0.8
    ready = toy.prepared("latent_replay", codec="float32", lr=0.1, average=decay)
    learner, state = exact(ready)
    mean = {name: state[f"param.{name}"] for name in learner.trained}
    stored = latents(ready, ROWS, 2)
    apart = 0.0
    for i, z in enumerate(latents(ready, 15, 3)):
        seen = state["count"] > 0
        with torch.no_grad():
            wanted = allowed_scores(torch.func.functional_call(learner.suffix, mean, (z[None],)), seen)[0, seen]
            apart = max(apart, (learner.scores(learner.parameters(state), z[None])[0, seen] - wanted).abs().max().item())
        replay = {"z": stored, "target": torch.tensor([0, 1, 0, 1]), "weight": torch.ones(ROWS).double()}
        learned, new = learner.learn(state, z[None], torch.tensor([i % 5]), torch.ones(1).double(), torch.tensor(0.1).double(), replay)
        for scores in (learner.predict(state, z[None])[0]["scores"], learned["scores"]):
            assert torch.allclose(scores[0, seen], wanted, rtol=1e-9, atol=1e-9)
        state = {**state, **new}
        mean = {name: decay * mean[name] + (1 - decay) * state[f"param.{name}"] for name in mean}
    assert apart > 0.01, "the network without the average must predict something else"


def test_filler_rows_have_no_influence_to_the_bit(toy):
    ready = toy.prepared("latent_replay")
    z = ready.examples[0][0]
    results = []
    for fill in (0, 200):
        rows = torch.full((ROWS, 6, 4, 4), fill, dtype=torch.uint8)
        rows[0] = 50
        replay = {"z": rows, "target": torch.tensor([1, 0, 0, 0]), "weight": torch.tensor([1.0, 0, 0, 0])}
        results.append(ready.learner.learn(ready.state, z, torch.tensor([2]), torch.ones(1), torch.tensor(0.1), replay))
    (first, new), (second, other) = results
    assert first["loss"] == second["loss"]
    # A sum with zeros may be ordered in another way in a convolution's gradient: equal, but for its rounding.
    assert all(torch.allclose(new[name], other[name], rtol=1e-6, atol=1e-8) for name in new)
    assert torch.equal(new["param.fc.bias"], other["param.fc.bias"])


def test_er_ace_mask_by_hand(toy):
    """Classes 0 and 1 are known; a window of two samples: the current loss sees its classes, all seen ones when it has one only."""
    ready = toy.prepared("latent_replay", loss="er-ace", window=2, codec="float32", lr=0.0)
    learner, state = ready.learner, ready.state
    z = ready.examples[0][0]
    empty = {"z": torch.zeros(ROWS, 6, 4, 4), "target": torch.zeros(ROWS, dtype=torch.int64), "weight": torch.zeros(ROWS)}
    scores = learner.suffix(z)[0]
    for label, classes in [(3, [0, 1, 3]), (0, [3, 0]), (2, [0, 2]), (2, [0, 1, 2, 3]), (0, [2, 0])]:
        outputs, new = learner.learn(state, z, torch.tensor([label]), torch.ones(1), torch.tensor(0.0), empty)
        state = {**state, **new}
        by_hand = -float(scores[label]) + float(torch.logsumexp(scores[classes], 0))
        assert outputs["loss"].item() == pytest.approx(by_hand, rel=1e-5, abs=1e-6)
    row = {"z": z.expand(ROWS, -1, -1, -1), "target": torch.tensor([1] * ROWS), "weight": torch.ones(ROWS)}
    outputs, _ = learner.learn(state, z, torch.tensor([2]), torch.ones(1), torch.tensor(0.0), row)
    new_part = -float(scores[2]) + float(torch.logsumexp(scores[[0, 2]], 0))
    rows_part = -float(scores[1]) + float(torch.logsumexp(scores[[0, 1, 2, 3]], 0))
    assert outputs["loss"].item() == pytest.approx(new_part + rows_part, rel=1e-5), "the rows see all seen classes"


def test_er_ace_learns_a_class_that_comes_in_one_long_run(toy):
    """Without a second class in its window, and without a row: its own samples must teach it all the same."""
    ready = toy.prepared("latent_replay", loss="er-ace", window=2, codec="float32", lr=0.1)
    learner, state, z = ready.learner, ready.state, ready.examples[0][0]
    empty = {"z": torch.zeros(ROWS, 6, 4, 4), "target": torch.zeros(ROWS, dtype=torch.int64), "weight": torch.zeros(ROWS)}
    for _ in range(30):
        _, new = learner.learn(state, z, torch.tensor([4]), torch.ones(1), torch.tensor(0.1), empty)
        state = {**state, **new}
    assert learner.predict(state, z)[0]["scores"].argmax().item() == 4


class Directions(nn.Module):
    """A head on the direction of its features: of zeros it makes 0 / 0."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        a = self.stem(x)
        return self.fc(a / (a * a).sum(1, keepdim=True).sqrt())


@pytest.mark.parametrize("codec", ["float32", "uint8"])
def test_filler_cannot_poison_a_suffix_that_divides_by_a_norm(toy, codec):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 6)).astype(np.float32)
    config = toy.config("latent_replay", codec=codec, lr=0.1)
    ready = prepare(Directions(), at="stem", example=x[:1], method="latent_replay", classes=3, config=config).fit(x, np.arange(20) % 3)
    spec = ready.learner.inputs_of("learn")["replay"]["z"]
    rows = {"z": torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)), "target": torch.zeros(ROWS).long(), "weight": torch.zeros(ROWS)}
    outputs, new = ready.learner.learn(ready.state, ready.examples[0][0], torch.tensor([1]), torch.ones(1), torch.tensor(0.1), rows)
    assert outputs["loss"].isfinite()
    assert all(tensor.isfinite().all() for tensor in new.values())
    assert not torch.equal(new["param.fc.weight"], ready.state["param.fc.weight"])


@pytest.mark.parametrize("codec", ["uint8", "packed", "pq"])
def test_learning_and_prediction_see_the_decoded_latent(toy, codec):
    """Nothing but the code reaches the suffix: another latent of the same code is the same sample, its own error apart."""
    ready = toy.prepared("latent_replay", codec=codec, bits=2, subquantizers=2, centroids=4, average=0.5)
    learner, z = ready.learner, ready.examples[0][0]
    twin = learner.codecs[""].decode(learner.codecs[""].encode(z))
    assert not torch.equal(twin, z)
    assert torch.equal(learner.codecs[""].encode(twin), learner.codecs[""].encode(z))
    rows = {name: torch.from_numpy(a[:ROWS]) for name, a in ready.memory.rows_by_name().items()}
    replay = {"z": rows["replay.z"], "target": rows["replay.target"], "weight": torch.ones(ROWS)}
    (first, state), (second, other) = (
        learner.learn(ready.state, value, torch.tensor([2]), torch.ones(1), torch.tensor(0.1), replay) for value in (z, twin)
    )
    assert toy.helpers.same(toy.helpers.arrays(state), toy.helpers.arrays(other))
    assert first["loss"] == second["loss"]
    assert torch.equal(learner.predict(ready.state, z)[0]["scores"], learner.predict(ready.state, twin)[0]["scores"])
    lost = ((z - twin).double() ** 2).sum() / (z.double() ** 2).sum()
    assert first["health.reconstruction"].item() == pytest.approx(lost.item(), rel=1e-5)
    assert second["health.reconstruction"].item() == 0.0


def test_reconstruction_error_is_reported_and_shows_drift(toy):
    x, y = toy.helpers.samples(60)
    held_out, _ = toy.helpers.samples(40, seed=5)
    exported, ready = toy.bundle("latent_replay", codec="packed", bits=4)
    codec = ready.learner.codecs[""]

    def by_hand(samples):
        z = torch.cat(ready.encode(samples))
        return float(((codec.decode(codec.encode(z)) - z).double() ** 2).sum() / (z.double() ** 2).sum())

    assert ready.reconstruction == pytest.approx(by_hand(x[y < 2]), rel=1e-5)
    assert exported.manifest.replay.reconstruction == ready.reconstruction == profile(ready).reconstruction
    assert ready.reconstruction_of(held_out) == pytest.approx(by_hand(held_out), rel=1e-5)
    with Learner.load(exported.path) as learner:
        for sample in held_out[:5]:
            assert learner.learn(sample, 0).health["reconstruction"] == pytest.approx(by_hand(sample[None]), rel=1e-4)
        drifted = learner.learn(6 * held_out[0], 0).health["reconstruction"]
    assert drifted > 10 * ready.reconstruction
    assert profile(toy.prepared("latent_replay", fit=False, codec="pq", subquantizers=2)).reconstruction is None
    assert toy.prepared("latent_replay", codec="float32").reconstruction == 0.0


def test_codebooks_are_a_line_of_the_ledger(toy):
    exported, ready = toy.bundle("latent_replay", codec="pq", subquantizers=2, centroids=8)
    ledger = exported.manifest.ledger
    assert ledger["codebooks"] == 8 * 6 * 4 + 2 * 8 * 4  # 8 codewords over 6 channels, and half a square of each of the 16
    assert profile(ready).ledger["codebooks"] == ledger["codebooks"]
    assert ledger["beyond_trunk"] == ledger["state"] + ledger["replay"] + ledger["codebooks"]
    weights = (exported.path / "weights.bin").read_bytes()
    assert weights.count(ready.learner.codecs[""].constants()[0].numpy().tobytes()) == 1, "encoding and decoding share it"
    assert toy.bundle("latent_replay")[0].manifest.ledger["codebooks"] == 0


@pytest.mark.parametrize("batch", [1, 7])
def test_cross_entropy_and_its_gradient(batch):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(batch, 6, generator=generator, dtype=torch.float64) * 5
    target = torch.arange(batch) % 6
    allowed = torch.rand(batch, 6, generator=generator) < 0.5
    allowed[torch.arange(batch), target] = True
    ours, theirs = scores.clone().requires_grad_(True), scores.clone().requires_grad_(True)
    got, want = cross_entropy(ours, target, allowed), F.cross_entropy(allowed_scores(theirs, allowed), target, reduction="none")
    assert torch.allclose(got, want, rtol=1e-12)
    got.sum().backward()
    want.sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_masks_hold_weights_through_the_step(toy, optimizer, decay):
    base = toy.prepared("finetune").learner
    generator = torch.Generator().manual_seed(1)
    masks = {n: torch.rand(base.suffix.get_parameter(n).shape, generator=generator) < 0.5 for n in base.trained}
    config = Finetune.Config(optimizer=optimizer, weight_decay=decay, lr=0.1)
    learner = Finetune(base.problem, config, suffix=base.suffix, masks=masks)
    start = state = learner.init()
    for i in range(20):
        z = torch.rand(1, 6, 4, 4, generator=generator)
        _, new = learner.learn(state, z, torch.tensor([i % 5]), torch.ones(1), torch.tensor(0.1))
        state = {**state, **new}
    for name, mask in masks.items():
        weight = f"param.{name}"
        assert torch.equal(state[weight][~mask], start[weight][~mask])
        assert (state[weight][mask] != start[weight][mask]).any()


@pytest.mark.parametrize(
    ("method", "changes"),
    [("finetune", {}), ("latent_replay", {}), ("latent_replay", {"average": 0.97}), ("joint", {})],
    ids=["finetune", "latent_replay", "average", "joint"],
)
def test_masks_reach_the_device_and_offline_training(toy, tmp_path, method, changes):
    """Given to prepare() by the model's own names: masked weights keep their bits, the others of the tensor do not."""
    x, y = toy.helpers.samples(60)
    model = toy.helpers.Net()
    names = dict(model.named_parameters())
    masks = {"fc.weight": torch.arange(names["fc.weight"].numel()).reshape(names["fc.weight"].shape) % 3 == 0}
    config = toy.config(method, lr=0.1, weight_decay=0.01, **changes)
    ready = prepare(model, at="stem", example=x[:1], method=method, classes=5, config=config, masks=masks).fit(x, y)
    before = names["fc.weight"].detach().numpy()
    if METHODS[method].host_only:
        after = toy.helpers.arrays(ready.learner.fit(torch.cat(ready.encode(x)), torch.tensor(y)))
    else:
        export(ready, tmp_path / "bundle")
        with Learner.load(tmp_path / "bundle") as learner:
            for sample, label in zip(x, y, strict=True):
                learner.learn(sample, int(label))
            after = learner.state()
    moved = masks["fc.weight"].numpy()
    for name in ("param.fc.weight", "average.fc.weight"):
        if name in after:
            assert np.array_equal(after[name][~moved], before[~moved])
            assert (after[name][moved] != before[moved]).all()
    assert ("average.fc.weight" in after) == bool(changes)


def test_masks_are_for_methods_that_train_the_model(toy):
    x, _ = toy.helpers.samples(1)
    mask = {"fc.weight": torch.ones(5, 8, dtype=torch.bool)}
    for method, match in (
        ("ridge", r"^masks: ridge trains no parameter of the model, got masks for \['fc.weight'\]; "),
        ("frozen", "^masks: "),
    ):
        with pytest.raises(InputError, match=match):
            prepare(toy.helpers.Net(), at="stem", example=x, method=method, classes=5, masks=mask)


@pytest.mark.parametrize("bad", ["unknown", "shape", "dtype", "untrained"])
def test_wrong_masks_are_refused(toy, bad):
    base = toy.prepared("finetune").learner
    name = {"unknown": "fc.bogus", "untrained": "mid.1.weight"}.get(bad, "fc.weight")
    mask = torch.ones((5, 8) if bad != "shape" else (8, 5), dtype=torch.float32 if bad == "dtype" else torch.bool)
    with pytest.raises(InputError, match=f"^masks: '{name}' must be a bool tensor"):
        Finetune(base.problem, suffix=base.suffix, masks={name: mask})


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (None, ["mid.0.weight", "mid.3.weight", "mid.3.bias", "fc.weight", "fc.bias"]),
        (("fc.*",), ["fc.weight", "fc.bias"]),
        (("*.bias",), ["mid.1.bias", "mid.3.bias", "fc.bias"]),
        (("mid.1.weight", "fc.weight"), ["mid.1.weight", "fc.weight"]),
    ],
)
def test_trainable_patterns_choose_what_learns(toy, patterns, names):
    ready = toy.prepared("finetune", trainable=patterns)
    assert sorted(ready.learner.trained) == sorted(names)
    before = {k: v.clone() for k, v in ready.learner.suffix.state_dict().items()}
    z, label = ready.examples[0]
    _, new = ready.learner.learn(ready.state, z, torch.tensor(label), torch.ones(1), torch.tensor(0.1))
    assert set(new) == {"count", *(f"param.{name}" for name in names)}
    assert all(not torch.equal(new[f"param.{name}"], ready.state[f"param.{name}"]) for name in names)
    assert all(torch.equal(v, before[k]) for k, v in ready.learner.suffix.state_dict().items())


def test_nothing_to_train_is_refused(toy):
    x, _ = toy.helpers.samples(1)
    headless = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match=r"^trainable: must name a parameter.*; .*cut the model further up"):
        prepare(headless, at="0", example=x, method="finetune", classes=5)


@pytest.mark.parametrize("method", ["finetune", "latent_replay"])
def test_batch_norm_keeps_its_statistics(toy, method):
    """The user's model is in training mode, its latents are far from the statistics: nothing may move."""
    net = toy.helpers.Net().train()
    kept = copy.deepcopy(net.state_dict())
    x, y = toy.helpers.samples(40)
    ready = prepare(net, at="stem", example=x[:1], method=method, classes=5, config=toy.config(method)).fit(x, y)
    specs = ready.learner.inputs_of("learn")
    extra = {"replay": {"z": torch.ones(ROWS, 6, 4, 4).byte(), "target": torch.zeros(ROWS).long(), "weight": torch.ones(ROWS)}}
    state = ready.state
    for i in range(20):
        arguments = [torch.full((1, 6, 4, 4), 50.0), torch.tensor([i % 5]), torch.ones(1), torch.tensor(0.1)]
        _, new = ready.learner.learn(state, *arguments, **({"replay": extra["replay"]} if "replay" in specs else {}))
        state = {**state, **new}
    for name in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias"):
        assert torch.equal(ready.learner.suffix.state_dict()[f"mid.1.{name}"], kept[f"mid.1.{name}"])
        assert torch.equal(ready.trunk.model.state_dict()[f"stem.1.{name}"], kept[f"stem.1.{name}"])
    assert net.training
    assert all(torch.equal(v, kept[k]) for k, v in net.state_dict().items()), "the user's model is never changed"


def test_the_suffix_must_fit_the_classes(toy):
    x, _ = toy.helpers.samples(1)
    with pytest.raises(InputError, match=r"^suffix: must return scores \[1, 7\], got \[1, 5\]; .*widen_head"):
        prepare(toy.helpers.Net(), at="stem", example=x, method="frozen", classes=7)


def accuracy(learner, state, z, y):
    return np.mean([learner.predict(state, row)[0]["scores"].argmax().item() == label for row, label in zip(z, y, strict=True)])


def test_joint_beats_frozen_and_is_repeatable(toy):
    x, y = toy.helpers.samples(200)
    held_x, held_y = toy.helpers.samples(100, seed=8)
    ready = toy.prepared("joint", epochs=40, lr=0.03)
    z, held = torch.cat(ready.encode(x)), ready.encode(held_x)
    state = ready.learner.fit(z, torch.from_numpy(y))
    again = ready.learner.fit(z, torch.from_numpy(y))
    assert toy.helpers.same(toy.helpers.arrays(state), toy.helpers.arrays(again))
    frozen = Frozen(ready.learner.problem, suffix=ready.learner.suffix)
    base = {**frozen.init(), "count": torch.ones(5)}
    assert accuracy(ready.learner, state, held, held_y) >= 0.9
    assert accuracy(frozen, base, held, held_y) <= 0.5
    assert state["count"].tolist() == [40.0] * 5
    assert set(ready.learner.steps) == {"predict"}


def test_joint_takes_a_batch_of_everything_and_refuses_a_rate_at_which_it_diverges(toy):
    x, y = toy.helpers.samples(20)
    z, y = torch.cat(toy.prepared("joint").encode(x)), torch.from_numpy(y)
    states = [toy.prepared("joint", batch=batch).learner.fit(z, y) for batch in (20, 2**70)]
    assert toy.helpers.same(*map(toy.helpers.arrays, states))
    with pytest.raises(InputError, match=r"^lr: must keep the weights finite in training, got 1e\+37; .*lower it"):
        toy.prepared("joint", lr=1e37).learner.fit(z, y)


def test_joint_trains_across_a_cut_with_several_tensors(toy):
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.fc = nn.Linear(64, 6), nn.Linear(6, 6), nn.Linear(12, 5)

        def forward(self, x):
            a = self.first(x.flatten(1))
            b = self.second(a)
            return self.fc(torch.cat([a, b], 1))

    x, y = toy.helpers.samples(150)
    model = Skip()
    toy.helpers.settle(model)
    ready = prepare(model, at="second", example=x[:1], method="joint", classes=5, config=toy.config("joint", epochs=40, lr=0.02))
    assert isinstance(ready.learner.problem.features, dict)
    parts = ready.encode(x)
    z = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    state = ready.learner.fit(z, torch.from_numpy(y))
    assert accuracy(ready.learner, state, parts, y) >= 0.9


def test_features_of_the_replay_row(toy):
    ready = toy.prepared("latent_replay")
    z, label = ready.examples[0]
    outputs, _ = ready.learner.prime(ready.state, z, torch.tensor(label))
    assert ready.learner.replay.fields == (TensorSpec("z", (6, 4, 4), "uint8"),)
    assert torch.equal(outputs["row.z"], ready.learner.codecs[""].encode(z))
    assert isinstance(ready.learner, LatentReplay)
    assert ready.memory.class_counts().sum() == min(len(ready.memory), 24)
