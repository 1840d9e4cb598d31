"""The demo: a small network pretrained on six classes of clothing learns four more, one sample at a time.

Every method is exported to a bundle and learns on a stock runtime through the device's own loop; the baselines run beside
it. Data: the embedded Fashion-MNIST subset (2,000 training and 500 test images).
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgecl.backbones.small_cnn import SmallCnn
from edgecl.evaluate import run_stream
from edgecl.figures import (
    BASELINES,
    ENGINE_PACKAGES,
    FORGETTING,
    costs,
    figures,
    machine,
    summarise,
    tasks_of,
    threads,
    versions,
    weight_hash,
)
from edgecl.learner import Problem
from edgecl.methods import METHODS, Finetune, Joint, LatentReplay, Ridge, StreamingLDA
from edgecl.methods._suffix import SuffixLearner
from edgecl.offline import offline_accuracy
from edgecl.prepare import Prepared, prepare
from edgecl.preprocess import ImageU8
from edgecl.pretraining import Recipe, train
from edgecl.streams import ClassIncremental, Dataset, fashion_mnist_subset
from edgecl_device import Learner
from edgecl_device.checks import entry
from edgecl_device.errors import InputError

MEAN, STD = 0.286, 0.353
"""Grey level of Fashion-MNIST's training images, on the scale 0 to 1."""

Notice = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """One row of the demo's table.

    Attributes:
        method: Registered name.
        at: Where the frozen trunk ends, a module of :class:`SmallCnn`; or :data:`MAP_HEAD`.
        label: What the row is called.
        config: Hyperparameters, chosen by ``benchmarks/choose_settings.py`` on other classes and other images.
    """

    method: str
    at: str
    label: str
    config: Any = None


MAP, FEATURE = SmallCnn.MAP, SmallCnn.FEATURE
MAP_HEAD = "map-head"
"""Joint training of a linear classifier on the values at :data:`MAP`, instead of the suffix."""

SETTINGS = (
    Setting("frozen", FEATURE, "frozen"),
    Setting("finetune", FEATURE, "finetune head", Finetune.Config(lr=0.001)),
    Setting("finetune", MAP, "finetune suffix", Finetune.Config(lr=0.001)),
    Setting("ncm", FEATURE, "ncm, 62-d"),
    Setting("ncm", MAP, "ncm, 576-d"),
    Setting("slda", FEATURE, "slda, 62-d", StreamingLDA.Config(g0=0.01)),
    Setting("slda", MAP, "slda, 576-d", StreamingLDA.Config(g0=0.1)),
    Setting("ridge", FEATURE, "ridge, 62-d", Ridge.Config(gamma=0.01)),
    Setting("ridge", MAP, "ridge, 576-d", Ridge.Config(gamma=0.1)),
    Setting(
        "latent_replay",
        MAP,
        "latent replay suffix",
        LatentReplay.Config(lr=0.01, optimizer="adam", loss="er-ace", new_weight=0.3, average=0.98, capacity_bytes=128 << 10),
    ),
    Setting("joint", FEATURE, "joint head, 62-d", Joint.Config(epochs=120, lr=0.01)),
    Setting("joint", MAP_HEAD, "joint head, 576-d", Joint.Config(epochs=120, lr=0.001)),
    Setting("joint", MAP, "joint suffix", Joint.Config(epochs=40, lr=0.01)),
)
"""Every row, baselines included."""


def pretrain(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], classes: int, seed: int, epochs: int = 10) -> SmallCnn:
    """Train the demo's network on its base classes only; outputs of the other classes are masked.

    Args:
        x: uint8 [N, 28, 28].
        y: int64 [N].
        classes: Outputs of the network.
        seed: Of initial weights and sample order.
        epochs: Passes over ``x``.
    """
    generator = torch.Generator().manual_seed(seed)
    net = SmallCnn(classes, generator=generator)
    train(net, x, y, preprocess=ImageU8([MEAN], [STD], "HW"), recipe=Recipe(epochs=epochs), generator=generator)
    return net


def prepare_setting(net: SmallCnn, setting: Setting, data: Dataset, base: Sequence[int]) -> Prepared:
    """The learner of one row, before it has seen a sample."""
    return prepare(
        net,
        at=setting.at,
        example=data.x[:1],
        method=setting.method,
        classes=len(data.class_names),
        config=setting.config,
        preprocess=ImageU8([MEAN], [STD], "HW"),
        class_names=data.class_names[: len(base)] if list(base) == list(range(len(base))) else (),
    )


def role_of(setting: Setting) -> str:
    """``baseline``, ``method``, or ``offline`` for what trains on all samples at once."""
    if setting.method == "joint":
        return "offline"
    return "baseline" if setting.method in BASELINES else "method"


def joint_of(setting: Setting, settings: Sequence[Setting]) -> str | None:
    """Label of the row that trains the same part of the network on the same features offline, if ``settings`` has it."""
    at = setting.at if setting.at != MAP or issubclass(METHODS[setting.method], SuffixLearner) else MAP_HEAD
    return next((s.label for s in settings if s.method == "joint" and s.at == at), None)


def run_setting(
    net: SmallCnn, setting: Setting, data: Dataset, stream: ClassIncremental, folder: Path, engine: str = "onnx", every: int = 50
) -> dict[str, Any]:
    """Prepare, export, load on the device's runtime and learn the stream; one row of the result."""
    if setting.method == "joint":
        return {"label": setting.label, "method": "joint", "accuracy": joint_accuracy(net, setting, data, stream)}
    from edgecl_export import export  # the command line and the demo drive the whole path; see pyproject.toml

    prepared = prepare_setting(net, setting, data, list(stream.base_classes)).fit(*stream.base)
    exported = export(prepared, folder / setting.label.replace(" ", "_").replace(",", ""), engine=engine)
    with Learner.load(exported.path, store=exported.path.with_suffix(".db")) as learner:
        found = run_stream(learner, stream, every=every, learns="learn" in exported.manifest.steps)
    return {"label": setting.label, "method": setting.method, **figures(found), **costs(exported.manifest)}


def joint_accuracy(net: SmallCnn, setting: Setting, data: Dataset, stream: ClassIncremental) -> float:
    """Test accuracy after offline training on the base set and the whole stream."""
    head = setting.at == MAP_HEAD
    prepared = prepare_setting(net, Setting("joint", MAP if head else setting.at, setting.label, setting.config), data, ())
    learner: Any = prepared.learner
    if head:
        size, classes = prepared.learner.problem.feature_size, len(data.class_names)
        learner = Joint(Problem(prepared.learner.problem.features, classes), setting.config, suffix=LinearHead(size, classes))
    return offline_accuracy(prepared, learner, stream)


class LinearHead(nn.Module):
    """A linear classifier on the features, scaled to length sqrt(d)."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.size = size
        self.fc = nn.Linear(size, classes)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Scores [N, classes] of latents [N, ...]."""
        x = z.flatten(1)
        scores: Tensor = self.fc(x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) * self.size**0.5)
        return scores


def run_demo(
    seeds: int = 1,
    *,
    engine: str = "onnx",
    settings: Sequence[Setting] = SETTINGS,
    folder: Path | None = None,
    notice: Notice = lambda text: None,
) -> dict[str, Any]:
    """The whole demo.

    Args:
        seeds: Pretrainings and stream orders.
        engine: The runtime on the device.
        settings: Rows.
        folder: Where the bundles go; a temporary folder by default.
        notice: Called with the name of what comes next, ``seeds * (1 + len(settings))`` times.

    Returns:
        What ``edgecl demo --json`` prints.

    Raises:
        InputError: when there is no seed, no row or no such engine.
    """
    entry("engine", engine, ENGINE_PACKAGES)
    if seeds < 1 or not settings:
        raise InputError(f"seeds, settings: must be at least 1 seed and 1 row, got {seeds} and {len(settings)}")
    start = time.perf_counter()
    data = fashion_mnist_subset()
    networks: list[str] = []
    rows: dict[str, list[dict[str, Any]]] = {s.label: [] for s in settings}
    with threads(1), tempfile.TemporaryDirectory() as scratch:
        for seed in range(seeds):
            stream = ClassIncremental(data, base_classes=range(6), steps=[[6], [7], [8], [9]], seed=seed)
            notice(f"seed {seed}: pretraining on {len(stream.base[1]):,} images of 6 classes")
            net = pretrain(*stream.base, len(data.class_names), seed)
            networks.append(weight_hash(net))
            for setting in settings:
                notice(f"seed {seed}: {setting.label}")
                place = (folder or Path(scratch)) / f"seed{seed}"
                rows[setting.label].append(run_setting(net, setting, data, stream, place, engine))
    return {
        "what": "Fashion-MNIST subset: 6 base classes (1,200 images), then 4 more, one sample at a time (800)",
        "engine": engine,
        "seeds": seeds,
        "seconds": time.perf_counter() - start,
        "forgetting": FORGETTING,
        "scenario": "class-incremental",
        "test_samples": [len(data.y_test)] * seeds,
        "tasks": tasks_of(data, stream),
        "rows": [{**summarise(rows[s.label]), "role": role_of(s), "joint": joint_of(s, settings)} for s in settings],
        "settings": [{**asdict(s), "config": None if s.config is None else asdict(s.config)} for s in settings],
        "pretrained_sha256": networks,
        "versions": versions(engine),
        "machine": machine(),
    }
