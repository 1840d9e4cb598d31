"""Nearest class mean against class means taken by numpy in float64."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgecl.learner import UNSEEN, Problem, State
from edgecl.methods.ncm import NearestMean
from edgecl_device.manifest import TensorSpec

Rows = NDArray[np.float32]


def make(size: int, classes: int, unit_norm: bool = True) -> NearestMean:
    return NearestMean(Problem(TensorSpec("z", (1, size), "float32"), classes), NearestMean.Config(unit_norm=unit_norm))


def stream(samples: int, size: int, classes: int) -> tuple[Rows, NDArray[np.int64], Rows]:
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=(samples, size)) + 0.3, 0).astype(np.float32)
    weight = rng.choice([0.1, 0.7, 1.0, 3.0], samples).astype(np.float32)
    return x, rng.integers(0, classes, samples), weight


def means(x: NDArray[np.float64], y: NDArray[np.int64], weight: Rows, classes: int) -> NDArray[np.float64]:
    return np.stack([np.average(x[y == k], axis=0, weights=weight[y == k].astype(np.float64)) for k in range(classes)])


def unit(x: Rows) -> NDArray[np.float64]:
    wide = x.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True))


def step(learner: NearestMean, name: str, state: State, x: Rows, y: int, weight: float = 1.0) -> tuple[dict[str, torch.Tensor], State]:
    arguments = (torch.from_numpy(x[None]), torch.tensor([int(y)]), torch.tensor([weight]))
    outputs, changed = learner.steps[name](state, *arguments)
    return outputs, {**state, **changed}


def learn_all(learner: NearestMean, x: Rows, y: NDArray[np.int64], weight: Rows) -> State:
    state = learner.init()
    for row, label, w in zip(x, y, weight, strict=True):
        outputs, state = step(learner, "learn", state, row, label, float(w))
        assert outputs["guard"]
    return state


@pytest.mark.parametrize("unit_norm", [True, False])
def test_state_and_scores_are_weighted_class_means_and_distances(unit_norm: bool) -> None:
    x, y, weight = stream(400, 24, 5)
    learner = make(24, 5, unit_norm)
    state = learn_all(learner, x, y, weight)
    features = unit(x) if unit_norm else x.astype(np.float64)
    want = means(features, y, weight, 5)
    assert np.allclose(state["mean"].numpy(), want, rtol=0, atol=2e-6)
    assert state["count"].tolist() == np.bincount(y, minlength=5).tolist()
    assert np.allclose(state["total"].numpy(), [weight[y == k].astype(np.float64).sum() for k in range(5)], rtol=1e-5)
    scores = np.concatenate([learner.predict(state, torch.from_numpy(row[None]))[0]["scores"].numpy() for row in x])
    assert scores.dtype == np.float32
    assert np.allclose(scores, -((features[:, None] - want) ** 2).sum(2), rtol=1e-5)


def test_forget_equals_never_having_learned() -> None:
    x, y, weight = stream(400, 24, 5)
    learner = make(24, 5)
    state = learn_all(learner, x, y, weight)
    for i in range(0, 400, 4):
        outputs, state = step(learner, "forget", state, x[i], y[i], float(weight[i]))
        assert outputs["guard"]
    kept = np.arange(400) % 4 != 0
    assert np.allclose(state["mean"].numpy(), means(unit(x)[kept], y[kept], weight[kept], 5), rtol=0, atol=1e-5)
    assert state["count"].tolist() == np.bincount(y[kept], minlength=5).tolist()
    assert learner.forgets_exactly


def test_a_class_that_loses_all_samples_is_as_new() -> None:
    x, _, _ = stream(3, 8, 2)
    learner = make(8, 3)
    # Three times + 0.1 and three times - 0.1 leaves 1.5e-8 in float32, which must not stay in the state.
    state = learn_all(learner, x, np.array([1, 1, 1]), np.full(3, 0.1, np.float32))
    for row in x:
        outputs, state = step(learner, "forget", state, row, 1, 0.1)
        assert outputs["guard"]
    assert all(torch.equal(state[name], tensor) for name, tensor in learner.init().items())
    assert learner.predict(state, torch.from_numpy(x[:1]))[0]["scores"].tolist() == [[np.float32(UNSEEN)] * 3]


def test_guard_refuses_to_forget_from_an_empty_class() -> None:
    x, y, weight = stream(20, 8, 2)
    learner = make(8, 3)
    state = learn_all(learner, x, y, weight)
    assert not step(learner, "forget", state, x[0], 2)[0]["guard"]


def test_guard_refuses_more_weight_than_there_is() -> None:
    x, _, _ = stream(2, 8, 2)
    learner = make(8, 2)
    state = learn_all(learner, x, np.array([0, 0]), np.ones(2, np.float32))
    assert not step(learner, "forget", state, x[0], 0, 5.0)[0]["guard"]
    assert step(learner, "forget", state, x[0], 0, 1.0)[0]["guard"]


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_guard_refuses_to_learn_a_class_without_weight(weight: float) -> None:
    x, _, _ = stream(1, 8, 2)
    learner = make(8, 2)
    outputs, changed = step(learner, "learn", learner.init(), x[0], 1, weight)
    assert not outputs["guard"]
    assert all(torch.isfinite(t).all() for t in changed.values())


def test_only_the_learned_class_changes() -> None:
    x, y, weight = stream(50, 8, 4)
    learner = make(8, 4)
    state = learn_all(learner, x[:49], y[:49], weight[:49])
    _, new = step(learner, "learn", state, x[49], 2)
    others = [0, 1, 3]
    assert all(torch.equal(new[name][others], state[name][others]) for name in state)
    assert not torch.equal(new["mean"][2], state["mean"][2])


def test_scores_and_loss_are_those_before_the_update() -> None:
    x, y, weight = stream(50, 8, 3)
    learner = make(8, 4)
    state = learn_all(learner, x[:49], y[:49], weight[:49])
    outputs, _ = step(learner, "learn", state, x[49], 1)
    assert torch.equal(outputs["scores"], learner.predict(state, torch.from_numpy(x[49:]))[0]["scores"])
    distance = ((unit(x)[49] - means(unit(x)[:49], y[:49], weight[:49], 3)[1]) ** 2).sum()
    assert outputs["loss"].item() == pytest.approx(distance, rel=1e-4)
    assert outputs["loss"].shape == ()
    assert step(learner, "learn", state, x[49], 3)[0]["loss"].item() == pytest.approx(1.0), "a new class: distance to zero"


def test_unseen_classes_are_masked() -> None:
    x, _, _ = stream(1, 8, 2)
    learner = make(8, 3)
    _, state = step(learner, "learn", learner.init(), x[0], 1)
    scores = learner.predict(state, torch.from_numpy(x))[0]["scores"][0]
    assert (scores > UNSEEN).tolist() == [False, True, False]
    assert torch.isfinite(scores).all()


def test_a_large_common_offset_does_not_blur_the_distances() -> None:
    learner = make(16, 2, unit_norm=False)
    near, far = np.full(16, 1000, np.float32), np.full(16, 1000, np.float32)
    near[0] += 0.25
    far[0] -= 0.5
    state = learn_all(learner, np.stack([near, far]), np.array([0, 1]), np.ones(2, np.float32))
    scores = learner.predict(state, torch.full((1, 16), 1000.0))[0]["scores"]
    assert scores.tolist() == [[-0.0625, -0.25]]


def test_several_named_features_of_any_shape_are_joined() -> None:
    features = {"left": TensorSpec("z.left", (1, 2, 3), "float32"), "right": TensorSpec("z.right", (1, 2), "float32")}
    learner = NearestMean(Problem(features, 2))
    z = torch.arange(8.0).reshape(1, 8)
    parts = {"left": z[:, :6].reshape(1, 2, 3), "right": z[:, 6:]}
    mean = learner.learn(learner.init(), parts, torch.tensor([1]), torch.ones(1))[1]["mean"]
    assert np.allclose(mean[1].numpy(), unit(z.numpy())[0], atol=1e-7)


@pytest.mark.parametrize("name", ["predict", "learn", "forget"])
def test_inputs_are_not_mutated_and_results_are_new_tensors(name: str) -> None:
    x, y, weight = stream(20, 8, 3)
    learner = make(8, 3)
    state = learn_all(learner, x, y, weight)
    given = {"z": torch.from_numpy(x[:1]), "target": torch.tensor([y[0]]), "weight": torch.tensor(weight[:1])}
    everything = {**state, **given}
    copies = {key: t.clone() for key, t in everything.items()}
    outputs, new_state = learner.steps[name](dict(state), **{key: given[key] for key in learner.inputs_of(name)})
    assert all(torch.equal(t, copies[key]) for key, t in everything.items())
    pointers = [t.untyped_storage().data_ptr() for t in [*outputs.values(), *new_state.values(), *everything.values()]]
    assert len(set(pointers)) == len(pointers)
    assert all((new_state[n].dtype, new_state[n].shape) == (state[n].dtype, state[n].shape) for n in new_state)


def test_state_bytes_are_those_of_the_docstring() -> None:
    assert sum(t.nbytes for t in make(10, 3).init().values()) == 4 * (3 * 10 + 2 * 3)


@pytest.mark.parametrize(("heavy", "kept"), [(50.0, True), (150.0, False), (1e8, False)])
def test_guard_refuses_to_forget_nearly_all_the_weight(heavy: float, kept: bool) -> None:
    """One of 1 + heavy would remain: the mean would be what rounding left of it."""
    learner = make(4, 2, unit_norm=False)
    x, _, _ = stream(2, 4, 2)
    state = learn_all(learner, x, np.zeros(2, np.int64), np.array([1.0, heavy], np.float32))
    outputs, after = step(learner, "forget", state, x[1], 0, heavy)
    assert bool(outputs["guard"]) is kept
    assert not kept or np.allclose(after["mean"][0].numpy(), x[0], rtol=1e-4)
