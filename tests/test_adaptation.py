"""Adaptation without targets against independent oracles: torch's own batch norm, autograd, closed forms, a memory by brute force."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgecl import METHODS, prepare
from edgecl.graph.lowering import build
from edgecl.graph.memory import kept_for_backward
from edgecl.learner import Problem
from edgecl.methods._norms import MIXED, ROWS, STORED, Statistics, moved
from edgecl.profiling import profile
from edgecl_device import Generator, InputError, ReplaySpec, TensorSpec
from edgecl_device.manifest import from_json, sealed, to_json
from edgecl_device.memory import whole_bytes
from edgecl_device.whole import WholeMemory

torch.set_num_threads(1)


class Deep(nn.Module):
    """Convolutions with batch norms behind a stem without one, a skip connection, and a linear head."""

    def __init__(self, settle, classes=4):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, classes)
        settle(self)

    def forward(self, x):
        x = F.relu(self.bn1(self.stem(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def net(toy):
    return Deep(toy.helpers.settle)


def images(count, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 8, 8, generator=generator) * scale + shift


def ready_of(net, method, **config):
    """A learner behind the stem, to whom all classes are known."""
    x = images(8).numpy()
    found = prepare(net, at="stem", example=x[:1], method=method, classes=4, config=METHODS[method].Config(**config))
    return found.fit(x, np.arange(8) % 4)


def latents(ready, x):
    with torch.no_grad():
        return ready.trunk(x)


def in_training(net):
    """The net as TENT configures it: statistics of the batch, none kept."""
    other = copy.deepcopy(net).train()
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return other


def test_norms_of_rows_are_those_of_torch_in_training(net):
    ours = copy.deepcopy(net)
    norms, x = Statistics(ours), images(9, seed=1, scale=2, shift=1)
    with torch.no_grad(), norms.using(ROWS, reports=True) as found:
        scores = ours(x)
    theirs = in_training(net)
    with torch.no_grad():
        assert torch.allclose(scores, theirs(x), rtol=1e-5, atol=1e-6)
        inside = net.stem(x)
    assert torch.allclose(found["bn1.mean"], inside.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert torch.allclose(found["bn1.var"], inside.var((0, 2, 3), unbiased=False), rtol=1e-5)
    with torch.no_grad(), norms.using(STORED):
        assert torch.allclose(ours(x), net(x), rtol=1e-5, atol=1e-6)
    tracked = nn.BatchNorm2d(6, momentum=0.3)
    tracked.load_state_dict(net.bn1.state_dict())
    tracked.train()(inside)
    with torch.no_grad(), norms.using(MIXED, 0.3, reports=True) as found:
        ours(x)
    assert torch.allclose(found["bn1.mean"], tracked.running_mean, rtol=1e-5, atol=1e-6)
    count = inside.numel() / 6
    biased = 0.7 * net.bn1.running_var + (tracked.running_var - 0.7 * net.bn1.running_var) * (count - 1) / count
    assert torch.allclose(found["bn1.var"], biased, rtol=1e-5)


def test_a_moving_variance_is_that_of_all_that_was_seen():
    """The exponential average of v + mu^2, less the square of that of mu, in float64 beside it; and its closed form on one image."""
    share, mean, var = 0.1, torch.full((3,), 0.5), torch.full((3,), 2.0)
    first, second = mean.double(), (var + mean * mean).double()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        x = torch.randn(1, 3, 4, 4, generator=generator) + 3 * torch.randn(1, 3, 1, 1, generator=generator)
        mean, var = moved(x, mean, var, share)
        wide = x.double()
        first = (1 - share) * first + share * wide.mean((0, 2, 3))
        second = (1 - share) * second + share * (wide * wide).mean((0, 2, 3))
    assert torch.allclose(mean.double(), first, rtol=1e-5, atol=1e-6)
    assert torch.allclose(var.double(), second - first * first, rtol=1e-4)
    assert (var > 4).all(), "the images' own means, whose variance is 9, are in it"
    start, x, n = (torch.tensor([0.5]), torch.tensor([2.0])), torch.tensor([[[3.0, 5.0]]]), 20
    mean, var = start
    for _ in range(n):
        mean, var = moved(x, mean, var, share)
    left = (1 - share) ** n  # of the start; the image has mean 4 and variance 1
    assert torch.allclose(mean, left * start[0] + (1 - left) * 4)
    assert var.item() == pytest.approx(left * 2.0 + (1 - left) * 1.0 + left * (1 - left) * (4 - 0.5) ** 2, rel=1e-5)


def test_tracked_scores_are_the_predictions_of_the_state_behind_them(net):
    ready = ready_of(net, "tent", rows_per_step=4)
    z = latents(ready, images(1, seed=2, scale=3))
    outputs, new = ready.learner.track(ready.state, z)
    after, _ = ready.learner.predict({**ready.state, **new}, z)
    assert torch.equal(outputs["scores"], after["scores"])
    assert not torch.allclose(outputs["scores"], ready.learner.predict(ready.state, z)[0]["scores"])
    assert set(new) == {"stat.bn1.mean", "stat.bn1.var", "stat.bn2.mean", "stat.bn2.var"}


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_tent_is_that_of_torch(net, optimizer):
    """Three steps of the published loop: batch statistics, mean entropy, affine parameters alone; scores are those before the step."""
    ready = ready_of(net, "tent", rows_per_step=4, optimizer=optimizer, lr=0.01)
    theirs = in_training(net)
    chosen = [p for name, p in theirs.named_parameters() if name.startswith("bn")]
    kinds = {"sgd": torch.optim.SGD, "momentum": lambda p, lr: torch.optim.SGD(p, lr, 0.9), "adam": torch.optim.Adam}
    optimiser, state = kinds[optimizer](chosen, lr=0.01), ready.state
    for step in range(3):
        x = images(20, seed=step, scale=2)  # more than rows_per_step: a host's batches may be of any size
        scores = theirs(x)
        loss = -(scores.softmax(1) * scores.log_softmax(1)).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            outputs, new = ready.learner.steps["adapt"](state, lr=torch.tensor(0.01), replay={"z": latents(ready, x)})
        assert outputs["scores"].shape == (20, 4)
        assert torch.allclose(outputs["scores"], scores, rtol=1e-4, atol=1e-5) and torch.allclose(outputs["loss"], loss, rtol=1e-4)
        state = {**state, **new}
    names = [name for name, _ in net.named_parameters() if name.startswith("bn")]
    assert ready.learner.trained == names
    for name in names:
        assert torch.allclose(state[f"param.{name}"], theirs.get_parameter(name), rtol=1e-4, atol=1e-5), name


def test_statistics_of_rows_are_stored_by_an_update(net):
    ready = ready_of(net, "tent", rows_per_step=4, statistics="rows", lr=0.0)
    x = images(12, seed=3, scale=2)
    with torch.no_grad():
        outputs, new = ready.learner.adapt(ready.state, torch.tensor(0.0), {"z": latents(ready, x)})
        after = [ready.learner.predict({**ready.state, **new}, latents(ready, x[i : i + 1]))[0]["scores"] for i in range(12)]
    assert torch.allclose(torch.cat(after), outputs["scores"], rtol=1e-4, atol=1e-5)
    assert not set(ready.learner.track(ready.state, latents(ready, x[:1]))[1]), "samples move nothing"


def test_an_update_keeps_the_inputs_of_norms_and_masks_alone(net):
    """Maps of 6 channels, 8 x 8, of 8 rows: one of each norm as floats, one mask of each rectifier, and nothing else of a map's size."""
    ready = ready_of(net, "tent", rows_per_step=8)
    kept = kept_for_backward(build(ready)["adapt"].graph)
    one = 8 * 6 * 8 * 8
    assert kept["bool"] == 2 * one + 64  # and which classes were seen
    assert 2 * one * 4 <= kept["float32"] < 2 * one * 4 + 1024
    found = profile(ready)
    phases = {step.step: step.canonical for step in found.steps}
    assert "weight_gradient" not in phases["adapt"] and phases["adapt"]["forward"] == 8 * phases["track"]["forward"]
    assert found.ledger["adaptation_start"] == found.ledger["state_second_buffers"]
    assert found.adapt_every == 64


def test_eata_is_the_published_loss_on_kept_rows(net):
    net.fc.weight.data *= 6  # predictions that are sure
    x, probability = images(40, seed=5, scale=3), torch.tensor([0.7, 0.1, 0.1, 0.1])
    theirs = in_training(net)
    scores = theirs(x)
    p = scores.softmax(1)
    entropy = -(p * p.log()).sum(1)
    bound, cosine = 0.7 * math.log(4), F.cosine_similarity(p, probability[None]).detach()
    middle = float(cosine[entropy < bound].median()) + 1e-3
    ready = ready_of(net, "eata", rows_per_step=4, optimizer="sgd", lr=0.1, margin=0.7, redundancy=middle, anchor=2.0)
    learner = ready.learner
    generator = torch.Generator().manual_seed(4)
    state = {**ready.state, "probability": probability}
    for name in learner.trained:
        state[f"fisher.{name}"] = torch.rand(state[f"param.{name}"].shape, generator=generator)
        state[f"anchor.{name}"] = state[f"param.{name}"] + 0.1
    kept = (entropy < bound) & (cosine < middle)
    assert 0 < kept.sum() < (entropy < bound).sum() < 40, "both filters act"
    weights = (bound - entropy[kept]).exp().detach()
    named = {name: value for name, value in theirs.named_parameters() if name in learner.trained}
    pull = sum((state[f"fisher.{n}"] * (value - state[f"anchor.{n}"]) ** 2).sum() for n, value in named.items())
    loss = (weights * entropy[kept]).mean() + 2.0 * pull
    loss.backward()
    with torch.no_grad():
        outputs, new = learner.adapt(state, torch.tensor(0.1), {"z": latents(ready, x)})
    assert torch.allclose(outputs["loss"], loss, rtol=1e-4) and int(outputs["health.kept"]) == int(kept.sum())
    for name, value in named.items():
        assert torch.allclose(new[f"param.{name}"], value.detach() - 0.1 * value.grad, rtol=1e-4, atol=1e-5), name
    assert torch.allclose(new["probability"], 0.9 * probability + 0.1 * p[kept].mean(0), rtol=1e-4)


def test_eata_leaves_everything_when_it_keeps_nothing(net):
    ready = ready_of(net, "eata", rows_per_step=4, margin=1e-6, anchor=0.0)
    state = {**ready.state}
    for name in [n for n in state if n.startswith("adam_m")]:
        state[name] = torch.ones_like(state[name])  # momentum would move the weights without a gradient
    with torch.no_grad():
        _, new = ready.learner.adapt(state, torch.tensor(0.1), {"z": latents(ready, images(6, seed=6))})
    assert all(torch.equal(value, state[name]) for name, value in new.items())


def test_eata_takes_no_unreliable_sample_in_and_so_does_no_work_for_it(toy):
    x, _ = toy.helpers.samples(40, seed=12)
    with toy.device("eata", "eager", margin=0.9) as learner:
        reports = [learner.adapt(a) for a in x]
        limit = 0.9 * math.log(2)
        for report in reports:
            p = np.exp(report.prediction.scores[:2].astype(np.float64))  # two classes are known
            p /= p.sum()
            assert report.selected == (-(p * np.log(p)).sum() < limit)
        chosen = [r.selected for r in reports]
        assert 6 < sum(chosen) < 40
        counts = np.cumsum(chosen)
        assert [r.updated for r in reports] == [bool(s and n >= 6 and n % 4 == 0) for s, n in zip(chosen, counts, strict=True)]
        assert learner.report()["replay"]["rows"] == 6


def test_eatas_information_is_the_mean_of_squared_gradients(net):
    ready = ready_of(net, "eata", rows_per_step=4)
    wanted = {name: 0.0 for name in ready.learner.trained}
    model = copy.deepcopy(net).eval()
    seen = 0
    x = images(8)
    for i in range(8):
        model.zero_grad()
        scores = model(x[i : i + 1])[0]  # all of them, whatever classes have come so far
        F.cross_entropy(scores[None], scores.argmax()[None]).backward()
        seen += 1
        for name in wanted:
            wanted[name] = wanted[name] + model.get_parameter(name).grad ** 2
    for name, value in wanted.items():
        assert torch.allclose(ready.state[f"fisher.{name}"], value / seen, rtol=1e-3, atol=1e-8), name


@pytest.mark.parametrize(("statistics", "share"), [("each", 0.2), ("source", 0.1)])
def test_statistics_alone(net, statistics, share):
    ready = ready_of(net, "bn_stats", statistics=statistics, share=share)
    assert set(ready.learner.steps) == {"predict", "adapt"} and ready.memory is None
    x, state = images(30, seed=7, scale=2, shift=1), ready.state
    for part in (x[:10], x[10:]):
        with torch.no_grad():
            outputs, new = ready.learner.adapt(state, latents(ready, part))
            state = {**state, **new}
            assert torch.allclose(ready.learner.predict(state, latents(ready, part))[0]["scores"], outputs["scores"], rtol=1e-4, atol=1e-5)
    inside = latents(ready, x)
    mean = 0.9 * net.bn1.running_mean + 0.1 * inside[10:].mean((0, 2, 3))  # of the source and the last batch
    if statistics == "source":
        assert torch.allclose(state["stat.bn1.mean"], mean, rtol=1e-4, atol=1e-5)
        assert torch.equal(state["source.bn1.mean"], net.bn1.running_mean)
    else:
        mean = 0.64 * net.bn1.running_mean + 0.16 * inside[:10].mean((0, 2, 3)) + 0.2 * inside[10:].mean((0, 2, 3))
        assert torch.allclose(state["stat.bn1.mean"], mean, rtol=1e-4, atol=1e-5)


def test_statistics_of_a_batch(net):
    """Prediction-time batch norm: the whole net on the statistics of 24 images."""
    ready = ready_of(net, "bn_stats", statistics="rows", rows_per_step=4)
    assert set(ready.learner.steps) == {"predict", "track", "adapt"}
    x = images(24, seed=8, scale=2)
    with torch.no_grad():
        outputs, _ = ready.learner.adapt(ready.state, replay={"z": latents(ready, x)})
        assert torch.allclose(outputs["scores"], in_training(net)(x), rtol=1e-4, atol=1e-5)


def test_a_net_without_norms_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    for method in ("tent", "bn_stats", "eata"):
        with pytest.raises(InputError, match=r"^suffix: must have a .*norm.*cut the model further up"):
            prepare(net, at="1", example=np.zeros((1, 4), np.float32), method=method, classes=2)


def test_a_norm_without_statistics_or_without_a_call_is_refused(toy):
    problem = Problem(TensorSpec("z", (1, 6, 8, 8), "float32"), 4)
    suffix = nn.Sequential(nn.BatchNorm2d(6, track_running_stats=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    with pytest.raises(InputError, match=r"^suffix: batch norm '0' must have stored statistics"):
        METHODS["tent"](problem, suffix=suffix)

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.fc = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.Linear(6, 4)

        def forward(self, x):
            return self.fc(self.used(x).mean((2, 3)))

    with pytest.raises(InputError, match=r"^suffix: must call each of its batch norms, got \['idle'\]"):
        METHODS["tent"](problem, suffix=Idle())

    class Twice(Idle):
        def forward(self, x):
            return self.fc(self.idle(self.used(self.used(x))).mean((2, 3)))

    with pytest.raises(InputError, match=r"^suffix: batch norm 'used' must be called once, it is called again"):
        METHODS["tent"](problem, suffix=Twice())


def make(policy, rows=6, classes=3, seed=1):
    spec = ReplaySpec((TensorSpec("z", (2,), "int32"),), rows, 0, policy, seed)
    return WholeMemory(ReplaySpec(spec.fields, rows, whole_bytes(spec, classes), policy, seed), classes)


def row(number):
    return {"z": np.array([number, -number], np.int32)}


def test_a_ring_holds_the_last_rows():
    memory = make("ring")
    for number in range(20):
        memory.offer(row(number), number % 3, number)
        assert sorted(memory.draw()["replay.z"][: len(memory), 0].tolist()) == list(range(max(0, number - 5), number + 1))
        assert memory.is_due(4) == (number >= 5 and number % 4 == 3)
    assert memory.generator.counter == 0, "nothing is drawn"


def test_balanced_memory_is_that_of_note_by_brute_force():
    """NOTE's PBRS over lists, from the same random words. Which row of a class goes is the words' as well: any one of them."""
    classes, stream = 4, np.random.default_rng(0).choice(4, 400, p=[0.7, 0.2, 0.08, 0.02])
    memory, words = make("balanced", classes=classes, seed=9), Generator(9, 0)
    kept, offered = {c: [] for c in range(classes)}, [0] * classes
    for number, label in enumerate(stream.tolist()):
        offered[label] += 1
        memory.offer(row(number), label, number)
        sizes = [len(kept[c]) for c in range(classes)]
        largest = [c for c in range(classes) if sizes[c] == max(sizes)]
        victim = None
        if sum(sizes) < 6:
            kept[label].append(number)
        elif label not in largest:
            victim = largest[words.below(len(largest))]
            words.below(sizes[victim])
            kept[label].append(number)
        elif words.below(offered[label]) < sizes[label]:
            victim = label
            kept[label].append(number)
        rows = memory.rows_by_name()
        for c in range(classes):
            now = rows["replay.sample_id"][rows["replay.target"] == c].tolist()
            assert set(now) <= set(kept[c]) and len(now) == len(kept[c]) - (c == victim)
            assert number in now or c != label or number not in kept[c]
            kept[c] = now
        assert words.counter == memory.generator.counter
    assert max(map(len, kept.values())) - min(map(len, kept.values())) <= 1, "a rare class has its share"


def test_a_balanced_memory_keeps_a_fair_sample_of_each_class():
    """Of 60 samples of one class, 6 rows: each is kept in about a tenth of 600 runs."""
    hits = np.zeros(60)
    for seed in range(600):
        memory = make("balanced", seed=seed)
        for number in range(60):
            memory.offer(row(number), 1, number)
        hits[memory.rows_by_name()["replay.sample_id"]] += 1
    assert hits.sum() == 3_600 and np.abs(hits - 60).max() < 5 * math.sqrt(60)


@pytest.mark.parametrize("policy", ["ring", "balanced"])
def test_an_offer_is_taken_back_to_the_bit(policy):
    memory, generator = make(policy), np.random.default_rng(3)
    for number in range(60):
        label = int(generator.integers(0, 3))
        before = {name: value.copy() for name, value in memory.snapshot().items()}
        take_back = memory.offer_for_now(row(number), label, number)
        take_back()
        after = memory.snapshot()
        used = len(before["memory.sample_id"])
        for name, value in before.items():
            assert np.array_equal(after[name][: len(value)] if name.startswith("memory.row") else after[name], value), name
        assert len(after["memory.sample_id"]) == used
        memory.offer(row(number), label, number)
    copied = make(policy)
    copied.restore(memory.snapshot())
    for number in range(60, 90):
        assert copied.offer(row(number), number % 3, number) == memory.offer(row(number), number % 3, number)
    assert all(np.array_equal(a, memory.snapshot()[name]) for name, a in copied.snapshot().items())
    memory.clear()
    assert len(memory) == 0 and not memory.draw()["replay.z"].any()


@pytest.mark.parametrize("policy", ["ring", "balanced"])
def test_every_byte_of_such_a_memory_counts(policy):
    memory = make(policy)
    arrays = [*memory._rows.arrays.values(), memory._ids, memory._slots, memory._starts, memory._offered]
    assert memory.nbytes == sum(array.nbytes for array in arrays) == memory.spec.capacity_bytes
    with pytest.raises(InputError, match=r"^capacity_bytes: must be at least \d+ and at most \d+ for 6 rows.*; take fewer rows"):
        WholeMemory(ReplaySpec(memory.spec.fields, 6, memory.nbytes - 1, policy, 0), 3)
    with pytest.raises(InputError, match=r"^policy: must be one of reservoir, largest-class for rows with a file of their own"):
        WholeMemory(ReplaySpec(memory.spec.fields, 6, memory.nbytes, policy, 0, in_file=True), 3)


def test_manifests_of_the_schema_before_are_read(toy):
    """Of a learner that does not adapt: schema 3 knows no ``adapt``."""
    exported, _ = toy.bundle("ncm")
    data = json.loads(to_json(exported.manifest))
    del data["adapt"], data["manifest_sha256"]
    older = from_json(json.dumps(sealed({**data, "schema": 3})))
    assert older.adapt is None and older.steps == exported.manifest.steps
