"""A configuration's errors in one form: the parameter, the constraint, what was got, the mend."""

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from edgecl_device.errors import InputError

Model = TypeVar("Model", bound=BaseModel)

_LONGEST = 60
"""Characters of a value that an error shows."""


def checked(model: type[Model], values: Mapping[str, Any], where: str = "") -> Model:
    """Values as a model has them.

    They are checked as JSON, where a list may become a tuple and a text a path, but no text becomes a number.

    Args:
        model: What they must be.
        values: As read from TOML.
        where: Section that the values are from, for the errors.

    Raises:
        InputError: with one part for each wrong value.

    >>> class Point(BaseModel, extra="forbid"):
    ...     x: int
    >>> checked(Point, {"x": "1"}, "point")
    Traceback (most recent call last):
    edgecl_device.errors.InputError: point.x: must be a valid integer, got '1'
    """
    try:
        return model.model_validate_json(json.dumps(values, default=_plain), strict=True)
    except ValidationError as error:
        found = [_in_words(model, where, dict(e)) for e in error.errors()]
        raise InputError("; ".join(dict.fromkeys(found))) from error


def _plain(value: Any) -> Any:
    """What JSON has not: a path is its text; TOML's dates and times, which no key takes, must not become texts."""
    return str(value) if isinstance(value, PurePath) else {"date or time": str(value)}


def unknown(where: str, key: str, known: Iterable[str]) -> str:
    """That a section has no such key, and which is the nearest."""
    known = list(known)
    near = get_close_matches(key, known, 1, 0.5)
    mend = f"the nearest is {near[0]!r}" if near else "leave it out"
    return f"{where or 'configuration'}: keys must be among {', '.join(known) or '(none)'}, got {key!r}; {mend}"


def choice(where: str, value: str, known: Iterable[str]) -> InputError:
    """That a value is none of those that there are, and which is the nearest."""
    known = list(known)
    near = get_close_matches(value, known, 1, 0.5)
    mend = f"; the nearest is {near[0]!r}" if near else "; name one of them"
    return InputError(f"{where}: must be one of {', '.join(known)}, got {_short(value)}{mend}")


def _in_words(model: type[BaseModel], where: str, error: dict[str, Any]) -> str:
    place, kind = list(error["loc"]), error["type"]
    section, description = _section(model, place[:-1]), ""
    if section is not None and place and place[-1] in section.model_fields:
        description = section.model_fields[place[-1]].description or ""
    if kind == "extra_forbidden" and section is not None:
        return unknown(_path(where, place[:-1]), str(place[-1]), section.model_fields)
    path = _path(where, place)
    mend = f"; it is {description}" if description else ""
    if kind == "missing":
        return f"{path}: must be given, got nothing{mend}"
    if kind == "value_error":
        return f"{path}: {error['ctx']['error']}{mend}"
    message = error["msg"].replace("Input should be", "must be").replace("should have", "must have")
    message = message[0].lower() + message[1:] if message.startswith(("List", "Value", "Tuple")) else message
    return f"{path}: {message.replace(', unable to parse string as an integer', '')}, got {_short(error['input'])}{mend}"


def _section(model: type[BaseModel], place: list[Any]) -> type[BaseModel] | None:
    """The model of a section, by the path of keys to it; None inside of what is no section."""
    for key in place:
        if isinstance(key, int):
            continue
        field = model.model_fields.get(key) if isinstance(key, str) else None
        if field is None:
            return None
        kinds = _models(field.annotation)
        if not kinds:
            return None
        model = kinds[0]
    return model


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in getattr(annotation, "__args__", ()) for kind in _models(part)]


def _path(where: str, place: list[Any]) -> str:
    text = where
    for key in place:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
