"""Nested mappings of named tensors and their flat form with dotted names."""

from collections.abc import Callable, Mapping
from typing import Any


def map_tree(tree: Any, function: Callable[[Any], Any]) -> Any:
    """The same nesting with ``function`` of every leaf.

    >>> map_tree({"image": 1, "sensor": 2}, lambda leaf: leaf + 1), map_tree(1, lambda leaf: leaf + 1)
    ({'image': 2, 'sensor': 3}, 2)
    """
    return {key: map_tree(value, function) for key, value in tree.items()} if isinstance(tree, Mapping) else function(tree)


def leaves(tree: Any) -> list[Any]:
    """The leaves, in the mappings' order."""
    return list(flatten_tree(tree).values())


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
