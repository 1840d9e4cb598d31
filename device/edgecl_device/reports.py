"""What the loop returns."""

from dataclasses import dataclass

from edgecl_device.manifest import Array


@dataclass(frozen=True, eq=False)
class Prediction:
    """One prediction.

    Attributes:
        scores: float32 [K]; a class that was never learned scores :data:`edgecl_device.manifest.UNSEEN_SCORE`.
        label: Class of the highest score, or None when no score is above that: no class was learned yet.
        class_name: Its name, or None when it has none.
        sample_id: Pass it to ``learn`` when the label arrives.
    """

    scores: Array
    label: int | None
    class_name: str | None
    sample_id: int


@dataclass(frozen=True)
class LearnReport:
    """One update.

    Attributes:
        sample_id: Pass it to ``forget`` or ``relabel``.
        loss: The step's loss, as the method defines it.
        predicted: Class predicted before the update, or None when no class was learned yet.
        label: Class learned.
        health: The method's health figures after the update.
        macs: Canonical multiply-accumulates spent, ``encode`` included when it ran.
        bytes_written: What the store wrote in this call: the transaction's whole pages in the write-ahead log, and, when they fell
            on it, a snapshot that a full log asked for, a block of sample ids, and the pages of a write-ahead log that was moved
            into the file; 0 without a store.
        seconds: Wall time of the call.
    """

    sample_id: int
    loss: float
    predicted: int | None
    label: int
    health: dict[str, float]
    macs: int
    bytes_written: int
    seconds: float
