"""What the command's options describe: a model, its input, its normalisation, a method's hyperparameters."""

import dataclasses
import importlib.util
import math
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgecl.backbones import BACKBONES, load_weights
from edgecl.methods import METHODS
from edgecl.preprocess import ImageU8
from edgecl.splitting import widen_head
from edgecl_device.checks import entry
from edgecl_device.errors import InputError
from edgecl_device.manifest import Array

MOST_VALUES = 1 << 28
"""Most values of one sample; more are not even tried to allocate."""

INPUTS: dict[str, tuple[int, ...]] = {
    "small_cnn": (1, 1, 28, 28),
    "mobilenet_v2": (1, 3, 224, 224),
    "resnet18": (1, 3, 224, 224),
    **{f"resnet{n}": (1, 3, 32, 32) for n in (20, 32, 44, 56)},
    "wrn_28_10": (1, 3, 32, 32),
    "wrn_40_2": (1, 3, 32, 32),
    "vit": (1, 3, 32, 32),
    "ds_cnn": (1, 1, 49, 10),
    "cnn1d": (1, 9, 128),
    "gru": (1, 128, 9),
}
"""Input of each backbone: [1, C, H, W] of an image, else as the backbone says."""

Number = typing.TypeVar("Number", int, float)


def load_model(
    model: str, classes: int, weights: Path | None = None, model_classes: int | None = None, generator: torch.Generator | None = None
) -> nn.Module:
    """A backbone by name, or what a function in a file returns.

    Args:
        model: Name, or ``file.py:function``.
        classes: Outputs wanted of a backbone.
        weights: File of weights.
        model_classes: Outputs of a backbone in ``weights``; its last linear layer is then widened to ``classes``.
        generator: Of a backbone's initial weights; None is that of its constructor.

    Raises:
        InputError: when there is no such backbone, file or function, or it returns no module.
        WeightsError: when the weights do not fit.
    """
    if model in BACKBONES:
        net = BACKBONES[model](classes=model_classes or classes, generator=generator)
    else:
        net = _own_model(model, model_classes)
    if weights is not None:
        load_weights(net, weights)
    if model_classes is not None and model_classes < classes:
        net = widen_head(net, [name for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1], classes)
    return net


def _own_model(model: str, model_classes: int | None) -> nn.Module:
    file, _, function = model.rpartition(":")
    path = Path(file)
    if not file.endswith(".py") or not path.is_file():
        raise InputError(f"MODEL: must be one of {', '.join(BACKBONES)}, or file.py:function with an existing file, got {model!r}")
    if model_classes is not None:
        raise InputError(f"--model-classes: is for the backbones only, got it with {model!r}; widen the head in {function}()")
    name = f"edgecl_own_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    with _importable(name, path.resolve().parent):
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # there dataclasses look up their annotations
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise InputError(f"MODEL: {file} failed with {_cause(error, path)}; mend the file") from error
        if not hasattr(module, function):
            raise InputError(f"MODEL: {file} has no attribute {function!r}; name a function in it that returns an nn.Module")
        try:
            net = getattr(module, function)()
        except (Exception, SystemExit) as error:
            outside = isinstance(error, TypeError) and error.__traceback__ is not None and error.__traceback__.tb_next is None
            mend = "it must be a function without arguments" if outside else f"mend {function}()"
            raise InputError(f"MODEL: {model} failed with {_cause(error, path)}; {mend}") from error
    if not isinstance(net, nn.Module):
        raise InputError(f"MODEL: {model} must return an nn.Module, got {type(net).__name__}")
    return net


@contextmanager
def _importable(name: str, folder: Path) -> Iterator[None]:
    """While inside, what lies in ``folder`` can be imported, as beside a script; a failure leaves no module of it behind."""
    before = dict(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    except BaseException:
        for key in set(sys.modules) - set(before):
            if key == name or folder in Path(getattr(sys.modules[key], "__file__", None) or "").parents:
                del sys.modules[key]
        if name in before:
            sys.modules[name] = before[name]
        raise
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _cause(error: BaseException, path: Path) -> str:
    """Type, text and, where it is known, the line of the user's file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")


def preprocessing(layout: str | None, mean: str | None, std: str | None, resize: str | None = None) -> ImageU8 | None:
    """The normalisation that the options describe.

    Raises:
        InputError: when one of the three is missing or wrong.
    """
    if layout is None and mean is None and std is None and resize is None:
        return None
    if layout is None or mean is None or std is None:
        raise InputError("--preprocess-u8, --mean, --std: go together, one of them is missing; give all three or none")
    size = None if resize is None else _numbers("--resize", resize, int)
    return ImageU8(_numbers("--mean", mean, float), _numbers("--std", std, float), layout, size)


def example_of(model: str, shape: str | None, dtype: str, preprocess: ImageU8 | None) -> Array:
    """One raw sample of zeros.

    Raises:
        InputError: when shape or type are wrong, or no shape is known.
    """
    if dtype not in ("float32", "uint8"):
        raise InputError(f"--dtype: must be float32 or uint8, got {dtype!r}")
    if shape is not None:
        sizes = tuple(_numbers("--input", shape, int))
        if len(sizes) < 2 or sizes[0] != 1 or min(sizes) < 1:
            raise InputError(f"--input: must be a batch of 1 and positive sizes, as 1,3,32,32, got {shape!r}")
        if (values := math.prod(sizes)) > MOST_VALUES:
            raise InputError(f"--input: must hold at most {MOST_VALUES:,} values, got {values:,} in {shape!r}; give a smaller sample")
    elif model in INPUTS:
        sizes = INPUTS[model]
        if preprocess is not None:
            if len(sizes) != 4:
                raise InputError(f"--preprocess-u8: is for images, {model!r} takes {list(sizes)}; leave it out")
            _, c, h, w = sizes
            sizes = {"CHW": (1, c, h, w), "HWC": (1, h, w, c), "HW": (1, h, w)}[preprocess.layout]
    else:
        raise InputError(f"--input: is needed for {model!r}; give the shape of one raw sample, as 1,3,32,32")
    return np.zeros(sizes, "uint8" if preprocess else dtype)


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: must be numbers separated by commas, got {text!r}") from None


_NUMBER = r"[0-9]{1,18}(?:\.[0-9]{1,18})?"
"""A number without a sign that is not beyond what any machine has."""


def parse_bytes(option: str, text: str) -> int:
    """Bytes from a number, with or without a unit.

    Raises:
        InputError: on anything else.

    >>> parse_bytes("--ram-budget", "64MiB"), parse_bytes("--ram-budget", "1.5 KB"), parse_bytes("--ram-budget", "4096")
    (67108864, 1500, 4096)
    """
    found = re.fullmatch(rf"({_NUMBER}) ?(?:([KMG])(i?))?B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise InputError(f"{option}: must be bytes, as 64MiB, 500KB or 1048576, got {text!r}")
    number, prefix, binary = found.groups()
    return _scaled(number, prefix, 1024 if binary else 1000)


def parse_count(option: str, text: str) -> int:
    """A count from a number, with or without a decimal unit.

    Raises:
        InputError: on anything else.

    >>> parse_count("--macs", "5M"), parse_count("--macs", "1.5 k"), parse_count("--macs", "675648")
    (5000000, 1500, 675648)
    """
    found = re.fullmatch(rf"({_NUMBER}) ?([KMGT])?", text.strip(), re.IGNORECASE)
    if found is None:
        raise InputError(f"{option}: must be a count, as 5M, 800k or 675648, got {text!r}")
    number, prefix = found.groups()
    return _scaled(number, prefix, 1000)


def _scaled(number: str, prefix: str | None, base: int) -> int:
    """A number with a unit's letter, whole: exact for any size."""
    return int(Fraction(number) * base ** (" KMGT".index(prefix.upper()) if prefix else 0))


def place(at: str) -> str | tuple[str, ...]:
    """Where to cut: one module's name, or names separated by commas; a comma at the end marks a single one of such.

    >>> place("layer3"), place("layer2,layer3"), place("layer3,")
    ('layer3', ('layer2', 'layer3'), ('layer3',))
    """
    return tuple(at.removesuffix(",").split(",")) if "," in at else at


def parse_config(method: str, pairs: Sequence[str]) -> Any:
    """A method's ``Config`` from ``key=value`` texts; tuples are separated by commas, ``none`` is None.

    Raises:
        InputError: on an unknown method or key, a repeated key, or a value of another type.

    >>> parse_config("finetune", ["lr=0.1", "trainable=fc.*,conv.*"]).trainable
    ('fc.*', 'conv.*')
    """
    kind = entry("--method", method, METHODS).Config
    hints = {field.name: typing.get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key not in hints or key in values:
            known = ", ".join(hints) or "(none)"
            raise InputError(f"--config: must be KEY=VALUE, each key once, keys of {method} are {known}, got {pair!r}")
        try:
            values[key] = _parsed(hints[key], text)
        except (ValueError, KeyError):
            wanted = getattr(hints[key], "__name__", str(hints[key])) if typing.get_origin(hints[key]) is None else str(hints[key])
            raise InputError(f"--config: {key} must be of type {wanted}, got {text!r}") from None
    return kind(**values)


def _parsed(hint: Any, text: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if text == "none" else _parsed(args[0], text)
    if origin is tuple:
        parts = text.split(",")
        if args[-1] is not Ellipsis and len(parts) != len(args):
            raise ValueError(text)
        return tuple(_parsed(args[0], part) for part in parts)
    if hint is bool:
        return {"true": True, "false": False}[text.lower()]
    return hint(text)
