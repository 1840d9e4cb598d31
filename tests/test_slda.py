"""Streaming LDA against its published recursion: mean, covariance, and a pseudo-inverse before every prediction."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgecl.learner import UNSEEN, Problem, State
from edgecl.methods.slda import StreamingLDA
from edgecl_device.errors import InputError
from edgecl_device.manifest import TensorSpec

Floats = NDArray[np.float64]
SIZE, CLASSES = 12, 5


def make(size: int = SIZE, classes: int = CLASSES, **config: object) -> StreamingLDA:
    problem = Problem(TensorSpec("z", (1, size), "float32"), classes)
    return StreamingLDA(problem, StreamingLDA.Config(**config))  # type: ignore[arg-type]


def stream(samples: int, size: int = SIZE, classes: int = CLASSES) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, samples)
    x = np.maximum(rng.normal(size=(classes, size))[y] + rng.normal(size=(samples, size)) @ rng.normal(size=(size, size)) / 3, 0)
    return x.astype(np.float32), y


def unit(x: NDArray[np.float32]) -> Floats:
    wide = x.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True))


def step(learner: StreamingLDA, state: State, x: NDArray[np.float32], y: int) -> tuple[dict[str, torch.Tensor], State]:
    outputs, changed = learner.learn(state, torch.from_numpy(x[None]), torch.tensor([int(y)]))
    return outputs, {**state, **changed}


def scores_of(learner: StreamingLDA, state: State, x: NDArray[np.float32]) -> Floats:
    return np.asarray(learner.predict(state, torch.from_numpy(x[None]))[0]["scores"].double().numpy()[0])


class Published:
    """The recursion of the paper, in float64; the first sample of a class sets its mean before the deviation is taken."""

    def __init__(self, size: int = SIZE, classes: int = CLASSES) -> None:
        self.sigma, self.mean, self.count = np.zeros((size, size)), np.zeros((classes, size)), np.zeros(classes)

    def learn(self, x: Floats, y: int) -> None:
        n = self.count.sum()
        if self.count[y] == 0:
            self.mean[y] = x
        d = x - self.mean[y]
        self.sigma = (n * self.sigma + n / (n + 1) * np.outer(d, d)) / (n + 1)
        self.mean[y] += d / (self.count[y] + 1)
        self.count[y] += 1

    def precision(self, eps: float) -> Floats:
        return np.asarray(np.linalg.pinv((1 - eps) * self.sigma + eps * np.eye(len(self.sigma))))

    def ridged(self, g0: float) -> Floats:
        """The same with a ridge of g0 on n times the covariance."""
        return np.asarray(np.linalg.pinv(self.sigma + g0 / self.count.sum() * np.eye(len(self.sigma))))

    def scores(self, x: Floats, precision: Floats) -> Floats:
        w = precision @ self.mean.T
        return np.asarray(x @ w - 0.5 * (self.mean.T * w).sum(0))


def close(got: torch.Tensor | Floats, want: Floats, bar: float) -> bool:
    return bool(np.linalg.norm(np.asarray(got, np.float64) - want) <= bar * np.linalg.norm(want))


@pytest.mark.parametrize("unit_norm", [True, False])
def test_every_step_equals_the_published_recursion(unit_norm: bool) -> None:
    x, y = stream(300)
    features = unit(x) if unit_norm else x.astype(np.float64)
    learner, paper = make(dtype="float64", unit_norm=unit_norm), Published()
    state = learner.init()
    for i in range(299):
        _, state = step(learner, state, x[i], y[i])
        paper.learn(features[i], y[i])
        precision, n, seen = paper.ridged(0.1), paper.count.sum(), paper.count > 0
        assert state["count"].tolist() == paper.count.tolist()
        assert close(state["mean"], paper.mean, 1e-10)
        assert close(n * state["precision"].numpy(), precision, 1e-10)
        assert close(n * state["readout"].numpy(), paper.mean @ precision, 1e-10)
        # Scores leave the step as float32.
        got = scores_of(learner, state, x[i + 1])[seen]
        want = paper.scores(features[i + 1], precision)[seen]
        assert np.abs(got - want).max() <= 1e-6 * max(1.0, np.abs(want).max())


def test_fixed_ridge_equals_the_papers_shrinkage_at_the_matching_eps() -> None:
    x, y = stream(200)
    eps = 1e-4
    learner, paper = make(dtype="float64", g0=200 * eps / (1 - eps)), Published()
    state = learner.init()
    for row, phi, label in zip(x, unit(x), y, strict=True):
        _, state = step(learner, state, row, label)
        paper.learn(phi, label)
    assert close(200 * state["precision"].numpy(), (1 - eps) * paper.precision(eps), 1e-10)
    for row, phi in zip(x[:20], unit(x)[:20], strict=True):
        want = (1 - eps) * paper.scores(phi, paper.precision(eps))
        assert np.allclose(scores_of(learner, state, row), want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_float32_stays_with_the_recursion() -> None:
    x, y = stream(2000)
    learner, paper = make(), Published()
    state = learner.init()
    for row, phi, label in zip(x, unit(x), y, strict=True):
        _, state = step(learner, state, row, label)
        paper.learn(phi, label)
    precision = paper.ridged(0.1)
    assert close(2000 * state["readout"].double().numpy(), paper.mean @ precision, 1e-4)
    wide = np.stack([paper.scores(phi, precision) for phi in unit(x)])
    narrow = np.stack([scores_of(learner, state, row) for row in x])
    assert np.abs(narrow - wide).max() <= 1e-4 * np.abs(wide).max()


def test_float32_stays_with_the_recursion_when_classes_come_in_turn_and_the_ridge_is_small() -> None:
    """A recursion of m_k . V_k would start from 1 / g0 and keep its rounding: every tenth prediction here would be another."""
    x, y = stream(2000)
    y.sort()
    learner, paper = make(g0=1e-3), Published()
    state = learner.init()
    for row, phi, label in zip(x, unit(x), y, strict=True):
        _, state = step(learner, state, row, label)
        paper.learn(phi, label)
    precision = paper.ridged(1e-3)
    wide = np.stack([paper.scores(phi, precision) for phi in unit(x)])
    narrow = np.stack([scores_of(learner, state, row) for row in x])
    assert np.abs(narrow - wide).max() <= 1e-4 * np.abs(wide).max()
    assert (narrow.argmax(1) != wide.argmax(1)).sum() <= 4


def test_precision_stays_symmetric_bit_for_bit() -> None:
    x, y = stream(2000, 67)
    learner = make(67)
    state = learner.init()
    for row, label in zip(x, y, strict=True):
        outputs, state = step(learner, state, row, label)
        assert outputs["guard"]
    assert torch.equal(state["precision"], state["precision"].t())


def test_first_sample_of_a_class_sets_its_mean_and_leaves_the_covariance() -> None:
    x, y = stream(40, classes=3)
    learner = make(dtype="float64")
    state = learner.init()
    for row, label in zip(x, y, strict=True):
        _, state = step(learner, state, row, label)
    row = x[0][::-1].copy()
    outputs, new = step(learner, state, row, 4)
    phi = unit(row[None])[0]
    assert torch.equal(new["precision"], state["precision"])
    assert close(new["mean"][4], phi, 1e-12)
    assert close(new["readout"][4], state["precision"].numpy() @ phi, 1e-12)
    assert outputs["health.s"].item() == 1.0
    others = [0, 1, 2, 3]
    assert torch.equal(new["readout"][others], state["readout"][others])


def test_priors_add_the_log_of_the_shares() -> None:
    x, y = stream(60, classes=3)
    plain, priors = make(dtype="float64"), make(dtype="float64", priors=True)
    state = plain.init()
    for row, label in zip(x, y, strict=True):
        _, state = step(plain, state, row, label)
    without, with_them = scores_of(plain, state, x[0]), scores_of(priors, state, x[0])
    count = np.bincount(y, minlength=3)
    assert np.allclose((with_them - without)[:3], np.log(count / 60), atol=1e-5)
    assert (with_them[3:] == without[3:]).all()
    assert (scores_of(priors, priors.init(), x[0]) == np.float32(UNSEEN)).all()


def test_scores_loss_and_health_are_those_before_the_update() -> None:
    x, y = stream(61)
    learner, paper = make(dtype="float64"), Published()
    state = learner.init()
    for row, phi, label in zip(x[:60], unit(x), y, strict=False):
        _, state = step(learner, state, row, label)
        paper.learn(phi, label)
    outputs, _ = step(learner, state, x[60], y[60])
    predicted = learner.predict(state, torch.from_numpy(x[60:]))[0]["scores"]
    assert torch.equal(outputs["scores"], predicted)
    difference = unit(x)[60] - paper.mean[y[60]]
    assert outputs["loss"].item() == pytest.approx(difference @ paper.ridged(0.1) @ difference, rel=1e-6)
    # Matrix determinant lemma: s is the ratio of the determinants of n Sigma + g0 I after and before.
    before = np.linalg.det(60 * paper.sigma + 0.1 * np.eye(SIZE))
    paper.learn(unit(x)[60], y[60])
    after = np.linalg.det(61 * paper.sigma + 0.1 * np.eye(SIZE))
    assert outputs["health.s"].item() == pytest.approx(after / before, rel=1e-6)
    assert outputs["guard"]


def test_guard_refuses_once_the_precision_is_not_positive() -> None:
    x, y = stream(20)
    learner = make()
    state = learner.init()
    for row, label in zip(x, y, strict=True):
        _, state = step(learner, state, row, label)
    broken = {**state, "precision": torch.eye(SIZE) * -10.0}
    assert not step(learner, broken, x[0][::-1].copy(), y[0])[0]["guard"]


def test_unseen_classes_are_masked() -> None:
    x, _ = stream(2)
    learner = make()
    assert (scores_of(learner, learner.init(), x[0]) == np.float32(UNSEEN)).all()
    _, state = step(learner, learner.init(), x[0], 3)
    assert (scores_of(learner, state, x[1]) > UNSEEN).tolist() == [False, False, False, True, False]


def test_steps_and_inputs() -> None:
    learner = make()
    assert list(learner.steps) == ["predict", "learn"]
    assert list(learner.inputs_of("learn")) == ["z", "target"]
    assert not learner.forgets_exactly


@pytest.mark.parametrize("name", ["predict", "learn"])
def test_inputs_are_not_mutated_and_results_are_new_tensors(name: str) -> None:
    x, y = stream(20)
    learner = make()
    state = learner.init()
    for row, label in zip(x, y, strict=True):
        _, state = step(learner, state, row, label)
    given = {"z": torch.from_numpy(x[:1]), "target": torch.tensor([y[0]])}
    everything = {**state, **given}
    copies = {key: t.clone() for key, t in everything.items()}
    outputs, new_state = learner.steps[name](dict(state), **{key: given[key] for key in learner.inputs_of(name)})
    assert all(torch.equal(t, copies[key]) for key, t in everything.items())
    pointers = [t.untyped_storage().data_ptr() for t in [*outputs.values(), *new_state.values(), *everything.values()]]
    assert len(set(pointers)) == len(pointers)
    assert all((new_state[n].dtype, new_state[n].shape) == (state[n].dtype, state[n].shape) for n in new_state)


@pytest.mark.parametrize(("dtype", "wide"), [("float32", 4), ("float64", 8)])
def test_state_bytes_are_those_of_the_docstring(dtype: str, wide: int) -> None:
    assert sum(t.nbytes for t in make(10, 3, dtype=dtype).init().values()) == wide * (100 + 2 * 30) + 4 * 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"g0": 0.0}, "g0: must be finite and above 0, got 0.0; 0.1 suits"),
        ({"dtype": "int8"}, "dtype: must be 'float32' or 'float64', got 'int8'"),
    ],
)
def test_wrong_config_is_refused_by_name(config: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StreamingLDA.Config(**config)  # type: ignore[arg-type]


def test_features_that_would_cancel_the_precision_are_refused():
    """In float32 the state would be lost by degrees, with no sign of it: s stays above 1."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, 16, generator=generator)
    for length, kept in ((1.0, True), (1e4, False)):
        learner = StreamingLDA(Problem(TensorSpec("z", (1, 16), "float32"), 4), StreamingLDA.Config(unit_norm=False))
        state, guards = learner.init(), []
        for i in range(12):
            z = (patterns[i % 4] + 0.3 * torch.randn(16, generator=generator)).unsqueeze(0) * length
            outputs, new = learner.learn(state, z, torch.tensor([i % 4]))
            guards.append(bool(outputs["guard"]))
            state |= new if guards[-1] else {}
        assert all(guards) is kept
