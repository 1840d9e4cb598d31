"""Recursive ridge against batch ridge solved in float64 by numpy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgecl.learner import UNSEEN, Problem
from edgecl.methods.ridge import Ridge
from edgecl_device.errors import EdgeclError, InputError, StepMissingError
from edgecl_device.manifest import TensorSpec

Floats = NDArray[np.float64]
EXACT, FLOAT32 = 1e-9, 1e-4


def stream(samples: int, size: int, classes: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """ReLU features of Gaussian classes: not centred, correlated, as those of a network."""
    rng = np.random.default_rng(seed)
    mix, centres = rng.normal(size=(size, size)) / np.sqrt(size), rng.normal(size=(classes, size))
    y = rng.integers(0, classes, samples)
    x = np.maximum((centres[y] + rng.normal(size=(samples, size))) @ mix, 0)
    return x.astype(np.float32), y


def unit(x: NDArray[np.float32]) -> Floats:
    wide = x.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True))


def batch(phi: Floats, y: NDArray[np.int64], classes: int, gamma: float, weight: Floats | None = None) -> Floats:
    """argmin_W sum_i w_i |W^T phi_i - t_i|^2 + gamma |W|^2 by the normal equations."""
    w = np.ones(len(phi)) if weight is None else weight
    gram = (phi * w[:, None]).T @ phi + gamma * np.eye(phi.shape[1])
    return np.asarray(np.linalg.solve(gram, (phi * w[:, None]).T @ np.eye(classes)[y]))


def error(got: torch.Tensor, want: NDArray[Any]) -> float:
    return float(np.linalg.norm(got.double().numpy() - want) / np.linalg.norm(want))


class Run:
    """A learner and its state."""

    def __init__(self, size: int, classes: int, **config: object) -> None:
        self.learner = Ridge(Problem(TensorSpec("z", (1, size), "float32"), classes), Ridge.Config(**config))  # type: ignore[arg-type]
        self.state = self.learner.init()
        self.outputs: dict[str, torch.Tensor] = {}

    def step(self, name: str, x: NDArray[np.float32], y: int, weight: float = 1.0, new: int | None = None) -> bool:
        """Run a step, keep what it returns when its guard holds, and say whether it did."""
        extra = () if new is None else (torch.tensor([new]),)
        arguments = (torch.from_numpy(x[None]), torch.tensor([int(y)]), *extra, torch.tensor([weight]))
        self.outputs, changed = self.learner.steps[name](self.state, *arguments)
        kept = bool(self.outputs["guard"])
        if kept:
            self.state = {**self.state, **changed}
        return kept

    def learn(self, x: NDArray[np.float32], y: NDArray[np.int64], weight: Floats | None = None) -> None:
        for i in range(len(x)):
            assert self.step("learn", x[i], y[i], 1.0 if weight is None else float(weight[i]))


@pytest.mark.parametrize(("dtype", "gamma", "bar"), [("float64", 0.1, EXACT), ("float32", 1.0, FLOAT32), ("float32", 0.1, FLOAT32)])
def test_equals_batch_ridge(dtype: str, gamma: float, bar: float) -> None:
    x, y = stream(1000, 48, 7)
    run = Run(48, 7, gamma=gamma, dtype=dtype)
    run.learn(x, y)
    assert error(run.state["readout"], batch(unit(x), y, 7, gamma)) < bar
    gram = unit(x).T @ unit(x) + gamma * np.eye(48)
    assert error(run.state["inverse"], np.linalg.inv(gram)) < bar
    assert run.state["count"].tolist() == np.bincount(y, minlength=7).tolist()


def test_reflected_all_steps_equal_batch_ridge() -> None:
    x, y = stream(300, 20, 4)
    run = Run(20, 4, dtype="float64", reflect=True)
    run.learner.calibrate(torch.from_numpy(x[:50]))
    run.learn(x, y)
    for i in range(100, 120):
        assert run.step("forget", x[i], y[i])
        y[i - 100], old = (y[i - 100] + 1) % 4, y[i - 100]
        assert run.step("relabel", x[i - 100], old, new=int(y[i - 100]))
    kept = np.r_[0:100, 120:300]
    phi = unit(x[kept])
    assert error(run.state["readout"], batch(phi, y[kept], 4, 0.1)) < EXACT
    mean = unit(x[:50]).mean(0)
    axis = mean / np.linalg.norm(mean) + np.eye(20)[0]  # ReLU features: no entry is negative
    mirror = np.eye(20) - 2 * np.outer(axis, axis) / (axis @ axis)
    assert error(run.state["inverse"], mirror @ np.linalg.inv(phi.T @ phi + 0.1 * np.eye(20)) @ mirror) < EXACT


def test_reflected_float32_keeps_what_a_small_gamma_would_lose() -> None:
    x, y = stream(4000, 48, 4)
    x = x / 20 + 1  # nearly all of a feature vector is the common mean
    y.sort()
    want = batch(unit(x), y, 4, 1e-3)
    plain, reflected = Run(48, 4, gamma=1e-3), Run(48, 4, gamma=1e-3, reflect=True)
    reflected.learner.calibrate(torch.from_numpy(x[::400]))
    for run in (plain, reflected):
        run.learn(x, y)
    right = [(unit(x) @ run.state["readout"].double().numpy()).argmax(1) == (unit(x) @ want).argmax(1) for run in (plain, reflected)]
    assert right[1].mean() > 0.999 > 0.99 > right[0].mean()
    assert error(reflected.state["readout"], want) < FLOAT32 < 1e-3 < error(plain.state["readout"], want)


def test_zero_base_features_leave_the_coordinates() -> None:
    run = Run(3, 2, dtype="float64", reflect=True)
    run.learner.calibrate(torch.zeros(5, 3))
    run.learn(np.eye(3, dtype=np.float32), np.array([0, 1, 1]))
    assert error(run.state["readout"], batch(np.eye(3), np.array([0, 1, 1]), 2, 0.1)) < EXACT


def test_raw_features_in_float64_equal_batch_ridge() -> None:
    x, y = stream(300, 20, 4)
    run = Run(20, 4, gamma=3.0, unit_norm=False, dtype="float64")
    run.learn(x, y)
    assert error(run.state["readout"], batch(x.astype(np.float64), y, 4, 3.0)) < EXACT


def test_weighted_samples_equal_weighted_batch_ridge() -> None:
    x, y = stream(300, 20, 4)
    weight = np.random.default_rng(1).choice([0.25, 1.0, 5.0], 300)
    run = Run(20, 4, dtype="float64")
    run.learn(x, y, weight)
    assert error(run.state["readout"], batch(unit(x), y, 4, 0.1, weight)) < EXACT
    assert run.state["count"].sum() == 300, "the count is of samples, not of weights"


def test_weight_three_equals_three_samples() -> None:
    x, y = stream(40, 12, 3)
    once, thrice = Run(12, 3, dtype="float64"), Run(12, 3, dtype="float64")
    once.learn(x, y, np.full(40, 3.0))
    thrice.learn(np.repeat(x, 3, 0), np.repeat(y, 3))
    assert error(once.state["readout"], thrice.state["readout"].numpy()) < EXACT


@pytest.mark.parametrize(("dtype", "bar"), [("float64", EXACT), ("float32", FLOAT32)])
def test_forgetting_five_percent_equals_batch_ridge_without_them(dtype: str, bar: float) -> None:
    x, y = stream(1000, 48, 7)
    weight = np.random.default_rng(1).choice([0.5, 1.0, 2.0], 1000)
    run = Run(48, 7, gamma=1.0, dtype=dtype)
    run.learn(x, y, weight)
    gone = np.random.default_rng(2).choice(1000, 50, replace=False)
    for i in gone:
        assert run.step("forget", x[i], y[i], float(weight[i]))
    kept = np.setdiff1d(np.arange(1000), gone)
    assert error(run.state["readout"], batch(unit(x)[kept], y[kept], 7, 1.0, weight[kept])) < bar
    assert error(run.state["readout"], batch(unit(x), y, 7, 1.0, weight)) > 10 * bar, "forgetting must have changed something"
    assert run.state["count"].tolist() == np.bincount(y[kept], minlength=7).tolist()


@pytest.mark.parametrize(("dtype", "bar"), [("float64", 1e-12), ("float32", 1e-5)])
def test_learn_then_forget_returns_to_the_start(dtype: str, bar: float) -> None:
    x, y = stream(60, 16, 3)
    run = Run(16, 3, gamma=1.0, dtype=dtype)
    run.learn(x[:50], y[:50])
    before = run.state
    run.learn(x[50:], y[50:])
    for i in (53, 50, 59, 51, 58, 52, 57, 54, 56, 55):
        assert run.step("forget", x[i], y[i])
    for name in ("inverse", "readout"):
        assert error(run.state[name], before[name].numpy().astype(np.float64)) < bar
    assert torch.equal(run.state["count"], before["count"])


def test_order_does_not_matter() -> None:
    x, y = stream(200, 16, 3)
    forward, backward = Run(16, 3, dtype="float64"), Run(16, 3, dtype="float64")
    forward.learn(x, y)
    backward.learn(x[::-1].copy(), y[::-1].copy())
    assert error(forward.state["readout"], backward.state["readout"].numpy()) < 1e-10


def test_relabel_equals_batch_ridge_with_the_new_labels() -> None:
    x, y = stream(200, 16, 4)
    weight = np.random.default_rng(1).choice([0.5, 2.0], 200)
    run = Run(16, 5, dtype="float64")
    run.learn(x, y, weight)
    inverse = run.state["inverse"].clone()
    new = y.copy()
    new[10:30] = 4
    for i in range(10, 30):
        assert run.step("relabel", x[i], y[i], float(weight[i]), new=4)
    assert error(run.state["readout"], batch(unit(x), new, 5, 0.1, weight)) < EXACT
    assert run.state["count"].tolist() == np.bincount(new, minlength=5).tolist()
    assert torch.equal(run.state["inverse"], inverse)


def test_relabel_of_a_class_without_samples_is_refused() -> None:
    x, _ = stream(2, 16, 4)
    run = Run(16, 4)
    assert run.step("learn", x[0], 0)
    assert not run.step("relabel", x[1], 2, new=1)


def test_drift_equals_exponentially_weighted_batch_ridge() -> None:
    x, y = stream(150, 16, 3)
    weight = np.random.default_rng(1).choice([0.5, 1.0, 2.0], 150)
    run = Run(16, 3, gamma=2.0, drift=0.97, trace_cap=1e12, dtype="float64")
    run.learn(x, y, weight)
    decayed = weight * 0.97 ** np.arange(149, -1, -1)
    assert error(run.state["readout"], batch(unit(x), y, 3, 2.0 * 0.97**150, decayed)) < EXACT


def test_drift_under_its_cap_equals_batch_ridge_with_the_factors_it_used() -> None:
    x, y = stream(150, 16, 3)
    cap = 16 / 0.5
    run = Run(16, 3, gamma=0.5, drift=0.95, dtype="float64")
    gram, moment, used = 0.5 * np.eye(16), np.zeros((16, 3)), []
    for phi, row, label in zip(unit(x), x, y, strict=True):
        used.append(min(max(np.trace(np.linalg.inv(gram)) / cap, 0.95), 1.0))
        gram, moment = used[-1] * gram + np.outer(phi, phi), used[-1] * moment + np.outer(phi, np.eye(3)[label])
        assert run.step("learn", row, label)
    assert min(used) == 0.95
    assert max(used) > 0.95, "the cap must have been at work"
    assert error(run.state["readout"], np.linalg.solve(gram, moment)) < EXACT


def test_unexcited_directions_do_not_wind_up() -> None:
    x, _ = stream(1, 16, 3)
    capped, free = Run(16, 3, drift=0.9), Run(16, 3, drift=0.9, trace_cap=1e30, dtype="float64")
    for _ in range(200):
        assert capped.step("learn", x[0], 1)
        assert free.step("learn", x[0], 1)
    assert capped.state["inverse"].trace() <= 160 * (1 + 1e-5)
    assert free.state["inverse"].trace() > 1e11, "without the cap it would"


def test_forget_and_relabel_are_not_offered_under_drift() -> None:
    run = Run(16, 3, drift=0.99)
    assert list(run.learner.steps) == ["predict", "learn"]
    assert not run.learner.forgets_exactly
    z, y, one = torch.ones(1, 16), torch.tensor([0]), torch.ones(1)
    with pytest.raises(StepMissingError, match=r"forget: .*drift 0\.99"):
        run.learner.forget(run.state, z, y, one)
    with pytest.raises(StepMissingError, match=r"relabel: .*drift 0\.99"):
        run.learner.relabel(run.state, z, y, y, one)


def test_steps_and_inputs_without_drift() -> None:
    learner = Run(16, 3).learner
    assert list(learner.steps) == ["predict", "learn", "forget", "relabel"]
    assert learner.forgets_exactly
    assert list(learner.inputs_of("relabel")) == ["z", "target", "new_target", "weight"]


def test_guard_refuses_a_sample_that_was_never_learned() -> None:
    run = Run(2, 3, gamma=0.1)
    assert run.step("learn", np.array([1, 0], np.float32), 1)
    # Across from all that was learned: s = 1 - 1/gamma = -9, and R would get the eigenvalue 10 - 100/9 < 0.
    z, y, one = torch.tensor([[0.0, 1.0]]), torch.tensor([1]), torch.ones(1)
    outputs, garbage = run.learner.forget(run.state, z, y, one)
    assert outputs["health.s"].item() == pytest.approx(-9, rel=1e-5)
    assert not outputs["guard"]
    assert np.linalg.eigvalsh(garbage["inverse"].numpy()).min() == pytest.approx(10 - 100 / 9, rel=1e-4)


@pytest.mark.parametrize(("gamma", "kept"), [(0.1, True), (0.02, True), (0.005, False)])
def test_guard_trips_when_s_is_not_above_tau(gamma: float, kept: bool) -> None:
    # One sample of length 1: R phi.phi = 1 / (1 + gamma), so s of its removal is gamma / (1 + gamma).
    run = Run(2, 2, gamma=gamma, tau=0.01)
    row = np.array([0.6, 0.8], np.float32)
    assert run.step("learn", row, 0)
    assert run.step("forget", row, 0) is kept
    assert run.outputs["health.s"].item() == pytest.approx(gamma / (1 + gamma), abs=1e-4)


def test_guard_keeps_the_state_sound_when_nearly_all_is_removed() -> None:
    x, y = stream(200, 32, 4)
    run = Run(32, 4, gamma=1e-4)
    run.learn(x, y)
    refused = [not run.step("forget", x[i], y[i]) for i in range(197)]
    assert any(refused)
    assert np.linalg.eigvalsh(run.state["inverse"].numpy()).min() > 0
    assert run.state["min_s"].item() > 0.01, "a refused update leaves no trace"


def test_guard_refuses_to_forget_from_an_empty_class() -> None:
    x, y = stream(200, 8, 2)
    run = Run(8, 3, gamma=1.0)
    run.learn(x, y)
    assert not run.step("forget", x[0], 2)
    assert run.outputs["health.s"].item() > 0.01, "s alone would have let it pass"


def test_health_is_the_ratio_of_determinants_and_its_minimum_is_kept() -> None:
    x, y = stream(30, 12, 2)
    run = Run(12, 2, gamma=1.0, dtype="float64")
    gram, seen = np.eye(12), [1.0]
    for i, (phi, sign) in enumerate([(row, 1) for row in unit(x)] + [(row, -1) for row in unit(x)[:5]]):
        new = gram + sign * np.outer(phi, phi)
        assert run.step("learn" if sign > 0 else "forget", x[i % 30], y[i % 30])
        seen.append(float(np.linalg.det(new) / np.linalg.det(gram)))
        gram = new
        assert run.outputs["health.s"].item() == pytest.approx(seen[-1], rel=1e-6)
        assert run.outputs["health.min_s"].item() == run.state["min_s"].item() == pytest.approx(min(seen), rel=1e-6)
    assert min(seen) < 0.95


def test_loss_and_scores_are_those_of_the_prediction_before_the_update() -> None:
    x, y = stream(50, 8, 3)
    run = Run(8, 3, dtype="float64")
    run.learn(x[:49], y[:49])
    want = unit(x)[49] @ batch(unit(x)[:49], y[:49], 3, 0.1)
    predicted = run.learner.predict(run.state, torch.from_numpy(x[49:]))[0]["scores"]
    assert run.step("learn", x[49], y[49])
    assert np.allclose(run.outputs["scores"].numpy()[0], want, atol=1e-6)
    assert torch.equal(run.outputs["scores"], predicted)
    assert run.outputs["loss"].item() == pytest.approx(float(((np.eye(3)[y[49]] - want) ** 2).sum()), rel=1e-5)
    assert run.outputs["loss"].dtype == run.outputs["scores"].dtype == torch.float32


@pytest.mark.parametrize("config", [{}, {"drift": 0.99}, {"projection": 67}])
def test_inverse_stays_symmetric_bit_for_bit(config: dict[str, object]) -> None:
    x, y = stream(1600, 67, 5)
    run = Run(67, 5, **config)
    rng = np.random.default_rng(1)
    for i in range(1600):
        run.step("learn", x[i], y[i], float(rng.uniform(0.1, 4)))
    if "drift" not in config:
        for i in range(400):
            run.step("forget", x[i], y[i], 0.1)
    assert torch.equal(run.state["inverse"], run.state["inverse"].t())
    assert torch.isfinite(run.state["inverse"]).all()


def test_unseen_classes_are_masked() -> None:
    x, _ = stream(2, 8, 3)
    run = Run(8, 4)

    def seen() -> list[bool]:
        scores = run.learner.predict(run.state, torch.from_numpy(x[1:]))[0]["scores"]
        assert scores.shape == (1, 4)
        return [bool(s > UNSEEN) for s in scores[0]]

    assert not any(seen())
    assert run.step("learn", x[0], 2)
    assert seen() == [False, False, True, False]
    assert run.step("relabel", x[0], 2, new=3)
    assert seen() == [False, False, False, True]
    assert run.step("forget", x[0], 3)
    assert not any(seen())


def test_projection_is_relu_of_a_seeded_gaussian_and_unit_norm() -> None:
    x, y = stream(200, 10, 3)
    before = torch.get_rng_state()
    run = Run(10, 3, projection=24, projection_seed=5, dtype="float64")
    assert torch.equal(torch.get_rng_state(), before), "the global generator must not be touched"
    run.learn(x, y)
    matrix = torch.randn(10, 24, generator=torch.Generator().manual_seed(5)).double().numpy()
    phi = np.maximum(unit(x) @ matrix, 0)
    phi /= np.linalg.norm(phi, axis=1, keepdims=True)
    assert error(run.state["readout"], batch(phi, y, 3, 0.1)) < EXACT
    other = Run(10, 3, projection=24, projection_seed=6, dtype="float64")
    other.learn(x, y)
    assert error(other.state["readout"], batch(phi, y, 3, 0.1)) > 0.1


def test_several_named_features_are_joined() -> None:
    features = {"left": TensorSpec("z.left", (1, 2, 3), "float32"), "right": TensorSpec("z.right", (1, 4), "float32")}
    learner = Ridge(Problem(features, 3))
    z = torch.arange(10.0).reshape(1, 10)
    parts = {"left": z[:, :6].reshape(1, 2, 3), "right": z[:, 6:]}
    target, one = torch.tensor([1]), torch.ones(1)
    joined = Run(10, 3)
    whole = joined.learner.learn(joined.state, z, target, one)[1]
    split = learner.learn(learner.init(), parts, target, one)[1]
    assert all(torch.equal(whole[name], split[name]) for name in whole)


def test_zero_features_change_only_the_count() -> None:
    run = Run(4, 2)
    before = run.state
    assert run.step("learn", np.zeros(4, np.float32), 1)
    assert torch.equal(run.state["inverse"], before["inverse"])
    assert torch.equal(run.state["readout"], before["readout"])
    assert run.state["count"].tolist() == [0, 1]


@pytest.mark.parametrize("step", ["predict", "learn", "forget", "relabel"])
def test_inputs_are_not_mutated_and_results_are_new_tensors(step: str) -> None:
    x, y = stream(20, 8, 3)
    run = Run(8, 3)
    run.learn(x, y)
    given = {"z": torch.from_numpy(x[:1]), "target": torch.tensor([y[0]]), "new_target": torch.tensor([1]), "weight": torch.ones(1)}
    inputs = {name: given[name] for name in run.learner.inputs_of(step)}
    everything = {**run.state, **given}
    copies = {name: t.clone() for name, t in everything.items()}
    outputs, new_state = run.learner.steps[step](dict(run.state), **inputs)
    assert all(torch.equal(t, copies[name]) for name, t in everything.items())
    results = [*outputs.values(), *new_state.values()]
    pointers = [t.untyped_storage().data_ptr() for t in [*results, *everything.values()]]
    assert len(set(pointers)) == len(pointers)
    assert all((new_state[n].dtype, new_state[n].shape) == (run.state[n].dtype, run.state[n].shape) for n in new_state)


def test_init_returns_new_tensors_every_time() -> None:
    learner = Run(8, 3).learner
    first, second = learner.init(), learner.init()
    pointers = [t.data_ptr() for t in [*first.values(), *second.values()]]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize(("dtype", "wide"), [("float32", 4), ("float64", 8)])
def test_state_bytes_are_those_of_the_docstring(dtype: str, wide: int) -> None:
    state = Run(10, 3, projection=24, dtype=dtype).state
    assert sum(t.nbytes for t in state.values()) == wide * (24 * 24 + 24 * 3) + 4 * (3 + 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gamma": 0.0}, "gamma: must be finite and above 0, got 0.0"),
        ({"gamma": math.inf}, "gamma: .*got inf"),
        ({"gamma": math.nan}, "gamma: .*got nan"),
        ({"projection": 0}, "projection: must be None or at least 1 unit, got 0"),
        ({"drift": 0.0}, "drift: must be above 0 and at most 1, got 0.0"),
        ({"drift": 1.5}, "drift: .*got 1.5"),
        ({"drift": 0.9, "trace_cap": -1.0}, "trace_cap: must be finite and above 0, got -1.0"),
        ({"trace_cap": 10.0}, "trace_cap: must be None without drift, got 10.0; set drift below 1"),
        ({"tau": 0.0}, "tau: must be between 0 and 1, got 0.0"),
        ({"dtype": "float16"}, "dtype: must be 'float32' or 'float64', got 'float16'; use"),
    ],
)
def test_wrong_config_is_refused_by_name(config: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Ridge.Config(**config)  # type: ignore[arg-type]
    assert isinstance(caught.value, EdgeclError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("dtype", "weight", "kept"), [("float32", 1e3, True), ("float32", 1e6, False), ("float64", 1e6, True)])
def test_guard_refuses_a_weight_beyond_the_precision_of_r(dtype: str, weight: float, kept: bool) -> None:
    learner = Ridge(Problem(TensorSpec("z", (1, 4), "float32"), 3), Ridge.Config(gamma=0.1, dtype=dtype))
    z = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    outputs, _ = learner.learn(learner.init(), z, torch.tensor([0]), torch.tensor([weight]))
    assert outputs["health.s"].item() == pytest.approx(1 + weight / 0.1, rel=1e-6)
    assert bool(outputs["guard"]) is kept


def test_guard_refuses_to_learn_on_a_broken_inverse() -> None:
    """Adding a sample to a positive definite R gives s > 1, whatever the sample."""
    learner = Ridge(Problem(TensorSpec("z", (1, 4), "float32"), 3))
    state = learner.init()
    state["inverse"][0, 0] = -0.1
    z = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    outputs, _ = learner.learn(state, z, torch.tensor([0]), torch.ones(1))
    assert 0.01 < outputs["health.s"].item() < 0.99
    assert not outputs["guard"]
