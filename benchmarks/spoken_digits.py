"""Spoken digits by speaker: a small network trained on five speakers, then the sixth one sample at a time; all six in turn.

    python benchmarks/spoken_digits.py --data FOLDER [--seeds 3] [--jobs 2] [--out FILE]

FOLDER holds ``fsdd/recordings`` (``edgecl.streams.fetch`` gets it). The network sees log-mel spectrograms; its trunk is frozen up to
the pooled feature, every learner starts from the five speakers' samples and learns the sixth's 450 on ONNX Runtime through the
device's own loop. Tested on each speaker's 50 test recordings: the new one's, and those of the five others. Hyperparameters are the
methods' defaults; the weight of 5 is that of the reference. Writes ``benchmarks/results/spoken_digits.json``.
"""

import argparse
import json
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one network a core

import numpy as np
import torch
from rich.progress import track
from torch import nn

from edgecl import METHODS, prepare
from edgecl.figures import machine
from edgecl.pretraining import Recipe, train
from edgecl.streams import Dataset, DomainIncremental
from edgecl.streams.loaders import load_wavs
from edgecl_device import Learner
from edgecl_export import export

SECONDS, MELS = 0.64, 40
RECIPE = Recipe(epochs=15, batch=32, lr=4e-3)
OUT = Path(__file__).parent / "results" / "spoken_digits.json"


@dataclass(frozen=True)
class Row:
    """A learner: its method, and the weight of a new speaker's sample."""

    label: str
    method: str
    weight: float = 1.0
    config: dict[str, Any] = field(default_factory=dict)


ROWS = (
    Row("before", "frozen"),
    Row("finetune head", "finetune"),
    Row("ncm", "ncm"),
    Row("slda", "slda"),
    Row("ridge", "ridge"),
    Row("ridge, weight 5", "ridge", 5.0),
)


class Standardise(nn.Module):
    """Log-mel energies on the scale of the base speakers."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) * (1 / self.std)


def network(classes: int, generator: torch.Generator) -> nn.Sequential:
    """Four convolutions on a spectrogram [1, 1, frames, mels], a pooled feature of 128 values, a linear head."""
    widths = (1, 24, 48, 96, 128)
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride=2 if i < 3 else 1, padding=1), nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter, generator=generator)
    return net


FEATURE = "13"
"""The pooled feature's module in :func:`network`."""


def run(data: Dataset, speaker: int, seed: int) -> dict[str, Any]:
    """All rows for one new speaker and one seed: accuracy on the new speaker's and on the others' test recordings."""
    torch.set_num_threads(1)
    others = [i for i in range(len(data.group_names)) if i != speaker]
    stream = DomainIncremental(data, base_groups=others, steps=[[speaker]], seed=seed)
    x, y = stream.base
    preprocess = Standardise(float(x.mean()), float(x.std()))
    generator = torch.Generator().manual_seed(seed)
    net = network(len(data.class_names), generator)
    train(net, x, y, preprocess=preprocess, recipe=RECIPE, generator=generator)
    return {row.label: learn(net, preprocess, row, stream) for row in ROWS}


def learn(net: nn.Module, preprocess: nn.Module, row: Row, stream: DomainIncremental) -> dict[str, float]:
    """One row's accuracies after the stream."""
    x, y = stream.base
    kind, classes = METHODS[row.method], len(stream.dataset.class_names)
    prepared = prepare(
        net, at=FEATURE, example=x[:1], method=row.method, classes=classes, config=kind.Config(**row.config), preprocess=preprocess
    )
    prepared.fit(x, y)
    with tempfile.TemporaryDirectory() as folder:
        bundle = export(prepared, Path(folder) / "bundle")
        with Learner.load(bundle.path) as learner:
            for sample in stream if "learn" in bundle.manifest.steps else ():
                learner.learn(sample.x, sample.y, weight=row.weight)
            others, new = (np.mean([learner.predict(a).label == b for a, b in zip(*stream.test(task), strict=True)]) for task in (0, 1))
    return {"new": float(new), "others": float(others)}


@lru_cache(maxsize=1)
def load(folder: Path) -> Dataset:
    """The recordings as spectrograms, read once a process."""
    return load_wavs(folder, seconds=SECONDS, mels=MELS)


def _job(job: tuple[Path, int, int]) -> dict[str, Any]:
    folder, speaker, seed = job
    return run(load(folder), speaker, seed)


def main() -> None:
    """Run all speakers and seeds and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    folder = args.data / "fsdd" / "recordings"
    speakers = load(folder).group_names
    jobs = [(folder, speaker, seed) for seed in range(args.seeds) for speaker in range(len(speakers))]
    with ProcessPoolExecutor(args.jobs) as pool:
        found = list(track(pool.map(_job, jobs), "speakers and seeds", total=len(jobs)))
    rows = []
    for row in ROWS:
        parts = {part: [f[row.label][part] for f in found] for part in ("new", "others")}
        means = {part: statistics.fmean(values) for part, values in parts.items()}
        by_speaker = {
            name: [f[row.label]["new"] for f, job in zip(found, jobs, strict=True) if job[1] == i] for i, name in enumerate(speakers)
        }
        by_seed = {
            part: [statistics.fmean(v for v, job in zip(values, jobs, strict=True) if job[2] == seed) for seed in range(args.seeds)]
            for part, values in parts.items()
        }
        rows.append({**asdict(row), **means, "by_seed": by_seed, "new_by_speaker": by_speaker})
        print(f"{row.label:<18} new {100 * means['new']:.1f}  others {100 * means['others']:.1f}")
    result = {
        "seeds": args.seeds,
        "seconds": SECONDS,
        "mels": MELS,
        "recipe": asdict(RECIPE),
        "rows": rows,
        "machine": machine(),
        "versions": {name: version(name) for name in ("edgecl", "torch", "onnxruntime", "kaldi-native-fbank", "numpy")},
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
