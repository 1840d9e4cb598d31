"""The network of a run: built, loaded, and trained on the base set where the configuration says so."""

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgecl.backbones import BACKBONES, WeightsError, load_weights
from edgecl.figures import threads, weight_hash
from edgecl.methods import METHODS
from edgecl.options import load_model
from edgecl.pretraining import train
from edgecl.runs.config import RunConfig
from edgecl.runs.files import read_json, save_network
from edgecl.streams import Dataset, Stream
from edgecl_device.errors import EdgeclError, InputError

_OPTIONS = {"MODEL:": "model.name:", "--model-classes:": "model.weights_classes:"}
"""What the command's options are called in a configuration."""


@contextmanager
def with_label(label: str) -> Iterator[None]:
    """Name the learner in whatever error comes."""
    try:
        yield
    except EdgeclError as error:
        raise InputError(f"learner {label!r}: {error}") from error


@contextmanager
def _named(section: str) -> Iterator[None]:
    """Put the section of the configuration before whatever parameter an error names."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{section}{error}") from error


def build(config: RunConfig, data: Dataset, generator: torch.Generator) -> nn.Module:
    """The network before pretraining; random weights are drawn from ``generator``, those of a user's own model by its seed.

    Raises:
        InputError: when it cannot be built.
        WeightsError: when weights do not fit.
    """
    model = config.model
    name = model.name if model.name in BACKBONES else str(config.folder / model.name)
    weights = None if model.weights is None else config.folder / model.weights
    # A model of the user's draws from the global generator, and prints what it likes
    with torch.random.fork_rng(), contextlib.redirect_stdout(sys.stderr):
        torch.manual_seed(generator.initial_seed())
        try:
            return load_model(name, model.classes or len(data.class_names), weights, model.weights_classes, generator)
        except InputError as error:
            text = str(error)
            for option, key in _OPTIONS.items():
                text = text.replace(option, key)
            raise InputError(text) from error


def check_kind(config: RunConfig, data: Dataset) -> None:
    """Whether every method learns the data set's kind of targets, before anything runs; and whether it wants no more classes.

    Raises:
        InputError: when that is not so.
    """
    for i, entry in enumerate(config.learner):
        if data.kind not in METHODS[entry.method].targets:
            others = ", ".join(name for name, method in METHODS.items() if data.kind in method.targets)
            raise InputError(
                f"learner[{i}].method: must be one of {others} for targets of kind {data.kind}, got {entry.method!r}; take one of them"
            )
    if data.kind != "class" and config.model.classes is not None:
        raise InputError(
            f"model.classes: is for one class a sample, got {config.model.classes} with targets of kind {data.kind}; leave it out, and "
            "name later labels or classes in the data set's class_names"
        )


def check_preprocess(config: RunConfig, data: Dataset) -> None:
    """Whether the normalisation suits the samples, before it is a part of any learner."""
    preprocess = config.preprocess()
    try:
        if preprocess is not None:
            preprocess(torch.tensor(data.x[:1]))
    except InputError as error:
        raise InputError(f"model.preprocess.{error}") from error
    except (RuntimeError, IndexError, ValueError) as error:  # PyTorch's, where the sample has other axes
        got = f"{list(data.x.shape[1:])} of the data set's samples ({str(error).partition(chr(10))[0].rstrip('.')})"
        raise InputError(f"model.preprocess.layout: must name the axes of one image, got {got}; mend it, or leave the table out") from error


def check_pretraining(config: RunConfig, stream: Stream) -> None:
    """Whether there is a base set where the configuration wants to pretrain on it."""
    if config.model.pretrain is not None and not len(stream.base[1]):
        raise InputError("model.pretrain: must have a base set to train on, the scenario has none; leave it out, or give weights")


def trained(config: RunConfig, data: Dataset, stream: Stream, seed: int) -> nn.Module:
    """The network of a seed: built, and pretrained on the base set where the configuration says so."""
    generator = torch.Generator().manual_seed(seed)
    net = build(config, data, generator)
    how = config.model.pretrain
    if how is not None:
        x, y = stream.base
        with threads(how.threads), _named("model.pretrain."):
            train(
                net,
                x,
                y,
                preprocess=config.preprocess(),
                recipe=how.recipe(),
                generator=generator,
                device=how.device,
                kind=data.kind,
                ignore=data.ignore,
            )
    return net


def ready(config: RunConfig, data: Dataset, stream: Stream, seed: int, path: Path) -> dict[str, Any]:
    """Make the network of a seed, and write its tensors to ``path``; returns what to remember of it."""
    net = trained(config, data, stream, seed)
    save_network(path, net.state_dict())
    return {"sha256": weight_hash(net), "pretrained": config.model.pretrain is not None}


def load(config: RunConfig, data: Dataset, seed: int, path: Path) -> nn.Module:
    """The network of a seed, with the tensors that :func:`ready` has written.

    Raises:
        InputError: when the file does not hold them any more.
    """
    net = build(config, data, torch.Generator().manual_seed(seed))
    wanted = read_json(path.with_suffix(".json")).get("sha256")
    try:
        load_weights(net, path)
        found = weight_hash(net)
    except WeightsError as error:
        found = str(error).removeprefix(f"{path}: ").partition("; ")[0]
    if found != wanted:
        raise InputError(f"{path}: must hold the network of SHA-256 {wanted}, got {found}; run it again with --fresh")
    return net.eval()
