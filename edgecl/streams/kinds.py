"""The kinds of targets that a data set may have, and their checks on whole arrays."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecl_device.errors import InputError

KINDS = ("class", "multilabel", "vector", "map")


def check_targets(name: str, y: NDArray[Any], count: int, kind: str, outputs: int, ignore: int | None) -> None:
    """Refuse targets that are not of their kind.

    Args:
        name: The parameter.
        y: Targets [N, ...].
        count: Samples N.
        kind: One of :data:`KINDS` but ``class``.
        outputs: Names that there are: labels, values or classes K.
        ignore: Value of a map's pixels that count for nothing, or None.
    """
    shapes = {"multilabel": f"zeros and ones [{count}, {outputs}]", "vector": f"float32 [{count}, {outputs}]"}
    wanted = shapes.get(kind, f"integers [{count}, H, W]")
    types = {"multilabel": "iub", "vector": "f", "map": "iu"}[kind]
    fits = y.shape == (count, outputs) if kind != "map" else y.ndim == 3 and len(y) == count and 0 not in y.shape[1:]
    if not fits or y.dtype.kind not in types or (kind == "vector" and y.dtype != np.float32):
        raise InputError(f"{name}: must be {wanted} for targets of kind {kind}, got {y.dtype} {list(y.shape)}; convert it, or add names")
    if kind == "vector" and not np.isfinite(y).all():
        raise InputError(f"{name}: values must be finite, got NaN or infinity; drop those samples")
    if kind == "multilabel" and not ((y == 0) | (y == 1)).all():
        raise InputError(f"{name}: labels must be 0 or 1, got {np.unique(y).tolist()[:5]}; pass one value a label, 1 where it applies")
    if kind == "map":
        wrong = (y < 0) | (y >= outputs)
        if ignore is not None:
            wrong &= y != ignore
        if wrong.any():
            also = "" if ignore is None else f" or {ignore}, which is ignored"
            found = np.unique(y[wrong]).tolist()[:5]
            raise InputError(f"{name}: pixels must be in 0..{outputs - 1}{also}, got {found}; add class names, or say what to ignore")
