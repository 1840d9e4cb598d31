"""Continual-learning metrics by their published definitions."""

from edgecl.metrics.flips import negative_flips
from edgecl.metrics.learning_curve import LEARNING_CURVE_VARIANTS, evaluations_per_task, learning_curve_area
from edgecl.metrics.matrix import (
    FORGETTING_VARIANTS,
    AccuracyMatrix,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
)
from edgecl.metrics.prequential import Prequential
from edgecl.metrics.relative import omega_all
from edgecl.metrics.trace import AccuracyTrace, average_anytime_accuracy, minimum_accuracy, stability_gap, worst_case_accuracy
from edgecl.metrics.transfer import forward_transfer, forward_transfer_raw
from edgecl.metrics.windowed import largest_fall, largest_rise, windowed_forgetting, windowed_plasticity

__all__ = [
    "FORGETTING_VARIANTS",
    "LEARNING_CURVE_VARIANTS",
    "AccuracyMatrix",
    "AccuracyTrace",
    "Prequential",
    "average_accuracy",
    "average_anytime_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "evaluations_per_task",
    "forgetting",
    "forward_transfer",
    "forward_transfer_raw",
    "largest_fall",
    "largest_rise",
    "learning_curve_area",
    "minimum_accuracy",
    "negative_flips",
    "omega_all",
    "stability_gap",
    "windowed_forgetting",
    "windowed_plasticity",
    "worst_case_accuracy",
]
