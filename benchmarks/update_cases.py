"""Networks and updates of ``step_latency.py``: the same numbers for every engine."""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecl.backbones import BACKBONES
from edgecl.channels import split_channels
from edgecl.splitting import split

CLASSES = 10
LR = 0.001
ROUNDING = 2.0**-23
ROWS = 8
"""Replay rows of W6."""

SHAPES = {"mobilenet_v2": (1, 3, 96, 96), "resnet20": (1, 3, 32, 32), "ds_cnn": (1, 1, 49, 10)}
UPDATES = {
    "W1": "classifier",
    "W2": "classifier and last two blocks",
    "W3": "everything",
    "W4": "all biases, and the classifier",
    "W5": "scale and shift of every channel, and the classifier",
    "W6": f"last block and classifier, latent replay of {ROWS} rows",
    "W7": "a quarter of the channels of six convolutions",
}

CUTS = {  # the last module that no update of the key needs a gradient of
    "mobilenet_v2": {"W1": "net.pool", "W2": "net.features.15", "W6": "net.features.16", "W7": "net.features.7"},
    "resnet20": {"W1": "net.pool", "W2": "net.layer3.0", "W6": "net.layer3.1", "W7": "net.layer1"},
    "ds_cnn": {"W1": "net.pool", "W2": "net.block2", "W6": "net.block3", "W7": "net.stem"},
}
CLASSIFIERS = {"mobilenet_v2": "net.classifier.*", "resnet20": "net.linear.*", "ds_cnn": "net.fc.*"}
SLICED = {
    "mobilenet_v2": [f"net.features.{i}.conv.0.0" for i in range(8, 14)],
    "resnet20": [f"net.layer2.{i}.conv{j}" for i in range(3) for j in (1, 2)],
    "ds_cnn": [f"net.block{i}.{kind}.0" for i in (1, 2, 3) for kind in ("depthwise", "pointwise")],
}


@dataclass(frozen=True)
class Case:
    """One update of one network.

    Attributes:
        net: Name of the network.
        update: Of :data:`UPDATES`.
        model: Scores of one sample; its norms are in eval mode.
        cut: Module behind which everything trained lies.
        trained: Names of the trained parameters.
        x: One sample.
        label: Its class.
        rows: Replayed latents [8, ...] and their classes, for W6.
    """

    net: str
    update: str
    model: nn.Module
    cut: str
    trained: tuple[str, ...]
    x: Tensor
    label: int
    rows: tuple[Tensor, Tensor] | None = None


def case(net: str, update: str) -> Case:
    """Make an update; everything random is from fixed seeds."""
    generator = torch.Generator().manual_seed(0)
    make: Callable[..., nn.Module] = BACKBONES[net]
    model: nn.Module = nn.Sequential(OrderedDict(input=nn.Identity(), net=make(classes=CLASSES, generator=generator))).eval()
    _settle(model, generator)
    if update == "W7":
        layers = dict(model.named_modules())
        model = split_channels(model, {name: range(layers[name].weight.shape[0] // 4) for name in SLICED[net]})  # type: ignore[union-attr,misc]
    cut = CUTS[net].get(update, "input")
    x = torch.randn(SHAPES[net], generator=generator)
    rows = None
    if update == "W6":
        with torch.no_grad():
            latents = split(model, cut).trunk(torch.randn((ROWS, *SHAPES[net][1:]), generator=generator))
        rows = latents, torch.arange(ROWS) % CLASSES
    norms = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))
    trained = []
    for name, _ in split(model, cut).suffix.named_parameters():
        of_kind = {"W4": name.endswith(".bias"), "W5": name.startswith(norms), "W7": ".trained." in name}.get(update, True)
        if of_kind or (update != "W7" and fnmatchcase(name, CLASSIFIERS[net])):
            trained.append(name)
    return Case(net, update, model, cut, tuple(trained), x, 3, rows)


def _settle(model: nn.Module, generator: torch.Generator) -> None:
    """Statistics and affine parameters of norms as a trained network has them: neither zero nor one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-0.1, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.1, 0.1, generator=generator)


class Loss(nn.Module):
    """The loss of an update as one module: what the engines that are no learners train.

    Forward takes the sample, then for W6 the replayed latents, then the targets [N, K]: one row a sample, of its weight in its class.
    """

    def __init__(self, of: Case) -> None:
        super().__init__()
        parts = split(of.model, of.cut)
        self.trunk, self.suffix = parts.trunk, parts.suffix
        self.requires_grad_(False)
        for name in of.trained:
            self.suffix.get_parameter(name).requires_grad_(True)

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        """Cross-entropy, summed over the rows."""
        *rows, targets = rest
        z = self.trunk(x)
        scores = self.suffix(torch.cat([z, *rows]) if rows else z)
        return -(F.log_softmax(scores, 1) * targets).sum()


def loss_inputs(of: Case) -> tuple[Tensor, ...]:
    """Arguments of :class:`Loss`."""
    one = F.one_hot(torch.tensor([of.label]), CLASSES).float()
    if of.rows is None:
        return of.x, one
    latents, labels = of.rows
    return of.x, latents, torch.cat([one, F.one_hot(labels, CLASSES).float() / ROWS])


def trained_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that require a gradient, without the prefix of :class:`Loss`."""
    return {name.removeprefix("suffix."): p for name, p in module.named_parameters() if p.requires_grad}


def distance(found: dict[str, Tensor], reference: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The largest difference between two updates of a tensor, beyond two roundings of its values, over the size of the reference's."""
    worst = 0.0
    for name, old in start.items():
        moved = reference[name].double() - old.double()
        apart = (found[name].double() - reference[name].double()).norm() - ROUNDING * reference[name].double().norm()
        worst = max(worst, float(apart.clamp_min(0) / moved.norm().clamp_min(1e-12)))
    return worst if math.isfinite(worst) else math.inf
