"""REMIND's augmentation, schedule and settings against torch, numpy and the rule of the authors written anew."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgecl import METHODS, prepare
from edgecl.methods._augment import ENTRIES, PLACES, beta_quantiles, crop, crop_sizes, interpolation, mix
from edgecl_device import Generator, Learner
from edgecl_device.errors import InputError
from edgecl_device.manifest import DrawSpec
from edgecl_export import export

torch.set_num_threads(1)
REMIND = METHODS["latent_replay"].Config.remind


def place_of(start, size, length):
    """The smallest integer that puts a box of this size there."""
    return -(-start * PLACES // (length + 1 - size))


def boxes(height, width):
    for h, w in itertools.product(range(1, height + 1), range(1, width + 1)):
        yield from itertools.product(range(height + 1 - h), range(width + 1 - w), [h], [w])


@pytest.mark.parametrize("shape", [(7, 7), (4, 6)], ids=str)
def test_every_box_of_a_map_comes_back_as_torch_interpolates_it(shape):
    height, width = shape
    every = list(boxes(height, width))
    x = torch.randn(len(every), 3, height, width, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[h, w] for _, _, h, w in every]).float()
    place = torch.tensor([[place_of(top, h, height), place_of(left, w, width)] for top, left, h, w in every])
    found = crop(x, torch.arange(len(every)), place, sizes)
    for one, got, (top, left, h, w) in zip(x, found, every, strict=True):
        cut = one[None, :, top : top + h, left : left + w]
        want = F.interpolate(cut, (height, width), mode="bilinear", align_corners=False)[0]
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6), (top, left, h, w)


@pytest.mark.parametrize("length", [7, 255])
def test_places_reach_every_start_about_equally_often(length):
    for size in (1, 2, length - 1, length):
        place = torch.arange(0, PLACES, 8 if length < 10 else 64)
        first = interpolation(place, torch.full((len(place),), float(size)), length)[:, 0].argmax(1)
        counts = torch.bincount(first, minlength=length + 1 - size)
        assert len(counts) == length + 1 - size, "a box never sticks out"
        assert counts.max() - counts.min() <= 1


def test_boxes_come_as_often_as_by_the_authors_rule():
    """Their rule with random numbers: area uniform, aspect log-uniform, both sides rounded, ten tries."""
    source, counts, draws = random.Random(0), np.zeros((8, 8)), 100_000
    for _ in range(draws):
        h = w = 7
        for _ in range(10):
            area, aspect = source.uniform(2 / 7, 1) * 49, math.exp(source.uniform(math.log(3 / 4), math.log(4 / 3)))
            tall, wide = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if tall <= 7 and wide <= 7:
                h, w = tall, wide
                break
        counts[h, w] += 1 / draws
    table = np.zeros((8, 8))
    for h, w in crop_sizes(7, 7).int().tolist():
        table[h, w] += 1 / ENTRIES
    assert np.abs(table - counts).sum() / 2 < 0.01


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0])
def test_shares_are_quantiles_of_the_beta_distribution(alpha):
    table = beta_quantiles(alpha).double().numpy()
    drawn = np.sort(np.random.default_rng(0).beta(alpha, alpha, 200_000))
    below = np.searchsorted(drawn, table) / len(drawn)
    # where the table is closer to 0 or 1 than float32 can tell, many entries are one number
    inside = (table > 1e-6) & (table < 1 - 1e-6)
    assert np.abs(below - (np.arange(ENTRIES) + 0.5) / ENTRIES)[inside].max() < 0.005
    assert np.all(np.diff(table) >= 0) and table[0] >= 0 and table[-1] <= 1
    assert table.mean() == pytest.approx(0.5, abs=1e-6)
    assert table.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=5e-3)


def test_mix_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [-1.0, -2.0]])
    assert mix(x, torch.tensor([0.25, 1.0]), 2).tolist() == [[4.0, 5.0], [3.0, 4.0]]


@pytest.mark.parametrize("real", [4, 3, 1, 0])
def test_a_step_with_crop_and_mixup_equals_torch(toy, real):
    """Two mixed rows from four drawn ones, of which `real` are there; a row without a partner stays as it is."""
    config = {"rows_per_step": 2, "crop": True, "mixup": 0.4, "codec": "float32", "new_weight": 0.5, "lr": 0.1}
    ready = toy.prepared("latent_replay", **config)
    learner, state = ready.learner, ready.state
    generator = torch.Generator().manual_seed(1)
    z, stored = torch.rand(1, 6, 4, 4, generator=generator), torch.rand(4, 6, 4, 4, generator=generator)
    labels = torch.tensor([0, 1, 1, 2])
    draw = {
        "size": torch.randint(0, ENTRIES, (5,), generator=generator),
        "place": torch.randint(0, PLACES, (5, 2), generator=generator),
        "share": torch.tensor([700]),
    }
    replay = {"z": stored.clone(), "target": labels, "weight": (torch.arange(4) < real).float()}
    replay["z"][real:] = float("nan")
    outputs, new = learner.learn(state, z, torch.tensor([3]), torch.ones(1), torch.tensor(0.1), replay, draw)

    cropped = []
    for one, size, place in zip(torch.cat([z, stored]), draw["size"], draw["place"], strict=True):
        h, w = crop_sizes(4, 4)[size].int().tolist()
        top, left = int(place[0]) * (5 - h) // PLACES, int(place[1]) * (5 - w) // PLACES
        cropped.append(F.interpolate(one[None, :, top : top + h, left : left + w], (4, 4), mode="bilinear", align_corners=False))
    share, seen = float(beta_quantiles(0.4)[700]), torch.tensor([True, True, False, True, False])
    weights = {name: state[f"param.{name}"].clone().requires_grad_(True) for name in learner.trained}

    def loss(x, label):
        return F.cross_entropy(learner.scores(weights, x).masked_fill(~seen, -torch.inf), torch.tensor([label]))

    total = 0.5 * loss(cropped[0], 3)
    pairs = min(real, 2)
    for i in range(pairs):
        a, b = cropped[1 + i], cropped[3 + i]
        if real > 2 + i:
            part = learner.scores(weights, share * a + (1 - share) * b)
            log = part.masked_fill(~seen, -1e30).log_softmax(1)[0]
            mixed = share * log[labels[i]] + (1 - share) * torch.where(seen[labels[2 + i]], log[labels[2 + i]], log[labels[2 + i]])
            total = total - mixed / pairs
        else:
            total = total + loss(a, int(labels[i])) / pairs
    gradients = torch.autograd.grad(total, list(weights.values()))
    assert outputs["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        assert torch.allclose(new[f"param.{name}"], weight - 0.1 * gradient, rtol=1e-5, atol=1e-7), name
    alone = learner.predict(state, z)[0]["scores"]
    assert torch.equal(outputs["scores"], alone), "the prediction is that of the whole map, not of a box"


def test_the_rate_of_a_class_falls_with_its_own_samples(toy):
    """Closed form: each step is that of a learner without a schedule at lr * decay ** (n_y // every)."""
    scheduled = toy.prepared("latent_replay", codec="float32", lr_decay=0.5, lr_decay_every=3)
    plain = toy.prepared("latent_replay", codec="float32")
    state, seen = scheduled.state, [0] * 5
    assert state["count"][:2].tolist() == [12, 12] and not state["learned"].any(), "base samples do not count"
    rows = {"z": torch.zeros(4, 6, 4, 4), "target": torch.zeros(4).long(), "weight": torch.zeros(4)}
    z = scheduled.examples[0][0]
    for label in [0, 0, 1, 0, 0, 2, 0, 1, 0, 0, 1, 1, 0, 0, 0, 4]:
        arguments = z, torch.tensor([label]), torch.ones(1)
        _, new = scheduled.learner.learn(state, *arguments, torch.tensor(0.2), rows)
        bare = {name: tensor for name, tensor in state.items() if name != "learned"}
        _, other = plain.learner.learn(bare, *arguments, torch.tensor(0.2 * 0.5 ** (seen[label] // 3)), rows)
        seen[label] += 1
        assert new["learned"].tolist() == seen
        assert all(torch.allclose(new[name], tensor, rtol=1e-6, atol=1e-8) for name, tensor in other.items())
        state = {**state, **new}
    assert max(seen) == 10


@pytest.mark.parametrize("every", [1, 7, 100, 1000])
def test_the_exponent_steps_where_it_should(every):
    counts = torch.arange(1, 20_001).float()
    assert torch.equal((counts / every).floor().long(), torch.arange(1, 20_001) // every)


def test_the_settings_are_those_of_the_authors():
    config = REMIND()
    r = config.rows_per_step
    assert (r, config.subquantizers, config.centroids, config.codec, config.policy) == (50, 32, 256, "pq", "largest-class")
    assert (config.optimizer, config.momentum, config.lr_decay, config.lr_decay_every) == ("momentum", 0.9, 0.5, 100)
    assert (config.crop, config.mixup) == (True, 0.1)
    # mean over r + 1 losses at rate 0.1: every one of them gets 0.1 / (r + 1)
    assert config.lr * config.new_weight == pytest.approx(0.1 / (r + 1))
    assert config.lr / r == pytest.approx(0.1 / (r + 1))
    assert config.lr * config.weight_decay == pytest.approx(0.1 * 1e-5)
    small = METHODS["latent_replay"].Config.remind_edge(capacity_bytes=1 << 16)
    assert (small.rows_per_step, small.subquantizers, small.centroids, small.capacity_bytes) == (8, 8, 64, 1 << 16)
    with pytest.raises(InputError, match=r"^centroids: "):
        REMIND(centroids=100)


def test_crop_needs_one_map(toy):
    x = np.zeros((1, 4), np.float32)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    with pytest.raises(InputError, match=r"^crop: must be False for a latent of \[\[1, 8\]\], got True; leave it out, or cut"):
        prepare(model, at="1", example=x, method="latent_replay", classes=3, config=METHODS["latent_replay"].Config(crop=True))


def test_the_device_draws_what_the_step_needs(toy, tmp_path):
    """REMIND on a small net: the gates hold; rows, boxes and the share come from one stream, in that order."""
    x, y = toy.helpers.samples(60)
    config = REMIND(2, 3, 16, capacity_bytes=4096, lr_decay=0.8, lr=0.02)
    ready = prepare(toy.helpers.Net(), at="stem", example=x[:1], method="latent_replay", classes=5, config=config).fit(x[:40], y[:40])
    exported = export(ready, tmp_path / "bundle")
    assert exported.manifest.replay.draws == (
        DrawSpec("size", (5,), ENTRIES),
        DrawSpec("place", (5, 2), PLACES),
        DrawSpec("share", (1,), ENTRIES),
    )
    with Learner.load(exported.path) as learner:
        memory, fed, run = learner._core.memory, [], learner._engine.run
        learner._engine.run = lambda step, values: (fed.append((step, {k: np.array(v) for k, v in values.items()})), run(step, values))[1]
        for sample, label in zip(x[40:60], y[40:60], strict=True):
            stream, kept = Generator(memory.spec.seed, memory.generator.counter), memory.rows_by_name()["replay.z"]
            learner.learn(sample, int(label))
            values = fed[-1][1]
            places = stream.sample(len(kept), 4)
            assert np.array_equal(values["replay.z"], kept[places])
            assert values["draw.size"].tolist() == [stream.below(ENTRIES) for _ in range(5)]
            assert values["draw.place"].tolist() == [[stream.below(PLACES), stream.below(PLACES)] for _ in range(5)]
            assert values["draw.share"].tolist() == [stream.below(ENTRIES)]
        del learner._engine.run
        counter = memory.generator.counter
        with pytest.raises(InputError):
            learner.learn(np.full_like(x[0], np.nan), 0)
        assert memory.generator.counter == counter
