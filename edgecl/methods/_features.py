"""What the analytic methods share: the feature vector of a sample, and checks of hyperparameters."""

import math
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from edgecl.learner import flatten_features
from edgecl_device.errors import InputError

LARGEST = float(np.finfo(np.float32).max)

SMALLEST_NORM = 1e-12
"""A feature vector shorter than this is divided by it instead, so that zeros stay zeros."""


def unit(x: Tensor) -> Tensor:
    """Rows of ``x`` [N, d] divided by their Euclidean length.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    length = (x * x).sum(1, keepdim=True).sqrt()
    return x / length.clamp_min(SMALLEST_NORM)


def vector(z: Any, unit_norm: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """One encoded sample as a vector [1, d] of ``dtype``, of length 1 if ``unit_norm``."""
    x = flatten_features(z).to(dtype)
    return unit(x) if unit_norm else x


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """Scalar product [1, K] of each row of ``a`` [K, d] with the same row of ``b`` [K, d].

    A matrix product with ones, so that its K d operations stand in the cost table as MACs.

    >>> row_products(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]])).tolist()
    [[3.0, 8.0]]
    """
    return torch.mm(a * b, torch.ones(a.shape[1], 1, dtype=a.dtype)).t()


def reflection_to_first_axis(direction: Tensor) -> Tensor:
    """The unit vector v [d, 1] whose reflection I - 2 v v^T takes a direction [d] to the first axis; zero for a zero direction.

    >>> v = reflection_to_first_axis(torch.tensor([0.0, 3.0]))
    >>> (torch.tensor([0.0, 3.0]) - 2 * v[:, 0] * (v[1, 0] * 3.0)).abs().round(decimals=6).tolist()
    [3.0, 0.0]
    """
    row = unit(direction.double().unsqueeze(0))
    if row.any():
        row[0, 0] += 1.0 if row[0, 0] >= 0 else -1.0  # the sign that does not cancel
    return unit(row).t().to(direction.dtype)


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a config's ``dtype``.

    Raises:
        InputError: when it is not ``float32`` or ``float64``.
    """
    known = {"float32": torch.float32, "float64": torch.float64}
    require(name in known, "dtype", "be 'float32' or 'float64'", name, "use 'float32' unless exactness needs more")
    return known[name]


MOST_DELAY = 256
"""Most updates that may wait; 16 are enough to make the refresh a small part of an update."""


def check_delay(delay: int) -> None:
    """Check a config's ``delay``.

    Raises:
        InputError: when it is not within 0 and :data:`MOST_DELAY`.
    """
    require(0 <= delay <= MOST_DELAY, "delay", f"be within 0 and {MOST_DELAY} updates", delay, "use 0 for none, or 16")


def check_types(config: Any) -> None:
    """Check the plain types of a config's values; NumPy's numbers become Python's.

    Raises:
        InputError: naming the first value that does not fit.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, np.generic):
            value = value.item()
            object.__setattr__(config, name, value)  # frozen for others: nobody has it yet
        wanted = get_args(hint) or (hint,)
        if value is None and type(None) in wanted:
            continue
        kinds: dict[Any, tuple[type, ...]] = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}
        plain = next((kinds[kind] for kind in wanted if kind in kinds and get_origin(hint) is not tuple), None)
        ok = plain is None or (isinstance(value, plain) and (bool in plain or not isinstance(value, bool)))
        require(
            ok, name, f"be of type {getattr(hint, '__name__', hint) if plain and len(wanted) == 1 else hint}", value, "pass such a value"
        )
        if float in wanted and isinstance(value, (int, float)):
            beyond = LARGEST < abs(value) < math.inf  # whether infinity will do is the parameter's own affair
            require(not beyond, name, f"be at most {LARGEST:.3g}, float32's largest number", value, "pass such a value")
            if isinstance(value, int) and abs(value) >= 2**63:  # beyond what PyTorch takes as a whole number
                object.__setattr__(config, name, float(value))


def require(ok: bool, parameter: str, constraint: str, value: object, mend: str) -> None:
    """Raise an InputError that names the parameter unless ``ok``."""
    if not ok:
        raise InputError(f"{parameter}: must {constraint}, got {value!r}; {mend}")
