"""CoTTA against its equations, and the teacher's views."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgecl import METHODS, prepare
from edgecl.methods._views import GRAIN, view_draw, views
from edgecl_device import InputError

torch.set_num_threads(1)

MIDDLE = GRAIN // 2
PLAIN = [MIDDLE, MIDDLE, MIDDLE, 0, MIDDLE, MIDDLE]
"""No zoom, no shift, not mirrored, brightness and contrast as they are."""


def net_of(settle):
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
    net = nn.Sequential(nn.Identity(), *net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    settle(net)
    net[-1].weight.data *= 3
    return net


def ready_of(net, **config):
    x = np.random.default_rng(0).standard_normal((6, 2, 8, 8)).astype(np.float32)
    ready = prepare(net, at="0", example=x[:1], method="cotta", classes=3, config=METHODS["cotta"].Config(rows_per_step=4, **config))
    return ready.fit(x, np.arange(6) % 3)


def in_training(net, state=None, kind=""):
    other = copy.deepcopy(net).train()
    for name, parameter in other.named_parameters():
        if state is not None and f"{kind}.{name}" in state:
            parameter.data = state[f"{kind}.{name}"].clone()
    return other


@pytest.mark.parametrize(("threshold", "uses_views"), [(0.0, False), (1.0, True)])
def test_an_update_is_that_of_the_equations(toy, threshold, uses_views):
    net = net_of(toy.helpers.settle)
    ready = ready_of(net, views=2, threshold=threshold, teacher=0.9, restore=0.25, optimizer="sgd", lr=0.3)
    generator = torch.Generator().manual_seed(1)
    state = {
        n: v + 0.1 * torch.randn(v.shape, generator=generator) if n.startswith(("teacher.", "param.")) else v
        for n, v in ready.state.items()
    }
    x = torch.randn(8, 2, 8, 8, generator=generator) * 2
    draw = {
        "view": torch.randint(0, GRAIN, (2, 8, 6), generator=generator),
        "restore": torch.randint(0, GRAIN, (len(ready.learner.trained),), generator=generator),
    }
    student, teacher, source = (in_training(net, state, kind) for kind in ("param", "teacher", "anchor"))
    with torch.no_grad():
        confidence = source(x).softmax(1).amax(1).mean()
        assert 0.4 < confidence < 0.99
        y = teacher(views(x, draw["view"])).reshape(2, 8, 3).mean(0) if uses_views else teacher(x)
        outputs, new = ready.learner.steps["adapt"](state, lr=torch.tensor(0.3), replay={"z": x}, draw=draw)
    loss = F.cross_entropy(student(x), y.softmax(1))
    loss.backward()
    own = -(y.softmax(1) * y.log_softmax(1)).sum(1).mean()
    assert torch.allclose(outputs["scores"], y, rtol=1e-4, atol=1e-5) and torch.allclose(outputs["loss"], loss - own, rtol=1e-3, atol=1e-6)
    back = 0
    assert ready.learner.trained == [n for n, _ in net.named_parameters() if n not in ("1.bias", "4.bias")], "a norm takes them away"
    for name in ready.learner.trained:
        parameter = student.get_parameter(name)
        stepped = parameter.detach() - 0.3 * parameter.grad
        assert torch.allclose(new[f"teacher.{name}"], 0.9 * state[f"teacher.{name}"] + 0.1 * stepped, rtol=1e-4, atol=1e-5), name
        gone = new[f"param.{name}"] == state[f"anchor.{name}"]
        back += int(gone.sum())
        assert torch.allclose(new[f"param.{name}"][~gone], stepped[~gone], rtol=1e-4, atol=1e-5), name
    total = sum(student.get_parameter(name).numel() for name in ready.learner.trained)
    assert abs(back - total / 4) < 4 * (total * 3 / 16) ** 0.5, "a quarter goes back"


def test_every_weight_goes_back_equally_often(toy):
    ready = ready_of(net_of(toy.helpers.settle), views=0, restore=0.1)
    hits = {name: 0 for name in ready.learner.trained}
    state = {n: v + 1.0 if n.startswith("param.") else v for n, v in ready.state.items()}
    x = torch.zeros(4, 2, 8, 8)
    with torch.no_grad():
        for offset in range(0, GRAIN, GRAIN // 50):
            draw = {"restore": torch.full((len(hits),), offset)}
            _, new = ready.learner.adapt(state, torch.tensor(0.0), {"z": x}, draw)
            for name in hits:
                hits[name] = hits[name] + (new[f"param.{name}"] == state[f"anchor.{name}"]).int()
    assert all(int(h.min()) >= 4 and int(h.max()) <= 6 for h in hits.values()), "5 of 50 draws, for each of them"


def test_single_samples_are_predicted_by_the_teacher(toy):
    net = net_of(toy.helpers.settle)
    ready = ready_of(net)
    state = {n: v * 1.5 if n.startswith("param.") else v for n, v in ready.state.items()}
    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.allclose(ready.learner.predict(state, x)[0]["scores"], net.eval()(x), rtol=1e-4, atol=1e-5)
        assert torch.allclose(ready.learner.track(state, x)[0]["scores"], ready.learner.track(ready.state, x)[0]["scores"])


def test_views():
    x = torch.randn(3, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    assert view_draw(3, 2).shape == (2, 3, 6)
    plain = torch.tensor(PLAIN).expand(2, 3, 6)
    assert torch.allclose(views(x, plain), torch.cat([x, x]), atol=1e-4)
    mirrored = torch.tensor([*PLAIN[:3], GRAIN - 1, *PLAIN[4:]]).expand(1, 3, 6)
    assert torch.allclose(views(x, mirrored), x.flip(3), atol=1e-4)
    brighter = torch.tensor([*PLAIN[:4], GRAIN - 1, MIDDLE]).expand(1, 3, 6)
    deviation = x.std((1, 2, 3), correction=0, keepdim=True)
    assert torch.allclose(views(x, brighter), x + 0.4 * deviation, atol=1e-3)
    closer = torch.tensor([0, *PLAIN[1:]]).expand(1, 3, 6)  # 0.9 of the sides
    grid = F.affine_grid(torch.eye(2, 3).expand(3, 2, 3) * 0.9, [3, 2, 6, 8], align_corners=False)
    wanted = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    assert torch.allclose(views(x, closer), wanted, atol=1e-3)


def test_views_need_maps():
    net = nn.Sequential(nn.Identity(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    config = METHODS["cotta"].Config(rows_per_step=4)
    with pytest.raises(InputError, match=r"^views: must be 0 for a latent of \[1, 4\]"):
        prepare(net, at="0", example=np.zeros((1, 4), np.float32), method="cotta", classes=2, config=config)
