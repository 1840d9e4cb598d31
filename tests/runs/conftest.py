"""A small run: windows of two sensor channels, a model in a file, a configuration."""

import json
from pathlib import Path

import numpy as np
import pytest

NET = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 5))
"""
CONFIG = """
[data]
name = "windows"
path = "windows.npz"

[scenario]
name = "class-incremental"
base_classes = [0, 1, 2]
steps = [[3], [4]]

[model]
name = "net.py:build"

[model.pretrain]
epochs = 3
lr = 0.02

[[learner]]
method = "ridge"
at = "2"

[[learner]]
label = "replay"
method = "latent_replay"
at = "2"
config = { lr = 0.05, capacity_bytes = 2048, rows_per_step = 4 }

[device]
every = 10
"""
MEASURED = ("update_ms", "update_bytes", "seconds")
"""Starts of the names of what is measured, and so differs between two runs."""


def windows():
    """20 training and 6 test windows of each of 5 classes: noise around one pattern a class."""
    generator = np.random.default_rng(0)
    patterns = generator.standard_normal((5, 2, 6))
    y, y_test = np.arange(100) % 5, np.arange(30) % 5
    noise = [0.4 * generator.standard_normal((len(labels), 2, 6)) for labels in (y, y_test)]
    return {
        "x": (patterns[y] + noise[0]).astype(np.float32),
        "y": y,
        "x_test": (patterns[y_test] + noise[1]).astype(np.float32),
        "y_test": y_test,
        "class_names": np.array(["rest", "walk", "run", "climb", "fall"]),
    }


def write(folder: Path) -> Path:
    """The configuration's path, with everything that it names beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(NET)
    np.savez(folder / "windows.npz", **windows())
    (folder / "run.toml").write_text(CONFIG)
    return folder / "run.toml"


def counted(value):
    """A result without what is measured."""
    if isinstance(value, dict):
        return {key: counted(part) for key, part in value.items() if not key.startswith(MEASURED)}
    return [counted(part) for part in value] if isinstance(value, list) else value


@pytest.fixture
def config(tmp_path):
    """A configuration of the test's own."""
    return write(tmp_path)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Folder of a run without a break, which no test may change."""
    from edgecl.runs import read_config, run

    path = write(tmp_path_factory.mktemp("whole"))
    result = run(read_config(path), path, path.with_suffix(".run"))
    assert json.loads((path.with_suffix(".run") / "run.json").read_text()) == json.loads(json.dumps(result))
    return path.with_suffix(".run")


@pytest.fixture(scope="session")
def small():
    """This module, for what is no fixture."""
    import sys

    return sys.modules[__name__]
