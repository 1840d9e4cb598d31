"""EcoTTA: parts, counts of the publication, gradients against a network of modules, warm-up."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgecl import METHODS, prepare
from edgecl.backbones import BACKBONES, wrn_40_2
from edgecl.graph.lowering import build
from edgecl.graph.memory import kept_for_backward
from edgecl.methods._adapt import affine_names
from edgecl.methods._parts import kept_elements
from edgecl_device import InputError

torch.set_num_threads(1)

PARTS = {  # of the publication: blocks in each part
    ("wrn_40_2", 4): ("block1.layer.2", "block1", "block2", "block3"),
    ("wrn_40_2", 5): ("block1.layer.2", "block1", "block2.layer.2", "block2", "block3"),
    ("wrn_28_10", 4): ("block1.layer.1", "block1", "block2", "block3"),
    ("wrn_28_10", 5): ("block1.layer.1", "block1", "block2.layer.1", "block2", "block3"),
}
COUNTS = [
    ("wrn_40_2", 4, 278_528, 107_008),
    ("wrn_40_2", 5, 327_680, 144_128),
    ("wrn_28_10", 4, 1_327_104, None),
    ("wrn_28_10", 5, 1_572_864, None),
]


def prepared(net, x, method="ecotta", at="conv1", classes=10, **config):
    return prepare(net, at=at, example=x[:1].numpy(), method=method, classes=classes, config=METHODS[method].Config(**config))


@pytest.fixture(scope="module")
def nets():
    return {name: BACKBONES[name](10) for name in ("wrn_40_2", "wrn_28_10")}


@pytest.mark.parametrize(("name", "parts", "elements", "parameters"), COUNTS)
def test_counts_are_those_of_the_publication(nets, name, parts, elements, parameters):
    learner = prepared(nets[name], torch.zeros(1, 3, 32, 32), parts=PARTS[name, parts]).learner
    assert kept_elements(learner.maps) == elements
    if parameters is not None:
        assert sum(learner.suffix.get_parameter(n).numel() for n in learner.trained) == parameters


@pytest.mark.parametrize(("name", "count"), [("wrn_40_2", 5_408), ("wrn_28_10", 17_952)])
def test_tent_trains_what_the_publication_says(nets, name, count):
    names = affine_names(nets[name])
    assert sum(nets[name].get_parameter(n).numel() for n in names) == count


class Two(nn.Module):
    """Two parts with norms, the second at half the size, behind a stem; a head with a norm."""

    def __init__(self, settle):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.one = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(6, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8))
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)
        settle(self)

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.two(self.one(self.stem(x))))).mean((2, 3)))


@pytest.fixture
def net(toy):
    return Two(toy.helpers.settle)


def images(count, seed=0, scale=1.0):
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed)) * scale


def written_out(net, ready, x, detached):
    """The same network as a reader of the publication would write it, with the learner's weights, in training mode."""
    torch.manual_seed(0)
    parts = [copy.deepcopy(net.one).train(), copy.deepcopy(net.two).train()]
    meta = []
    for k, (inputs, outputs, stride) in enumerate([(4, 6, 1), (6, 8, 2)]):
        modules = {"branch.conv": nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), "branch.norm": nn.BatchNorm2d(outputs)}
        modules["norm"] = nn.BatchNorm2d(outputs)
        for name, module in modules.items():
            for own, parameter in module.named_parameters():
                parameter.data = ready.state[f"param.metas.{k}.{name}.{own}"].clone()
        meta.append(modules)
    tail = copy.deepcopy(net.bn).train()
    with torch.no_grad():
        z = net.stem(x)
    gaps = []
    for k, part in enumerate(parts):
        frozen = part(z.detach() if detached and k else z)
        z = meta[k]["norm"](frozen) + F.relu(meta[k]["branch.norm"](meta[k]["branch.conv"](z)))
        gaps.append((z - frozen.detach()).abs().mean())
    scores = net.fc(F.relu(tail(z)).mean((2, 3)))
    return scores, gaps, meta


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("pull", ["weights", "outputs"])
def test_an_update_is_that_of_the_network_written_out(net, detached, pull):
    x, labels = images(30), np.arange(30) % 3
    ready = prepared(
        net,
        x,
        at="stem",
        classes=3,
        rows_per_step=4,
        detached=detached,
        pull=pull,
        anchor=0.2,
        optimizer="sgd",
        lr=0.5,
        margin=0.95,
        batch=10,
    )
    ready.fit(x.numpy(), labels)
    state = {name: value + 0.01 if name.startswith("anchor.") else value for name, value in ready.state.items()}
    rows = images(16, seed=1, scale=2)
    scores, gaps, meta = written_out(net, ready, rows, detached)
    entropy = -(scores.softmax(1) * scores.log_softmax(1)).sum(1)
    kept = entropy < 0.95 * math.log(3)
    assert 0 < kept.sum() < 16
    named = {f"metas.{k}.{n}.{own}": p for k, ms in enumerate(meta) for n, m in ms.items() for own, p in m.named_parameters()}
    assert set(named) == set(ready.learner.trained)
    held = sum(((p - state[f"anchor.{n}"]) ** 2).sum() for n, p in named.items()) if pull == "weights" else sum(gaps)
    loss = entropy[kept].mean() + 0.2 * held
    loss.backward()
    with torch.no_grad():
        outputs, new = ready.learner.steps["adapt"](state, lr=torch.tensor(0.5), replay={"z": ready.trunk(rows)})
    assert torch.allclose(outputs["loss"], loss, rtol=1e-4) and torch.allclose(outputs["scores"], scores, rtol=1e-4, atol=1e-5)
    for name, parameter in named.items():
        wanted = parameter.detach() - 0.5 * parameter.grad
        assert torch.allclose(new[f"param.{name}"], wanted, rtol=1e-4, atol=1e-5), name


def test_an_update_keeps_the_maps_of_meta_networks_alone(net):
    """``sum_k |x_{k-1}| + 2 |x_k|``, the input of the head's norm, and its last map, which is still there when the loss is."""
    x = images(12)
    sizes = {}
    for detached in (True, False):
        ready = prepared(net, x, at="stem", classes=3, rows_per_step=8, detached=detached, batch=6).fit(x.numpy(), np.arange(12) % 3)
        graph = build(ready)["adapt"].graph
        sizes[detached] = kept_for_backward(graph)["float32"] / 4 / 8
    maps = ready.learner.maps
    assert maps == (4 * 64, 6 * 64, 8 * 16)
    wanted = kept_elements(maps) + 2 * maps[-1]
    assert wanted <= sizes[True] < wanted + 40, "beside maps some vectors of channels and classes"
    assert sizes[False] >= sizes[True] + 8 * 16, "and that of the second part's own norm, where gradients pass it"


def test_the_warm_up_starts_from_the_plain_network_and_learns(toy):
    net = Two(toy.helpers.settle)
    x, labels = images(90, scale=0.5), np.arange(90) % 3
    x[:, 0] += torch.from_numpy(labels)[:, None, None] * 0.7
    ready = prepared(net, x, at="stem", classes=3, epochs=1, warmup_lr=0.0, batch=30).fit(x.numpy(), labels)
    state = ready.state
    for k, part in enumerate(("one", "two")):  # without a rate, what is left is where it starts
        with torch.no_grad():
            inside = getattr(net, part)[:1](net.stem(x) if k == 0 else net_in_training(net, x))
            wide = nn.BatchNorm2d(inside.shape[1]).train()
            wide.weight.data, wide.bias.data = getattr(net, part)[1].weight.data, getattr(net, part)[1].bias.data
            inside = wide(inside)
            inside = inside.relu() if k == 0 else inside
        assert torch.allclose(state[f"param.metas.{k}.norm.bias"], inside.mean((0, 2, 3)), rtol=1e-2, atol=1e-2)
    before = loss_of(ready, x, labels)
    trained = prepared(net, x, at="stem", classes=3, epochs=6, batch=30).fit(x.numpy(), labels)
    assert loss_of(trained, x, labels) < before - 0.1
    for name in trained.learner.trained:
        assert torch.equal(trained.state[f"anchor.{name}"], trained.state[f"param.{name}"])
    affine = prepared(net, x, "affine_warmup", at="stem", classes=3, epochs=6, batch=30).fit(x.numpy(), labels)
    assert loss_of(affine, x, labels) < loss_of(prepared(net, x, "tent", at="stem", classes=3).fit(x.numpy(), labels), x, labels) - 0.1
    assert affine.learner.trained == ["one.1.weight", "one.1.bias", "two.1.weight", "two.1.bias", "bn.weight", "bn.bias"]
    again = {name: value.clone() for name, value in affine.state.items() if name.startswith("param.")}
    affine.fit(x[:6].numpy(), labels[:6])
    assert all(torch.equal(affine.state[name], value) for name, value in again.items()), "the first samples alone train"


def net_in_training(net, x):
    one = copy.deepcopy(net.one).train()
    return one(net.stem(x))


def loss_of(ready, x, labels):
    with torch.no_grad():
        scores = ready.learner.predict(ready.state, ready.trunk(x))[0]["scores"]
    return float(F.cross_entropy(scores, torch.from_numpy(labels)))


def test_stored_statistics_after_a_warm_up_are_those_of_all_samples(net):
    x, labels = images(50), np.arange(50) % 3
    ready = prepared(net, x, "affine_warmup", at="stem", classes=3, warmup_lr=0.0, batch=7).fit(x.numpy(), labels)
    with torch.no_grad():
        inside = net.one[0](net.stem(x))
    assert torch.allclose(ready.state["stat.one.1.mean"], inside.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert torch.allclose(ready.state["stat.one.1.var"], inside.var((0, 2, 3), unbiased=False), rtol=1e-4)


def test_parts_that_do_not_fit_are_refused(net):
    x = images(1)
    for parts, message in [
        (("two", "one"), r"^parts: must run one behind the other"),
        (("fc",), r"^parts: must end where one map"),
        (("three",), r"^parts: must name modules behind the cut"),
    ]:
        with pytest.raises(InputError, match=message):
            prepared(net, x, at="stem", classes=3, parts=parts)
    with pytest.raises(InputError, match=r"^features: must be one float32 map"):
        prepare(
            nn.Sequential(nn.Flatten(), nn.Linear(128, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
            at="0",
            example=x.numpy(),
            method="ecotta",
            classes=3,
        )
    whole = nn.Sequential(nn.Identity(), net)
    parts = ("1.one", "1.two")
    deeper = prepared(whole, x, at="0", classes=3, stem="1.stem", parts=parts).learner
    assert deeper.maps == prepared(net, x, at="stem", classes=3).learner.maps
    with pytest.raises(InputError, match=r"^parts: must run one behind the other, and behind the stem"):
        prepared(whole, x, at="0", classes=3, stem="1.two", parts=parts)
    assert prepared(net, x, at="stem", classes=3).learner.maps == prepared(net, x, at="stem", classes=3, parts=("one", "two")).learner.maps
    assert prepared(wrn_40_2(10), torch.zeros(1, 3, 32, 32)).learner.maps == (16384, 32768, 16384, 8192)
