"""A learner on a stream of latents: the method's own step functions, without engine, store and log, as fast as the host allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgecl.engine import to_arrays
from edgecl.learner import State, call_step, refreshed
from edgecl.planning.candidates import Candidate
from edgecl.planning.latents import Unpacked
from edgecl.planning.space import Depth
from edgecl.prepare import Prepared
from edgecl.streams import Stream
from edgecl.trees import unflatten_like
from edgecl.trunk import Trunk
from edgecl_device.checks import best_class
from edgecl_device.manifest import Array
from edgecl_device.memory import row_of

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Course:
    """The order in which samples come, as rows of a table of latents.

    Attributes:
        base: Rows of the base set.
        base_y: Their classes.
        stream: Row and class of every sample of the stream.
        tests: Rows, classes and the choice of classes of every task; None is a choice among all.
    """

    base: Indices
    base_y: Indices
    stream: Sequence[tuple[int, int]]
    tests: Sequence[tuple[Indices, Indices, Sequence[int] | None]]

    @classmethod
    def of(cls, stream: Stream) -> "Course":
        """The course of a stream whose samples are row numbers."""
        tests = [(*stream.test(task), stream.choices(task)) for task in range(stream.tasks)]
        base, base_y = stream.base
        return cls(base, base_y, [(int(sample.x), sample.y) for sample in stream], tests)


def accuracy(depth: Depth, candidate: Candidate, rows: Array, course: Course) -> float:
    """Share of all test samples of a course that are right at its end, 0 to 1.

    As on the device: the base set is taken in first; a sample's update is refused when its result is not finite or the method's guard
    is false, and draws nothing then.

    Args:
        depth: Where the network is cut.
        candidate: What learns behind it.
        rows: Latents of all samples at that depth, float32 [N, D].
        course: The samples and their order.

    Raises:
        InputError: when the base samples do not fit the method.
        PredictionError: when a score is not finite.
    """
    learner = candidate.learner(depth)
    ready = Prepared(Trunk([None], Unpacked(depth.problem.features), ("x",)), rows[:1], learner)
    if len(course.base):
        ready.fit(rows[course.base], course.base_y)
    state, trunk = ready.state, ready.trunk
    with torch.no_grad():
        for place, label in course.stream:
            state = _learned(ready, state, trunk(torch.from_numpy(rows[place : place + 1])), label)
        right = 0
        for places, labels, choices in course.tests:
            for scores, label in zip(_scores(ready, state, torch.from_numpy(rows[places])), labels, strict=True):
                best = best_class(scores if choices is None else scores[list(choices)])
                right += int(best is not None and (best if choices is None else choices[best]) == label)
    return right / sum(len(labels) for _, labels, _ in course.tests)


def _scores(ready: Prepared, state: State, rows: Tensor) -> Array:
    """Scores [N, K] of latents [N, D]: each as if alone, all in one pass."""

    def predict(row: Tensor) -> Tensor:
        return ready.learner.predict(state, ready.trunk(row.unsqueeze(0)))[0]["scores"][0]

    try:
        scores: Array = torch.vmap(predict, chunk_size=64)(rows).numpy()
    except RuntimeError as error:
        if "vmap" not in str(error) and "Batching rule" not in str(error):
            raise
        # an operator without a batching rule; one by one the result is the same
        scores = torch.stack([predict(row) for row in rows]).numpy()
    return scores


def _learned(ready: Prepared, state: State, z: Any, label: int) -> State:
    """The state after one sample; the memory gets its row."""
    memory, learner = ready.memory, ready.learner
    counter = memory.generator.counter if memory is not None else 0
    leaves = {name: torch.from_numpy(value) for name, value in (memory.draw() if memory is not None else {}).items()}
    leaves |= {"target": torch.tensor([label]), "weight": torch.ones(1), "lr": torch.tensor(learner.default_lr)}
    wanted = learner.inputs_of("learn")
    inputs = {name: z if name == "z" else unflatten_like(spec, leaves, name) for name, spec in wanted.items()}
    outputs, new = call_step(learner, "learn", state, inputs)
    if not _keeps(outputs):
        if memory is not None:
            memory.generator.counter = counter
        return state
    state = refreshed(learner, {**state, **new}, None if memory is None else memory.draw_aside)  # as the device: before the row is kept
    if memory is not None:
        memory.offer(to_arrays(row_of(outputs)), label, -1)
    return state


def _keeps(outputs: Mapping[str, Tensor]) -> bool:
    """Whether the device would keep an update."""
    checks = [outputs["finite"], outputs.get("guard", torch.tensor(True))]
    numbers = [outputs[name] for name in ("loss", "scores") if name in outputs]
    return all(bool(check) for check in checks) and all(bool(torch.isfinite(number).all()) for number in numbers)
