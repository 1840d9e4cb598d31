"""Continual-learning metrics by their published definitions."""

from edgecl.metrics.matrix import (
    FORGETTING_VARIANTS,
    AccuracyMatrix,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
)
from edgecl.metrics.prequential import Prequential

__all__ = [
    "FORGETTING_VARIANTS",
    "AccuracyMatrix",
    "Prequential",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forgetting",
]
