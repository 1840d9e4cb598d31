"""A plan for windows of two sensor channels and a small network."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgecl.planning import Limits, Network, Settings, default_configs, plan, validation_split
from edgecl.streams import ClassIncremental, Dataset

CLASSES = 5
LIMITS = Limits(ram=8000, flash=40_000, macs=20_000)


def windows() -> Dataset:
    """20 training windows of each of 5 classes: noise around one pattern a class. The test samples must not be looked at."""
    generator = np.random.default_rng(0)
    patterns, y = generator.standard_normal((CLASSES, 2, 6)), np.arange(100) % CLASSES
    x = (patterns[y] + 0.8 * generator.standard_normal((100, 2, 6))).astype(np.float32)
    return Dataset(x, y, np.full((5, 2, 6), np.nan, np.float32), np.arange(5), ("rest", "walk", "run", "climb", "fall"))


def network() -> Network:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return Network(model.eval(), None, windows().x[:1], CLASSES)


def scenario(data: Dataset, order: int) -> ClassIncremental:
    return ClassIncremental(data, base_classes=[0, 1, 2], steps=[[3], [4]], seed=order)


def configs() -> dict[str, Any]:
    found = default_configs()
    replay = dataclasses.replace(found["latent_replay"], lr=0.05, rows_per_step=4, centroids=16)
    return {**found, "latent_replay": replay, "finetune": dataclasses.replace(found["finetune"], lr=0.05)}


def settings(**changes: Any) -> Settings:
    """Time that is never up."""
    return Settings(**{"configs": configs(), "at": ["2"], "samples": 100, "orders": 2, "seconds": 1e9, "top": 3, **changes})


@pytest.fixture(scope="session")
def split():
    return validation_split(windows(), 100)


@pytest.fixture(scope="session")
def planned(split):
    return plan(network(), split, scenario, LIMITS, settings())


@pytest.fixture(scope="session")
def small():
    """This module, for what is no fixture."""
    import sys

    return sys.modules[__name__]
