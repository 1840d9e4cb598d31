"""A model that is not in the project, from PyTorch to the device; and the larger backbones."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgecl import METHODS, ImageU8, SplitError, prepare
from edgecl.backbones import MobileNetV2, resnet20
from edgecl_device import Learner
from edgecl_export import export

torch.set_num_threads(1)

NAMES = ("bar", "stripe", "ring")
CLASSES = 6


class Residual(nn.Module):
    """Two convolutions and a shortcut that changes the number of channels."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return torch.relu_(out)


class Depthwise(nn.Module):
    """Expand, filter each channel with a stride, project: an inverted residual without its shortcut."""

    def __init__(self, channels, outputs, stride):
        super().__init__()
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.filter = nn.Conv2d(2 * channels, 2 * channels, 3, stride, 1, groups=2 * channels, bias=False)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.project = nn.Conv2d(2 * channels, outputs, 1)

    def forward(self, x):
        return self.project(F.relu6(self.norm(self.filter(F.relu6(self.expand(x))))))


class Mine(nn.Module):
    """Residual and depthwise blocks, functional operators, a skip past ``middle``, two kinds of pooling."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.entry = Residual(3, 8)
        self.middle = Depthwise(8, 8, stride=1)
        self.exit = Depthwise(8, 12, stride=2)
        self.head = nn.Linear(24, classes)

    def forward(self, x):
        a = F.max_pool2d(self.entry(x), 2)
        b = self.middle(a)
        c = F.avg_pool2d(b + a, 2)
        d = self.exit(c)
        d = torch.cat([F.adaptive_avg_pool2d(d, 1).flatten(1), F.max_pool2d(d, 2).flatten(1)], dim=1)
        return self.head(F.dropout(d, 0.1, self.training))


def pictures(count, seed, classes=CLASSES):
    """Coloured textures, one frequency and direction a class: uint8 [N, 16, 16, 3] and int64 [N]."""
    generator = np.random.default_rng(seed)
    y = np.arange(count) % classes
    rows, columns = np.mgrid[0:16, 0:16] / 16
    phase = generator.uniform(0, 2 * np.pi, count)
    angle, frequency = np.pi * y / classes, 2 + (y % 3)
    waves = np.cos(angle)[:, None, None] * rows + np.sin(angle)[:, None, None] * columns
    grey = np.sin(2 * np.pi * frequency[:, None, None] * waves + phase[:, None, None])
    colour = np.eye(3)[y % 3] * 0.5 + 0.5
    x = 128 + 60 * grey[..., None] * colour[:, None, None] + generator.normal(0, 15, (count, 16, 16, 3))
    return np.clip(x, 0, 255).astype(np.uint8), y


@pytest.fixture(scope="module")
def trained():
    """The model, trained on the first three classes as its owner would have."""
    generator = torch.Generator().manual_seed(0)
    model = Mine()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter, generator=generator)
            elif parameter.shape:
                parameter.zero_()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1)
    x, y = pictures(180, 1)
    x, y = x[y < 3], y[y < 3]
    images, labels = ImageU8([0.5] * 3, [0.25] * 3)(torch.from_numpy(x)), torch.from_numpy(y)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(12):
        for rows in torch.randperm(len(x), generator=generator).split(30):
            optimiser.zero_grad()
            F.cross_entropy(model.eval()(images[rows]), labels[rows]).backward()
            optimiser.step()
    return model


@pytest.mark.parametrize(
    ("method", "config"),
    [("ridge", {"gamma": 0.1}), ("latent_replay", {"lr": 0.03, "rows_per_step": 8, "capacity_bytes": 200_000}), ("slda", {})],
)
def test_my_own_model_learns_new_classes_on_the_device(trained, tmp_path, method, config):
    x, y = pictures(180, 1)
    base = y < 3
    ready = prepare(
        trained,
        at="middle",
        example=x[:1],
        method=method,
        classes=CLASSES,
        config=METHODS[method].Config(**config),
        preprocess=ImageU8(mean=[0.5] * 3, std=[0.25] * 3),
        class_names=NAMES,
    )
    assert len(ready.learner.problem.features) == 2, "the skip crosses the cut beside the block"
    export(ready.fit(x[base], y[base]), tmp_path / "bundle")

    learner = Learner.load(tmp_path / "bundle", store=tmp_path / "learner.db")
    held_x, held_y = pictures(90, 2)

    def accuracy(wanted):
        rows = np.isin(held_y, wanted)
        return np.mean([learner.predict(a).label == b for a, b in zip(held_x[rows], held_y[rows], strict=True)])

    old = accuracy([0, 1, 2])
    assert accuracy([3, 4, 5]) == 0
    assert learner.predict(x[0]).class_name == "bar"
    for name in ("wave", "mesh", "dot"):
        learner.add_class(name)
    new_x, new_y = pictures(300, 3)
    for a, b in zip(new_x, new_y, strict=True):
        if b >= 3:
            learner.learn(a, ("wave", "mesh", "dot")[b - 3])
    learner.close()
    learner = Learner.load(tmp_path / "bundle", store=tmp_path / "learner.db")
    assert old >= 0.8
    assert accuracy([3, 4, 5]) >= 0.6, "chance is 1/6"
    assert accuracy(range(CLASSES)) >= 0.6
    learner.close()


def test_a_model_that_cannot_be_traced_says_where_and_how_to_mend_it():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            x = self.first(x)
            if x.sum() > 0:
                x = x * 2
            return self.last(x)

    with pytest.raises(SplitError, match=r"^model: cannot be traced.*model\.py:\d+ \(if x\.sum\(\) > 0:.*; make this code"):
        prepare(Branch(), at="first", example=np.zeros((1, 4), np.float32), classes=3)


def test_a_wrong_cut_says_which_there_are():
    example = np.zeros((1, 3, 16, 16), np.float32)
    with pytest.raises(SplitError, match="no module named 'midle' is called by the model; choose one of: middle, "):
        prepare(Mine(), at="midle", example=example, classes=CLASSES)
    with pytest.raises(SplitError, match="nothing is left for the suffix after 'head'"):
        prepare(Mine().eval(), at="head", example=example, classes=CLASSES)


@pytest.mark.parametrize(
    ("model", "at", "method", "config"),
    [
        (resnet20, "layer3.1", "latent_replay", {"rows_per_step": 2}),
        (resnet20, "layer3", "ridge", {"projection": 64}),
        (MobileNetV2, "features.17", "finetune", {"trainable": ("classifier.*",)}),
        (MobileNetV2, "features.16", "latent_replay", {"rows_per_step": 2, "capacity_bytes": 1 << 20}),
    ],
)
def test_the_backbones_learn_on_the_device(tmp_path, model, at, method, config):
    """Random weights, 32x32 images: one learning step of each, through every gate."""
    net = model(classes=4)
    x = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    preprocess = ImageU8([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    settings = METHODS[method].Config(**config)
    ready = prepare(net, at=at, example=x[:1], method=method, classes=4, config=settings, preprocess=preprocess)
    export(ready.fit(x, np.arange(6) % 2), tmp_path / "bundle")
    with Learner.load(tmp_path / "bundle") as learner:
        before = learner.state()
        report = learner.learn(x[0], 3)
        assert np.isfinite(report.loss)
        assert report.macs > 1_000_000
        assert learner.predict(x[0]).scores[3] > -1e29
        assert any(a.tobytes() != learner.state()[name].tobytes() for name, a in before.items() if name.startswith(("param.", "readout")))
