"""CLR: the identity at the start, one step against plain PyTorch, counts of the paper, tasks that never touch each other."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgecl import prepare
from edgecl.backbones import MobileNetV2, resnet18
from edgecl.graph.lowering import build, within
from edgecl.graph.memory import kept_for_backward
from edgecl.learner import UNSEEN, Problem
from edgecl.methods import Clr
from edgecl.profiling import profile
from edgecl.reprogram import Recipe, train_task, write_task
from edgecl_device import Learner
from edgecl_device.errors import InputError
from edgecl_device.manifest import TensorSpec

torch.set_num_threads(1)

ROWS = 3


class Bottleneck(nn.Module):
    """ResNet-50's block: 1x1, 3x3, 1x1."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        same = stride == 1 and inputs == 4 * width
        self.side = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x):
        return F.relu(self.main(x) + self.side(x))


def resnet50():
    """He et al. 2016, table 1; 25,557,032 weights."""
    layers, inputs = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)).eval()


def learner_of(net, shape, classes, **config):
    return Clr(Problem(TensorSpec("z", (1, *shape), "float32"), classes), Clr.Config(**config), suffix=net)


@pytest.mark.parametrize(
    ("make", "weights", "full", "kernels", "affine", "percent"),
    [
        (resnet50, 25_557_032, False, 34_560, 53_120, (0.135, 0.343, 0.551)),
        (resnet18, 11_689_512, False, 35_136, 9_600, (0.301, 0.383, 0.465)),
        (resnet50, 25_557_032, True, 239_040, 53_120, (0.935, 1.143, 1.351)),
    ],
    ids=["resnet50", "resnet18", "resnet50 full"],
)
def test_what_a_task_adds_is_what_the_paper_counts(make, weights, full, kernels, affine, percent):
    with torch.device("meta"):
        net = make()
    net = net.to_empty(device="cpu")
    for tensor in [*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())]:
        tensor.data.fill_(0.01)
    assert sum(p.numel() for p in net.parameters()) == weights
    found = learner_of(net, (3, 32, 32), 1000, full=full).task_values()
    head = dict(net.named_modules())
    last = [m for m in head.values() if isinstance(m, nn.Linear)][-1]
    assert found == {"kernels": kernels, "affine": affine, "statistics": affine, "head": last.in_features * 1000 + 1000}
    shares = np.cumsum([found["kernels"], found["affine"], found["statistics"]]) / weights * 100
    assert [round(share, 3) for share in shares] == list(percent)


@pytest.mark.parametrize("full", [False, True])
def test_the_first_prediction_is_the_frozen_networks_to_the_bit(toy, full):
    nets = {(1, 8, 8): toy.helpers.Net(), (3, 32, 32): MobileNetV2(5, width=0.25).eval()}
    toy.helpers.settle(nets[3, 32, 32])
    for shape, net in nets.items():
        learner = learner_of(net, shape, 5, full=full)
        state = learner.init()
        state["count"] += 1
        for seed in range(3):
            x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) * 3
            with torch.no_grad():
                assert (learner.predict(state, x)[0]["scores"] - net(x)).abs().max() == 0
        assert all(name.removeprefix("param.") in learner.trained for name in state if name.startswith("param."))
        assert {name.split(".")[-2] for name in learner.kernels} == {"reprogram"}


class Reference(nn.Module):
    """The toy's suffix behind its kernel, in plain modules."""

    def __init__(self, net):
        super().__init__()
        self.first, self.norm, self.act, self.second = copy.deepcopy(net.mid)
        self.kernel = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        nn.init.dirac_(self.kernel.weight, 6)
        self.head = copy.deepcopy(net.fc)
        self.double()

    def trained(self):
        return [self.kernel.weight, self.norm.weight, self.norm.bias, self.head.weight, self.head.bias]

    def forward(self, z):
        self.seen = self.kernel(self.first(z))
        return self.head(F.adaptive_avg_pool2d(self.second(self.act(self.norm(self.seen))), 1).flatten(1))


NAMES = ("mid.0.reprogram.weight", "mid.1.weight", "mid.1.bias", "fc.weight", "fc.bias")
OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.05),
}


def exact(ready):
    learner = copy.deepcopy(ready.learner)
    learner.suffix.double()
    learner._learning.double()
    return learner, {name: tensor.double() for name, tensor in ready.state.items()}


def close(a, b):
    return torch.allclose(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_single_samples_equal_torch(toy, optimizer):
    """Stored statistics in the forward pass; they then move by the running average of v + m^2, kept here as such."""
    ready = toy.prepared("clr", optimizer=optimizer, share=0.1)
    learner, state = exact(ready)
    reference = Reference(toy.helpers.Net()).eval()
    optimiser = OPTIMISERS[optimizer](reference.trained())
    norm, seen = reference.norm, {0, 1}
    mean, square = norm.running_mean.clone(), norm.running_var + norm.running_mean**2
    z = torch.rand(20, 1, 6, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    for i, one in enumerate(z):
        label, weight = (2 * i) % 5, 1.0 + i % 2
        seen.add(label)
        scores = reference(one).masked_fill(~torch.tensor([k in seen for k in range(5)]), -torch.inf)
        loss = weight * F.cross_entropy(scores, torch.tensor([label]))
        arguments = torch.tensor([label]), torch.tensor([weight]).double(), torch.tensor(0.05, dtype=torch.float64)
        outputs, new = learner.learn(state, one, *arguments)
        state = {**state, **new}
        assert outputs["loss"].item() == pytest.approx(loss.item(), rel=1e-6, abs=1e-9)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        maps = reference.seen.detach()
        mean = 0.9 * mean + 0.1 * maps.mean((0, 2, 3))
        square = 0.9 * square + 0.1 * (maps.var((0, 2, 3), correction=0) + maps.mean((0, 2, 3)) ** 2)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(square - mean**2)
        for name, parameter in zip(NAMES, reference.trained(), strict=True):
            assert close(state[f"param.{name}"], parameter.detach()), name
        assert close(state["stat.mid.1.running_mean"], norm.running_mean)
        assert close(state["stat.mid.1.running_var"], norm.running_var)


@pytest.mark.parametrize("real", [ROWS, 1, 0])
def test_rows_equal_torch_in_training_mode_when_all_are_there(toy, real):
    """With fewer rows the batch's statistics are too few and the stored ones are used. Filler is nonsense here: it must not matter."""
    ready = toy.prepared("clr", task_rows=ROWS, share=0.2, capacity_bytes=4096)
    learner, state = exact(ready)
    reference = Reference(toy.helpers.Net()).train(real == ROWS)
    reference.norm.momentum = 0.2
    optimiser = OPTIMISERS["sgd"](reference.trained())
    z = torch.rand(8, 1 + ROWS, 6, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for i, batch in enumerate(z):
        label, targets = torch.tensor([i % 2]), torch.tensor([0, 1, 0])
        rows = batch[1:].clone()
        rows[real:] = 1e3
        before = [reference.norm.running_mean.clone(), reference.norm.running_var.clone()]
        scores = reference(batch[: 1 + real])[:, :2]
        loss = F.cross_entropy(scores[:1], label) + (F.cross_entropy(scores[1:], targets[:real]) if real else 0.0)
        replay = {"z": rows, "target": targets, "weight": (torch.arange(ROWS) < real).double()}
        outputs, new = learner.learn_with_rows(
            state, batch[:1], label, torch.ones(1).double(), torch.tensor(0.05, dtype=torch.float64), replay
        )
        assert torch.equal(outputs["scores"], learner.predict(state, batch[:1])[0]["scores"]), "before the update, stored statistics"
        state = {**state, **new}
        assert outputs["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        maps = reference.seen.detach()
        mean, variance = maps.mean((0, 2, 3)), maps.var((0, 2, 3), correction=0)
        second = 0.8 * (before[1] + before[0] ** 2) + 0.2 * (variance + mean**2)
        expected = 0.8 * before[0] + 0.2 * mean
        reference.norm.running_mean.copy_(expected)
        reference.norm.running_var.copy_(second - expected**2)
        for name, parameter in zip(NAMES, reference.trained(), strict=True):
            assert close(state[f"param.{name}"], parameter.detach()), name
        assert close(state["stat.mid.1.running_var"], reference.norm.running_var)


def test_statistics_of_single_samples_come_to_those_of_the_stream(toy):
    """Samples whose own spread is small beside that of their means: batch norm's own rule would miss nearly all of it."""
    learner = learner_of(
        nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2)).eval(), (1, 4, 4), 2
    )
    generator = torch.Generator().manual_seed(0)
    state = learner.init()
    for _ in range(4000):
        mean, variance = torch.randn(1, generator=generator) * 2 + 1, torch.full((1,), 0.25)
        state |= learner.tracked(state, [(mean, variance)], 0.005)
    assert state["stat.1.running_mean"].item() == pytest.approx(1.0, abs=0.3)
    assert state["stat.1.running_var"].item() == pytest.approx(4.25, rel=0.15)


def test_unsuitable_networks_are_refused(toy):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(InputError, match=r"^suffix: must hold a convolution of more than one tap .* set full=True .*or take finetune"):
        learner_of(flat, (1, 4, 4), 2)
    with pytest.raises(InputError, match=r"^suffix: must hold a convolution to put a kernel behind, got 'none'; cut .* up, or take"):
        learner_of(flat, (1, 4, 4), 2, full=True)

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 16))

        def forward(self, x):
            return F.linear(x.flatten(1), self.weight)

    with pytest.raises(InputError, match=r"^suffix: must call a linear layer or a convolution as its head"):
        learner_of(Functional(), (1, 4, 4), 2)


def test_the_ledger_shows_full_last_stages_and_recomputed(toy):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            wide = [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
            self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
            self.early = nn.Sequential(*copy.deepcopy(wide), *copy.deepcopy(wide))
            self.late = nn.Sequential(nn.MaxPool2d(2), *copy.deepcopy(wide))
            self.fc = nn.Linear(8, 5)
            toy.helpers.settle(self)

        def forward(self, x):
            return self.fc(self.late(self.early(self.stem(x))).mean((2, 3)))

    x = np.zeros((1, 1, 16, 16), np.float32)
    kept = {}
    for name, at in (("full", "stem"), ("last stages", "early")):
        ready = prepare(Deep(), at=at, example=x, method="clr", classes=5)
        kept[name] = profile(ready).ledger["kept_for_backward"]
        if name == "full":
            step = build(ready, "onnx")["learn"]
            small = within(step, step.plan.arena_bytes * 19 // 20)  # what export does within ram_budget_bytes
            kept["recomputed"] = sum(kept_for_backward(small.graph).values())
            assert small.plan.arena_bytes < step.plan.arena_bytes and kept["full"] == sum(kept_for_backward(step.graph).values())
    assert kept["last stages"] < kept["full"] and kept["recomputed"] < kept["full"]


def test_likelihood_is_that_of_normal_densities(toy):
    learner = toy.prepared("clr").learner
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(30, 1, 6, 4, 4, generator=generator)
    state = learner.init()
    assert learner.identify(state, latents[0])[0]["likelihood"] == torch.tensor(UNSEEN)
    for z in latents[:-1]:
        state |= {k: v for k, v in learner.prime(state, z, torch.tensor([0]))[1].items() if k.startswith("feature.")}
    described = torch.stack([torch.cat([z[0].mean((1, 2)), z[0].std((1, 2), correction=0)]) for z in latents])
    mean, own = described[:-1].mean(0), described[:-1].var(0, correction=0)
    assert torch.allclose(state["feature.mean"], mean, atol=1e-5) and torch.allclose(state["feature.var"], own, atol=1e-5)
    variance = own + (own.mean() - own) * 8 / (29 + 8)
    expected = torch.distributions.Normal(mean, variance.sqrt()).log_prob(described[-1]).sum() + 12 * math.log(2 * math.pi) / 2
    assert learner.identify(state, latents[-1])[0]["likelihood"].item() == pytest.approx(expected.item(), rel=1e-4)


def shifted(toy, task, count, seed):
    """Samples of a task: the toy's, on another scale and level, classes of its own."""
    x, y = toy.helpers.samples(count, seed)
    return (x * (1.0 + 0.5 * task) + task).astype(np.float32), y


@pytest.mark.parametrize("engine", ["eager", "onnx", "executorch"])
def test_earlier_tasks_are_bit_identical_after_all_later_ones_and_are_identified(toy, engine, tmp_path):
    held = {f"task {t}": shifted(toy, t, 8, seed=90 + t)[0] for t in range(4)}
    store = None if engine == "eager" else tmp_path / "learner.db"
    with toy.device("clr", engine, store=store, lr=0.1) as learner:
        first = {}
        for t, (name, x_held) in enumerate(held.items()):
            learner.add_task(name)
            learner.switch_task(name)
            learner.add_class(f"thing {t}")
            for x, label in zip(*shifted(toy, t, 40, seed=t), strict=True):
                learner.learn(x, int(label))
            first[name] = [learner.predict(x).scores.tobytes() for x in x_held]
        for name, x_held in held.items():
            assert [learner.predict(x, task=name).scores.tobytes() for x in x_held] == first[name]
            learner.switch_task(name)
            assert [learner.predict(x).scores.tobytes() for x in x_held] == first[name]
            assert learner._core.names[0] == f"thing {name[-1]}"
        in_use, before = learner.task, learner.state()
        for name, x_held in held.items():
            for x in x_held:
                found = learner.identify(x, last=4)
            assert found.task == name and found.samples == 4 and set(found.likelihoods) == {"base", *held}
        assert learner.task == in_use and toy.helpers.same(learner.state(), before), "identify switches to none"
        seen = learner.predict(held["task 2"][0])
        again = learner.identify(seen.sample_id)
        assert again.sample_id == seen.sample_id and again.samples == 1
        learner.learn(again.sample_id, 1)
        for last in (0, 1025):
            with pytest.raises(InputError, match=r"^last: must be 1 to 1024 samples"):
                learner.identify(x, last=last)


def test_batches_on_the_host_equal_torch_in_training_mode(toy):
    learner, state = exact(toy.prepared("clr"))
    reference = Reference(toy.helpers.Net()).train()
    z = torch.rand(7, 6, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weights = {name: value.clone().requires_grad_(True) for name, value in learner.parameters(state).items()}
    scores, found = learner.in_training(weights, state, z)
    expected = reference(z)
    assert close(scores, expected)
    scores.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in zip(NAMES, reference.trained(), strict=True):
        assert torch.allclose(weights[name].grad, parameter.grad, rtol=1e-8, atol=1e-9), name
    (mean, variance), maps = found[0], reference.seen.detach()
    assert torch.allclose(mean, maps.mean((0, 2, 3))) and torch.allclose(variance, maps.var((0, 2, 3), correction=0))


def test_a_task_trained_on_the_host(toy):
    ready = toy.prepared("clr", fit=False)
    x, y = toy.helpers.samples(200, seed=5)
    held_x, held_y = toy.helpers.samples(50, seed=6)
    recipe = Recipe(epochs=12, every=8, lr=1e-2)
    seen = []
    state = train_task(ready, x, y, recipe, progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (12, 12)
    fresh = ready.learner.init()
    assert set(state) == set(fresh) and state["count"].tolist() == [40.0] * 5 and state["feature.count"] == 200
    with torch.no_grad():
        right = [
            int(ready.learner.predict(state, z)[0]["scores"].argmax()) == label
            for z, label in zip(ready.encode(held_x), held_y, strict=True)
        ]
    assert np.mean(right) >= 0.8
    again = train_task(ready, x, y, recipe)
    assert toy.helpers.same(toy.helpers.arrays(again), toy.helpers.arrays(state)), "no global seed"
    assert all(torch.equal(value, ready.state[name]) for name, value in fresh.items())
    with pytest.raises(InputError, match=r"^prepared: must be of the method clr, got ncm"):
        train_task(toy.prepared("ncm"), x, y)
    with pytest.raises(InputError, match=r"^x: must hold at least 2 samples"):
        train_task(ready, x[:1], y[:1])
    for name, value in {"epochs": 0, "batch": 1, "lr": -1.0, "factor": 0.0, "penalty": -1.0, "momentum": 2.0, "every": 0}.items():
        with pytest.raises(InputError, match=f"^{name}: "):
            Recipe(**{name: value})


@pytest.mark.parametrize("squared", [True, False])
def test_the_penalty_on_the_host(toy, squared):
    """One step of one batch against Adam's first step, which is the sign of the gradient: the penalty's alone where the loss has none."""
    ready = toy.prepared("clr", fit=False)
    x, y = toy.helpers.samples(20, seed=7)
    start = {name: value.clone() for name, value in ready.learner.init().items()}
    strong = train_task(ready, x, y, Recipe(epochs=1, batch=32, penalty=1e6, squared=squared, lr=1e-3), start)
    for name in ready.learner.trained:
        old, new = start[f"param.{name}"], strong[f"param.{name}"]
        some = old != 0  # at zero the penalty has no gradient, and the loss decides
        assert torch.allclose(new[some], (old - 1e-3 * old.sign())[some], atol=2e-6), name


def test_a_task_from_the_host_goes_on_on_the_device(toy, tmp_path):
    exported, ready = toy.bundle("clr")
    x, y = toy.helpers.samples(60, seed=8)
    state = train_task(ready, x, y, Recipe(epochs=3, lr=1e-2))
    names = ["a", "b"]
    nbytes = write_task(ready, state, tmp_path / "task.safetensors", names)
    with torch.no_grad():
        scores = [ready.learner.predict(state, z)[0]["scores"].numpy()[0] for z in ready.encode(x[:5])]
    for store in (None, tmp_path / "l.db"):
        started = Learner.load(exported.path, store)
        started.add_task("mine", file=tmp_path / "task.safetensors")
        assert started.tasks()["mine"].nbytes == nbytes
        started.switch_task("mine")
        if store is not None:
            started._store.close()  # as a killed process leaves it
        with started if store is None else Learner.load(exported.path, store) as learner:
            assert learner.task == "mine"
            found = [learner.predict(one) for one in x[:5]]
            assert all(np.allclose(seen.scores, want, rtol=1e-4, atol=1e-5) for seen, want in zip(found, scores, strict=True))
            assert {seen.class_name for seen in found} <= {"a", "b", None}
            assert learner.report()["class_counts"] == {"a": 12, "b": 12, "2": 12, "3": 12, "4": 12}
            learner.learn(x[0], int(y[0]))
            (tmp_path / "other").write_bytes(b"no task")
            for file, match in (
                (tmp_path / "nothing", r"^file: .*nothing cannot be read"),
                (tmp_path / "other", r"^file: .*other must be a task of this bundle, is not"),
            ):
                with pytest.raises(InputError, match=match):
                    learner.add_task("other", file=file)
            with pytest.raises(InputError, match=r"^like, file: one of both"):
                learner.add_task("other", "base", tmp_path / "task.safetensors")
    with pytest.raises(InputError, match=r"^state: must be a state of clr"):
        write_task(ready, {"count": state["count"]}, tmp_path / "t")
    with pytest.raises(InputError, match=r"^path: .* cannot be written"):
        write_task(ready, state, tmp_path / "no" / "t")
