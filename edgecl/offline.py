"""Offline training on everything at once, the stream's samples included: the upper bound of a comparison."""

from typing import Any

import numpy as np
import torch

from edgecl.prepare import Prepared, stacked
from edgecl.streams import Stream


def offline_accuracy(prepared: Prepared, learner: Any, stream: Stream) -> float:
    """Test accuracy, 0 to 1, after offline training on the base set and the whole stream; every test sample counts the same.

    Args:
        prepared: Whose trunk encodes the samples.
        learner: A :class:`edgecl.methods.Joint` on the latents of that trunk.
        stream: The scenario.
    """
    x = np.concatenate([stream.base[0], np.stack([s.x for s in stream])])
    y = np.concatenate([stream.base[1], np.array([s.y for s in stream])])
    state = learner.fit(stacked(prepared.encode(x)), torch.tensor(y))
    right = []
    with torch.no_grad():
        for task in range(stream.tasks):
            (xs, ys), choices = stream.test(task), stream.choices(task)
            scores = learner.scores(learner.parameters(state), stacked(prepared.encode(xs)))
            classes = torch.arange(scores.shape[1]) if choices is None else torch.tensor(list(choices))
            right.append(classes[scores[:, classes].argmax(1)].numpy() == ys)
    return float(np.concatenate(right).mean())
