"""Offline training on everything at once, the stream's samples included: the upper bound of a comparison."""

from typing import Any

import numpy as np
import torch

from edgecl.prepare import Prepared
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
    state = learner.fit(_stacked(prepared.encode(x)), torch.tensor(y))
    tests = [stream.test(task) for task in range(stream.tasks)]
    with torch.no_grad():
        z = _stacked(prepared.encode(np.concatenate([t[0] for t in tests])))
        predicted = learner.scores(learner.parameters(state), z).argmax(1).numpy()
    return float(np.mean(predicted == np.concatenate([t[1] for t in tests])))


def _stacked(latents: list[Any]) -> Any:
    """Latents of single samples as one batch."""
    if isinstance(latents[0], torch.Tensor):
        return torch.cat(latents)
    return {name: torch.cat([z[name] for z in latents]) for name in latents[0]}
