"""What the loop returns."""

from dataclasses import dataclass

from edgecl_device.manifest import Array


@dataclass(frozen=True, eq=False)
class Prediction:
    """One prediction.

    Attributes:
        scores: float32 [K]; classes that were never learned score below all others.
        label: Class of the highest score.
        class_name: Its name, or None when it has none.
        sample_id: Pass it to ``learn`` when the label arrives.
    """

    scores: Array
    label: int
    class_name: str | None
    sample_id: int


@dataclass(frozen=True)
class LearnReport:
    """One update.

    Attributes:
        sample_id: Pass it to ``forget`` or ``relabel``.
        loss: The step's loss, as the method defines it.
        predicted: Class predicted before the update.
        label: Class learned.
        health: The method's health figures after the update.
        macs: Canonical multiply-accumulates spent, ``encode`` included when it ran.
        bytes_written: Bytes appended to the store's write-ahead log; 0 without a store.
        seconds: Wall time of the call.
    """

    sample_id: int
    loss: float
    predicted: int
    label: int
    health: dict[str, float]
    macs: int
    bytes_written: int
    seconds: float
