"""A method's hyperparameters from a configuration's table."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from edgecl.methods import METHODS
from edgecl.options import parse_bytes
from edgecl.runs.errors import unknown
from edgecl_device.errors import InputError


def method_config(where: str, method: str, values: Mapping[str, Any]) -> Any:
    """A method's ``Config``; lists become tuples, the text ``"none"`` is None where that may be, ``_bytes`` keys take ``"128KiB"``.

    Raises:
        InputError: on an unknown key, naming the nearest, or a value that does not fit.

    >>> method_config("config", "latent_replay", {"capacity_bytes": "128KiB"}).capacity_bytes
    131072
    """
    kind = METHODS[method].Config
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names:
            raise InputError(unknown(where, key, names))
        optional = type(None) in typing.get_args(hints[key])
        if key.endswith("_bytes") and isinstance(value, str):
            found[key] = parse_bytes(f"{where}.{key}", value)
        elif value == "none" and optional:
            found[key] = None
        else:
            found[key] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**found)
    except InputError as error:
        raise InputError(f"{where}.{error}") from error
