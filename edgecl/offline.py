"""Offline training on everything at once, the stream's samples included: the upper bound of a comparison."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgecl.evaluate import Tests
from edgecl.learner import State
from edgecl.prepare import Prepared, stacked
from edgecl.streams import Stream

Encoded = list[tuple[Any, Any]]
"""Latents and classes of the test samples of each task."""


def offline_accuracy(prepared: Prepared, learner: Any, stream: Stream) -> float:
    """Test accuracy, 0 to 1, after offline training on the base set and the whole stream; every test sample counts the same.

    Args:
        prepared: Whose trunk encodes the samples.
        learner: A :class:`edgecl.methods.Joint` on the latents of that trunk.
        stream: The scenario.
    """
    latents, classes, _ = _samples(prepared, stream)
    return _accuracy(learner, learner.fit(stacked(latents), classes), stream, _encoded(prepared, _all_tests(stream)))


def offline_accuracies(prepared: Prepared, learner: Any, stream: Stream, tests: Tests) -> tuple[float, list[float]]:
    """:func:`offline_accuracy`, and what :func:`edgecl.metrics.omega_all` divides by.

    Args:
        prepared: As for :func:`offline_accuracy`.
        learner: As there; trained anew after each task, on all samples so far.
        stream: As there.
        tests: Samples and classes of each task, as :func:`edgecl.evaluate.evaluation_set` gives them.

    Returns:
        The accuracy, and those after each task on ``tests`` of all tasks met so far [T].
    """
    latents, classes, met = _samples(prepared, stream)
    encoded, seen = _encoded(prepared, tests), []
    for task in range(stream.tasks):
        rows = torch.nonzero(met <= task)[:, 0]
        state = learner.fit(stacked([latents[row] for row in rows.tolist()]), classes[rows])
        seen.append(_accuracy(learner, state, stream, encoded[: task + 1]))
    return _accuracy(learner, state, stream, _encoded(prepared, _all_tests(stream))), seen


def _samples(prepared: Prepared, stream: Stream) -> tuple[list[Any], Tensor, Tensor]:
    """Latents, class and task of every sample; the base set is met before any task of the stream."""
    x, y = stream.base
    samples = list(stream)
    latents = prepared.encode(np.concatenate([x, np.stack([s.x for s in samples])]))
    return latents, torch.tensor([*y.tolist(), *(s.y for s in samples)]), torch.tensor([-1] * len(y) + [s.task for s in samples])


def _all_tests(stream: Stream) -> Tests:
    return [stream.test(task) for task in range(stream.tasks)]


def _encoded(prepared: Prepared, tests: Tests) -> Encoded:
    return [(stacked(prepared.encode(x)), y) for x, y in tests]


def _accuracy(learner: Any, state: State, stream: Stream, encoded: Encoded) -> float:
    """Share of these tasks' test samples that are right, among the classes that the learner has seen."""
    seen = set(torch.nonzero(state["count"])[:, 0].tolist())
    right = []
    for task, (z, y) in enumerate(encoded):
        choices = stream.choices(task)
        classes = torch.tensor(sorted(seen if choices is None else seen.intersection(choices)))
        with torch.no_grad():
            scores = learner.scores(learner.parameters(state), z)
        right.append(classes[scores[:, classes].argmax(1)].numpy() == y)
    return float(np.concatenate(right).mean())
