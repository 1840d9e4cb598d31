"""Area under the learning curve: how fast a task is learned."""

import numpy as np

from edgecl.metrics.trace import AccuracyTrace
from edgecl_device.errors import InputError

LEARNING_CURVE_VARIANTS = ("a-gem", "first-evaluations")


def learning_curve_area(trace: AccuracyTrace, beta: int = 10, variant: str = "a-gem") -> float:
    """LCA_beta: mean accuracy on a task at its first evaluations, mean over the tasks of the stream.

    The unit of beta is one evaluation; compare only runs that are evaluated equally often. The base set is not counted, as no
    evaluation falls into its learning.

    Args:
        trace: Accuracies A.
        beta: Evaluations of a task after its first sample.
        variant: Which evaluations count.

            - ``a-gem``: ``1/(beta+1) sum_{b=0..beta} Z_b``, ``Z_0`` before the task's first sample. Source: Chaudhry et al., Efficient
              Lifelong Learning with A-GEM, 2019.
            - ``first-evaluations``: the beta evaluations after it alone. Source: De Lange et al., 2023, their code.

    Raises:
        InputError: when ``beta`` is below 1, a task has fewer evaluations, or on an unknown variant.

    >>> trace = AccuracyTrace([[1.0, 0.0], [0.5, 0.5], [0.75, 1.0]], current=[0, 1, 1])
    >>> [learning_curve_area(trace, 2, variant) for variant in LEARNING_CURVE_VARIANTS]
    [0.5, 0.75]
    """
    if variant not in LEARNING_CURVE_VARIANTS:
        raise InputError(f"variant: must be one of {list(LEARNING_CURVE_VARIANTS)}, got {variant!r}")
    fewest = evaluations_per_task(trace)
    if not 1 <= beta <= fewest:
        raise InputError(f"beta: must be from 1 to {fewest}, the fewest evaluations of a task, got {beta}; evaluate more often")
    first = 0 if variant == "a-gem" else 1
    starts = [(task, trace.start(task)) for task in range(trace.current[0] + 1, trace.tasks)]
    return float(np.mean([trace.values[start + first : start + beta + 1, task].mean() for task, start in starts]))


def evaluations_per_task(trace: AccuracyTrace) -> int:
    """Fewest evaluations after a sample of the task, over the tasks of the stream; 0 when there is the base set alone.

    >>> evaluations_per_task(AccuracyTrace([[1.0, 0.0], [0.5, 0.5], [0.75, 1.0]], current=[0, 1, 1]))
    2
    """
    return min((int((trace.current == task).sum()) for task in range(trace.current[0] + 1, trace.tasks)), default=0)
