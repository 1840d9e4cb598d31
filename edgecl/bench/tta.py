"""``edgecl bench tta``: test-time adaptation on corrupted images, in batches and sample by sample, with its controls.

A folder holds a file for each figure that takes time; a run that was stopped goes on where it was. Seeds draw the corruptions, the order of
the images, the augmentations of the warm-up and its order. What no method may know, the labels of the stream, only counts errors.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import nn

import edgecl
import edgecl_device
from edgecl.bench.adapting import BATCHES, SINGLES, Entry, in_batches, learner_of, one_by_one, saved_bytes
from edgecl.bench.jitter import jittered
from edgecl.figures import machine, threads, versions, weight_hash
from edgecl.learner import State
from edgecl.prepare import Prepared
from edgecl.preprocess import ImageU8
from edgecl.profiling import profile
from edgecl.runs.files import locked, save_network, sha256_data, stage
from edgecl.streams import CORRUPTIONS, Corrupted, Dataset
from edgecl_device.errors import InputError

Progress = Callable[[str, int, int], None]

FISHER = 2000
"""Clean source images whose gradients say which weights EATA holds."""

KNOWN = 200
"""Source images that the others only count: which classes there are."""

EXAMPLES = 32
"""Source images on which the checks at export run."""

_WARM = {"affine": Entry("affine", "affine_warmup"), "ecotta": Entry("ecotta", "ecotta", {"detached": False})}
"""What is warmed up: EcoTTA's meta networks with the whole gradient, whatever their updates keep later."""


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        batches: Rows of a batch, one table each.
        single: Whether the device's loop runs, in random order and in long runs of a class.
        corruptions: Which, in their order.
        images: Test images, the first ones.
        seeds: How many.
        run: Least images of one class in a row in the second order of single samples.
        rounds: Passes over an eighth of the images at the smallest batch, for what becomes of a learner in the long run; 0 for none.
        entries: Labels of the lines that are wanted; all by default.
    """

    batches: tuple[int, ...] = (200, 64)
    single: bool = True
    corruptions: tuple[str, ...] = CORRUPTIONS
    images: int = 2000
    seeds: int = 3
    run: int = 80
    rounds: int = 10
    entries: tuple[str, ...] = ()


def run_tta(
    data: Dataset, net: nn.Module, preprocess: ImageU8, plan: Plan, folder: Path, progress: Progress = lambda text, done, total: None
) -> dict[str, Any]:
    """Every figure, and the result that the tables are drawn from.

    Args:
        data: Colour images of bytes; the training images are the source's.
        net: Trained on them, in eval mode, with modules ``conv1`` and ``layer1``, ``layer2``, ... as the ResNets have.
        preprocess: Its normalisation.
        plan: What is compared.
        folder: Of the figures.
        progress: Called with what runs, how much of it is done, and how much there is.

    Raises:
        InputError: when the folder's figures are of another plan, network, data or version.
    """
    data = dataclasses.replace(data, x_test=data.x_test[: plan.images], y_test=data.y_test[: plan.images])
    known = {**versions("onnx"), **{name: version(name) for name in ("scipy", "pillow")}, "sources": _sources()}
    of = {"plan": dataclasses.asdict(plan), "network": weight_hash(net), "data": sha256_data(data), "versions": known, "machine": machine()}
    start = json.loads(json.dumps(of))  # as it will be read
    with locked(folder), threads(1):
        if stage(folder / "start.json", lambda: start) != start:
            raise InputError(f"--out: {folder} holds figures of another plan, network, data or version; choose another folder")
        bench = _Bench(data, net, preprocess, plan, folder, progress)
        return {**bench.all(), **start}


def _sources() -> str:
    """SHA-256 over the code of both packages: figures of two versions do not mix."""
    digest = hashlib.sha256()
    for package in (edgecl, edgecl_device):
        for folder in package.__path__:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass
class _Bench:
    data: Dataset
    net: nn.Module
    preprocess: ImageU8
    plan: Plan
    folder: Path
    progress: Progress
    fitted: dict[Any, State] = field(default_factory=dict)

    def all(self) -> dict[str, Any]:
        tables = {f"batch {batch}": self._in_batches(batch) for batch in self.plan.batches}
        if self.plan.rounds:
            tables["rounds"] = self._rounds(min(self.plan.batches))
        if self.plan.single:
            tables["single"] = self._singles("single", {})
            tables["single, long runs"] = self._singles("runs", {"policy": "balanced"}, setting="correlated", run=self.plan.run)
        return {"tables": tables, "costs": self._costs()}

    def _in_batches(self, batch: int) -> list[dict[str, Any]]:
        def measure(entry: Entry, seed: int) -> dict[str, Any]:
            stream = self._stream(seed)
            sized = self._sized(entry, batch, len(stream.dataset.y_test))
            errors, _ = in_batches(entry, sized, self._state(entry, sized[batch], seed), stream, batch, seed)
            return {"errors": errors}

        return self._table(f"batch{batch}", BATCHES, measure)

    def _rounds(self, batch: int) -> list[dict[str, Any]]:
        """Passes over fewer images, without a reset between them."""

        def measure(entry: Entry, seed: int) -> dict[str, Any]:
            stream = self._stream(seed, images=max(batch, self.plan.images // 8 // batch * batch))
            sized = self._sized(entry, batch, len(stream.dataset.y_test))
            state, found = self._state(entry, sized[batch], seed), []
            for number in range(self.plan.rounds):
                errors, state = in_batches(entry, sized, state, stream, batch, seed + number, fresh=False)
                found.append(mean(errors.values()))
            return {"errors": {"last round": found[-1]}, "rounds": found}

        return self._table("rounds", BATCHES, measure)

    def _singles(self, name: str, config: Mapping[str, Any], **setting: Any) -> list[dict[str, Any]]:
        from edgecl_export import export  # the command drives the whole path; see pyproject.toml

        def measure(entry: Entry, seed: int) -> dict[str, Any]:
            prepared = learner_of(entry, self.net, self.preprocess, self.data, **config)
            prepared.fit(self.data.x[:EXAMPLES], self.data.y[:EXAMPLES])  # what the checks at export start from
            prepared.state = self._state(entry, prepared, seed)
            bundle = self.folder / f"seed{seed}" / name / f"{_file(entry)}.bundle"
            exported = export(prepared, bundle, overwrite=True)
            errors = one_by_one(entry, bundle, self._stream(seed, **setting))
            own = exported.manifest.ledger["beyond_trunk"] if entry.role == "method" else None
            return {"errors": errors, **({} if own is None else {"bytes": own})}

        return self._table(name, SINGLES, measure)

    def _table(self, name: str, entries: Sequence[Entry], measure: Callable[[Entry, int], dict[str, Any]]) -> list[dict[str, Any]]:
        rows, entries = [], self._wanted(entries)
        for number, entry in enumerate(entries):
            found = []
            for seed in range(self.plan.seeds):
                self.progress(f"{name}: {entry.label}, seed {seed}", number * self.plan.seeds + seed, len(entries) * self.plan.seeds)

                def timed(entry: Entry = entry, seed: int = seed) -> dict[str, Any]:
                    began = time.perf_counter()
                    return {**measure(entry, seed), "seconds": time.perf_counter() - began}

                found.append(stage(self.folder / f"seed{seed}" / name / f"{_file(entry)}.json", timed))
            errors = [mean(one["errors"].values()) for one in found]
            row = {"label": entry.label, "method": entry.method, "role": entry.role, "error": mean(errors), "errors": errors}
            row["error_sd"] = stdev(errors) if len(errors) > 1 else None
            row["by_corruption"] = {key: mean(one["errors"][key] for one in found) for key in found[0]["errors"]}
            row |= {key: found[0][key] for key in ("bytes",) if key in found[0]}
            if "rounds" in found[0]:
                row["rounds"] = [mean(values) for values in zip(*(one["rounds"] for one in found), strict=True)]
            rows.append(row)
        return rows

    def _costs(self) -> list[dict[str, Any]]:
        """Of an update of 64 rows: MACs a sample, bytes that PyTorch keeps for the backward pass, and those of the ledger."""
        rows, entries = [], self._wanted(BATCHES)
        for number, entry in enumerate(entries):
            self.progress(f"costs: {entry.label}", number, len(entries))

            def make(entry: Entry = entry) -> dict[str, Any]:
                prepared = learner_of(entry, self.net, self.preprocess, self.data)
                found = profile(prepared)
                with torch.no_grad():
                    z = prepared.trunk(torch.from_numpy(np.repeat(self.data.x_test[:1], 64, 0)))
                macs = {step.step: step.canonical_macs for step in found.steps}
                if entry.role != "method":  # a forward pass; nothing is kept, and no row waits
                    return {
                        "label": entry.label,
                        "macs": macs["encode"] + macs["predict"],
                        "kept_by_pytorch": 0,
                        "kept": 0,
                        "kept_masks": 0,
                    }
                rows = prepared.learner.replay
                return {
                    "label": entry.label,
                    "macs": macs["encode"] + macs["adapt"] // (1 if rows is None else rows.rows_per_step),
                    "kept_by_pytorch": saved_bytes(prepared.learner, prepared.state, z),
                    "kept": found.ledger["kept_for_backward"],
                    "kept_masks": found.ledger["kept_masks"],
                    "beyond_trunk": found.ledger["beyond_trunk"],
                }

            rows.append(stage(self.folder / "costs" / f"{_file(entry)}.json", make))
        return rows

    def _wanted(self, entries: Sequence[Entry]) -> list[Entry]:
        return [entry for entry in entries if not self.plan.entries or entry.label in self.plan.entries]

    def _stream(self, seed: int, images: int | None = None, **setting: Any) -> Corrupted:
        data = self.data
        if images is not None:
            data = dataclasses.replace(data, x_test=data.x_test[:images], y_test=data.y_test[:images])
        return Corrupted(data, **{"setting": "continual", "corruptions": self.plan.corruptions, "seed": seed, **setting})

    def _sized(self, entry: Entry, batch: int, images: int) -> dict[int, Prepared]:
        """The learner for each number of rows that a batch has."""
        sizes = {min(batch, images), images % batch or min(batch, images)}
        return {rows: learner_of(entry, self.net, self.preprocess, self.data, rows_per_step=rows) for rows in sizes | {batch}}

    def _state(self, entry: Entry, prepared: Prepared, seed: int) -> State:
        """The learner's state behind what it may do with source samples."""
        if entry.warm:
            known, own = self._warm(entry.warm, seed), prepared.learner.init()
            return {name: known[name].clone() if name in known else value for name, value in own.items()}
        count = min(FISHER if entry.method == "eata" else KNOWN, len(self.data.y))
        key = entry.method, tuple(entry.config.items())
        if key not in self.fitted:
            chosen = np.linspace(0, len(self.data.y) - 1, count).astype(int)  # images may be sorted by class
            self.fitted[key] = learner_of(entry, self.net, self.preprocess, self.data).fit(self.data.x[chosen], self.data.y[chosen]).state
        return {name: value.clone() for name, value in self.fitted[key].items()}

    def _warm(self, name: str, seed: int) -> State:
        """Weights and statistics behind the warm-up on augmented source samples."""
        path = self.folder / f"seed{seed}" / f"warm-{name}.pth"

        def make() -> dict[str, Any]:
            self.progress(f"seed {seed}: warming up {name}", 0, 1)
            first = self.data.x.shape[1] == 3
            images = jittered(self.data.x.transpose(0, 2, 3, 1) if first else self.data.x, seed)
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if first else images
            prepared = learner_of(_WARM[name], self.net, self.preprocess, self.data, seed=seed)
            save_network(path, prepared.fit(images, self.data.y).state)
            return {"images": len(images)}

        stage(path.with_suffix(".json"), make)
        state: State = torch.load(path, weights_only=True)
        return state


def _file(entry: Entry) -> str:
    """The entry's label as a file's name."""
    return "".join(c if c.isalnum() else "-" for c in entry.label.lower()).strip("-")
