"""Nested mappings of named tensors and their flat form with dotted names."""

from collections.abc import Mapping
from typing import Any


def flatten_tree(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted name, in the mappings' order.

    >>> flatten_tree({"replay": {"z": 1, "target": 2}, "lr": 3})
    {'replay.z': 1, 'replay.target': 2, 'lr': 3}
    """
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten_tree(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def unflatten_like(tree: Any, leaves: Mapping[str, Any], prefix: str = "") -> Any:
    """The inverse of :func:`flatten_tree`, with the nesting of ``tree``.

    >>> unflatten_like({"replay": {"z": None}, "lr": None}, {"replay.z": 1, "lr": 3})
    {'replay': {'z': 1}, 'lr': 3}
    """
    if not isinstance(tree, Mapping):
        return leaves[prefix]
    return {key: unflatten_like(value, leaves, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items()}
