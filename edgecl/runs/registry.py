"""Data sets and scenarios that a configuration may name: one line each; options are the keyword arguments of the function."""

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, create_model

from edgecl.runs.errors import checked
from edgecl.streams import (
    Blurry,
    ClassIncremental,
    Dataset,
    DomainIncremental,
    OneTask,
    Recurring,
    Stream,
    TaskIncremental,
    TimeOrdered,
    fashion_mnist_subset,
    fetch,
    load_arrays,
    load_cifar10,
    load_cifar100,
    load_idx,
    load_wavs,
    load_windows,
)
from edgecl_device.errors import InputError


@dataclass(frozen=True)
class Source:
    """A data set of the registry.

    Attributes:
        load: Function that loads it.
        public: What :func:`edgecl.streams.fetch` calls it, where ``download = true`` brings its folder.
    """

    load: Callable[..., Dataset]
    public: str | None = None


DATASETS: dict[str, Source] = {
    "fashion-mnist-subset": Source(fashion_mnist_subset),
    "fashion-mnist": Source(load_idx, "fashion_mnist"),
    "idx": Source(load_idx),
    "cifar10": Source(load_cifar10, "cifar10"),
    "cifar100": Source(load_cifar100, "cifar100"),
    "fsdd": Source(load_wavs, "fsdd"),
    "wavs": Source(load_wavs),
    "windows": Source(load_windows),
    "arrays": Source(load_arrays),
}
"""Data sets by name."""

SCENARIOS: dict[str, Callable[..., Stream]] = {
    "class-incremental": ClassIncremental,
    "task-incremental": TaskIncremental,
    "domain-incremental": DomainIncremental,
    "blurry": Blurry,
    "recurring": Recurring,
    "time-ordered": TimeOrdered,
    "one-task": OneTask,
}
"""Scenarios by name; the data set and the seed are given by the run."""

GIVEN = ("dataset", "seed")
"""Parameters of a scenario that are no options."""


def options_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that a configuration may set, by name."""
    return {name: p for name, p in inspect.signature(function).parameters.items() if name not in GIVEN}


def check_options(where: str, function: Callable[..., Any], options: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Options as the function takes them: known, of the right types, paths relative to ``base``.

    Args:
        where: Section of the configuration, for errors.
        function: Its keyword arguments are the options.
        options: Values as TOML has them.
        base: Folder that relative paths start from.

    Raises:
        InputError: naming each option that is unknown, missing or of another type.

    >>> check_options("data", lambda folder: None, {"folder": "here"}, Path("/base"))
    {'folder': 'here'}
    """
    fields: dict[str, Any] = {}
    hints = typing.get_type_hints(getattr(function, "__init__") if isinstance(function, type) else function)  # noqa: B009
    paths = {name for name, hint in hints.items() if Path in (hint, *typing.get_args(hint))}
    for name, parameter in options_of(function).items():
        hint = Path if name in paths else hints.get(name, Any)
        fields[name] = (hint, ... if parameter.default is parameter.empty else parameter.default)
    model: type[BaseModel] = create_model("Options", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)
    values = checked(model, options, where)
    return {name: base / value if name in paths else value for name in options if (value := getattr(values, name)) is not None}


def dataset_options(name: str, options: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Options of a data set as :func:`load` takes them; ``download = true`` stands for the folder of a public one.

    Raises:
        InputError: as :func:`check_options`, and when there is nothing to download.
    """
    source, rest = DATASETS[name], dict(options)
    if not (wanted := rest.pop("download", False)):
        return check_options("data", source.load, rest, base)
    public = [name for name, source in DATASETS.items() if source.public]
    if wanted is not True or source.public is None:
        raise InputError(f"data.download: must be true or false, and is for {', '.join(public)}, got {wanted!r} for {name}; give its files")
    if "folder" in rest:
        raise InputError("data.folder: must not be given beside download = true, which brings its own; leave one of them out")
    return {**check_options("data", source.load, {**rest, "folder": "."}, base), "folder": None}


def load(name: str, options: Mapping[str, Any]) -> Dataset:
    """A data set; what is to be downloaded is fetched first.

    Args:
        name: In :data:`DATASETS`.
        options: Of :func:`dataset_options`.
    """
    source = DATASETS[name]
    if "folder" in options and options["folder"] is None:
        return source.load(**{**options, "folder": fetch(str(source.public))})
    return source.load(**options)


def make_stream(name: str, options: Mapping[str, Any], data: Dataset, seed: int) -> Stream:
    """A scenario's stream.

    Args:
        name: In :data:`SCENARIOS`.
        options: As :func:`check_options` returns them.
        data: The data set.
        seed: Of the order, where the scenario draws one.

    Raises:
        InputError: when the options do not suit the data, or the stream has no sample.
    """
    make = SCENARIOS[name]
    given = {"seed": seed} if "seed" in inspect.signature(make).parameters else {}
    stream = make(data, **options, **given)
    if not len(stream):
        raise InputError(f"scenario: {name} must have at least one sample behind the base set, got none; list one more task")
    return stream
