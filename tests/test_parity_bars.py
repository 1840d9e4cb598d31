"""What parity's comparison of one step lets pass and refuses: bars, allowances and kinks, on engines made for the purpose."""

import numpy as np
import pytest
import torch
from torch import nn

from edgecl import EagerEngine, prepare
from edgecl_export import ExportError
from edgecl_export.kinks import NUDGES, Shifted, nudged, shifts
from edgecl_export.parity import MOST_KINKS, Tally, compare_step

CHANGE = 1e-3


class Fixed:
    """An engine that makes one change: to ``new`` from [1, 2], and the same from weights beside those."""

    def __init__(self, new, tensor="w", **outputs):
        self.new, self.tensor = np.array(new), tensor
        self.outputs = {name: np.array(value, bool if name == "guard" else np.float32) for name, value in outputs.items()}

    def load(self, state):
        self.start = state

    def run(self, step, inputs):
        return self.outputs

    def commit(self):
        pass

    def state(self):
        return {self.tensor: self.new + (self.start[self.tensor] - OLD["w"])}


OLD = {name: np.array([1.0, 2.0]) for name in ("w", "param.w", "average.w", "momentum.w", "adam_m.w")}
ALLOWANCES = [  # outputs, new state of both engines, whether it passes, how many comparisons need an allowance
    ({}, [1.1, 2.1], [1.1, 2.1], True, 0),
    ({}, [1.1, 2.1], [1.1001, 2.1], True, 1),  # 4e-5 of the state, 7e-4 of the change
    ({}, [1.1, 2.1], [1.1002, 2.1], False, 0),  # 8e-5 and 1.4e-3
    ({}, [21.0, 22.0], [21.004, 22.0], False, 0),  # 1.3e-4 and 1.4e-4
    ({"health.s": 0.05}, [1.1, 2.1], [1.1002, 2.1], True, 2),
    ({"health.s": 0.01}, [1.1, 2.1], [1.102, 2.1], True, 2),  # 8e-4 and 1.4e-2
    ({"health.s": 1e-6}, [1.1, 2.1], [1.11, 2.1], False, 0),  # 4e-3: no division loses more than a factor of 100
    ({"loss": 1e-5}, [1.0, 2.0 + 1e-6], [1.0, 2.0 + 1.08e-6], True, 1),
    ({"loss": 1e-5}, [1.0, 2.0 + 1e-6], [1.0, 2.0 + 1.12e-6], False, 0),
    ({"loss": 0.0}, [1.0, 2.0 + 1e-6], [1.0, 2.0 + 1.49e-6], True, 1),
    ({"loss": 0.0}, [1.0, 2.0 + 1e-6], [1.0, 2.0 + 1.6e-6], False, 0),  # half of a change is never rounding
    ({}, [1.0, 2.0 + 1e-13], [1.0, 2.0 + 1.004e-13], True, 1),  # two roundings of the stored value
    ({}, [1.0, 2.0], [1.0, 2.0 + 1e-15], True, 1),  # four roundings of the tensor, where nothing should change
    ({}, [1.0, 2.0], [1.0, 2.0 + 2e-15], False, 0),
    ({}, [1e-6, 0.0], [2e-6, 0.0], True, 1),  # what shrinks is known relative to what it was
    ({}, [1e-3, 0.0], [1.3e-3, 0.0], False, 0),  # 1.3e-4
    ({"guard": False}, [1.1, 2.1], [3.0, 4.0], True, 0),  # neither engine keeps it
]


@pytest.mark.parametrize(("outputs", "reference", "other", "passes", "allowed"), ALLOWANCES)
def test_allowances_are_bounded_and_counted(outputs, reference, other, passes, allowed):
    tally = Tally()
    engines = [Fixed(new, "param.w" if "loss" in outputs else "w", **outputs) for new in (reference, other)]
    if passes:
        assert compare_step("learn", OLD, {}, *engines, tally) == ("guard" not in outputs)
        compared = 0 if "guard" in outputs else 2 + len(outputs)
        assert (tally.bare, tally.allowed) == (compared - allowed, allowed)
    else:
        with pytest.raises(ExportError, match=r"gate 'parity': step 'learn': .* differs from eager"):
            compare_step("learn", OLD, {}, *engines, tally)


@pytest.mark.parametrize(("moved", "passes"), [(1.0, True), (2.0, True), (5.0, False)])
def test_statistics_are_known_no_better_than_what_they_are_of(moved, passes):
    """Of a change of 1e-3, as where rows repeat: 64 roundings of float32 are 3.8e-6 of the size; other tensors have two."""
    old, new = np.array([1.0, 2.0], np.float32), np.array([1.0, 2.001], np.float32)
    other = new + np.array([0.0, moved * 2e-6 * np.sqrt(5)], np.float32)
    for name in ("stat.norm.mean", "stat.norm.var", "mean"):
        engines = [Stepped(name, value) for value in (new, other)]
        if passes and name.startswith("stat."):
            compare_step("adapt", {name: old}, {}, *engines)
        else:
            with pytest.raises(ExportError, match=f"the change of {name} differs from eager|{name} differs from eager"):
                compare_step("adapt", {name: old}, {}, *engines)


class Stepped:
    """An engine of one tensor, which it replaces."""

    def __init__(self, name, value):
        self.value = {name: value}

    def load(self, state):
        pass

    def run(self, step, inputs):
        return {}

    def commit(self):
        pass

    def state(self):
        return self.value


@pytest.mark.parametrize(
    ("tensor", "passes"),
    [("w", False), ("readout", False), ("param.w", True), ("average.w", True), ("momentum.w", True), ("adam_m.w", True)],
)
def test_a_small_loss_widens_the_bar_of_what_a_gradient_changes_only(tensor, passes):
    old = {tensor: np.array([1.0, 2.0])}
    engines = [Fixed([1.0, last], tensor, loss=1e-5) for last in (2.0 + 1e-6, 2.0 + 1.05e-6)]
    if passes:
        compare_step("learn", old, {}, *engines)
    else:
        with pytest.raises(ExportError, match=f"the change of {tensor} differs from eager"):
            compare_step("learn", old, {}, *engines)


def test_trained_parameters_that_shrink_are_compared_with_themselves():
    with pytest.raises(ExportError, match=r"step 'learn': param\.w differs from eager"):
        compare_step("learn", {"param.w": OLD["w"]}, {}, *(Fixed([last, 0.0], "param.w") for last in (1e-6, 2e-6)))


def test_a_step_that_one_engine_refuses_is_refused():
    with pytest.raises(ExportError, match="step 'learn': output guard is"):
        compare_step("learn", OLD, {}, Fixed([1.1, 2.1], guard=True), Fixed([1.1, 2.1], guard=False))


@pytest.mark.parametrize("loss", [np.inf, np.nan])
def test_a_loss_that_both_engines_overflow_is_refused_by_both(loss):
    """The device's loop keeps no such update, so that there is nothing to compare; one engine's alone is a difference."""
    over, right = Fixed([1.1, 2.1], loss=loss), Fixed([1.1, 2.1], loss=3.0)
    assert not compare_step("learn", {"w": OLD["w"]}, {}, over, over)
    with pytest.raises(ExportError, match="loss differs from eager"):
        compare_step("learn", {"w": OLD["w"]}, {}, right, over)


def test_an_output_near_zero_needs_an_allowance():
    tally = Tally()
    compare_step("learn", OLD, {}, Fixed([1.0, 2.0], loss=1e-5), Fixed([1.0, 2.0], loss=1.05e-5), tally)
    assert (tally.bare, tally.allowed) == (2, 1)
    with pytest.raises(ExportError, match="loss differs"):
        compare_step("learn", OLD, {}, Fixed([1.0, 2.0], loss=1e-5), Fixed([1.0, 2.0], loss=1.2e-5))


@pytest.mark.parametrize(
    ("tensor", "norm", "difference", "passes"),
    [
        ("param.w", 1.0, 1.2e-6, True),  # 1e-6 and a rounding of |w| |z| = 2.24
        ("param.w", 1.0, 1.4e-6, False),
        ("param.w", 10.0, 3.6e-6, True),
        ("param.w", 10.0, 3.8e-6, False),
        ("param.w", 1e9, 1.005e-4, True),  # a hundredth of the score, whatever the terms
        ("param.w", 1e9, 1.02e-4, False),
        ("w", 1e9, 1.2e-6, False),
    ],
)
def test_scores_that_cancel_are_known_to_a_rounding_of_their_terms(tensor, norm, difference, passes):
    old, z = {tensor: np.array([1.0, 2.0])}, {"z": np.array([[norm]], np.float32)}
    engines = [Fixed([1.0, 2.0], tensor, scores=value) for value in (1e-4, 1e-4 + difference)]
    if passes:
        compare_step("predict", old, z, *engines)
    else:
        with pytest.raises(ExportError, match="scores differs"):
            compare_step("predict", old, z, *engines)


def test_codes_may_lie_on_an_edge_but_not_be_floored(toy):
    exported, ready = toy.bundle("latent_replay")
    eager = EagerEngine(ready.trunk, ready.learner)
    inputs = {spec.name: spec.zeros() for spec in exported.manifest.steps["learn"].inputs}
    inputs["z"] = ready.examples[3][0].numpy()
    inputs["weight"] = np.ones(1, np.float32)
    state = toy.helpers.arrays(ready.state)

    class Codes(toy.helpers.Spoiled):
        def run(self, step, inputs):
            outputs = self.inner.run(step, inputs)
            row = outputs["row.z"].copy()
            row.reshape(-1)[: self.spoil] += 1
            return {**outputs, "row.z": row}

        def state(self):
            return self.inner.state()

    compare_step("learn", state, inputs, eager, Codes(toy.onnx("latent_replay"), 1))
    with pytest.raises(ExportError, match=r"codes row\.z differ"):
        compare_step("learn", state, inputs, eager, Codes(toy.onnx("latent_replay"), 20))


def test_another_codeword_is_as_good_only_where_it_is_as_near(toy):
    """One code of a product-quantised row is another one: allowed while the row loses as much, and no step is compared by it."""
    codec = {"codec": "pq", "subquantizers": 3, "centroids": 8}
    exported, ready = toy.bundle("latent_replay", **codec)
    eager = EagerEngine(ready.trunk, ready.learner)
    inputs = {spec.name: spec.zeros() for spec in exported.manifest.steps["learn"].inputs}
    inputs |= {"z": ready.examples[3][0].numpy(), "weight": np.ones(1, np.float32)}
    state = toy.helpers.arrays(ready.state)

    class Codes(toy.helpers.Spoiled):
        loses = 1.0

        def run(self, step, inputs):
            outputs = self.inner.run(step, inputs)
            row = outputs["row.z"].copy()
            row[0, : self.spoil] ^= 4
            return {**outputs, "row.z": row, "health.reconstruction": outputs["health.reconstruction"] * np.float32(self.loses)}

    tally, other = Tally(), Codes(toy.onnx("latent_replay", **codec), 1)
    assert not compare_step("learn", state, inputs, eager, other, tally)
    assert tally.allowed == 1
    with pytest.raises(ExportError, match=r"codes row\.z differ"):
        compare_step("learn", state, inputs, eager, Codes(toy.onnx("latent_replay", **codec), 2))
    other.loses = 1.1
    with pytest.raises(ExportError, match=r"health\.reconstruction differs from eager"):
        compare_step("learn", state, inputs, eager, other)


class Kinked(nn.Module):
    """One unit of the trained layer is exactly zero for latents of equal values; ``side`` is its derivative there."""

    def __init__(self, side):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stem, self.mid, self.fc, self.side = nn.Identity(), nn.Linear(8, 6), nn.Linear(6, 3), side
        for weight in self.parameters():
            nn.init.normal_(weight, 0.0, 0.5, generator=generator)
        with torch.no_grad():
            self.mid.weight[0] = torch.tensor([1.0, -1.0] * 4)
            self.mid.bias[0] = 0.0

    def forward(self, x):
        h = self.mid(self.stem(x))
        return self.fc(torch.where(h >= 0 if self.side else h > 0, h, torch.zeros_like(h)))


@pytest.fixture(scope="module")
def kinked():
    """Two healthy engines that stand on either side of a kink, the state and inputs of a step there."""
    x = np.full((1, 8), 0.7, np.float32)
    learners = [prepare(Kinked(side), at="stem", example=x, method="finetune", classes=3) for side in (0, 1)]
    engines = [EagerEngine(ready.trunk, ready.learner) for ready in learners]
    state = {name: value.numpy().copy() for name, value in learners[0].state.items()}
    state["count"] = np.ones_like(state["count"])  # over one seen class the loss would be zero
    inputs = {"z": x, "target": np.array([1]), "weight": np.ones(1, np.float32), "lr": np.array(0.01, np.float32)}
    return *engines, state, inputs


def second(kinked):
    """A second engine on the reference's side."""
    return EagerEngine(kinked[0]._trunk, kinked[0]._learner)


def test_a_healthy_network_at_a_kink_passes_and_is_counted(kinked):
    eager, other, state, inputs = kinked
    changes = []
    for engine in (eager, other):
        engine.load(state)
        engine.run("learn", inputs)
        engine.commit()
        changes.append(engine.state()["param.mid.weight"] - state["param.mid.weight"])
    assert np.linalg.norm(changes[0] - changes[1]) > 0.03 * np.linalg.norm(changes[0]), "the two sides differ by far more than the bar"
    tally = Tally()
    for count in range(1, MOST_KINKS + 1):
        assert compare_step("learn", state, inputs, eager, other, tally)
        assert tally.kinks == count
    assert str(tally).endswith(f"; {MOST_KINKS} updates (at most {MOST_KINKS}) at a kink, equal to eager's on its other side")
    assert tally.worst["change"] < CHANGE
    with pytest.raises(ExportError, match=f"more than {MOST_KINKS} states lie at a kink"):
        compare_step("learn", state, inputs, eager, other, tally)
    smooth = Tally()
    compare_step("learn", state, inputs, eager, second(kinked), smooth)
    assert smooth.kinks == 0 and "kink" not in str(smooth)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("tensor", ["param.mid.weight", "param.mid.bias", "param.fc.weight", "param.fc.bias"])
@pytest.mark.parametrize("factor", [1.036, 0.964])
def test_an_error_of_a_kinks_size_is_refused_at_a_kink_too(toy, kinked, side, tensor, factor):
    """On either side of it: nudged weights explain the jump, not the error beside it."""
    eager, state, inputs = kinked[0], *kinked[2:]
    bad = toy.helpers.Spoiled(kinked[1] if side else second(kinked), toy.helpers.scaled(tensor, factor))
    with pytest.raises(ExportError, match=r"step 'learn': .* differs from eager"):
        compare_step("learn", state, inputs, eager, bad)


class Jumping:
    """An engine of one tensor, whose update some weights make jump."""

    def load(self, state):
        self.start = state["param.w"]

    def run(self, step, inputs):
        return {"loss": np.float32(1.0), "finite": np.True_}

    def commit(self):
        pass


class Rough(Jumping):
    """Its update jumps by a share of its size with every rounding of its weights, as one of a very deep network does."""

    def __init__(self, share, factor=1.0, phase=0.0, from_below=1e9):
        self.share, self.factor, self.phase, self.from_below = share, factor, phase, from_below

    def state(self):
        jump = self.share * np.sin(1e9 * self.start + self.phase) * (self.start < self.from_below)
        return {"param.w": self.start - 0.1 * self.factor * (1 + jump)}


def test_an_update_among_many_kinks_is_known_no_better_than_it_moves():
    state = {"param.w": np.linspace(1.0, 2.0, 400)}
    tally = Tally()
    assert compare_step("learn", state, {}, Rough(0.02), Rough(0.02, phase=1.0), tally)
    assert (tally.unsettled, tally.kinks) == (1, 0) and 0.01 < tally.moved < 0.04
    assert str(tally).endswith("with weights 1e-06 away")
    for share, other in (
        (0.02, Rough(0.02, factor=1.05)),  # beyond what eager's own moves
        (0.02, Rough(0.06, phase=1.0)),
        (0.3, Rough(0.3, phase=1.0)),  # eager's own is anything
        (0.0, Rough(0.01)),  # eager's own does not move
    ):
        with pytest.raises(ExportError, match=r"param\.w differs from eager"):
            compare_step("learn", state, {}, Rough(share), other)
    before = Tally()
    assert compare_step("learn", state, {}, Rough(0.02), Rough(0.02), before)
    assert before.unsettled == 0


def test_what_eager_makes_again_beside_a_state_is_no_rough_ground():
    """Its own update does not move with every second nudge, as those raise the weight: the other's then has to be one that it makes."""
    state = {"param.w": np.ones(1)}
    with pytest.raises(ExportError, match=r"param\.w differs from eager"):
        compare_step("learn", state, {}, Rough(0.02, from_below=1.0), Rough(0.01, phase=1.0))


class Sided(Jumping):
    """Its every weight stands at a kink of its own, where its update jumps by half; at the kink itself it takes given sides."""

    def __init__(self, sides, factor=1.0):
        self.sides, self.factor = np.array(sides, bool), factor

    def state(self):
        side = np.where(self.start == 1.0, self.sides, self.start > 1.0)
        return {"param.w": self.start - 0.1 * self.factor * (1 + 0.5 * side)}


def test_of_several_kinks_each_may_be_taken_either_way():
    """More than eight nudges are needed until the right sides come up by chance; an error beside them is none of theirs."""
    state, sides = {"param.w": np.ones(5)}, [1, 0, 0, 0, 1]
    first = next(i for i, start in enumerate(nudged(state)) if np.array_equal(start["param.w"] > 1, np.array(sides, bool)))
    assert first >= NUDGES
    tally = Tally()
    assert compare_step("learn", state, {}, Sided([0] * 5), Sided(sides), tally)
    assert (tally.kinks, tally.unsettled) == (1, 0) and tally.worst["change"] < CHANGE
    with pytest.raises(ExportError, match=r"param\.w differs from eager"):
        compare_step("learn", state, {}, Sided([0] * 5), Sided(sides, factor=1.01))


class Unmoved(Jumping):
    """A rectifier of its stands at its kink, whose input no weight moves; it takes a given side there."""

    def __init__(self, side, factor=1.0):
        self.side, self.factor = side, factor

    def run(self, step, inputs):
        near = 2e-6 if self.side else -2e-6
        self.passed = int((torch.tensor([[near, 1.0, -1.0]]).relu() != 0).sum())
        return super().run(step, inputs)

    def state(self):
        return {"param.w": self.start - 0.1 * self.factor * self.passed}


def test_a_rectifier_is_taken_over_its_kink_where_nudged_weights_move_something_else():
    state, tally = {"param.w": np.ones(5)}, Tally()
    for side in (0, 1):
        assert compare_step("adapt", state, {}, Unmoved(side), Unmoved(1 - side), tally)
        with pytest.raises(ExportError, match=r"param\.w differs from eager"):
            compare_step("adapt", state, {}, Unmoved(side), Unmoved(1 - side, factor=1.01))
    assert (tally.kinks, tally.unsettled) == (2, 0)


@pytest.mark.parametrize(
    ("rectify", "low", "high"),
    [
        (torch.relu, 0.0, 100.0),
        (nn.ReLU(), 0.0, 100.0),
        (nn.ReLU6(), 0.0, 6.0),
        (torch.nn.functional.relu6, 0.0, 6.0),
        (nn.Hardtanh(-2.0, 3.0), -2.0, 3.0),
    ],
)
def test_a_shifted_rectifier_gives_what_it_gives_and_takes_either_side_at_its_kinks(rectify, low, high):
    x = torch.tensor([[low - 1.0, low - 1e-7, low + 1e-7, (low + high) / 2, high - 1e-6, high + 1e-6, high + 1.0]], requires_grad=True)
    taken = set()
    for sides in shifts():
        with sides:
            y = rectify(x)
        assert torch.allclose(y, rectify(x), rtol=0, atol=2e-6)
        taken.add(tuple(torch.autograd.grad(y.sum(), x)[0][0].tolist()))
    found = [set(column) for column in zip(*taken, strict=True)]
    both = {0.0, 1.0}
    assert found == [{0.0}, both, both, {1.0}, *([{1.0}] * 3 if high == 100.0 else [both, both, {0.0}])]


def test_a_rectifier_in_place_is_shifted_in_place():
    for sides in shifts():
        x = torch.tensor([[-1.0, 2.0]])
        with sides:
            y = torch.nn.functional.relu(x, inplace=True)
        assert y is x and x.tolist() == [[0.0, 2.0]]


def test_a_gradient_is_taken_through_shifted_rectifiers():
    """In a learner's own step: a unit near its kink learns in some runs and does not in others, the one beside it always does."""
    net = nn.Sequential(nn.Identity(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(2))
        net[1].bias.zero_()
    x = np.array([[1e-7, 1.0]], np.float32)
    ready = prepare(net, at="0", example=x, method="finetune", classes=2).fit(np.eye(2, dtype=np.float32), np.arange(2))
    engine, moved = EagerEngine(ready.trunk, ready.learner), set()
    start = {name: value.numpy() for name, value in ready.state.items()}
    for sides in shifts():
        engine.load(start)
        with sides:
            engine.run("learn", {"z": x, "target": np.array([0]), "lr": np.float32(0.1), "weight": np.ones(1, np.float32)})
        engine.commit()
        moved.add(tuple((engine.state()["param.1.bias"] != start["param.1.bias"]).tolist()))
    assert moved == {(True, True), (False, True)}


def test_updates_of_many_rows_may_all_lie_at_kinks():
    state, tally = {"param.w": np.ones(5)}, Tally()
    for _ in range(MOST_KINKS + 1):
        assert compare_step("adapt", state, {}, Sided([0] * 5), Sided([1] * 5), tally)
    assert tally.kinks == MOST_KINKS + 1


def test_a_side_that_only_one_tensor_takes_is_refused(toy, kinked):
    """The gradient of a kink's other side belongs to all tensors of that side, or to none."""
    eager, other, state, inputs = kinked
    other.load(state)
    other.run("learn", inputs)
    other.commit()
    crossed = other.state()["param.mid.bias"]
    bad = toy.helpers.Spoiled(second(kinked), lambda name, _, new: crossed if name == "param.mid.bias" else new)
    with pytest.raises(ExportError, match=r"param\.mid\.bias differs from eager"):
        compare_step("learn", state, inputs, eager, bad)


@pytest.mark.parametrize(
    "x",
    [
        torch.tensor([[1e30, -1e30, 2e30]]),
        torch.tensor([[float("inf"), -1.0, 2.0]]),
        torch.tensor([[float("nan"), -1.0, 2.0]]),
        torch.tensor([[300.0, -300.0, 2.0]], dtype=torch.float16),
        torch.tensor([[3, -3, 2]]),
        torch.tensor(-2.0),
        torch.zeros(2, 0),
    ],
)
def test_shifted_rectifiers_far_from_their_kinks_are_plain_ones(x):
    for rectify in (torch.relu, torch.nn.functional.relu6, lambda x: x.clone().relu_()):
        with Shifted(1e-5, 0):
            found = rectify(x)
        assert found.dtype == x.dtype and torch.equal(found.nan_to_num(), rectify(x).nan_to_num())


def test_rectifiers_are_shifted_within_vmap():
    x = torch.tensor([[[1.0, -1.0]], [[2.0, -2.0]]])
    with Shifted(1e-6, 0):
        assert torch.equal(torch.func.vmap(torch.relu)(x), x.clamp(min=0))
