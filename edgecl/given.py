"""What users give: samples, names and weights, checked and made plain."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgecl.trees import flatten_tree, leaves
from edgecl_device.checks import as_float32, short
from edgecl_device.errors import InputError
from edgecl_device.manifest import Array

Samples = Array | Mapping[str, Array]
"""Raw samples [N, ...], or a mapping of a model's inputs to such."""


def plain_samples(name: str, x: Any) -> Any:
    """Samples as plain arrays in this machine's byte order: one, or a mapping of inputs to equally many."""
    if isinstance(x, Mapping) and x and all(isinstance(key, str) and key.isidentifier() for key in x):
        parts = {key: plain_samples(f"{name}.{key}", part) for key, part in x.items()}
        if len({len(part) for part in parts.values()}) > 1:
            raise InputError(f"{name}: inputs must have equally many samples, got {[len(part) for part in parts.values()]}; cut the longer")
        return parts
    if isinstance(x, np.ma.MaskedArray) or not isinstance(x, np.ndarray) or x.ndim < 2 or not len(x):
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
        raise InputError(f"{name}: must be a numpy array [N, ...] of at least one sample, got {got}; use numpy.asarray, or x[None] for one")
    if x.dtype.kind not in "fiub":
        raise InputError(f"{name}: must hold numbers, got {x.dtype}; convert it to float32 or uint8")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise InputError(f"{name}: values must be finite, got NaN or infinity; drop or repair those samples")
    return np.ascontiguousarray(x, x.dtype.newbyteorder("="))


def check_like(x: Samples, wanted: Any, name: str = "x") -> None:
    """Samples, which argument ``name`` gave, must have the inputs, shapes and types of the example, whose specs are ``wanted``."""
    if isinstance(x, Mapping) != isinstance(wanted, Mapping) or (isinstance(x, Mapping) and set(x) != set(wanted)):
        names = list(wanted) if isinstance(wanted, Mapping) else "one array"
        raise InputError(f"{name}: must have the inputs of the example, {names}, got {list(x) if isinstance(x, Mapping) else 'one array'}")
    specs = flatten_tree({name: wanted})
    for key, part in flatten_tree({name: x}).items():
        spec = specs[key]
        if part.shape[1:] != spec.shape[1:] or part.dtype.name != spec.dtype:
            sizes = ", ".join(map(str, ("N", *spec.shape[1:])))
            raise InputError(
                f"{key}: must be {spec.dtype} [{sizes}] as the example, got {part.dtype} {list(part.shape)}; convert or resize it"
            )


def check_independent(z: Any, alone: Any, batch: int) -> None:
    """The first row of a batch of latents must be the latent of the first sample alone, which is how the device computes it."""
    for together, single in zip(leaves(z), leaves(alone), strict=True):
        ok = len(together) == batch and len(single) == 1
        if not ok or not torch.allclose(together[:1].double(), single.double(), rtol=1e-3, atol=1e-4 * float(single.double().abs().max())):
            raise InputError(
                f"x: the model's latent of a sample depends on the rest of its batch of {batch}; pass batch=1 to fit and encode"
            )


NAMES = {"class": "class_names", "vector": "names", "multilabel": "labels", "map": "classes"}
"""Which argument gave the names, by kind of target."""


def check_names(argument: str, names: Any, most: int) -> None:
    """Names, which ``argument`` gave, must be different texts, ``most`` of them at most."""
    ok = isinstance(names, Sequence) and not isinstance(names, (str, bytes)) and all(isinstance(name, str) and name for name in names)
    if not ok:
        raise InputError(f"{argument}: must be a list of strings, none of them empty, got {short(names)}; pass ['cat', 'dog']")
    if odd := [name for name in names if not name.isascii() and re.search("[\ud800-\udfff]", name)]:
        raise InputError(f"{argument}: must be text that UTF-8 can hold, got {short(odd)}; rename it")
    if len(names) > most:
        wider = "size" if argument == "names" else "classes"
        raise InputError(f"{argument}: must be at most {most} names, got {len(names)}; raise {wider}")
    twice = sorted(name for name, times in Counter(names).items() if times > 1)
    if twice:
        raise InputError(f"{argument}: must be different names, got {short(twice)} more than once; rename one")


def sample_weights(weight: Any, samples: int) -> list[Tensor]:
    """Weights [N] as one tensor [1] a sample."""
    try:
        found = np.asarray(weight)
    except ValueError as error:  # lists of different lengths
        raise InputError(f"weight: must be numbers [{samples}], one a sample, got {short(weight)} ({error}); reshape it") from error
    if found.shape != (samples,):
        raise InputError(f"weight: must be numbers [{samples}], one a sample, got {found.dtype} {list(found.shape)}; reshape it")
    return [torch.tensor([as_float32(f"weight of sample {i}", value, positive=True)]) for i, value in enumerate(found)]


def check_device(device: str) -> None:
    """Refuse a device that PyTorch has not here, or that holds no values, as 'meta'.

    Raises:
        InputError: naming it.
    """
    wanted = "device: must be a device that PyTorch has here, as 'cpu' or 'cuda'"
    if not isinstance(device, str):
        raise InputError(f"{wanted}, got {short(device)}; pass a string")
    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # what it is depends on what torch was built with
        why = short(str(error).partition("\n")[0])
        raise InputError(f"{wanted}, got {short(device)} ({why}); choose another, or install the build of PyTorch for it") from error
