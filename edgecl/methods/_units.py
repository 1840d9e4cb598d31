"""Where a network's channels can be left out as a whole: pairs of convolutions with hidden channels between, and single ones."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from edgecl.methods._features import require
from edgecl.splitting import recorded

PER_CHANNEL = (
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Identity),
    *(nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d),
)
"""Modules that treat every channel by itself and have no values of their own."""

_FUNCTIONS = {
    F.relu,
    F.relu6,
    F.silu,
    F.gelu,
    F.hardswish,
    F.leaky_relu,
    F.elu,
    torch.relu,
    torch.sigmoid,
    torch.tanh,
    F.max_pool2d,
    F.avg_pool2d,
}
_METHODS = {"relu", "sigmoid", "tanh"}


@dataclass(frozen=True)
class Units:
    """Output channels of a convolution that live or are left out.

    Attributes:
        rows: Path of the convolution whose output channels they are.
        columns: Path of the one convolution that reads them, whose input channels they are, too; None where others read them.
        norms: Batch norms between the two, whose values are taken of the living channels.
        channels: Output channels that there are.
    """

    rows: str
    columns: str | None
    norms: tuple[str, ...]
    channels: int


def units_of(suffix: nn.Module, layers: Sequence[str]) -> tuple[fx.GraphModule, tuple[Units, ...]]:
    """The suffix with a second argument, and its units.

    Where the output of one layer goes through nothing but batch norm with stored statistics and functions of single channels to another,
    its channels are hidden: the pair runs as a narrower network, and nothing is put back into place. Else the second argument, for the
    layer's path, has what puts the output channels into their places (:func:`placed`).

    Args:
        suffix: Maps features to scores.
        layers: Paths of its sparse convolutions.

    Raises:
        InputError: when one is called more than once.
    """
    graph = fx.GraphModule(suffix, recorded(suffix))
    modules = dict(graph.named_modules())
    calls = [node for node in graph.graph.nodes if node.op == "call_module" and node.target in layers]
    called = [str(node.target) for node in calls]
    for name in layers:
        require(called.count(name) == 1, "sparse", f"name layers that are called once, {name!r} is not", called.count(name), "leave it out")
    found: list[Units] = []
    readers: set[str] = set()
    for node in calls:
        name = str(node.target)
        if name in readers:
            continue
        columns, norms = _reader(node, modules, set(layers) - readers - {units.rows for units in found})
        found.append(Units(name, columns, norms, modules[name].out_channels))
        readers |= {columns} if columns else set()
    with graph.graph.inserting_after(next(node for node in graph.graph.nodes if node.op == "placeholder")):
        argument = graph.graph.placeholder("places")
    alone = {units.rows for units in found if units.columns is None}
    for node in calls:
        if node.target in alone:
            users = list(node.users)
            with graph.graph.inserting_after(node):
                place = graph.graph.call_function(operator.getitem, (argument, node.target))
            with graph.graph.inserting_after(place):
                whole = graph.graph.call_function(placed, (node, place))
            for user in users:
                user.replace_input_with(node, whole)
    graph.recompile()
    return graph, tuple(found)


def placed(y: Tensor, place: Mapping[str, Tensor]) -> Tensor:
    """Living channels [N, k, H, W] in their places among all, [N, O, H, W]; others hold what ``rest`` [O] has there.

    A product with a matrix of ones and zeros: its gradient is one, too, while a gather's gradient is a scatter, which no runtime does fast.
    """
    return F.conv2d(y, place["matrix"].reshape(*place["matrix"].shape, 1, 1), place["rest"])


def place_of(channels: Tensor, live: Tensor, rest: Tensor) -> dict[str, Tensor]:
    """What :func:`placed` takes.

    Args:
        channels: int64 [k], the places.
        live: bool [k].
        rest: float32 [O], for channels that are not there.
    """
    matrix = ((channels.unsqueeze(0) == torch.arange(rest.shape[0]).unsqueeze(1)) & live.unsqueeze(0)).to(rest.dtype)
    return {"matrix": matrix, "rest": rest * (1.0 - matrix.sum(1))}


def _reader(node: fx.Node, modules: Mapping[str, nn.Module], layers: set[str]) -> tuple[str | None, tuple[str, ...]]:
    """The sparse layer that alone reads a layer's output channel by channel, and the batch norms on the way."""
    norms: list[str] = []
    while len(node.users) == 1:
        (node,) = node.users
        if node.op == "call_module":
            module: Any = modules[str(node.target)]
            if node.target in layers:
                return str(node.target), tuple(norms)
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and _calls(node) == 1:
                norms.append(str(node.target))
            elif not isinstance(module, PER_CHANNEL):
                return None, ()
        elif not (node.op == "call_function" and node.target in _FUNCTIONS) and not (node.op == "call_method" and node.target in _METHODS):
            return None, ()
    return None, ()


def _calls(node: fx.Node) -> int:
    return sum(other.op == "call_module" and other.target == node.target for other in node.graph.nodes)
