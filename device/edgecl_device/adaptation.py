"""Adaptation to samples without a target: what the loop does around the steps ``track`` and ``adapt``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgecl_device.adapt_checks import ADAPT, TRACK
from edgecl_device.engines import Engine
from edgecl_device.errors import InputError
from edgecl_device.manifest import Array, Manifest, StepSpec
from edgecl_device.memory import row_of
from edgecl_device.record import Sample
from edgecl_device.targets import target_of
from edgecl_device.whole import WholeMemory

LOSS_DECAY = 0.9
"""Of the running mean of the loss, as in SAR (Niu et al. 2023)."""

Run = Callable[[str, Mapping[str, Array], str], dict[str, Array]]


@dataclass
class Adapted:
    """What was found for one sample.

    Attributes:
        outputs: Of the step that saw the sample itself: ``track``, or ``adapt`` without a memory.
        found: The prediction in its scores.
        selected: Whether the sample enters the memory.
        offered: Whether it has been offered to the memory already, as the update read it there.
        loss: Of the update; None when none ran.
        health: The method's figures.
        reset: Whether the loop went back to the start behind the update.
        undo: What takes back what could not wait for :meth:`Adaptation.keep`, in order.
    """

    outputs: dict[str, Array]
    found: Any
    selected: bool
    health: dict[str, float]
    offered: bool = False
    loss: float | None = None
    reset: bool = False
    undo: list[Callable[[], None]] = field(default_factory=list)

    def take_back(self) -> None:
        """Let everything be as before the sample."""
        for step in reversed(self.undo):
            step()


class Adaptation:
    """Applies samples without a target, each either whole or not at all.

    Attributes:
        updates: Updates since the start, or the last reset.
        loss: Running mean of their losses, None before the first.

    Args:
        manifest: With a step ``adapt``.
        engine: Holds the state.
        memory: What updates read; None for methods that adapt on every sample.
        state: The bundle's initial state, to which a reset goes back: a copy of what ``track`` and ``adapt`` write stays in memory.
        run: Runs a step and refuses a result that must not be kept.
    """

    def __init__(self, manifest: Manifest, engine: Engine, memory: WholeMemory | None, state: Mapping[str, Array], run: Run) -> None:
        assert manifest.adapt is not None
        self._spec = manifest.adapt
        self._engine = engine
        self._memory = memory
        self._run = run
        self._classes = manifest.target.kind == "class"
        self._target = target_of(manifest.target, manifest.max_classes)
        self._start = {name: state[name].copy() for name in written(manifest.steps)}
        self._tracked = manifest.steps[TRACK].state_out if TRACK in manifest.steps else ()
        self.updates = 0
        self.loss: float | None = None

    def propose(self, sample: Sample) -> Adapted:
        """Predict a sample, and run an update where one is due. :meth:`keep` makes it the present, :meth:`Adapted.take_back` undoes it.

        Raises:
            UpdateRefusedError: when a result must not be kept; nothing has changed then.
            PredictionError: when a score is not finite.
            InputError: when the learner knows no class.
        """
        what, memory = f"sample {sample.id}", self._memory
        outputs = self._run(ADAPT if memory is None else TRACK, sample.inputs(), what)
        found = self._target.read(outputs["scores"])
        if found is None:
            raise InputError("x: needs a class that was learned, got none: nothing is predicted; fit source samples before the export")
        health = health_of(outputs)
        if memory is None:
            return Adapted(outputs, found, True, health, loss=float(outputs["loss"]))
        adapted = Adapted(outputs, found, bool(outputs.get("select", True)), health)
        if not adapted.selected or not memory.is_due(self._spec.every, ahead=1):
            return adapted
        try:
            before = self._engine.state(self._tracked)
            adapted.undo.append(lambda: self._engine.put(before))
            self._engine.commit()
            adapted.undo.append(memory.offer_for_now(row_of(outputs), self._label(adapted), sample.id))
            adapted.offered = True
            updated = self._run(ADAPT, {"lr": sample.inputs()["lr"], **memory.draw()}, what)
        except BaseException:
            adapted.take_back()
            raise
        adapted.loss, adapted.health = float(updated["loss"]), {**health, **health_of(updated)}
        return adapted

    def keep(self, sample: Sample, adapted: Adapted) -> None:
        """Make what :meth:`propose` found the present, and go back to the start where that is due."""
        self._engine.commit()
        if self._memory is not None and adapted.selected and not adapted.offered:
            self._memory.offer(row_of(adapted.outputs), self._label(adapted), sample.id)
        if adapted.loss is None or adapted.health.get("kept") == 0:  # of no row: nothing has moved, and the loss tells nothing
            return
        self.updates += 1
        self.loss = adapted.loss if self.loss is None else LOSS_DECAY * self.loss + (1 - LOSS_DECAY) * adapted.loss
        adapted.reset = self._resets(self.loss)
        if adapted.reset:
            self.reset()

    def reset(self) -> None:
        """Go back to the bundle's initial state, with an empty memory."""
        self._engine.put(self._start)
        if self._memory is not None:
            self._memory.clear()
        self.updates, self.loss = 0, None

    def progress(self) -> dict[str, Any]:
        """What :meth:`restore` needs, as JSON's values."""
        return {"updates": self.updates, "loss": self.loss}

    def restore(self, progress: Any) -> None:
        """Take over :meth:`progress`.

        Raises:
            InputError: when it does not fit.
        """
        ok = isinstance(progress, dict) and progress.keys() == {"updates", "loss"} and type(progress["updates"]) is int
        if not ok or not (progress["loss"] is None or isinstance(progress["loss"], int | float)):
            raise InputError(f"adaptation: must have updates and loss, got {progress}; write the snapshot again")
        self.updates, self.loss = progress["updates"], progress["loss"]

    def _label(self, adapted: Adapted) -> int:
        return int(adapted.found) if self._classes else 0

    def _resets(self, loss: float) -> bool:
        if self._spec.reset == "every":
            return self.updates >= self._spec.reset_every
        return self._spec.reset == "loss" and loss < self._spec.reset_below


def health_of(outputs: Mapping[str, Array]) -> dict[str, float]:
    """A method's figures among a step's outputs."""
    return {name.removeprefix("health."): float(value) for name, value in outputs.items() if name.startswith("health.")}


def written(steps: Mapping[str, StepSpec]) -> list[str]:
    """Names of the state that ``track`` and ``adapt`` write."""
    return sorted({name for step in (TRACK, ADAPT) if step in steps for name in steps[step].state_out})
