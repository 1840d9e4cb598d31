"""``edgecl bench tta``: test-time adaptation on corrupted images, in batches and sample by sample, with its controls.

Seeds draw the corruptions, the order of the images, the augmentations of the warm-up and its order. What no method may know, the labels of
the stream, only counts errors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import nn

from edgecl.bench.adapting import BATCHES, RUNS, SINGLES, Entry, in_batches, learner_of, one_by_one, saved_bytes
from edgecl.bench.cells import Cell, as_file, check_known, fill, one_setting
from edgecl.bench.jitter import jittered
from edgecl.console import Step, silent
from edgecl.figures import machine, weight_hash
from edgecl.given import check_device
from edgecl.learner import State
from edgecl.prepare import Prepared
from edgecl.preprocess import ImageU8
from edgecl.profiling import profile
from edgecl.runs.files import save_network, sha256_data
from edgecl.streams import CORRUPTIONS, Corrupted, Dataset
from edgecl_device.errors import InputError
from edgecl_export import export

FISHER = 2000
"""Clean source images whose gradients say which weights EATA holds."""

KNOWN = 200
"""Source images that the others only count: which classes there are."""

EXAMPLES = 32
"""Source images on which the checks at export run."""

_WARM = {"affine": Entry("affine", "affine_warmup"), "ecotta": Entry("ecotta", "ecotta", {"detached": False})}
"""What is warmed up: EcoTTA's meta networks with the whole gradient, whatever their updates keep later."""

Measure = Callable[[Entry, int], dict[str, Any]]
"""Errors of an entry with a seed."""

Line = tuple[Entry, list[Cell]]
"""A line of a table, and its figures by seed."""


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        batches: Rows of a batch, one table each; none for single samples alone.
        single: Whether the device's loop runs, in random order and in long runs of a class.
        corruptions: Which, in their order.
        images: Test images, the first ones.
        seeds: How many.
        run: Least images of one class in a row in the second order of single samples.
        rounds: Passes over some eighth of the images, whole batches, at the smallest batch, for what becomes of a learner in the long
            run; 0 for none.
        entries: Labels of the lines that are wanted; all by default.
        device: PyTorch's, for batches and warm-ups; single samples run on ONNX Runtime.
    """

    batches: tuple[int, ...] = (200, 64)
    single: bool = True
    corruptions: tuple[str, ...] = CORRUPTIONS
    images: int = 2000
    seeds: int = 3
    run: int = 80
    rounds: int = 10
    entries: tuple[str, ...] = ()
    device: str = "cpu"


def run_tta(
    data: Dataset, net: nn.Module, preprocess: ImageU8, plan: Plan, folder: Path, jobs: int = 1, progress: Step = silent
) -> dict[str, Any]:
    """Every figure, and the result that the tables are drawn from.

    Args:
        data: Colour images of bytes; the training images are the source's.
        net: Trained on them, in eval mode, with modules ``conv1`` and ``layer1``, ``layer2``, ... as the ResNets have.
        preprocess: Its normalisation.
        plan: What is compared. A folder whose plan had fewer seeds, batches or entries gets what is missing; one that lacks nothing is
            read, of whatever version.
        folder: Of the figures.
        jobs: Processes that make figures.
        progress: Called with what runs, how much of it is done, and how much there is.

    Raises:
        InputError: when the folder's figures are of other images, corruptions, lengths of runs, network, data or version, a batch would
            be of one image, or PyTorch has no such device here.
    """
    check_known("entries", plan.entries, {entry.label for entry in (*BATCHES, *SINGLES, *RUNS)})
    data = replace(data, x_test=data.x_test[: plan.images], y_test=data.y_test[: plan.images])
    same = {name: getattr(plan, name) for name in ("images", "corruptions", "run", "rounds")}
    check_device(plan.device)
    for batch in plan.batches:
        if len(data.y_test) % batch == 1:
            raise InputError(
                f"--images: must leave no batch of a single image, got {len(data.y_test)} in batches of {batch}; take one less"
            )
    same |= {"network": weight_hash(net), "data": sha256_data(data)}
    bench = _Bench(data, net, preprocess, plan, folder)
    protocols, costs = bench.protocols(), bench.costs()
    measured = [*costs, *(cell for lines in protocols.values() for _, cells in lines for cell in cells)]
    complete = all(cell.path.exists() for cell in measured)
    with one_setting(folder, "scipy", "pillow", device=None, complete=complete, **same) as setting:
        starts = bench.starts()
        fill([] if complete else starts, jobs, progress)
        fill(measured, jobs, progress)
        found = {name: [(entry, [cell.read() for cell in cells]) for entry, cells in lines] for name, lines in protocols.items()}
        tables = {name: [_row(entry, some) for entry, some in lines] for name, lines in found.items()}
        made = [one for lines in found.values() for _, some in lines for one in some]
        made += [cell.read() for cell in starts if cell.path.exists()]
        machines = sorted({one["machine"] for one in made if "machine" in one})
        return {"tables": tables, "costs": [cell.read() for cell in costs], "seeds": plan.seeds, **setting, "machine": "; ".join(machines)}


def _row(entry: Entry, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A line of a table, of the figures of its seeds."""
    errors = [mean(one["errors"].values()) for one in found]
    row = {"label": entry.label, "method": entry.method, "role": entry.role, "error": mean(errors), "errors": errors}
    row["error_sd"] = stdev(errors) if len(errors) > 1 else None
    row["by_corruption"] = {key: mean(one["errors"][key] for one in found) for key in found[0]["errors"]}
    row |= {key: found[0][key] for key in ("images", "bytes") if key in found[0]}
    if "rounds" in found[0]:
        row["rounds"] = [mean(values) for values in zip(*(one["rounds"] for one in found), strict=True)]
    return row


@dataclass(frozen=True)
class _Bench:
    data: Dataset
    net: nn.Module
    preprocess: ImageU8
    plan: Plan
    folder: Path

    def protocols(self) -> dict[str, list[Line]]:
        """The lines of each table."""
        found = {f"batch {batch}": self._lines(f"batch {batch}", BATCHES, partial(self.of_batches, batch)) for batch in self.plan.batches}
        if self.plan.rounds and self.plan.batches:
            least = min(self.plan.batches)
            name = f"batch {least}, {self.plan.rounds} passes"
            found[name] = self._lines(name, BATCHES, partial(self.of_rounds, least))
        if self.plan.single:
            found["batch 1"] = self._lines("batch 1", SINGLES, partial(self.of_singles, None))
            name = "batch 1, long runs of a class"
            found[name] = self._lines(name, RUNS, partial(self.of_singles, self.plan.run))
        return found

    def _lines(self, name: str, entries: Sequence[Entry], measure: Measure) -> list[Line]:
        def cell(entry: Entry, seed: int) -> Cell:
            path = self.folder / f"seed{seed}" / as_file(name) / f"{as_file(entry.label)}.json"
            return Cell(path, f"{name}: {entry.label}, seed {seed}", partial(measure, entry, seed))

        return [(entry, [cell(entry, seed) for seed in range(self.plan.seeds)]) for entry in self.wanted(entries)]

    def wanted(self, entries: Sequence[Entry]) -> list[Entry]:
        return [entry for entry in entries if not self.plan.entries or entry.label in self.plan.entries]

    def of_batches(self, batch: int, entry: Entry, seed: int) -> dict[str, Any]:
        stream = self._stream(seed)
        sized = self._sized(entry, batch, len(stream.dataset.y_test))
        errors, _ = in_batches(entry, sized, self._state(entry, sized[batch], seed), stream, batch, seed, device=self.plan.device)
        return {"errors": errors, "images": len(stream.dataset.y_test), "machine": machine(self.plan.device)}

    def of_rounds(self, batch: int, entry: Entry, seed: int) -> dict[str, Any]:
        """Passes over fewer images, without a reset between them."""
        stream = self._stream(seed, images=max(batch, self.plan.images // 8 // batch * batch))
        sized = self._sized(entry, batch, len(stream.dataset.y_test))
        state, found = self._state(entry, sized[batch], seed), []
        for number in range(self.plan.rounds):
            errors, state = in_batches(entry, sized, state, stream, batch, seed + number, fresh=False, device=self.plan.device)
            found.append(mean(errors.values()))
        last = {"last pass": found[-1]}
        return {"errors": last, "rounds": found, "images": len(stream.dataset.y_test), "machine": machine(self.plan.device)}

    def of_singles(self, run: int | None, entry: Entry, seed: int) -> dict[str, Any]:
        """On the device's loop: images in random order, or at least ``run`` of a class in a row."""
        stream = self._stream(seed, setting="correlated" if run else "continual", run=run)
        prepared = learner_of(entry, self.net, self.preprocess, self.data)
        prepared.fit(self.data.x[:EXAMPLES], self.data.y[:EXAMPLES])  # what the checks at export start from
        prepared.state = self._state(entry, prepared, seed)
        bundle = self.folder / f"seed{seed}" / f"bundles{'-runs' if run else ''}" / as_file(entry.label)
        exported = export(prepared, bundle, overwrite=True)
        errors = one_by_one(entry, bundle, stream)
        own = {"bytes": exported.manifest.ledger["beyond_trunk"]} if entry.role == "method" else {}
        return {"errors": errors, "images": len(stream.dataset.y_test), "machine": machine(), **own}

    def costs(self) -> list[Cell]:
        """Of an update of 64 rows: MACs a sample, bytes that PyTorch keeps for the backward pass, and those of the ledger."""
        return [
            Cell(self.folder / "costs" / f"{as_file(entry.label)}.json", f"costs: {entry.label}", partial(self.of_costs, entry))
            for entry in self.wanted(BATCHES if self.plan.batches else ())
        ]

    def of_costs(self, entry: Entry) -> dict[str, Any]:
        prepared = learner_of(entry, self.net, self.preprocess, self.data)
        found = profile(prepared)
        macs = {step.step: step.canonical_macs for step in found.steps}
        if entry.role != "method":  # a forward pass; nothing is kept, and no row waits
            return {"label": entry.label, "macs": macs["encode"] + macs["predict"], "kept_by_pytorch": 0, "kept": 0, "kept_masks": 0}
        with torch.no_grad():
            z = prepared.trunk(torch.from_numpy(np.repeat(self.data.x_test[:1], 64, 0)))
        rows = prepared.learner.replay
        return {
            "label": entry.label,
            "macs": macs["encode"] + macs["adapt"] // (1 if rows is None else rows.rows_per_step),
            "kept_by_pytorch": saved_bytes(prepared.learner, prepared.state, z),
            "kept": found.ledger["kept_for_backward"],
            "kept_masks": found.ledger["kept_masks"],
            "beyond_trunk": found.ledger["beyond_trunk"],
        }

    def starts(self) -> list[Cell]:
        """The states that learners start from, behind what each may do with source samples."""
        lines = self.wanted([*(BATCHES if self.plan.batches else ()), *((*SINGLES, *RUNS) if self.plan.single else ())])
        entries = {self._start(entry, seed): (entry, seed) for entry in lines for seed in range(self.plan.seeds)}
        found = []
        for path, (entry, seed) in entries.items():
            make = partial(self.of_warm_up, entry.warm, seed, path) if entry.warm else partial(self.of_fit, entry, path)
            label = f"warming up {entry.warm}, seed {seed}" if entry.warm else f"source samples for {entry.method}"
            found.append(Cell(path.with_suffix(".json"), label, make, beside=path))
        return found

    def of_warm_up(self, name: str, seed: int, path: Path) -> dict[str, Any]:
        """Weights and statistics behind the warm-up on augmented source samples."""
        first = self.data.x.shape[1] == 3
        images = jittered(self.data.x.transpose(0, 2, 3, 1) if first else self.data.x, seed)
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if first else images
        prepared = learner_of(_WARM[name], self.net, self.preprocess, self.data, seed=seed)
        save_network(path, prepared.fit(images, self.data.y, device=self.plan.device).state)
        return {"images": len(images), "machine": machine(self.plan.device)}

    def of_fit(self, entry: Entry, path: Path) -> dict[str, Any]:
        count = min(FISHER if entry.method == "eata" else KNOWN, len(self.data.y))
        chosen = np.linspace(0, len(self.data.y) - 1, count).astype(int)  # images may be sorted by class
        save_network(path, learner_of(entry, self.net, self.preprocess, self.data).fit(self.data.x[chosen], self.data.y[chosen]).state)
        return {"images": count}

    def _start(self, entry: Entry, seed: int) -> Path:
        if entry.warm:
            return self.folder / f"seed{seed}" / f"warm-{entry.warm}.pth"
        return self.folder / "fitted" / f"{entry.method}.pth"  # what is taken from source samples is the same for all settings

    def _state(self, entry: Entry, prepared: Prepared, seed: int) -> State:
        known, own = torch.load(self._start(entry, seed), weights_only=True), prepared.learner.init()
        return {name: known.get(name, value) for name, value in own.items()}

    def _stream(self, seed: int, images: int | None = None, **setting: Any) -> Corrupted:
        data = replace(self.data, x_test=self.data.x_test[:images], y_test=self.data.y_test[:images])
        return Corrupted(data, **{"setting": "continual", "corruptions": self.plan.corruptions, "seed": seed, **setting})

    def _sized(self, entry: Entry, batch: int, images: int) -> dict[int, Prepared]:
        """The learner for each number of rows that a batch has."""
        sizes = {min(batch, images), images % batch or min(batch, images)}
        return {rows: learner_of(entry, self.net, self.preprocess, self.data, rows_per_step=rows) for rows in sizes | {batch}}
