"""Data sets and scenarios that a configuration may name: one line each; options are the keyword arguments of the function."""

import inspect
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, create_model

from edgecl.runs.errors import checked
from edgecl.streams import ClassIncremental, Dataset, Stream, fashion_mnist_subset

DATASETS: dict[str, Callable[..., Dataset]] = {
    "fashion-mnist-subset": fashion_mnist_subset,
}
"""Functions that load a data set."""

SCENARIOS: dict[str, Callable[..., Stream]] = {
    "class-incremental": ClassIncremental,
}
"""Scenarios; the data set and the seed are given by the run."""

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
    for name, parameter in options_of(function).items():
        fields[name] = (hints.get(name, Any), ... if parameter.default is parameter.empty else parameter.default)
    model: type[BaseModel] = create_model("Options", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)
    values = checked(model, options, where)
    paths = {name for name in fields if Path in (hints.get(name), *typing.get_args(hints.get(name)))}
    return {name: base / value if name in paths else value for name in options if (value := getattr(values, name)) is not None}
