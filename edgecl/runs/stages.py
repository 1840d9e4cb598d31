"""A run: data, network, budget, bundle, device run, figures; each stage leaves its result in the run's folder.

A run that was ended at any moment goes on at the first stage without a result; the device run goes on at the sample where it
stopped. What it finds is what a run without a break finds, to the bit, times and bytes written apart.
"""

import dataclasses
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edgecl.console import Step, silent
from edgecl.evaluate import evaluation_set
from edgecl.evaluate import figures as metrics
from edgecl.figures import BASELINES, costs, figures, machine, summarise, tasks_of, threads, versions
from edgecl.methods import METHODS
from edgecl.offline import offline_accuracies, offline_accuracy
from edgecl.runs.budget import check_budget, prepared_of
from edgecl.runs.config import LearnerConfig, RunConfig
from edgecl.runs.device import BUNDLE, device_run
from edgecl.runs.files import LOCK, locked, read_json, sha256_data, sha256_file, stage, write_bytes, write_json
from edgecl.runs.methods import method_config
from edgecl.runs.model import build, check_kind, check_preprocess, check_pretraining, load, ready, with_label
from edgecl.runs.registry import load as load_data
from edgecl.runs.registry import make_stream
from edgecl.streams import Dataset, Stream
from edgecl.tally import Tally, tally_of
from edgecl_device.checks import as_path
from edgecl_device.errors import InputError
from edgecl_device.manifest import Array, read_manifest

START, RESULT = "start.json", "run.json"
WRITTEN = (START, "config.toml", "cost.json", RESULT, "report.html")
SEED = re.compile(r"seed\d+")
SCRATCH = ".edgecl-new-*"
"""What an export that was killed leaves behind."""


def run(config: RunConfig, source: Path, folder: Path, *, fresh: bool = False, progress: Step = silent) -> dict[str, Any]:
    """Run a configuration, or go on with it.

    Args:
        config: What to run.
        source: Its file, of which the folder gets a copy.
        folder: Of the run; made when there is none.
        fresh: Delete what an earlier run left in the folder.
        progress: Called with what runs, how much of it is done and how much there is.

    Returns:
        The content of ``run.json``.

    Raises:
        InputError: when the folder holds something else, or a run of another configuration, other data, other weights or other
            versions; when a learner exceeds the budget; or when a part does not fit.
    """
    _check_folder(folder, fresh)
    with locked(folder), threads(1):
        if fresh:
            _clear(folder)
        progress("loading the data", 0, 1)
        data = load_data(config.data.name, config.dataset_options())
        _begin(config, source, folder, data)
        if not (folder / RESULT).exists():
            _Run(config, folder, data, progress).all()
        result: dict[str, Any] = read_json(folder / RESULT)
        if result.get("title") != config.report.title:
            result["title"] = config.report.title
            write_json(folder / RESULT, result)
    return result


def _check_folder(folder: Path, fresh: bool) -> None:
    as_path("--out", folder)
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / START).exists() and not (folder / LOCK).exists()):
        raise InputError(f"--out: {folder} exists and holds no run; choose another folder")
    if fresh and Path.cwd().resolve().is_relative_to(folder.resolve()):
        raise InputError(f"--out: {folder} is or holds the working directory; choose another folder, or work elsewhere")


def _clear(folder: Path) -> None:
    """Delete what a run writes, and nothing else; of a seed's folder that lies elsewhere the link.

    What the run is of goes last: a kill before leaves a run that still refuses another configuration.
    """
    for path in sorted(folder.iterdir(), key=lambda path: path.name == START):
        if SEED.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        elif path.name.removesuffix(".new") in WRITTEN:
            path.unlink()


def _begin(config: RunConfig, source: Path, folder: Path, data: Dataset) -> None:
    """Write down what the run is of, or see that the folder's run is of the same."""
    start = {
        "config": config.model_dump(mode="json", exclude={"report"}),
        "data": {"sha256": sha256_data(data)},
        "files": {name: sha256_file(path) for name, path in config.files.items()},
        "versions": versions(config.device.engine),
        "machine": machine(),
    }
    if not (folder / START).exists():
        left = sorted(path.name for path in folder.iterdir() if SEED.fullmatch(path.name) or path.name in ("cost.json", RESULT))
        if left:
            got = f"got {', '.join(left)} without it"
            raise InputError(
                f"--out: {folder} must hold {START} beside results, {got}; pass --fresh to delete them, or choose another folder"
            )
        write_bytes(folder / "config.toml", source.read_bytes())
        write_json(folder / START, start)
        return
    before = read_json(folder / START)
    changed = [
        f"{name} was {_short(old)}, is {_short(new)}"
        for name, (old, new) in _differences("", before, start).items()
        if not name.startswith("machine")
    ]
    if changed:
        raise InputError(
            f"--out: {folder} holds a run of something else: {'; '.join(changed)}; pass --fresh to delete it, or choose another folder"
        )


def _differences(path: str, old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Values that differ, by their path."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        pairs = [(f"{path}.{key}" if path else key, old.get(key), new.get(key)) for key in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and any(isinstance(item, dict) for item in new):
        pairs = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(old, new, strict=True))]
    else:
        return {path.removeprefix("config."): (old, new)} if old != new else {}
    return {name: found for pair in pairs for name, found in _differences(*pair).items()}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


class _Run:
    """The stages of one run; each learner of each seed has a folder of its own."""

    def __init__(self, config: RunConfig, folder: Path, data: Dataset, progress: Step) -> None:
        self.config, self.folder, self.data, self.progress = config, folder, data, progress
        self.entries = list(zip(config.labels, config.learner, strict=True))

    def all(self) -> None:
        """Every stage that has no result yet, then ``run.json``."""
        start = time.perf_counter()
        check_kind(self.config, self.data)
        check_preprocess(self.config, self.data)
        streams = {seed: self.stream(seed) for seed in self.config.device.seeds}
        tasks = [self._tasks(stream) for stream in streams.values()]  # first of all: what no seed may lack is missed before any learns
        first = next(iter(streams.values()))
        self._check_base(first)
        profiles = self._budget(first.base[0])
        found: dict[str, list[dict[str, Any]]] = {label: [] for label in self.config.labels}
        networks = {}
        for seed, stream in streams.items():
            place = self.folder / f"seed{seed}"
            network = place / "network.pth"
            self.progress(f"seed {seed}: network" + (", pretraining" if self.config.model.pretrain else ""), 0, 1)
            networks[seed] = stage(
                place / "network.json",
                lambda: ready(self.config, self.data, stream, seed, network),  # noqa: B023
            )
            for label, entry in sorted(self.entries, key=lambda named: named[1].method != "joint"):  # whose accuracies omega_all takes
                joint = self._joint_of(entry) if self.config.device.omega_all and entry.method != "joint" else None
                offline = None if joint is None else found[joint][-1]["seen_accuracy"]
                with with_label(label):
                    run_one = (_Offline if METHODS[entry.method].host_only else _OnDevice)(self, seed, stream, label, entry, place, offline)
                    found[label].append(stage(place / label / "result.json", run_one.run))
        write_json(self.folder / RESULT, self._result(found, profiles, networks, stream, tasks, time.perf_counter() - start))

    def stream(self, seed: int) -> Stream:
        """The scenario of a seed."""
        return make_stream(self.config.scenario.name, self.config.scenario_options(), self.data, seed)

    def _joint_of(self, entry: LearnerConfig) -> str | None:
        """The first learner that is trained offline at the same place."""
        return next((label for label, other in self.entries if other.method == "joint" and other.at == entry.at), None)

    def _tasks(self, stream: Stream) -> list[dict[str, Any]]:
        """The tasks of a seed, with the number of test samples that the run uses of each."""
        tests = self.tally(stream).tests
        return [{**task, "test_samples": len(y)} for task, (_, y) in zip(tasks_of(self.data, stream), tests, strict=True)]

    def tally(self, stream: Stream) -> Tally:
        """What keeps predictions and tests of a stream."""
        return tally_of(stream, evaluation_set(stream, self.config.device.test_samples), self.data.scoring())

    def _check_base(self, stream: Stream) -> None:
        """Whether there is a base set for what needs one."""
        check_pretraining(self.config, stream)
        if len(stream.base[1]):
            return
        for i, entry in enumerate(self.config.learner):
            config = method_config(f"learner[{i}].config", entry.method, entry.config)
            if getattr(config, "codec", "float32") != "float32":
                raise InputError(
                    f"learner[{i}].config.codec: must be 'float32' without a base set, to which it is fitted, got {config.codec!r}; set it"
                )
            if entry.trunk_dtype is not None:
                raise InputError(
                    f"learner[{i}].trunk_dtype: must be left out without a base set, on which it is calibrated, got {entry.trunk_dtype!r}; "
                    "leave it out, or give the scenario a base set"
                )

    def _budget(self, base: Array) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            net = build(self.config, self.data, torch.Generator().manual_seed(self.config.device.seeds[0]))
            found = {}
            for i, (label, entry) in enumerate(self.entries):
                self.progress("counting costs", i, len(self.entries))
                if not METHODS[entry.method].host_only:
                    found[label] = dataclasses.asdict(check_budget(self.config, entry, label, net, self.data, base))
            return found

        return stage(self.folder / "cost.json", make)

    def _result(
        self,
        found: dict[str, list[dict[str, Any]]],
        profiles: dict[str, Any],
        networks: dict[int, Any],
        stream: Stream,
        tasks: list[list[dict[str, Any]]],
        seconds: float,
    ) -> dict[str, Any]:
        config, start = self.config, read_json(self.folder / START)
        learners = []
        for label, entry in self.entries:
            rows = found[label]
            joint = self._joint_of(entry)
            role = "offline" if entry.method == "joint" else "baseline" if entry.method in BASELINES else "method"
            learners.append(
                {
                    **summarise(rows),
                    "label": label,
                    "method": entry.method,
                    "at": entry.at,
                    "role": role,
                    "joint": joint,
                    "config": profiles.get(label, {}).get("config", entry.config),
                    "metrics": list(dict.fromkeys(name for row in rows for name in row.get("metrics", ()))),
                    "matrices": [row["matrix"] for row in rows if "matrix" in row],
                    "curves": [row["curve"] for row in rows if "curve" in row],
                    **({"parts": [row["parts"] for row in rows]} if "parts" in rows[0] else {}),
                    "profile": profiles.get(label),
                }
            )
        tests = [sum(task["test_samples"] for task in mine) for mine in tasks]
        return {
            "title": config.report.title,
            "what": f"{config.data.name}, {config.scenario.name}: {len(stream.base[1]):,} base samples, then {len(stream):,} one at a time",
            "samples": {"base": len(stream.base[1]), "stream": len(stream), "test": tests},
            "tasks_by_seed": tasks,
            "seeds": config.device.seeds,
            "engine": config.device.engine,
            "learners": learners,
            "networks": networks,
            "config": start["config"],
            "data": {"name": config.data.name, **start["data"], "kind": self.data.kind, "classes": list(self.data.class_names)},
            "files": start["files"],
            "versions": start["versions"],
            "machine": start["machine"],
            "seconds": seconds,
        }


@dataclasses.dataclass
class _OnDevice:
    """Bundle and device run of one learner and one seed."""

    whole: _Run
    seed: int
    stream: Stream
    label: str
    entry: LearnerConfig
    place: Path
    offline: Sequence[float] | None

    @property
    def title(self) -> str:
        """For the progress."""
        return f"seed {self.seed}, {self.label}"

    def run(self) -> dict[str, Any]:
        """Figures and costs; a bundle that is there is used as it is."""
        config = self.whole.config
        folder = self.place / self.label
        gates = stage(folder / "bundle.json", lambda: self._bundle(folder))
        found, refused = device_run(
            folder,
            self.whole.tally(self.stream),
            every=config.device.every,
            store=config.device.store,
            progress=lambda done, total: self.whole.progress(f"{self.title}: learning the stream", done, total),
        )
        manifest = read_manifest(folder / BUNDLE)
        known = metrics(found, offline=self.offline)
        shown = {**known, **figures(found), **costs(manifest), "metrics": list(known), "refused": refused}
        return {**shown, "ledger": manifest.ledger, **gates}

    def _bundle(self, folder: Path) -> dict[str, Any]:
        from edgecl_export import export  # a run drives the whole path; see pyproject.toml

        whole = self.whole
        for left in folder.glob(SCRATCH):
            shutil.rmtree(left)
        prepared = self.prepared()
        taking = f"{self.title}: taking in base samples"
        if len(self.stream.base[1]):
            prepared.fit(*self.stream.base, progress=lambda done, total: whole.progress(taking, done, total))
        whole.progress(f"{self.title}: writing the bundle and checking it", 0, 1)
        folder.mkdir(parents=True, exist_ok=True)
        exported = export(
            prepared,
            folder / BUNDLE,
            engine=whole.config.device.engine,
            overwrite=True,
            pending_capacity=whole.config.device.pending,
            ram_budget_bytes=whole.config.budget.ram,
        )
        return {"bundle_id": exported.manifest.bundle_id, "gates": [dataclasses.asdict(gate) for gate in exported.gates]}

    def prepared(self) -> Any:
        """The learner before it has seen a sample."""
        whole = self.whole
        net = load(whole.config, whole.data, self.seed, self.place / "network.pth")
        return prepared_of(whole.config, self.entry, net, whole.data, self.stream.base[0])


class _Offline(_OnDevice):
    """Offline training, which has no bundle."""

    def run(self) -> dict[str, Any]:
        """The accuracy after it."""
        self.whole.progress(f"{self.title}: training offline", 0, 1)
        prepared = self.prepared()
        if not self.whole.config.device.omega_all:
            return {"accuracy": offline_accuracy(prepared, prepared.learner, self.stream)}
        tests = evaluation_set(self.stream, self.whole.config.device.test_samples)
        accuracy, seen = offline_accuracies(prepared, prepared.learner, self.stream, tests)
        return {"accuracy": accuracy, "seen_accuracy": seen}
