"""Latents of one set of samples at many depths of a network, from one pass over it."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from edgecl.splitting import cut, traced
from edgecl.taps import pool
from edgecl.trunk import Trunk
from edgecl_device.manifest import Array, TensorSpec

At = str | tuple[str, ...]
"""Where a network is cut, as :func:`edgecl.prepare.prepare` takes it."""


def specs_of(features: TensorSpec | Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The tensors of one latent by name; a single one has the empty name."""
    return {"": features} if isinstance(features, TensorSpec) else dict(features)


def packed(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [N, ...] as one row a sample [N, D].

    >>> packed([torch.zeros(2, 3, 4), torch.zeros(2, 5)]).shape
    torch.Size([2, 17])
    """
    return torch.cat([part.flatten(1) for part in parts], 1)


class Unpacked(nn.Module):
    """Rows of :func:`packed` as the latents that they are made of; stands for the trunk where latents are at hand.

    Args:
        features: Spec of one latent, as :class:`edgecl.learner.Problem` has it.
    """

    def __init__(self, features: TensorSpec | Mapping[str, TensorSpec]) -> None:
        super().__init__()
        self._features = features

    def forward(self, rows: Tensor) -> Any:
        """One tensor [N, ...], or a mapping of them, from rows [N, D]."""
        specs = specs_of(self._features)
        parts = torch.split(rows, [prod(spec.shape) for spec in specs.values()], 1)
        tree = {name: part.reshape(-1, *spec.shape[1:]) for (name, spec), part in zip(specs.items(), parts, strict=True)}
        return tree[""] if isinstance(self._features, TensorSpec) else tree


def depths(model: nn.Module, places: Iterable[At], x: Tensor) -> nn.Module:
    """The network with the latents of many cuts as its outputs, and nothing behind the deepest.

    Args:
        model: As :func:`edgecl.splitting.split` takes it; copied.
        places: Cuts whose latents are float32.
        x: One input [1, ...] as the model takes it.

    Returns:
        A module that maps [N, ...] to rows float32 [N, D] by place, each as the trunk of that cut gives it.

    Raises:
        SplitError: when the model cannot be cut at one of them.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> {at: tuple(rows.shape) for at, rows in depths(net, ["0", ("0", "1")], torch.zeros(1, 4))(torch.zeros(5, 4)).items()}
    {'0': (5, 3), ('0', '1'): (5, 6)}
    """
    places = list(dict.fromkeys(places))
    whole, tracer, graph, _ = traced(model)
    order = {node: i for i, node in enumerate(graph.nodes)}
    ends: dict[At, fx.Node] = {}
    crossing: dict[At, list[fx.Node]] = {}
    for at in places:
        if isinstance(at, str):
            _, front, crossing[at] = cut(tracer, graph, at)
            ends[at] = max(front, key=order.__getitem__)
    names = sorted({name for at in places if not isinstance(at, str) for name in at})
    parts = dict(zip(names, pool(whole, tracer, graph, names, x), strict=True)) if names else {}
    outputs: dict[At, fx.Node] = {}
    kept: set[fx.Node] = set(parts.values())
    for at in places:
        if isinstance(at, str):
            with graph.inserting_after(ends[at]):  # at once: a later layer may write into a tensor that crosses
                outputs[at] = graph.call_function(_packed_copy, (crossing[at],))
            kept.add(outputs[at])
    for node in reversed(list(graph.nodes)):
        if node in kept:
            break
        graph.erase_node(node)
    for at in places:
        if not isinstance(at, str):
            outputs[at] = graph.call_function(packed, ([parts[name] for name in at],))
    graph.output(tuple(outputs[at] for at in places))
    return _Named(places, fx.GraphModule(whole, graph, class_name="Depths").eval())


def _packed_copy(parts: Sequence[Tensor]) -> Tensor:
    """As :func:`packed`, never a view."""
    return packed([part.clone() for part in parts])


class _Named(nn.Module):
    """Gives a tuple's entries their places."""

    def __init__(self, places: Sequence[At], inner: nn.Module) -> None:
        super().__init__()
        self._places, self.inner = places, inner

    def forward(self, x: Tensor) -> dict[At, Tensor]:
        return dict(zip(self._places, self.inner(x), strict=True))


class Latents:
    """Rows of samples at every depth that was asked for; each depth is computed once.

    Args:
        model: The network.
        preprocess: Runs before it.
        x: Raw samples [N, ...].
    """

    def __init__(self, model: nn.Module, preprocess: nn.Module | None, x: Array) -> None:
        self._model, self._preprocess, self._x = model, preprocess, x
        self._rows: dict[At, Array] = {}

    def want(self, places: Iterable[At], batch: int = 64) -> None:
        """Compute what is missing of these depths, in one pass."""
        missing = [at for at in dict.fromkeys(places) if at not in self._rows]
        if not missing:
            return
        with torch.no_grad():
            first = torch.tensor(self._x[:1])
            x = first if self._preprocess is None else self._preprocess(first)
            net = Trunk([self._preprocess], depths(self._model, missing, x), ("x",)).eval()
            found: dict[At, list[Array]] = {at: [] for at in missing}
            for part in torch.split(torch.tensor(self._x), batch):
                for at, rows in net(part).items():
                    found[at].append(rows.numpy())
        self._rows |= {at: np.concatenate(parts) for at, parts in found.items()}

    def at(self, place: At) -> Array:
        """Rows float32 [N, D] at one depth."""
        self.want([place])
        return self._rows[place]
