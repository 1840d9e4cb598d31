"""Kinks: where a rectifier's input is zero but for rounding, each engine may take either side, and gradients jump.

Two ways to let eager take the other side. Nudged weights are such that eager itself computes; but weights in front of a norm move a
gradient that is small beside its terms, too. A shifted rectifier changes nothing but the side of what is near its kink.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from edgecl_device.manifest import Array

NUDGE, NUDGES, MOST_NUDGES = 1e-6, 8, 64
"""Relative change of trained weights that takes a rectifier over its kink, about ten roundings; how many times it is tried, and how many
times at most: of several kinks that are near an engine may take each either way, and of five the right sides come up once in 32."""

NUDGED = ("param.", "average.")
"""Names of the trained weights, and of their running average."""

SHIFTS, TURNS = (1e-6, 3e-6, 1e-5), 8
"""Shifts of rectifiers, as shares of the root mean square of what comes in, and how many times each is tried: a norm that takes away a mean
far from zero is off by more than ten roundings."""

_IN_PLACE = {torch.relu_, Tensor.relu_, F.relu_, F.hardtanh_}
_RECTIFIERS = {torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu, F.relu_, F.relu6}
_CLIPPED = {F.hardtanh, F.hardtanh_}


def nudged(state: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """States whose trained weights are some roundings away: a rectifier at its kink then falls to the other side.

    Each weight goes up or down by :data:`NUDGE` of its size, by chance, as a common factor would not move a sum that is zero. Each nudge
    is followed by its mirror image, so that one of the two crosses. A weight and its running average move by the same factor.

    Example:
        >>> up, down, *_ = nudged({"param.w": np.ones(4), "count": np.ones(1)})
        >>> np.abs(up["param.w"] - 1).round(7), (up["param.w"] + down["param.w"]).round(9), up["count"]
        (array([1.e-06, 1.e-06, 1.e-06, 1.e-06]), array([2., 2., 2., 2.]), array([1.]))
    """
    if not any(name.startswith(NUDGED) for name in state):
        return
    for index in range(MOST_NUDGES):
        generator = np.random.default_rng(index // 2)
        steps = {}
        for name, value in state.items():
            if name.startswith("param."):
                steps[name.partition(".")[2]] = NUDGE * (-1) ** index * (1.0 - 2.0 * generator.integers(0, 2, value.shape, np.int8))
        yield {
            name: (value * (1.0 + steps[name.partition(".")[2]])).astype(value.dtype) if name.startswith(NUDGED) else value
            for name, value in state.items()
        }


class Shifted(TorchFunctionMode):
    """While inside, each rectifier decides by its input plus a shift, up or down by chance, and passes on the input itself.

    Rectifiers are ReLU, ReLU6 and hardtanh, as functions, methods or modules.
    Units of all rows go the same way: rows may be equal, and an engine then takes the same side for all of them.
    What has no size to take a share of, as integers, single values and infinities, is rectified as ever.

    Args:
        share: The shift, as a share of the root mean square of the input.
        seed: Of the directions.

    Example:
        >>> x = torch.tensor([[1e-7, -1e-7, 1.0, -1.0]])
        >>> with Shifted(1e-6, seed=0):
        ...     taken = torch.cat([x.relu() != 0 for _ in range(9)]).sum(0)
        >>> [0 < times < 9 for times in taken.tolist()], taken[2:].tolist()
        ([True, True, False, False], [9, 0])
    """

    def __init__(self, share: float, seed: int) -> None:
        super().__init__()
        self._share, self._generator = share, np.random.default_rng(seed)  # torch's would be refused within vmap

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Rectifiers otherwise than they are, the rest as it is."""
        if func not in _RECTIFIERS | _CLIPPED:
            return func(*args, **(kwargs or {}))
        names = ("input", "min_val", "max_val", "inplace") if func in _CLIPPED else ("input", "inplace")
        given = {"min_val": -1.0, "max_val": 1.0, **dict(zip(names, args, strict=False)), **(kwargs or {})}
        low, high = (given["min_val"], given["max_val"]) if func in _CLIPPED else (0.0, 6.0 if func is F.relu6 else math.inf)
        x: Tensor = given["input"]
        if not x.dim() or not x.is_floating_point():
            return func(*args, **(kwargs or {}))
        up = torch.from_numpy(1.0 - 2.0 * self._generator.integers(0, 2, (1, *x.shape[1:]), np.int8)).to(x.device)
        wide = x.detach().double()  # squares of float32 may overflow
        near = wide + self._share * wide.square().mean().sqrt().nan_to_num(0.0, 0.0, 0.0) * up
        found = torch.where(near <= low, low, torch.where(near >= high, high, x))
        return x.copy_(found) if func in _IN_PLACE or given.get("inplace") else found


def shifts() -> Iterator[Shifted]:
    """Each shift in its turn, in other directions each time."""
    for seed in range(TURNS):
        for share in SHIFTS:
            yield Shifted(share, seed)
