"""SparCL against its definitions: both granularities, gradients, masks, DER++, the gate, and the whole battery for single weights."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecl import METHODS, prepare
from edgecl.graph.capture import capture
from edgecl.graph.lowering import build_step
from edgecl.masks import nominal_macs, pack, unpack
from edgecl_device import Learner as DeviceLearner
from edgecl_device.memory import ReplayMemory
from edgecl_export import export

_spec = importlib.util.spec_from_file_location("edgecl_test_conformance", Path(__file__).with_name("test_conformance.py"))
assert _spec is not None and _spec.loader is not None
battery = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(battery)

CLASSES = 5
ROWS = 4
COMMON: dict[str, Any] = {"rows_per_step": ROWS, "capacity_bytes": 1 << 14, "codec": "float32", "lr": 0.1}
FORMS = pytest.mark.parametrize("granularity", ["structured", "unstructured"])


class Block(nn.Module):
    """A residual block, whose hidden channels are read by one layer, and a convolution in front, whose output two read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Identity()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        scores: Tensor = self.fc(F.relu(x + y).mean((2, 3)))
        return scores


def ready(toy: Any, **changes: Any) -> Any:
    """A prepared learner on :class:`Block`, and the inputs of one update."""
    model = Block()
    toy.helpers.settle(model, 3)
    x = np.random.default_rng(0).standard_normal((40, 2, 5, 5)).astype(np.float32)
    config = METHODS["sparcl"].Config(**{**COMMON, **changes})
    prepared = prepare(model, at="stem", example=x[:1], method="sparcl", classes=CLASSES, config=config)
    return prepared.fit(x, np.arange(40) % CLASSES)


def inputs(prepared: Any, seed: int = 0, step: str = "learn") -> dict[str, Any]:
    """One update's inputs, with rows drawn by the memory."""
    memory: ReplayMemory = prepared.memory
    memory.generator.counter = 1000 * seed
    drawn = {name: torch.tensor(array) for name, array in memory.draw(step).items()}
    replay = {name.removeprefix("replay."): value for name, value in drawn.items() if name.startswith("replay.")}
    z = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(seed))
    if step == "refresh":
        return {"replay": replay, "draw": {n.removeprefix("draw."): v for n, v in drawn.items() if n.startswith("draw.")}}
    return {"z": z, "target": torch.tensor([seed % CLASSES]), "weight": torch.ones(1), "lr": torch.tensor(0.1), "replay": replay}


def patterns(prepared: Any) -> dict[str, Tensor]:
    """The masks on single weights that a structured learner's units stand for."""
    learner, state, found = prepared.learner, prepared.state, {}
    for key, units in learner.form._units.items():
        live = torch.zeros(units.channels, dtype=torch.bool)
        blocks, count = learner.form._numbers(state, key)
        numbers = blocks[: int(count)].unsqueeze(1) * learner.config.block + torch.arange(learner.config.block)
        live[numbers.reshape(-1)] = True
        found[key] = live.reshape(-1, 1, 1, 1).expand(learner.suffix.get_parameter(f"{key}.weight").shape)
        if units.columns:
            found[units.columns] = live.reshape(1, -1, 1, 1).expand(learner.suffix.get_parameter(f"{units.columns}.weight").shape)
    return found


def learned(prepared: Any, state: dict[str, Tensor], step: str = "learn", seed: int = 0) -> dict[str, Tensor]:
    """The state after one step."""
    with torch.no_grad():
        return {**state, **prepared.learner.steps[step](state, **inputs(prepared, seed, step))[1]}


def loss_by_autograd(prepared: Any, state: dict[str, Tensor], seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the dense network with masked weights at zero: ER's loss over all classes, by PyTorch's own functions."""
    given = inputs(prepared, seed)
    dense = {name: value.clone().requires_grad_(True) for name, value in prepared.learner.form.dense(state).items()}
    scores = torch.func.functional_call(prepared.learner.suffix, dense, (torch.cat([given["z"], given["replay"]["z"]]),))
    targets = torch.cat([given["target"], given["replay"]["target"]])
    each = F.cross_entropy(scores, targets, reduction="none")
    loss = each[0] + each[1:].mean()
    return loss, dict(zip(dense, torch.autograd.grad(loss, list(dense.values())), strict=True))


@pytest.mark.parametrize("block", [1, 2])
def test_pairs_are_found_and_run_narrow(toy: Any, block: int) -> None:
    prepared = ready(toy, sparsity=0.5, gradient_sparsity=0.5, refresh_every=0, block=block)
    units = prepared.learner.form._units
    assert {key: (found.columns, found.norms) for key, found in units.items()} == {"first": (None, ()), "conv1": ("conv2", ("bn1",))}
    shapes = {name: tuple(t.shape) for name, t in prepared.state.items() if name.startswith("param.") and t.dim() == 4}
    assert shapes == {"param.first.weight": (4, 2, 3, 3), "param.conv1.weight": (4, 8, 3, 3), "param.conv2.weight": (8, 4, 3, 3)}
    assert prepared.learner.form._first["conv1"].numel() == 4 // block
    assert not [name for name in prepared.state if name.startswith(("units.", "live.", "moves."))], "a mask that stays is no state"


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("grow", [0.0, 0.25])
def test_a_structured_mask_gives_the_weights_of_the_same_mask_on_single_weights(toy: Any, block: int, grow: float) -> None:
    common = {"sparsity": 0.5, "gradient_sparsity": 0.5, "grow": grow, "exchange": 0.0, "refresh_every": 3, "loss": "er", "grow_for": 4}
    one, other = ready(toy, block=block, **common), ready(toy, granularity="unstructured", **common)
    masks = patterns(one)
    state, plain = one.state, dict(other.state)
    plain |= {f"param.{name}": value for name, value in one.learner.form.dense(state).items()}
    plain |= {f"{kind}.{name}": pack(mask.reshape(-1)) for name, mask in masks.items() for kind in ("mask", "moves")}
    for seed in range(3):
        state, plain = learned(one, state, seed=seed), learned(other, plain, seed=seed)
        for name, value in one.learner.form.dense(state).items():
            torch.testing.assert_close(value, plain[f"param.{name}"], rtol=1e-5, atol=1e-6)
    z = torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(
        one.learner.predict(state, z)[0]["scores"], other.learner.predict(plain, z)[0]["scores"], rtol=1e-5, atol=1e-5
    )


@FORMS
def test_only_chosen_gradients_move_weights_and_they_are_autograds(toy: Any, granularity: str) -> None:
    prepared = ready(toy, granularity=granularity, sparsity=0.5, gradient_sparsity=0.75, loss="er", exchange=0.0, grow=0.0)
    learner, state = prepared.learner, learned(prepared, prepared.state, "refresh")
    before, new = learner.form.dense(state), learned(prepared, state)
    after = learner.form.dense(new)
    loss, gradients = loss_by_autograd(prepared, state)
    with torch.no_grad():
        assert float(learner.learn(state, **inputs(prepared))[0]["loss"]) == pytest.approx(float(loss), rel=1e-5)
    for name, old in before.items():
        layer = name.removesuffix(".weight")
        mask = torch.ones_like(old, dtype=torch.bool)
        if granularity == "unstructured" and f"moves.{layer}" in state:
            mask = unpack(state[f"moves.{layer}"], old.numel()).reshape(old.shape)
            assert int(mask.sum()) == round(0.25 * old.numel())
        elif granularity == "structured" and old.dim() == 4:
            key, axis = ("conv1", 1) if layer == "conv2" else (layer, 0)
            channels = learner.form._numbers(state, key)[0][state[f"moves.{key}"]]
            mask = torch.zeros_like(mask).index_fill(axis, channels, True)
            assert int(mask.sum()) == round(0.25 * old.numel())
        wanted = torch.where(mask, old - 0.1 * gradients[name], old)
        torch.testing.assert_close(after[name], wanted, rtol=1e-4, atol=1e-6)
        assert torch.equal(after[name][~mask], old[~mask]), "to the bit"


@FORMS
def test_masks_keep_their_counts_and_masked_weights_are_zero(toy: Any, granularity: str) -> None:
    prepared = ready(
        toy, granularity=granularity, sparsity=0.5, gradient_sparsity=0.75, grow=0.1, exchange=0.1, grow_for=8, refresh_every=3
    )
    state, form = prepared.state, prepared.learner.form
    seen = set()
    for seed in range(15):
        state = learned(prepared, state, seed=seed)
        before = {key: _live(form, granularity, state, key) for key in form.schedules}
        if seed % 3 == 2:
            new = bool(state["fresh"] < 8)
            seen.add(new)
            state = learned(prepared, state, "refresh", seed)
            for key, schedule in form.schedules.items():
                live = _live(form, granularity, state, key)
                assert len(live) == (schedule.most if new else schedule.base)
                kept = min((schedule.most if new else schedule.base) - schedule.exchanged, len(before[key]))
                assert len(live - before[key]) <= len(live) - kept, "what grows may be what was dropped"
        for name, value in form.dense(state).items():
            key = name.removesuffix(".weight")
            if granularity == "unstructured" and key in form.schedules:
                mask = unpack(state[f"mask.{key}"], value.numel()).reshape(value.shape)
                moves = unpack(state[f"moves.{key}"], value.numel()).reshape(value.shape)
                assert not value[~mask].any() and not (moves & ~mask).any()
                assert state[f"mask.{key}"].numel() == -(-value.numel() // 8)
        for key in form.schedules if granularity == "structured" else ():
            count = int(form._numbers(state, key)[1])
            assert not state[f"param.{key}.weight"][count:].any()
            columns = form._units[key].columns
            assert columns is None or not state[f"param.{columns}.weight"][:, count:].any()
    assert seen == {True, False}, "both phases of the schedule"


def _live(form: Any, granularity: str, state: dict[str, Tensor], key: str) -> set[int]:
    if granularity == "unstructured":
        return set(torch.nonzero(unpack(state[f"mask.{key}"], form.schedules[key].units)).reshape(-1).tolist())
    units, count = form._numbers(state, key)
    return set(units[: int(count)].tolist())


@FORMS
def test_a_refresh_keeps_what_is_important_and_moves_no_survivor(toy: Any, granularity: str) -> None:
    """Importance by autograd's gradients: the survivors are the highest of it, their weights are untouched, what grows starts at zero."""
    prepared = ready(
        toy,
        granularity=granularity,
        sparsity=0.5,
        gradient_sparsity=0.75,
        grow=0.0,
        exchange=0.2,
        window=1000,
        refresh_every=3,
        regrow="zero",
    )
    state, form = {**prepared.state, "since": torch.zeros(CLASSES)}, prepared.learner.form
    given = inputs(prepared, 4, "refresh")["replay"]
    dense = {name: value.clone().requires_grad_(True) for name, value in form.dense(state).items()}
    scores = torch.func.functional_call(prepared.learner.suffix, dense, (given["z"],))
    gradients = torch.autograd.grad(F.cross_entropy(scores, given["target"]), list(dense.values()))
    gradient = dict(zip(dense, gradients, strict=True))  # every class is current, so that both terms are this one
    new = learned(prepared, state, "refresh", 4)
    for key, schedule in form.schedules.items():
        before, live = _live(form, granularity, state, key), _live(form, granularity, new, key)
        worth = {name: dense[name].detach().abs() + 1.5 * gradient[name].abs() for name in dense}
        score = worth[f"{key}.weight"]
        if granularity == "structured":
            score = score.sum((1, 2, 3))
            columns = form._units[key].columns
            if columns:
                score = score + worth[f"{columns}.weight"].sum((0, 2, 3))
        score = score.reshape(-1)
        order = sorted(before, key=lambda unit: -float(score[unit]))
        survivors = set(order[: schedule.base - schedule.exchanged])
        assert survivors <= live and len(live) == schedule.base
        old_weight, new_weight = form.dense(state)[f"{key}.weight"], form.dense(new)[f"{key}.weight"]
        flat = (
            (old_weight.flatten(1), new_weight.flatten(1))
            if granularity == "structured"
            else (old_weight.reshape(-1), new_weight.reshape(-1))
        )
        assert all(torch.equal(flat[0][unit], flat[1][unit]) for unit in survivors)
        assert all(not flat[1][unit].any() for unit in live - survivors)


def test_dark_experience_is_two_draws(toy: Any) -> None:
    prepared = ready(toy, distill=0.1, replay_weight=0.5, loss="er", sparsity=0.5, gradient_sparsity=0.5, refresh_every=0)
    assert prepared.learner.replay.rows_per_step == 2 * ROWS
    state, given = prepared.state, inputs(prepared)
    dense = prepared.learner.form.dense(state)
    scores = torch.func.functional_call(prepared.learner.suffix, dense, (torch.cat([given["z"], given["replay"]["z"]]),))
    new, copied, replayed = scores[:1], scores[1::2], scores[2::2]
    loss = (
        F.cross_entropy(new, given["target"])
        + 0.1 * F.mse_loss(copied, given["replay"]["logits"][::2])
        + 0.5 * F.cross_entropy(replayed, given["replay"]["target"][1::2])
    )
    with torch.no_grad():
        outputs, _ = prepared.learner.learn(state, **given)
        few = {**given["replay"], "weight": (torch.arange(2 * ROWS) < 2).float()}  # two rows are there: one for each term
        begun, _ = prepared.learner.learn(state, **{**given, "replay": few})
    assert float(outputs["loss"]) == pytest.approx(float(loss), rel=1e-5)
    terms = F.mse_loss(scores[1], given["replay"]["logits"][0]), F.cross_entropy(scores[2:3], given["replay"]["target"][1:2])
    assert float(begun["loss"]) == pytest.approx(float(F.cross_entropy(new, given["target"]) + 0.1 * terms[0] + 0.5 * terms[1]), rel=1e-5)
    torch.testing.assert_close(outputs["row.logits"], new, rtol=1e-5, atol=1e-5)
    rows = prepared.memory.rows_by_name()
    whole = torch.func.functional_call(prepared.learner.suffix, dense, (torch.from_numpy(rows["replay.z"]),))
    torch.testing.assert_close(torch.from_numpy(rows["replay.logits"]), whole.detach(), rtol=1e-4, atol=1e-4)


def test_structured_masks_save_work_and_single_ones_do_not(toy: Any) -> None:
    """Canonical and executed MACs of both, beside the nominal ones of the dense net."""
    found = {}
    for granularity, sparsity, gradients in (("structured", 0.0, 0.0), ("structured", 0.75, 0.875), ("unstructured", 0.75, 0.875)):
        learner = ready(toy, granularity=granularity, sparsity=sparsity, gradient_sparsity=gradients, refresh_every=0).learner
        found[granularity, sparsity] = build_step(capture(learner, "learn")), learner.densities()
    dense, masked = found["structured", 0.0][0], found["unstructured", 0.75]
    layers = masked[0].layers
    sparse, densities = found["structured", 0.75]
    pair = ("conv1", "conv2")

    def of(built: Any, phase: str) -> int:
        return sum(built.layers[layer].get(phase, 0) for layer in pair)

    for phase, share in (("forward", 0.25), ("input_gradient", 0.25), ("weight_gradient", 0.125)):
        assert of(sparse, phase) == share * of(masked[0], phase), phase
        assert of(dense, phase) == of(masked[0], phase), "a mask that multiplies by zero saves nothing"
    nominal = nominal_macs({layer: layers[layer] for layer in pair}, masked[1])
    assert nominal == sum(of(sparse, phase) for phase in ("forward", "input_gradient", "weight_gradient"))
    assert {layer: densities[layer] for layer in pair} == {layer: masked[1][layer] for layer in pair}
    assert sparse.executed.total_macs < 0.5 * masked[0].executed.total_macs


def test_a_refresh_draws_aside(toy: Any) -> None:
    """What updates draw does not depend on whether a refresh runs."""
    prepared = ready(toy, refresh_every=3)
    memory = prepared.memory
    memory.generator.counter = 40
    aside = {name: array.copy() for name, array in memory.draw_aside("refresh").items()}
    assert memory.generator.counter == 40
    assert {name for name in aside if name.startswith("draw.")} == {draw.tensor.name for draw in prepared.learner.form.draws}
    plain = memory.draw()
    assert not [name for name in plain if name.startswith("draw.")]
    assert any(not np.array_equal(plain[name], aside[name]) for name in plain), "other words than those of the update"


def test_a_sample_that_is_known_is_not_learned(toy: Any, tmp_path: Any) -> None:
    prepared = ready(toy, skip_above=0.5, codec="uint8", refresh_every=3, lr=0.05)
    export(prepared, tmp_path / "bundle")
    x = np.random.default_rng(1).standard_normal((40, 2, 5, 5)).astype(np.float32)
    with DeviceLearner.load(tmp_path / "bundle") as learner:
        steps = learner.manifest.steps
        forward = steps["encode"].canonical_macs + steps["gate"].canonical_macs
        assert steps["gate"].canonical_macs == steps["predict"].canonical_macs
        outcomes = set()
        for sample in x:
            before, rows = learner.state(), learner.rows()
            scores = learner.predict(sample).scores
            label = int(scores.argmax()) if len(outcomes) % 2 else 3
            report = learner.learn(sample, label)
            share = np.exp(scores - scores.max())
            assert report.learned is not bool(share[label] / share.sum() > 0.5)
            outcomes.add(report.learned)
            if not report.learned:
                assert toy.helpers.same(learner.state(), before) and toy.helpers.same(learner.rows(), rows)
                assert report.macs == forward
            else:
                assert report.macs >= forward + steps["learn"].canonical_macs
        assert outcomes == {True, False}
        session = learner.report()["session"]
        assert session["skipped"] + session["learned"] == 40


class Single:
    """The toy with masks on single weights, for the battery."""

    def __init__(self, toy: Any) -> None:
        self.toy, self.helpers = toy, toy.helpers

    def __getattr__(self, name: str) -> Any:
        if name in ("prepared", "bundle", "device", "onnx", "config"):
            return lambda *args, **changes: getattr(self.toy, name)(*args, **{"granularity": "unstructured", "distill": 0.1, **changes})
        return getattr(self.toy, name)


BATTERY = [
    battery.test_steps_run,
    battery.test_inputs_are_not_mutated,
    battery.test_frozen_tensors_are_bit_identical_after_200_samples,
    battery.test_rollback_is_bit_identical,
    battery.test_a_sample_that_is_not_finite_changes_nothing,
    battery.test_unseen_classes_are_never_predicted,
]


@pytest.mark.parametrize("engine", battery.ENGINES)
@pytest.mark.parametrize("test", BATTERY)
def test_the_battery_with_masks_on_single_weights(toy: Any, engine: str, test: Any) -> None:
    test(Single(toy), "sparcl", engine)


def test_it_learns_with_masks_on_single_weights(toy: Any) -> None:
    battery.test_it_learns(Single(toy), "sparcl", "onnx")


def test_a_resumed_run_with_masks_on_single_weights(toy: Any, tmp_path: Any) -> None:
    battery.test_a_resumed_run_equals_an_uninterrupted_one(Single(toy), "sparcl", tmp_path)


@FORMS
def test_masks_that_stay_are_exported(toy: Any, tmp_path: Any, granularity: str) -> None:
    """Every state tensor is read by some step, dense layers and masks that never change among them."""
    for i, sparsity in enumerate((0.0, 0.5)):
        export(
            ready(toy, granularity=granularity, sparsity=sparsity, gradient_sparsity=sparsity, refresh_every=0, codec="uint8"),
            tmp_path / str(i),
        )
