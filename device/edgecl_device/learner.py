"""The loop: predict, learn, adapt, forget, save and roll back, one sample at a time, on any engine.

The loop keeps what is not a fixed-shape tensor function out of the graphs: random draws, replay rows, labels that arrive
later, the log. Call one learner from one thread at a time; a call from a second one is refused.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import numpy as np

from edgecl_device.adapt_checks import ADAPT, TRACK
from edgecl_device.checks import (
    GATE,
    REFRESH,
    as_float32,
    as_inputs,
    as_int,
    as_name,
    as_path,
    as_weight,
    check_manifest,
    check_state,
    entry,
    has_length,
    read_tensors,
    short,
)
from edgecl_device.core import Core
from edgecl_device.engines import Engine
from edgecl_device.engines.executorch import ExecutorchEngine
from edgecl_device.engines.onnx import OnnxEngine
from edgecl_device.errors import BundleError, EdgeclError, InputError, StepMissingError
from edgecl_device.event import EVENT_OVERHEAD
from edgecl_device.journal import Journal
from edgecl_device.manifest import Array, Manifest, check_files, read_manifest
from edgecl_device.pending import Pending
from edgecl_device.record import Record, Sample
from edgecl_device.reports import AdaptReport, LearnReport, Prediction, predicted
from edgecl_device.rows import row_file_of
from edgecl_device.store import AUTOMATIC, Store
from edgecl_device.targets import target_of
from edgecl_device.tasks import TaskVerbs
from edgecl_device.turns import verb

ENGINES: dict[str, Callable[[Path, Manifest, int, str], Engine]] = {"onnx": OnnxEngine, "executorch": ExecutorchEngine}


class Learner(TaskVerbs):
    """A learner on an engine, with a store that survives crashes.

    Load a bundle with :meth:`load`. The constructor drives any engine with the same loop. A closed learner raises ClosedError.
    While a call runs, another one, from a second thread or from a signal handler, raises BusyError; a handler may call
    :meth:`close`.

    Args:
        manifest: What the steps need.
        engine: Runs the steps; the learner loads its state and closes it.
        state: Initial state by name.
        rows: Initial replay rows, as :meth:`edgecl_device.memory.ReplayMemory.fill` takes them.
        store: The learner's own from now on; None is one in memory. A store with a snapshot wins over ``state`` and
            ``rows``: the learner goes on where it stopped.
        row_file: File of the replay rows, where the manifest says that they lie in one; it goes with the store.

    Raises:
        BundleError: when the parts do not fit together.
        StoreError: when the store cannot be recovered.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: Engine,
        state: Mapping[str, Array],
        rows: Mapping[str, Array] | None = None,
        store: Store | None = None,
        row_file: Path | None = None,
    ) -> None:
        super().__init__()
        check_manifest(manifest)
        self.manifest = manifest
        self._engine = engine
        new = store is None or store.new
        token = store.token if new and store is not None and row_file is not None else None
        self._core = Core(manifest, engine, state, rows, row_file, new, token)
        self._x = manifest.steps["encode"].inputs
        self._options = {spec.name for spec in manifest.steps["learn"].inputs} if "learn" in manifest.steps else set()
        self._pending = Pending(manifest.features, manifest.pending_capacity)
        self._session = {"predicted": 0, "learned": 0, "skipped": 0, "adapted": 0, "macs": 0}
        self._target = target_of(manifest.target, manifest.max_classes)
        self._store = store or Store(None, manifest.bundle_id, manifest.log_capacity_bytes)
        record = Record(manifest, self._store.persistent or manifest.forgets or "relabel" in manifest.steps)
        self._store.has_room(EVENT_OVERHEAD + record.nbytes)
        self._journal = Journal(self._core, self._pending, self._store, record)
        try:
            self._journal.start()
        except EdgeclError:
            if AUTOMATIC not in self._store.snapshots():
                self._core.abandon()
            raise

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        store: str | Path | None = None,
        engine: str | None = None,
        durability: str = "normal",
        threads: int = 1,
        rows: str | Path | None = None,
        memory: str = "fastest",
    ) -> Self:
        """Load a bundle and, with a store, go on where it stopped.

        Args:
            bundle: The folder that ``edgecl export`` wrote.
            store: File of the store, outside of the bundle, made when there is none. None keeps nothing beyond this process:
                log and snapshots then take memory, up to the manifest's ``log_capacity_bytes`` and one state with its rows a snapshot;
                the log of a method without ``forget`` and ``relabel`` then holds no features.
            engine: ``onnx`` or ``executorch``; None is the one that the bundle was exported for, and there is no other for it.
            durability: ``normal``: a power cut may lose the samples since the last ``save``; ``full``: each one is synced to the disk.
            threads: Threads inside one operator, 1 to 64; above 1 a resumed run may differ in the last bits.
            rows: File of the replay rows, for a bundle that keeps them in one (``export(..., rows_in_file=True)``), made with a new
                store; it goes with the store from then on.
            memory: ``fastest``, ``balanced`` or ``smallest``: what ONNX Runtime may spend on packed weights and arenas to be faster.
                ExecuTorch's memory is planned at export.

        Raises:
            InputError: for a wrong path, engine, durability, number of threads or setting of memory.
            BundleError: when a file is missing or altered, or the parts do not fit together.
            StoreError: when the store or its file of rows is empty, damaged, in use, cannot be made, or (StoreMismatchError) is of
                another bundle; their files are then what they were.

        Example::

            learner = Learner.load("bundle/", store="learner.db")
            seen = learner.predict(x)
            report = learner.learn(seen.sample_id, "mug")
        """
        folder = as_path("bundle", bundle)
        if engine is not None:
            entry("engine", engine, ENGINES)
        if store is not None and as_path("store", store).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"store: must be outside of the bundle, whose files are checked, got {short(store)}; pass another path")
        manifest = read_manifest(folder)
        if manifest.engine not in ENGINES:
            raise BundleError(
                f"{folder}: was exported for engine {short(manifest.engine)}, this package has {', '.join(ENGINES)}; update it"
            )
        if engine not in (None, manifest.engine):
            raise BundleError(f"{folder}: was exported for engine {manifest.engine!r}, not {engine!r}; pass engine={manifest.engine!r}")
        check_manifest(manifest)
        row_file = row_file_of(manifest, folder, store, rows)
        check_files(folder, manifest)
        state = read_tensors(folder / manifest.state_file)
        check_state(manifest, state)  # before the engine allocates what the manifest says
        first_rows = read_tensors(folder / manifest.replay_file) if manifest.replay_file else None
        with ExitStack() as opened:
            runner = ENGINES[manifest.engine](folder, manifest, threads, memory)
            opened.callback(runner.close)
            log = Store(store, manifest.bundle_id, manifest.log_capacity_bytes, durability)
            opened.callback(log.leave)
            learner = cls(manifest, runner, state, first_rows, log, row_file)
            opened.pop_all()
        return learner

    @verb
    def predict(self, x: Array | Mapping[str, Array], task: str | None = None) -> Prediction:
        """Predict one sample and keep its features, so that its label may arrive later.

        Args:
            x: One sample, or the next frame of a stream, as the bundle's ``encode`` takes it; its batch dimension of 1 may be left out.
                Of a model of several inputs a mapping of their names.
            task: Predict as this task does, which then still is not the one in use; None is the one that is.

        Raises:
            InputError: when shape, dtype or values do not fit, or there is no such task.
            PredictionError: when a score is not finite.
            StoreFullError: when the disk is full and the next 1,024 sample ids cannot be reserved.
        """
        other = None if task is None or task == self._core.task else self._core.read_task(self._journal.task(self._task("task", task)))
        with self._core.hearing():
            z = self._encode(x)
            with nullcontext() if other is None else self._journal.whole(), self._core.visiting(other):
                scores, names = self._engine.run("predict", z)["scores"], self._core.names
            found = self._target.read(scores)
            sample_id = self._store.new_id()
        self._pending.add(sample_id, z)
        self._journal.changed = True
        self._session["predicted"] += 1
        self._session["macs"] += self._macs("encode", "predict")
        return predicted(self.manifest.target.kind, scores[0], found, names, sample_id)

    @verb
    def learn(self, x: Array | Mapping[str, Array] | int, y: Any, weight: float = 1.0, lr: float | None = None) -> LearnReport:
        """Learn one sample. A method with a ``gate`` leaves out what is not worth an update: ``learned`` of the report tells.

        Args:
            x: A sample, or the ``sample_id`` of an earlier prediction; for a stream the latter.
            y: Its target. A class: its index in [0, max_classes), or the name of a known one. A real vector: an array of float32 [D].
                Labels: an array of zeros and ones [K], or a list of their names. A map: an array of integers [H, W].
            weight: Above 0; other than 1 only for methods whose ``learn`` takes it.
            lr: At least 0; None is the bundle's; only for methods whose ``learn`` takes it.

        Raises:
            InputError: when the sample, its id, the label or an option does not fit.
            UpdateRefusedError: when the new state is not finite or the method's guard refuses it.
            StoreFullError: when the sample cannot be logged.
            StepMissingError: when the method does not learn.
        """
        start, written = perf_counter(), self._written
        self._check_step("learn")
        target = self._target.array(y, self._core.names)
        weight = as_weight(weight, self.manifest.method, self._options)
        lr = self._rate(lr, self._options)
        sample_id, z, macs = self._sample(x)
        sample = Sample(sample_id, z, target, weight, lr)
        passed = self._core.gate(sample)
        learned = passed is None or bool(passed["worth"])
        macs += self._macs(GATE) if passed is not None else 0
        if learned:
            macs += self._macs("learn")
            self._store.fold()
            refreshes = self._core.refreshes
            outputs = self._journal.learn(sample)
            macs += self._macs(REFRESH) if self._core.refreshes > refreshes else 0
        else:
            assert passed is not None
            outputs = passed
            self._pending.discard(sample_id)
            self._journal.changed = True
        self._session["learned" if learned else "skipped"] += 1
        self._session["macs"] += macs
        before, told, written = self._target.read(outputs["scores"]), self._target.told(target), self._written - written
        loss = float(outputs["loss"])
        return LearnReport(sample_id, loss, before, told, dict(self._core.health), macs, written, perf_counter() - start, learned)

    @verb
    def adapt(self, x: Array | Mapping[str, Array] | int, lr: float | None = None) -> AdaptReport:
        """Predict one sample and adapt to it, without a target.

        The sample is encoded once and predicted. A method with a memory then offers it, under the class predicted, unless its own filter
        leaves it out; when the manifest's ``adapt.every`` samples have been offered since the last update, and the memory is full, an
        update runs on all of its rows. A method without one updates on every sample.

        Args:
            x: A sample, or the ``sample_id`` of an earlier prediction; for a stream the latter.
            lr: At least 0, of an update that runs now; None is the bundle's; only for methods whose ``adapt`` takes it.

        Raises:
            InputError: when the sample, its id or an option does not fit, or the learner knows no class.
            UpdateRefusedError: when the new state is not finite; state and memory are then what they were, the sample not among it.
            PredictionError: when a score is not finite.
            StoreFullError: when the sample cannot be logged.
            StepMissingError: when the method does not adapt.
        """
        start, written = perf_counter(), self._written
        self._check_step(ADAPT)
        lr = self._rate(lr, {spec.name for spec in self.manifest.steps[ADAPT].inputs})
        sample_id, z, macs = self._sample(x)
        self._store.fold()
        adapted = self._journal.adapt(Sample(sample_id, z, None, 1.0, lr))
        macs += self._macs(TRACK) if TRACK in self.manifest.steps else 0
        macs += self._macs(ADAPT) if adapted.loss is not None else 0
        self._session["adapted"] += 1
        self._session["macs"] += macs
        scores = adapted.outputs["scores"][0]
        prediction = predicted(self.manifest.target.kind, scores, adapted.found, self._core.names, sample_id)
        updated, written = adapted.loss is not None, self._written - written
        health, seconds = dict(self._core.health), perf_counter() - start
        return AdaptReport(sample_id, prediction, adapted.loss, updated, adapted.selected, adapted.reset, health, macs, written, seconds)

    @verb
    def reset_adaptation(self) -> None:
        """Go back to the bundle's initial state, with an empty memory: for a shift that the caller knows of.

        Raises:
            StepMissingError: when the method does not adapt.
            StoreFullError: when it cannot be logged.
        """
        self._check_step(ADAPT)
        self._journal.reset_adaptation()

    @verb
    def forget(self, sample_id: int) -> bool:
        """Unlearn a sample exactly, here and in every named snapshot, and erase its features and replay row.

        A new automatic snapshot is written, so that the store keeps no older state. Costs one snapshot's bytes. Predictions that
        wait for a label with the very features of the sample are discarded, too; one that was learned under another id is a sample
        of its own. A ``sample_id`` that only waits is discarded in the same way, whatever the method.

        Returns:
            Whether the store's files are free of it already. False: the sample is unlearned for good, but the disk was full (or
            failed) when the write-ahead log was to be emptied, which still holds its features. Every later ``learn``, ``save``,
            ``forget`` and start tries again; ``report()["log"]["erased"]`` tells when it is done. Or a file of rows could not be
            written: the next snapshot tries again, ``report()["replay"]["rows_waiting"]`` is 0 right behind one that did.

        Raises:
            StepMissingError: when the method has no exact ``forget``.
            ForgetRefusedError: when the sample neither waits nor is in the log (any more).
            UpdateRefusedError: when the method's guard refuses, here or in a named snapshot; nothing is changed then.
        """
        sample_id = as_int("sample_id", sample_id)
        if sample_id in self._pending.samples:
            self._journal.discard(sample_id)
        elif not self.manifest.forgets:
            raise StepMissingError(f"forget: {self.manifest.method} does not forget exactly, its steps are {self._steps()}; export another")
        else:
            self._journal.revise(sample_id, "forget", None)
        return self._store.erased and self._core.settled

    @verb
    def relabel(self, sample_id: int, y: Any) -> None:
        """Correct the target of a learned sample, here and in every named snapshot. Costs one snapshot's bytes.

        Args:
            sample_id: Of the update.
            y: Its target, as :meth:`learn` takes it.

        Raises:
            StepMissingError: when the method has no ``relabel``.
            ForgetRefusedError: when the sample is not in the log (any more).
            InputError: when the target does not fit.
            UpdateRefusedError: when the method's guard refuses, here or in a named snapshot; nothing is changed then.
        """
        self._check_step("relabel")
        self._journal.revise(as_int("sample_id", sample_id), "relabel", self._target.array(y, self._core.names))

    @verb
    def add_class(self, name: str) -> int:
        """Name the next free class, one without a name and without a learned sample; returns its index.

        Raises:
            InputError: when the name is taken, or all of the bundle's classes are; when targets are real vectors.
        """
        if self.manifest.target.kind == "vector":
            raise InputError(f"name: targets of kind vector have no classes, got {short(name)}; name the values when preparing")
        names, name = self._core.names, as_name(name)
        if name in names:
            raise InputError(f"name: class {short(name)} exists at index {names.index(name)}; learn samples of it under that name")
        free = [i for i, known in enumerate(names) if known is None and not self._core.counts[i]]
        if not free:
            raise InputError(f"name: all {len(names)} classes of this bundle are taken, got {short(name)}; export with more max_classes")
        self._journal.add_class(name, free[0])
        return free[0]

    @verb
    def reset_stream(self) -> None:
        """Let the stream begin anew: the next frame is its first. What was learned, and predictions that wait, stay.

        Raises:
            StepMissingError: when the bundle's trunk carries no state.
            StoreFullError: when it cannot be logged.
        """
        if not self.manifest.stream:
            raise StepMissingError("reset_stream: this bundle's trunk carries no state from sample to sample; there is nothing to reset")
        self._journal.reset_stream()

    @verb
    def save(self, name: str | None = None) -> None:
        """Write a snapshot: a named one to roll back to, or the automatic one, from which the next start goes on.

        The store's file then holds everything by itself. A copy made later needs the file ``*-wal``, too, until :meth:`close`.

        Raises:
            InputError: for a named one of a learner whose replay rows lie in a file.
            StoreFullError: when it does not fit; an older one of that name stays.
        """
        if name is not None and self._core.memory is not None and self._core.memory.file is not None:
            raise InputError(
                f"name: must be left out where replay rows lie in a file, which holds one version of them, got {short(name)}; "
                "save() without one, or copy store and file together while the learner is closed"
            )
        self._journal.save(AUTOMATIC if name is None else as_name(name))

    @verb
    def rollback(self, name: str | None = None) -> None:
        """Go back to a snapshot. History is a line: what was learned, added or saved after it is dropped for good.

        It is erased from the store's files as by :meth:`forget`; ``report()["log"]["erased"]`` tells whether that is done.
        Predictions that wait for a label keep waiting, and a stream goes on where it is.

        Args:
            name: A named snapshot; None is the automatic one (of the last ``save()``, ``forget``, ``relabel``, ``rollback``, close
                or full log).

        Raises:
            InputError: when there is no such snapshot, naming those there are.
        """
        key = AUTOMATIC if name is None else as_name(name)
        known = self._store.snapshots()
        if key not in known:
            there = short([n for n in known if n]) if any(known) else "none"
            raise InputError(f"name: no snapshot {short(name)}, there are {there}; save one first")
        self._journal.rollback(key)
        self._forget_traits()

    @verb
    def state(self) -> dict[str, Array]:
        """Copies of every state tensor."""
        return self._engine.state()

    @verb
    def rows(self) -> dict[str, Array]:
        """Copies of the replay rows, as the constructor takes them; empty without a replay memory."""
        return self._core.memory.rows_by_name() if self._core.memory is not None else {}

    @verb
    def report(self) -> dict[str, Any]:
        """Figures of this learner: totals of its life, counts of this session, log, replay memory, snapshots, health, adaptation.

        ``session.bytes_written`` is everything that the store has written since it was opened: log, snapshots, blocks of sample
        ids, and each page once more when the write-ahead log is moved into the file; of replay rows in a file the pages that each snapshot
        changes there, too. Not in it: what the file system adds, and
        what :meth:`close` will write, which is nothing right after :meth:`save`.
        """
        core, store, memory = self._core, self._store, self._core.memory
        return {
            "method": self.manifest.method,
            **core.totals,
            "session": {**self._session, "bytes_written": self._written, "refused": core.refused},
            "class_counts": {self._called(i): int(n) for i, n in enumerate(core.counts) if n},
            "pending": len(self._pending.samples),
            "log": store.report(),
            "replay": None if memory is None else memory.report(),
            "snapshots": store.snapshots(),
            "state_bytes": sum(spec.nbytes for spec in self.manifest.state),
            **({"task": core.task, "tasks": self._journal.tasks()} if core.task else {}),
            "health": dict(core.health),
            "adaptation": None if core.adaptation is None else core.adaptation.progress(),
        }

    @property
    def _written(self) -> int:
        return self._store.written + self._core.written

    @verb
    def _close(self) -> None:
        try:
            if self._journal.changed and self._store.persistent:
                self._journal.save(AUTOMATIC)
        finally:
            self._shut("is closed")

    def _settle(self) -> None:
        if not self._closed and (self._journal.interrupted or self._store.in_transaction):
            self._shut("was closed, as an interrupt came while its store was written")

    def _shut(self, why: str) -> None:
        self._closed = why
        with ExitStack() as stack:
            stack.callback(self._core.close)
            stack.callback(self._store.close)

    def _sample(self, x: Array | Mapping[str, Array] | int) -> tuple[int, dict[str, Array], int]:
        """Number and features of a sample or of an earlier prediction, and the MACs that they took now."""
        if isinstance(x, np.ndarray | Mapping):
            if self.manifest.stream:
                raise InputError("x: a stream's frames go through predict, each once and in order; pass the sample_id that it returned")
            z = self._encode(x)
            return self._store.new_id(), z, self._macs("encode")
        if not isinstance(x, int | np.integer):
            raise InputError(f"x: must be a numpy array, or a sample_id of predict, got {type(x).__name__}; convert it with numpy.asarray")
        sample_id = as_int("x (a numpy array, or a sample_id)", x)
        return sample_id, self._pending.get(sample_id), 0

    def _encode(self, x: Array | Mapping[str, Array]) -> dict[str, Array]:
        outputs = self._engine.run("encode", as_inputs(x, self._x))
        z = {spec.name: outputs[spec.name] for spec in self._pending.specs}
        if not outputs.get("finite", np.True_) or not all(has_length(value) for value in z.values()):
            raise InputError("x: its features are not finite or too large to square; scale it as the bundle's preprocessing expects")
        if self.manifest.stream:
            self._engine.commit()
        return z

    def _called(self, index: int) -> str:
        """A class's name, or its index where that is nobody's name."""
        names = self._core.names
        return names[index] or (str(index) if str(index) not in names else f"{index} (no name)")

    def _rate(self, lr: float | None, options: Collection[str]) -> float:
        if lr is not None and "lr" not in options:
            raise InputError(f"lr: {self.manifest.method} has no learning rate, got {lr}; leave it out")
        return as_float32("lr", self.manifest.learning_rate if lr is None else lr, positive=False)

    def _check_step(self, step: str) -> None:
        if step not in self.manifest.steps:
            raise StepMissingError(f"{step}: {self.manifest.method} has no such step, its steps are {self._steps()}; export another method")

    def _steps(self) -> str:
        return ", ".join(sorted(self.manifest.steps))

    def _macs(self, *steps: str) -> int:
        return sum(self.manifest.steps[step].canonical_macs for step in steps)
