"""Parity: one step on two engines from the same state, compared by relative differences of outputs, new state and change.

``docs/bundle.md`` says in plain words what is compared with which bar, and when a bar is wider.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgecl.learner import UNSEEN
from edgecl_device.adapt_checks import ADAPT
from edgecl_device.manifest import Array
from edgecl_export.errors import ExportError, refuse
from edgecl_export.kinks import NUDGE, NUDGED, NUDGES, nudged, shifts

WEIGHTS, MOMENTS, CHANGE = 1e-5, 1e-4, 1e-3
"""Largest relative differences: of weights and analytic state; of optimiser moments, losses and scores; of an update."""

ROUNDING = {"float32": 2.0**-23, "float64": 2.0**-52}
"""Two roundings of a stored value: a change cannot be known better than the numbers that it lies between. Only values that
changed count."""

TRAINED = ("param.", "average.", "momentum.", "adam_")
"""Names of tensors that a gradient changes, and of nothing else: only their change may be a vanishing one."""

STATISTICS, DEPTH = "stat.", 32
"""Names of a norm's statistics, which are means of values behind all layers before it, and how many times :data:`ROUNDING` they are off."""

CODES = 0.01
"""Share of a row's codes that may differ by one: values that lie on the edge between two codes."""

RECONSTRUCTION = "health.reconstruction"
"""What a replay row loses of its latent."""

MOST_LOST, MOST_VANISHING, MOST_CANCELLED = 100.0, 0.5, 1e-2
"""Limits of three allowances of :func:`compare_step`, so that no state makes a comparison pass whatever it finds."""

CONDITIONED = 1e-4
"""Bar of a badly conditioned state. The change, whose bar stays, is what tells a wrong step."""

MOST_KINKS = 6
"""States of a gate that may lie at a kink, a quarter: ResNet-18 met 6 in 100, so that 25 states hold more than 6 once in a thousand
exports. An update of the step ``adapt`` is of many rows, 64 by default: 1 - 0.94^64 of them meet one, which is no limit."""

MOST_MOVED = 0.1
"""Share of an update by which eager's own may move when its weights are nudged, where no nudged run makes eager's update again."""

FLOOR = 1e-2
"""Outputs are compared relative to at least this size."""

UNLESS = (
    "if the learner is badly conditioned (a small regulariser, features far from unit length, classes without spread), mend that: raise "
    "gamma or g0, use unit_norm or float64; else report this as a defect"
)


@dataclass
class Tally:
    """What comparisons found.

    Attributes:
        worst: Largest relative difference by kind.
        bare: Comparisons that held the bare bars.
        allowed: Comparisons that needed an allowance (``docs/bundle.md`` lists them).
        kinks: States at a kink, whose update was compared with eager's on its other side.
        unsettled: States whose update is known no better than eager's own moves when its weights are nudged.
        moved: The most that it moved in one of them, as a share of the update.
    """

    worst: dict[str, float] = field(default_factory=dict)
    bare: int = 0
    allowed: int = 0
    kinks: int = 0
    unsettled: int = 0
    moved: float = 0.0

    def add(self, bare: bool) -> None:
        """Count one comparison that passed."""
        self.bare += bare
        self.allowed += not bare

    def merge(self, other: "Tally") -> None:
        """Count what another tally holds as well."""
        for kind, value in other.worst.items():
            self.worst[kind] = max(self.worst.get(kind, 0.0), value)
        self.bare += other.bare
        self.allowed += other.allowed
        self.kinks += other.kinks
        self.unsettled += other.unsettled
        self.moved = max(self.moved, other.moved)

    def __str__(self) -> str:
        worst = ", ".join(f"{kind} {value:.0e}" for kind, value in sorted(self.worst.items()))
        kinks = f"; {self.kinks} updates (at most {MOST_KINKS}) at a kink, equal to eager's on its other side" if self.kinks else ""
        if self.unsettled:
            kinks += (
                f"; {self.unsettled} updates no farther from eager's than eager's own move, by up to {self.moved:.0e}, with weights "
                f"{NUDGE:.0e} away"
            )
        return f"{worst}; {self.bare} comparisons held the bare bars, {self.allowed} needed an allowance{kinks}"


def compare_step(
    step: str, state: Mapping[str, Array], inputs: Mapping[str, Array], eager: Any, target: Any, tally: Tally | None = None
) -> bool:
    """Run one step on two engines from the same state and compare outputs, new state and the change itself.

    Args:
        step: Name of the step.
        state: Every state tensor.
        inputs: At least the inputs that the step takes.
        eager: The reference engine.
        target: The engine to check.
        tally: Collects what was found.

    Returns:
        Whether the step was compared: false when both engines refuse it, or the sample lies between two codewords.

    Raises:
        ExportError: naming the tensor, the difference and the bar.
    """
    tally = Tally() if tally is None else tally
    eager.load(state)
    target.load(state)
    outputs = eager.run(step, inputs)
    others = target.run(step, inputs)
    if _refuses(outputs) and _refuses(others):
        return False  # neither engine's loop keeps anything of this step
    if _other_codewords(outputs, others):
        # Two codewords were equally near: the row is as good, but the update is that of another latent. Another state has to tell.
        _compare_floats(step, RECONSTRUCTION, outputs[RECONSTRUCTION], others[RECONSTRUCTION], 1.0, tally)
        tally.add(bare=False)
        return False
    # dividing by s < 1, as taking out a sample does, loses that factor of precision on either side
    lost = min(max(1.0, 1.0 / max(float(outputs.get("health.s", 1.0)), 1.0 / MOST_LOST)), MOST_LOST)
    compare_outputs(step, outputs, others, tally, lost, _rounding_of_products(state, inputs))
    # the gradient of a sample that is all but learned is a probability minus one, exact to a rounding of one
    smallest = ROUNDING["float32"]
    vanishing = min(8 * smallest / max(float(outputs.get("loss", 1.0)), smallest), MOST_VANISHING)
    eager.commit()
    target.commit()
    new, other = eager.state(), target.state()
    found = Tally()
    try:
        _compare_state(step, state, new, other, lost, vanishing, found)
    except ExportError as error:
        at_kink = _compare_nudged(step, state, inputs, eager, new, other, lost, vanishing)
        if at_kink is None:
            raise
        if at_kink.kinks and tally.kinks == MOST_KINKS and step != ADAPT:
            why = f"step {step!r}: more than {MOST_KINKS} states lie at a kink of the network, where updates jump"
            raise refuse("parity", why, "report this as a defect") from error
        eager.load(new)
        found = at_kink
    tally.merge(found)
    return True


def _compare_state(
    step: str,
    state: Mapping[str, Array],
    new: Mapping[str, Array],
    other: Mapping[str, Array],
    lost: float,
    vanishing: float,
    tally: Tally,
) -> None:
    """Compare the new state of two engines, and the change from the state that both had before.

    Args:
        step: Name of the step.
        state: Every state tensor before the step.
        new: Every state tensor after the reference engine's step.
        other: Those after the other's.
        lost: Factor by which all bars are wider.
        vanishing: What is added to the bar of the change of trained tensors.
        tally: Collects what was found.
    """
    for name, reference in new.items():
        if reference.dtype.kind != "f":
            _check_equal(step, name, reference, other[name], tally)
            continue
        kind, bar = ("moments", MOMENTS) if name.startswith(("momentum.", "adam_")) else ("state", WEIGHTS)
        got = _without_lost_signs(name, state, new, other)
        wide, old = reference.astype(np.float64), state[name].astype(np.float64)  # the norm of float32 overflows from 1e19 on
        size, apart = _norm(wide), _norm(wide - got)
        plain = _norm(wide - other[name])
        # what little is left when the last sample leaves is a difference of large numbers: it is known relative to those
        whole = size if name.startswith(TRAINED) else max(size, _norm(old))
        widest = max(lost * bar, CONDITIONED)
        _judge(step, name, _ratio(apart, whole), widest, kind, tally, _ratio(plain, size) <= bar)
        changed = _norm(wide - old)
        floor = ROUNDING[str(reference.dtype)] * _norm(wide[(wide != old) | (got != old)])
        if name.startswith(STATISTICS):
            floor = DEPTH * ROUNDING[str(reference.dtype)] * size
        if changed <= floor:  # a change that is itself all rounding
            floor = max(floor, 2 * ROUNDING[str(reference.dtype)] * size)
        relative = _ratio(max(apart - floor, 0.0), changed)
        bar = lost * CHANGE + (vanishing if name.startswith(TRAINED) else 0.0)
        _judge(step, f"the change of {name}", relative, bar, "change", tally, _ratio(plain, changed) <= CHANGE)


def _compare_nudged(
    step: str,
    state: Mapping[str, Array],
    inputs: Mapping[str, Array],
    eager: Any,
    new: Mapping[str, Array],
    other: Mapping[str, Array],
    lost: float,
    vanishing: float,
) -> Tally | None:
    """Compare the other engine's update with eager's on the other side of a kink: each engine may stand on either.

    All tensors must hold their bars against the same run, from nudged weights or with shifted rectifiers, so that only an update passes
    that eager makes next to this state, or where units near their kinks take the other side.
    Where many kinks are near, as in a deep network that is trained whole, no nudged run makes eager's own update again, either. Its update
    is then known no better than it moves, and the other's must be no farther away.

    Returns:
        What was found, or None if no such run makes the same update, and a nudged one makes eager's or eager's moves too far.
    """
    moves: dict[str, float] = {}
    settled = False
    for tried, (start, sides) in enumerate(_beside(state)):
        if tried == NUDGES and not settled and (rough := _unsettled(state, new, other, moves, lost)) is not None:
            return rough
        eager.load(start)
        with sides:
            refused = _refuses(eager.run(step, inputs))
        if refused:
            continue
        eager.commit()
        run = eager.state()
        found = Tally(kinks=1)
        try:
            _compare_state(step, start, run, _from(start, state, other), lost, vanishing, found)
        except ExportError:
            pass  # another nudge may make it
        else:
            return found
        if tried < NUDGES:
            try:
                _compare_state(step, start, run, _from(start, state, new), lost, vanishing, Tally())
                settled = True
            except ExportError:
                moves = {name: max(moves.get(name, 0.0), apart) for name, apart in _apart(state, new, _from(state, start, run)).items()}
    return None


def _beside(state: Mapping[str, Array]) -> Iterator[tuple[Mapping[str, Array], AbstractContextManager[Any]]]:
    """States, and what to be in, for runs of eager beside this one: some nudged weights, then shifted rectifiers, then the other nudges."""
    for index, start in enumerate(nudged(state)):
        if index == NUDGES:
            yield from ((state, sides) for sides in shifts())
        yield start, nullcontext()


def _unsettled(
    state: Mapping[str, Array], new: Mapping[str, Array], other: Mapping[str, Array], moves: Mapping[str, float], lost: float
) -> Tally | None:
    """What is found where no nudged run makes eager's own update again: none if the other's is farther away than that moves.

    Args:
        state: Every state tensor before the step.
        new: Those after eager's.
        other: Those after the other engine's.
        moves: The most that eager's change of each tensor moved, as a share of it.
        lost: Factor by which all bars are wider.
    """
    largest = max(moves.values(), default=math.inf)
    if largest > MOST_MOVED:
        return None
    distances = _apart(state, new, other)
    if any(distance > max(moves[name], lost * CHANGE) for name, distance in distances.items()):
        return None
    return Tally({"change": max(distances.values())}, allowed=1, unsettled=1, moved=largest)


def _from(start: Mapping[str, Array], state: Mapping[str, Array], new: Mapping[str, Array]) -> dict[str, Array]:
    """A new state with the changes that it brought to ``state`` from ``start`` instead: float64 adds no rounding to them."""
    return {
        name: value + (start[name].astype(np.float64) - state[name]) if name.startswith(NUDGED) else value for name, value in new.items()
    }


def _apart(state: Mapping[str, Array], new: Mapping[str, Array], other: Mapping[str, Array]) -> dict[str, float]:
    """How far another change of each tensor of floats is from one, as a share of it; what is not floats must be equal."""
    found = {}
    for name, reference in new.items():
        if reference.dtype.kind != "f":
            found[name] = 0.0 if np.array_equal(reference, other[name]) else math.inf
            continue
        wide = reference.astype(np.float64)
        floor = 2 * ROUNDING[str(reference.dtype)] * _norm(wide)
        found[name] = _ratio(max(_norm(wide - other[name]) - floor, 0.0), _norm(wide - state[name]))
    return found


def _rounding_of_products(state: Mapping[str, Array], inputs: Mapping[str, Array]) -> float:
    """One rounding of the largest product of an input with a trained weight, by Cauchy and Schwarz: scores are sums of such products."""
    weights = [_norm(value.astype(np.float64)) for name, value in state.items() if name.startswith("param.")]
    given = [_norm(value.astype(np.float64)) for value in inputs.values() if value.dtype.kind == "f"]
    return ROUNDING["float32"] * max(weights, default=0.0) * max(given, default=0.0)


def _without_lost_signs(name: str, state: Mapping[str, Array], new: Mapping[str, Array], other: Mapping[str, Array]) -> Array:
    """The other engine's tensor; under Adam, less what its weights inherit from moments that differ.

    Adam divides a gradient by its own size. Where a gradient is itself lost in rounding, so is the sign of the weight's change:
    it inherits the relative difference of its first moment, whose own bar is not touched.
    """
    moment = name.replace("param.", "adam_m.", 1)
    if not name.startswith("param.") or moment not in new:
        return other[name].astype(np.float64)
    size = np.maximum(np.abs(new[moment].astype(np.float64)), np.finfo(np.float64).tiny)
    share = np.minimum(2 * np.abs(new[moment] - other[moment]) / size, 2)
    difference = other[name].astype(np.float64) - new[name]
    inherited = np.abs(new[name].astype(np.float64) - state[name]) * share
    return np.asarray(new[name] + np.sign(difference) * np.maximum(np.abs(difference) - inherited, 0))


def compare_outputs(
    step: str, reference: Mapping[str, Array], other: Mapping[str, Array], tally: Tally, lost: float = 1.0, rounding: float = 0.0
) -> None:
    """Compare the outputs of one step; integers and truth values must be equal, a few codes may differ by one rounding.

    Args:
        step: Name of the step.
        reference: The reference engine's outputs.
        other: The other's.
        tally: Collects what was found.
        lost: Factor by which the bar is wider.
        rounding: Size of a difference that scores and losses owe to the rounding of the products that they are sums of.
    """
    for name, value in reference.items():
        got = other[name]
        if name == "scores":
            seen = value > UNSEEN / 2
            if ((got > UNSEEN / 2) != seen).any():
                raise refuse("parity", f"step {step!r}: other classes are masked", "report this as a defect")
            value, got = value[seen], got[seen]
        if value.dtype == np.uint8:
            apart = np.abs(value.astype(int) - got)
            if apart.max(initial=0) > 1 or np.count_nonzero(apart) > max(1, CODES * apart.size):
                raise refuse("parity", f"step {step!r}: codes {name} differ", "report this as a defect")
            tally.add(bare=not apart.any())
        elif value.dtype.kind == "f":
            _compare_floats(step, name, value, got, lost, tally, rounding)
        else:
            _check_equal(step, f"output {name}", value, got, tally)


def _compare_floats(step: str, name: str, value: Array, got: Array, lost: float, tally: Tally, rounding: float = 0.0) -> None:
    wide = value.astype(np.float64)
    difference, size = _norm(wide - got), _norm(wide)
    # a loss near zero is a difference of scores: it is known no better than their own rounding, about 1e-6
    scale = max(size, FLOOR)
    bar = lost * MOMENTS + min(rounding / scale, MOST_CANCELLED)
    _judge(step, name, difference / scale, bar, "outputs", tally, _ratio(difference, size) <= MOMENTS)


def _other_codewords(outputs: Mapping[str, Array], others: Mapping[str, Array]) -> bool:
    """Whether few of a row's codes differ, and not by one, on engines that tell what the row loses."""
    pairs = [(value, others[name]) for name, value in outputs.items() if value.dtype == np.uint8]
    far = any((np.abs(value.astype(int) - other) > 1).any() for value, other in pairs)
    few = all(np.count_nonzero(value != other) <= max(1, CODES * value.size) for value, other in pairs)
    return far and few and RECONSTRUCTION in outputs


def _refuses(outputs: Mapping[str, Array]) -> bool:
    """Whether the loop keeps nothing of a step with these outputs: a guard, or a state or loss that is not finite."""
    finite = bool(outputs.get("finite", True)) and bool(np.isfinite(outputs.get("loss", 0.0)))
    return not (finite and bool(outputs.get("guard", True)))


def _norm(values: Array) -> float:
    """Without BLAS, whose threads would wait for each other on every tensor where the machine has other work."""
    flat = values.reshape(-1)
    return math.sqrt(np.einsum("i,i->", flat, flat))


def _ratio(difference: float, size: float) -> float:
    """``difference / size``, also where the size is zero."""
    return difference / max(size, 1e-30)


def _check_equal(step: str, name: str, reference: Array, other: Array, tally: Tally) -> None:
    if not np.array_equal(reference, other):
        raise refuse("parity", f"step {step!r}: {name} is {other}, eager gives {reference}", "report this as a defect")
    tally.add(bare=True)


def _judge(step: str, name: str, relative: float, bar: float, kind: str, tally: Tally, bare: bool) -> None:
    tally.worst[kind] = max(tally.worst.get(kind, 0.0), relative)
    if not relative <= bar:
        why = f"step {step!r}: {name} differs from eager by {relative:.2e}, more than {bar:.0e}"
        raise refuse("parity", why, UNLESS)
    tally.add(bare)
