"""The calls of a learner that keeps several tasks: a state for each, of which one is in use."""

from abc import abstractmethod
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgecl_device.checks import IDENTIFY, LIKELIHOOD, as_int, as_name, as_path, short
from edgecl_device.core import Core
from edgecl_device.engines import Engine
from edgecl_device.errors import InputError, StepMissingError, StoreError
from edgecl_device.journal import Journal
from edgecl_device.manifest import Array, Manifest
from edgecl_device.pending import Pending
from edgecl_device.reports import Identified, TaskReport
from edgecl_device.turns import OneAtATime, verb

MOST_HEARD = 1024
"""Samples by whose likelihoods a task can be identified together."""


class TaskVerbs(OneAtATime):
    """What :class:`edgecl_device.learner.Learner` does with tasks; see there for the rest."""

    manifest: Manifest
    _core: Core
    _engine: Engine
    _journal: Journal
    _pending: Pending
    _session: dict[str, int]

    def __init__(self) -> None:
        super().__init__()
        self._heard: deque[dict[str, float]] = deque(maxlen=MOST_HEARD)
        self._traits: dict[str, dict[str, Array]] = {}

    @verb
    def add_task(self, name: str, like: str | None = None, file: str | Path | None = None) -> None:
        """Add a task, which :meth:`switch_task` makes the one in use. No other task is read or written, but for ``like``.

        Args:
            name: Its name.
            like: The task that it is a copy of, with its classes; None starts as the bundle does, with no class.
            file: A task that was trained elsewhere, on the workstation for instance (:func:`edgecl.reprogram.write_task`); the store
                then gets a new automatic snapshot, too.

        Raises:
            StepMissingError: when the method has no tasks.
            InputError: when there is one of that name, or none that it should be like, or the file is none of this bundle's tasks.
            StoreFullError: when it cannot be written.
        """
        self._check_tasks("add_task")
        name = as_name(name)
        if name in self._journal.tasks():
            raise InputError(f"name: task {short(name)} exists; switch to it, or pass another name")
        if file is None:
            self._journal.add_task(name, None if like is None else self._task("like", like))
        elif like is not None:
            raise InputError(f"like, file: one of both says how a task starts, got {short(like)} and {short(file)}; leave one out")
        else:
            self._journal.bring_task(name, self._read(as_path("file", file)))
        self._forget_traits()

    @verb
    def switch_task(self, name: str) -> None:
        """Go on with another task. What was learned in the present one is written to the store, if it is not there yet.

        The replay memory holds samples of one task and is emptied; predictions that wait for a label keep waiting, and what is learned
        of them goes into the task in use by then.

        Raises:
            StepMissingError: when the method has no tasks.
            InputError: when there is no such task.
            StoreFullError: when the present task cannot be written; it stays in use then.
        """
        self._check_tasks("switch_task")
        name = self._task("name", name)
        if name != self._core.task:
            self._journal.switch_task(name)
            self._traits.clear()

    @verb
    def drop_task(self, name: str) -> None:
        """Drop a task that is not in use. Snapshots that were saved while it was there keep it: a rollback brings it back.

        Raises:
            StepMissingError: when the method has no tasks.
            InputError: when there is no such task, or it is the one in use.
        """
        self._check_tasks("drop_task")
        name = self._task("name", name)
        if name == self._core.task:
            raise InputError(f"name: must not be the task in use, got {short(name)}; switch to another one first")
        self._journal.drop_task(name)
        self._forget_traits()

    @verb
    def tasks(self) -> dict[str, TaskReport]:
        """Every task by name.

        Raises:
            StepMissingError: when the method has no tasks.
        """
        self._check_tasks("tasks")
        found = {}
        for name in self._journal.tasks():
            blob = self._journal.task(name)
            with self._journal.whole(), self._core.visiting(self._core.read_task(blob)):
                counts = {self._called(i): int(n) for i, n in enumerate(self._core.counts) if n}
            found[name] = TaskReport(name == self._core.task, len(blob), counts)
        return found

    @property
    def task(self) -> str:
        """Name of the task in use; empty for methods without tasks."""
        return self._core.task

    @verb
    def identify(self, x: Array | Mapping[str, Array] | int, last: int = 1) -> Identified:
        """Tell which task a sample is of, by its likelihood under each, and keep its features for :meth:`learn`. Switches to none.

        Args:
            x: A sample, or the ``sample_id`` of an earlier prediction; for a stream the latter.
            last: Samples to decide by, this one and those identified before it, 1 to 1,024; fewer count right behind a change of tasks.

        Raises:
            StepMissingError: when the method has no tasks, or does not tell them apart.
            InputError: when the sample does not fit, or ``last``.
        """
        self._check_tasks(IDENTIFY)
        self._check_step(IDENTIFY)
        if not 1 <= as_int("last", last) <= MOST_HEARD:
            raise InputError(f"last: must be 1 to {MOST_HEARD} samples, got {last}; 16 are enough for tasks that differ")
        sample_id, z, macs = self._sample(x)
        found = {}
        for name in self._journal.tasks():
            with self._journal.whole(), self._core.holding(self._traits_of(name)):
                found[name] = float(self._engine.run(IDENTIFY, z)[LIKELIHOOD])
            macs += self._macs(IDENTIFY)
        self._pending.add(sample_id, z)
        self._journal.changed = True
        self._session["macs"] += macs
        self._heard.append(found)
        counted = list(self._heard)[-last:]
        means = {name: float(np.mean([one[name] for one in counted])) for name in found}
        return Identified(max(means, key=means.__getitem__), means, len(counted), sample_id)

    def _check_tasks(self, call: str) -> None:
        if not self._core.task:
            raise StepMissingError(f"{call}: {self.manifest.method} keeps one state for everything, it has no tasks; export clr, which has")

    def _task(self, parameter: str, name: str) -> str:
        """The name of a task, which must exist, as plain text: the store's checks are over it."""
        self._check_tasks(parameter)
        name = as_name(name)
        if name not in self._journal.tasks():
            raise InputError(f"{parameter}: no task {short(name)}, there are {short(self._journal.tasks())}; add it first")
        return name

    def _traits_of(self, name: str) -> dict[str, Array]:
        """What the step ``identify`` reads of a task that is not in use."""
        if name == self._core.task:
            return {}
        if name not in self._traits:
            state = self._core.read_task(self._journal.task(name)).under("state.")
            self._traits[name] = {key: state[key].copy() for key in self.manifest.steps[IDENTIFY].state_in}
        return self._traits[name]

    def _read(self, path: Path) -> bytes:
        try:
            blob = path.read_bytes()
            self._core.read_task(blob, foreign=True)
        except OSError as error:
            raise InputError(f"file: {path} cannot be read ({error.strerror}); pass the path of a task's file") from error
        except StoreError as error:
            why = str(error).partition(";")[0]
            raise InputError(f"file: {path} must be a task of this bundle, is not ({why}); write it with edgecl.reprogram") from error
        return blob

    def _forget_traits(self) -> None:
        self._traits.clear()
        self._heard.clear()

    @abstractmethod
    def _sample(self, x: Any) -> tuple[int, dict[str, Array], int]:
        """Id and features of a sample, or of an earlier prediction, and the MACs that it took to encode it."""

    @abstractmethod
    def _called(self, index: int) -> str:
        """A class's name, or its index where that is nobody's name."""

    @abstractmethod
    def _check_step(self, step: str) -> None:
        """Refuse a step that the method does not have."""

    @abstractmethod
    def _macs(self, *steps: str) -> int:
        """Canonical multiply-accumulates of steps."""
