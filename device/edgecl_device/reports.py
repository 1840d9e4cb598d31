"""What the loop returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgecl_device.manifest import Array


@dataclass(frozen=True)
class TaskReport:
    """One task of a learner.

    Attributes:
        active: Whether it is the one in use.
        nbytes: Bytes of its blob in the store.
        class_counts: Samples learned by class, less the forgotten; a class without a name is called by its index.
    """

    active: bool
    nbytes: int
    class_counts: dict[str, int]


@dataclass(frozen=True)
class Identified:
    """Which task samples are of.

    Attributes:
        task: The one with the highest likelihood.
        likelihoods: Of each task, the mean over the samples of the logarithm of their density, as the method defines it.
        samples: Samples that count.
        sample_id: The last one: pass it to ``learn`` when its target arrives.
    """

    task: str
    likelihoods: dict[str, float]
    samples: int
    sample_id: int


@dataclass(frozen=True, eq=False)
class Prediction:
    """One prediction.

    Attributes:
        scores: float32 [K], of a map [K, H, W]; a class that was never learned scores :data:`edgecl_device.manifest.UNSEEN_SCORE`.
        label: Class of the highest score, or None when no score is above that: no class was learned yet.
        class_name: Its name, or None when it has none.
        sample_id: Pass it to ``learn`` when the target arrives.
        value: Of real vectors: float32 [D], the scores themselves.
        labels: Of several labels: those whose score is above the bundle's threshold.
        label_names: Their names, None where one has none.
        label_map: Of maps: class of the highest score of every pixel, int64 [H, W]; None when no class was learned yet.
    """

    scores: Array
    label: int | None
    class_name: str | None
    sample_id: int
    value: Array | None = None
    labels: tuple[int, ...] | None = None
    label_names: tuple[str | None, ...] | None = None
    label_map: Array | None = None

    @property
    def outcome(self) -> Any:
        """``label``, ``value``, ``labels`` or ``label_map``, whichever the bundle's target has; None when no class was learned yet."""
        found = (self.label, self.value, self.labels, self.label_map)
        return next((each for each in found if each is not None), None)


def predicted(kind: str, scores: Array, found: Any, names: Sequence[str | None], sample_id: int) -> Prediction:
    """The prediction of one kind of target.

    Args:
        kind: One of :data:`edgecl_device.targets.KINDS`.
        scores: float32 [K, ...].
        found: What :meth:`edgecl_device.targets.Target.read` found in them.
        names: Names of classes or labels.
        sample_id: The sample.
    """
    if kind == "class":
        return Prediction(scores, found, None if found is None else names[found], sample_id)
    if kind == "multilabel":
        return Prediction(scores, None, None, sample_id, labels=found, label_names=tuple(names[i] for i in found))
    return Prediction(scores, None, None, sample_id, **{"value" if kind == "vector" else "label_map": found})


@dataclass(frozen=True)
class AdaptReport:
    """One sample that the learner has adapted to, or taken into its memory for later.

    Attributes:
        sample_id: Its number.
        prediction: From the one forward pass that the sample got; with statistics that follow each sample, from those that it has moved.
        loss: Of the update, as the method defines it; None when none ran.
        updated: Whether an update ran.
        selected: Whether the sample entered the memory; True for methods without one.
        reset: Whether the loop went back to the start behind the update, by its reset policy.
        health: The method's health figures.
        macs: Canonical multiply-accumulates spent: ``encode`` when it ran, ``track``, and ``adapt`` when it ran.
        bytes_written: As in :class:`LearnReport`.
        seconds: Wall time of the call.
    """

    sample_id: int
    prediction: Prediction
    loss: float | None
    updated: bool
    selected: bool
    reset: bool
    health: dict[str, float]
    macs: int
    bytes_written: int
    seconds: float


@dataclass(frozen=True)
class LearnReport:
    """One update.

    Attributes:
        sample_id: Pass it to ``forget`` or ``relabel``.
        loss: The step's loss, as the method defines it.
        predicted: What was predicted before the update: the class, None when none was learned yet; or, by kind, ``value``, ``labels`` or
            ``label_map`` as :class:`Prediction` has them.
        label: What was learned, in the same form.
        health: The method's health figures after the update.
        macs: Canonical multiply-accumulates spent, ``encode`` included when it ran.
        bytes_written: What the store wrote in this call: the transaction's whole pages in the write-ahead log, and, when they fell
            on it, a snapshot that a full log asked for, a block of sample ids, and the pages of a write-ahead log that was moved
            into the file, of rows in a file the pages that the snapshot changes; 0 without a store.
        seconds: Wall time of the call.
        learned: False for a sample that the method's ``gate`` left out: nothing has changed, nothing is logged, and ``macs`` are those of
            the forward pass.
    """

    sample_id: int
    loss: float
    predicted: Any
    label: Any
    health: dict[str, float]
    macs: int
    bytes_written: int
    seconds: float
    learned: bool = True
