"""Offline training on everything at once, the stream's samples included: the upper bound of a comparison."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from edgecl.evaluate import Tests
from edgecl.prepare import Prepared, stacked
from edgecl.streams import Stream


def offline_accuracy(prepared: Prepared, learner: Any, stream: Stream) -> float:
    """Test accuracy, 0 to 1, after offline training on the base set and the whole stream; every test sample counts the same.

    Args:
        prepared: Whose trunk encodes the samples.
        learner: A :class:`edgecl.methods.Joint` on the latents of that trunk.
        stream: The scenario.
    """
    tests = [stream.test(task) for task in range(stream.tasks)]
    return _trained(prepared, learner, stream, tests, [stream.tasks - 1])[0]


def offline_seen_accuracy(prepared: Prepared, learner: Any, stream: Stream, tests: Tests) -> list[float]:
    """Accuracy [T], 0 to 1, on the test samples of all tasks met, of a learner trained anew after each task on all samples so far.

    What :func:`edgecl.metrics.omega_all` divides by. Only classes seen so far are predicted.

    Args:
        prepared: As for :func:`offline_accuracy`.
        learner: As there.
        stream: As there.
        tests: Samples and classes of each task, as :func:`edgecl.evaluate.evaluation_set` gives them.
    """
    return _trained(prepared, learner, stream, tests, range(stream.tasks))


def _trained(prepared: Prepared, learner: Any, stream: Stream, tests: Tests, ends: Sequence[int]) -> list[float]:
    """Accuracy on the tests of all tasks up to each of ``ends``, of a learner trained on these tasks."""
    samples = list(stream)
    x = np.concatenate([stream.base[0], np.stack([s.x for s in samples])])
    y = torch.tensor(np.concatenate([stream.base[1], np.array([s.y for s in samples])]))
    # the base set is met before any task of the stream
    met = torch.tensor([-1] * len(stream.base[1]) + [s.task for s in samples])
    z, encoded = prepared.encode(x), [stacked(prepared.encode(xs)) for xs, _ in tests[: ends[-1] + 1]]
    found = []
    for end in ends:
        rows = torch.nonzero(met <= end)[:, 0]
        state = learner.fit(stacked([z[row] for row in rows.tolist()]), y[rows])
        seen = set(y[rows].tolist())
        right = []
        for task in range(end + 1):
            choices = stream.choices(task)
            classes = torch.tensor(sorted(seen if choices is None else seen.intersection(choices)))
            with torch.no_grad():
                scores = learner.scores(learner.parameters(state), encoded[task])
            right.append(classes[scores[:, classes].argmax(1)].numpy() == tests[task][1])
        found.append(float(np.concatenate(right).mean()))
    return found
