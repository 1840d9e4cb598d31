"""Updates that wait for the step ``refresh``: the methods' algebra, and the loop that runs the step."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgecl.learner import Problem, State, call_step, refreshed
from edgecl.methods import Ridge, StreamingLDA
from edgecl.methods._inverse import Inverse
from edgecl_device import Learner as DeviceLearner
from edgecl_device.checks import check_steps
from edgecl_device.errors import BundleError, InputError, UpdateRefusedError
from edgecl_device.manifest import AGE, TensorSpec

Floats = NDArray[np.float64]
METHODS = {"ridge": ("inverse", Ridge), "slda": ("precision", StreamingLDA)}
methods = pytest.mark.parametrize("method", METHODS)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_changes_that_wait_equal_a_dense_matrix(dtype: torch.dtype, bar: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inverse = Inverse("R", 9, 4, dtype)
    state, dense = inverse.init(0.5), torch.eye(9, dtype=torch.float64) * 2
    for i in range(23):
        u = torch.randn(1, 9, generator=generator).to(dtype) / 3
        negative = i % 3 == 1
        state |= inverse.less(state, u, torch.tensor([[negative]]))
        dense += (1 if negative else -1) * u.double().t() @ u.double()
        row = torch.randn(1, 9, generator=generator).to(dtype)
        assert (inverse.times(state, row).double() - row.double() @ dense).abs().max() < bar * dense.abs().max() * 10
        if i % 4 == 2 or not inverse.has_room(state):  # it may come early
            state |= inverse.refreshed(state)
            assert state[AGE] == 0
            assert (state["R"].double() - dense).abs().max() < bar * dense.abs().max() * 10


@methods
@pytest.mark.parametrize("delay", [1, 5, 16])
def test_learning_with_a_delay_is_learning_without(method: str, delay: int) -> None:
    rng = np.random.default_rng(1)
    x, y = np.maximum(rng.standard_normal((203, 24)), 0).astype(np.float32), rng.integers(0, 6, 203)
    name, kind = METHODS[method]
    problem = Problem(TensorSpec("z", (1, 24), "float32"), 6)
    plain, late = (kind(problem, kind.Config(dtype="float64", delay=d)) for d in (0, delay))
    states: list[State] = [plain.init(), late.init()]
    for i in range(203):
        for j, learner in enumerate((plain, late)):
            inputs = {"z": torch.from_numpy(x[i : i + 1]), "target": torch.tensor([int(y[i])])}
            if method == "ridge":
                inputs["weight"] = torch.tensor([1.0 + i % 3])
            outputs, new = call_step(learner, "learn", states[j], inputs)
            assert outputs["guard"]
            states[j] = refreshed(learner, {**states[j], **new})
    assert states[1][AGE] == 203 % delay
    states[1] |= late.refresh(states[1])[1]
    for key, value in states[0].items():
        assert torch.allclose(states[1][key], value, rtol=1e-10, atol=1e-12), key
    assert torch.allclose(states[1][name], states[1][name].t(), rtol=1e-12, atol=0)


def test_forgetting_with_a_delay_equals_batch_ridge_without_the_samples() -> None:
    rng = np.random.default_rng(2)
    x, y = np.maximum(rng.standard_normal((60, 12)), 0).astype(np.float32), np.arange(60) % 4
    learner = Ridge(Problem(TensorSpec("z", (1, 12), "float32"), 4), Ridge.Config(dtype="float64", delay=8))
    state = learner.init()
    for step, rows in (("learn", range(60)), ("forget", range(0, 60, 5)), ("relabel", range(1, 60, 5))):
        for i in rows:
            inputs: dict[str, Any] = {"z": torch.from_numpy(x[i : i + 1]), "target": torch.tensor([int(y[i])]), "weight": torch.ones(1)}
            if step == "relabel":
                inputs["new_target"] = torch.tensor([(int(y[i]) + 1) % 4])
                y[i] = (y[i] + 1) % 4
            outputs, new = call_step(learner, step, state, inputs)
            assert outputs["guard"] and outputs["finite"]
            state = refreshed(learner, {**state, **new})
    kept = np.arange(60) % 5 != 0
    phi = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float64)[kept]
    want = np.linalg.solve(phi.T @ phi + 0.1 * np.eye(12), phi.T @ np.eye(4)[y[kept]])
    assert np.abs(state["readout"].numpy() - want).max() < 1e-6  # features are scaled in float32's x, but divided in float64


@methods
def test_an_update_without_room_is_refused(method: str) -> None:
    _, kind = METHODS[method]
    learner = kind(Problem(TensorSpec("z", (1, 3), "float32"), 2), kind.Config(delay=2))
    state, inputs = learner.init(), {"z": torch.ones(1, 3), "target": torch.tensor([0])}
    if method == "ridge":
        inputs["weight"] = torch.ones(1)
    kept = []
    for _ in range(3):
        outputs, new = call_step(learner, "learn", state, inputs)
        kept.append(bool(outputs["guard"]))
        state |= new if kept[-1] else {}
    assert kept == [True, True, False]


def test_the_step_is_there_with_a_delay_only() -> None:
    problem = Problem(TensorSpec("z", (1, 3), "float32"), 2)
    for kind in (Ridge, StreamingLDA):
        assert "refresh" not in kind(problem).steps
        assert kind(problem).refresh_every == 0
        learner = kind(problem, kind.Config(delay=3))
        assert learner.inputs_of("refresh") == {}
        assert learner.refresh_every == 3
    with pytest.raises(InputError, match=r"^delay: must be 0 with drift below 1, .*got 4; use 0"):
        Ridge.Config(drift=0.9, delay=4)


DELAYED = {"delay": 4}


@pytest.mark.parametrize(("method", "engine"), [("ridge", "eager"), ("ridge", "onnx"), ("ridge", "executorch"), ("slda", "onnx")])
def test_the_loop_refreshes_in_time(toy: Any, method: str, engine: str) -> None:
    x, y = toy.helpers.samples(30, seed=1)
    with toy.device(method, engine, **DELAYED) as late, toy.device(method, engine) as plain:
        macs = late.manifest.steps
        ages = [float(late.state()[AGE])]
        for a, b in zip(x, y, strict=True):
            report = late.learn(a, int(b))
            plain.learn(a, int(b))
            ages.append(float(late.state()[AGE]))
            extra = macs["refresh"].canonical_macs if ages[-1] == 0 else 0
            assert report.macs == macs["encode"].canonical_macs + macs["learn"].canonical_macs + extra
            assert np.abs(late.predict(a).scores - plain.predict(a).scores).max() < 1e-3
    assert ages == [(ages[0] + i) % 4 for i in range(31)]
    assert macs["refresh"].canonical_macs == 4 * np.prod([s.shape for s in late.manifest.state if s.name == METHODS[method][0]])


@pytest.mark.parametrize("end", range(5, 10))
def test_a_resumed_run_equals_an_uninterrupted_one(toy: Any, end: int, tmp_path: Any) -> None:
    x, y = toy.helpers.samples(14, seed=1)
    bundle = toy.bundle("ridge", **DELAYED)[0].path
    with DeviceLearner.load(bundle) as whole:
        for a, b in zip(x, y, strict=True):
            whole.learn(a, int(b))
        want = whole.state()
    first = DeviceLearner.load(bundle, store=tmp_path / "l.db")
    for a, b in zip(x[:end], y[:end], strict=True):
        first.learn(a, int(b))
    first._store.close()  # no last snapshot: the log is replayed
    with DeviceLearner.load(bundle, store=tmp_path / "l.db") as second:
        for a, b in zip(x[end:], y[end:], strict=True):
            second.learn(a, int(b))
        assert toy.helpers.same(second.state(), want)


def test_forget_and_snapshots_with_changes_that_wait(toy: Any, tmp_path: Any) -> None:
    x, y = toy.helpers.samples(12, seed=1)
    bundle = toy.bundle("ridge", **DELAYED)[0].path
    with DeviceLearner.load(bundle, store=tmp_path / "l.db") as learner, DeviceLearner.load(bundle) as other:
        ids = [learner.learn(a, int(b)).sample_id for a, b in zip(x[:7], y[:7], strict=True)]
        learner.save("seven")
        for a, b in zip(x[7:], y[7:], strict=True):
            learner.learn(a, int(b))
        assert learner.forget(ids[2])
        for i in [*range(2), *range(3, 12)]:
            other.learn(x[i], int(y[i]))
        probe = toy.helpers.samples(20, seed=5)[0]
        assert max(np.abs(learner.predict(a).scores - other.predict(a).scores).max() for a in probe) < 1e-4
        learner.rollback("seven")
        with DeviceLearner.load(bundle) as six:
            for i in (0, 1, 3, 4, 5, 6):
                six.learn(x[i], int(y[i]))
            assert max(np.abs(learner.predict(a).scores - six.predict(a).scores).max() for a in probe) < 1e-4


def test_a_refresh_that_must_not_be_kept_is_told_by_the_next_update(toy: Any) -> None:
    x, y = toy.helpers.samples(9, seed=1)
    with toy.device("ridge", "onnx", **DELAYED) as learner:
        while float(learner.state()[AGE]) != 3:
            learner.learn(x[0], int(y[0]))
        run = learner._engine.run
        learner._engine.run = lambda step, inputs: {**run(step, inputs), **({"finite": np.False_} if step == "refresh" else {})}
        learner.learn(x[1], int(y[1]))
        before = learner.state()
        assert before[AGE] == 4
        with pytest.raises(UpdateRefusedError, match=r"^refresh: refused for sample \d+: the new state .* not finite.*unchanged"):
            learner.learn(x[2], int(y[2]))
        assert toy.helpers.same(learner.state(), before)
        learner._engine.run = run
        learner.learn(x[2], int(y[2]))
        assert learner.state()[AGE] == 1


def test_a_refresh_that_an_engine_cannot_run_is_told_by_the_next_update(toy: Any, tmp_path: Any) -> None:
    """The update before it is in the log: an error there would make a caller learn its sample twice."""
    x, y = toy.helpers.samples(9, seed=1)
    with DeviceLearner.load(toy.bundle("ridge", **DELAYED)[0].path, store=tmp_path / "l.db") as learner:
        while float(learner.state()[AGE]) != 3:
            learner.learn(x[0], int(y[0]))
        run, macs = learner._engine.run, learner.manifest.steps

        def short_of_memory(step: str, inputs: Any) -> Any:
            if step == "refresh":
                raise RuntimeError("Failed to allocate memory")
            return run(step, inputs)

        learner._engine.run = short_of_memory
        learned = learner.report()["learned"]
        learner.learn(x[1], int(y[1]))
        before = learner.state()
        assert learner.report()["learned"] == learned + 1 and before[AGE] == 4
        with pytest.raises(RuntimeError, match="Failed to allocate memory"):
            learner.learn(x[2], int(y[2]))
        assert learner.report()["learned"] == learned + 1 and toy.helpers.same(learner.state(), before)
        learner._engine.run = run
        refreshes = learner._core.refreshes
        report = learner.learn(x[2], int(y[2]))
        assert report.macs == sum(macs[step].canonical_macs for step in ("encode", "learn", "refresh"))
        assert (learner.state()[AGE], learner._core.refreshes) == (1, refreshes + 1)


def test_a_refusal_behind_a_late_refresh_says_what_changed(toy: Any) -> None:
    x, y = toy.helpers.samples(9, seed=1)
    with toy.device("ridge", "onnx", **DELAYED) as learner:
        while float(learner.state()[AGE]) != 3:
            learner.learn(x[0], int(y[0]))
        run = learner._engine.run
        spoiled = {"refresh"}
        learner._engine.run = lambda step, inputs: {**run(step, inputs), **({"finite": np.False_} if step in spoiled else {})}
        learner.learn(x[1], int(y[1]))
        spoiled = {"learn"}
        with pytest.raises(
            UpdateRefusedError, match=r"^learn: refused .*; the state is unchanged, but for changes that waited and were taken in$"
        ):
            learner.learn(x[2], int(y[2]))
        assert learner.state()[AGE] == 0
        with pytest.raises(UpdateRefusedError, match=r"the state is unchanged$"):
            learner.learn(x[2], int(y[2]))


def test_every_refresh_is_counted(toy: Any) -> None:
    x, y = toy.helpers.samples(9, seed=1)
    with toy.device("ridge", "onnx", **DELAYED) as learner:
        run, runs = learner._engine.run, []
        learner._engine.run = lambda step, inputs: (runs.append(step), run(step, inputs))[1]
        ids = [learner.learn(a, int(b)).sample_id for a, b in zip(x, y, strict=True)]
        learner.forget(ids[0])
        assert learner._core.refreshes == runs.count("refresh") >= 3


@pytest.mark.parametrize(
    ("delay", "every", "message"),
    [(4, 0, "else 0, got 0 and such step"), (4, -1, "else 0, got -1 and such step"), (0, 3, "else 0, got 3 and no such step")],
)
def test_a_manifest_that_does_not_say_when_is_refused(toy: Any, delay: int, every: int, message: str) -> None:
    manifest = toy.bundle("ridge", delay=delay)[0].manifest
    with pytest.raises(BundleError, match=f"^refresh_every: must be at least 1 with a step 'refresh', {message}; "):
        check_steps(dataclasses.replace(manifest, refresh_every=every))


def test_a_manifest_whose_refresh_cannot_run_alone_is_refused(toy: Any) -> None:
    manifest = toy.bundle("ridge", **DELAYED)[0].manifest
    refresh = manifest.steps["refresh"]
    for changed in (
        dataclasses.replace(refresh, inputs=(TensorSpec("weight", (1,), "float32"),)),
        dataclasses.replace(refresh, state_out=("inverse",)),
    ):
        with pytest.raises(
            BundleError, match=r"^step 'refresh': must take state, rows and draws alone, and write 'age', float32 .*got .*inverse"
        ):
            check_steps(dataclasses.replace(manifest, steps={**manifest.steps, "refresh": changed}))


@pytest.mark.parametrize("step", ["before the refresh", "behind it"])
def test_what_was_forgotten_does_not_wait(toy: Any, tmp_path: Any, step: str) -> None:
    """A change that waits is the sample's features times R: with R, its direction could be read from it."""
    x, y = toy.helpers.samples(8, seed=1)
    with DeviceLearner.load(toy.bundle("ridge", delay=16)[0].path, store=tmp_path / "l.db") as learner:
        ids = [learner.learn(a, int(b)).sample_id for a, b in zip(x, y, strict=True)]
        if step == "behind it":
            while float(learner.state()[AGE]):
                learner.learn(x[0], int(y[0]))
        learner.save("eight")
        learner.forget(ids[3])
        for _ in range(2):
            state = learner.state()
            assert state[AGE] == 0
            assert state["waiting"].tobytes() == bytes(state["waiting"].nbytes)  # no sign of a zero is left, either
            learner.rollback("eight")


@pytest.mark.parametrize("engine", ["onnx", "executorch"])
def test_a_delay_of_one_is_exported(toy: Any, engine: str) -> None:
    """Taking out what was just learned is the very change that was taken in before it; its row must not be there any more."""
    x, y = toy.helpers.samples(6, seed=1)
    with toy.device("ridge", engine, delay=1) as learner:
        ids = [learner.learn(a, int(b)).sample_id for a, b in zip(x, y, strict=True)]
        learner.forget(ids[2])
        assert float(learner.state()[AGE]) == 0


@pytest.mark.parametrize("good", [0, 1])
def test_a_forget_whose_refresh_must_not_be_kept_changes_nothing(toy: Any, tmp_path: Any, good: int) -> None:
    """It fails in the named snapshot, or only behind it in the present."""
    x, y = toy.helpers.samples(6, seed=1)
    with DeviceLearner.load(toy.bundle("ridge", **DELAYED)[0].path, store=tmp_path / "l.db") as learner:
        ids = [learner.learn(a, int(b)).sample_id for a, b in zip(x, y, strict=True)]
        learner.save("six")
        before, snapshot, run, left = learner.state(), bytes(learner._store.snapshot("six")), learner._engine.run, [good]

        def spoilt(step: str, inputs: Any) -> Any:
            outputs = run(step, inputs)
            left[0] -= step == "refresh"
            return {**outputs, "finite": np.False_} if step == "refresh" and left[0] < 0 else outputs

        learner._engine.run = spoilt
        with pytest.raises(UpdateRefusedError, match=f"^refresh: refused for sample {ids[1]}"):
            learner.forget(ids[1])
        assert toy.helpers.same(learner.state(), before)
        assert bytes(learner._store.snapshot("six")) == snapshot
        learner._engine.run = run
        assert learner.forget(ids[1])
        assert learner.report()["forgotten"] == 1
