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
from edgecl.metrics.overlap import f1_by_label, iou_by_class, mean_present, micro_f1
from edgecl.metrics.prequential import Prequential
from edgecl.metrics.ranking import average_precision, mean_average_precision
from edgecl.metrics.regression import r_squared, spread
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
    "average_precision",
    "backward_transfer",
    "evaluations_per_task",
    "f1_by_label",
    "forgetting",
    "forward_transfer",
    "forward_transfer_raw",
    "iou_by_class",
    "largest_fall",
    "largest_rise",
    "learning_curve_area",
    "mean_average_precision",
    "mean_present",
    "micro_f1",
    "minimum_accuracy",
    "negative_flips",
    "omega_all",
    "r_squared",
    "spread",
    "stability_gap",
    "windowed_forgetting",
    "windowed_plasticity",
    "worst_case_accuracy",
]
