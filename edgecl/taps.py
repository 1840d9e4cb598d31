"""Features from several depths of a model at once: each is averaged over its positions, scaled to length 1, and joined.

Middle layers of a network know what its last one has dropped, and there are fewer channels: a linear head on a few of them is
often better and smaller than one on the last features alone. No parameter is added, and nothing behind the deepest one runs.

Source: Evci, Dumoulin, Larochelle, Mozer, "Head2Toe: Utilizing intermediate representations for better transfer learning",
ICML 2022 (one linear classifier on features of all depths). Deviations: whole layers are chosen by name, not single features by
a group lasso; each layer's part has length 1, so that none outweighs the others.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

from edgecl.methods._features import unit
from edgecl.splitting import Split, SplitError, listing, part_of, traced


def pooled(x: Tensor, positions: Sequence[int]) -> Tensor:
    """Feature maps [N, C, ...] as rows of length 1 [N, C]: the mean over ``positions``, the axes behind C.

    >>> pooled(torch.tensor([[[3.0, 3.0], [2.0, 6.0]]]), [2])
    tensor([[0.6000, 0.8000]])
    """
    return unit(x.mean(list(positions)) if positions else x)


def taps(model: nn.Module, names: Sequence[str], x: Tensor) -> fx.GraphModule:
    """The part of ``model`` that computes the outputs of several modules, as one feature vector.

    Args:
        model: Any module with one tensor input that ``torch.fx`` can trace; copied.
        names: Modules, each called once, whose outputs are tensors [N, C] or [N, C, ...], as in ``model.named_modules()``.
        x: One input [1, ...] as the model takes it, to find the shapes.

    Returns:
        A module that maps [N, ...] to float32 [N, d]: the parts in the order of ``names``, d the sum of their channels.

    Raises:
        SplitError: when a name is unknown or given twice, its module is called more than once or returns no such tensor, or the
            model cannot be traced.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3))
    >>> taps(net, ["1", "2"], torch.ones(1, 1, 8, 8))(torch.ones(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """
    whole, tracer, graph, _ = traced(model)
    parts = pool(whole, tracer, graph, names, x)
    for node in reversed(list(graph.nodes)):  # nothing behind the deepest tap runs
        if node in parts:
            break
        graph.erase_node(node)
    graph.output(graph.call_function(torch.cat, (parts, 1)))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return part_of(whole, graph, inputs, "Taps", set(model.state_dict()))


def pool(whole: nn.Module, tracer: Any, graph: fx.Graph, names: Sequence[str], x: Tensor) -> list[fx.Node]:
    """Nodes with the pooled outputs of modules, put into a graph of :func:`edgecl.splitting.traced`; arguments as in :func:`taps`.

    Raises:
        SplitError: as :func:`taps`.
    """
    if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise SplitError(f"at: must be different names of modules, got {names!r}; pass some of model.named_modules()")
    once = {name: tracer.results[name] for name, spans in tracer.spans.items() if len(spans) == 1}
    for name in names:
        if not isinstance(once.get(name), fx.Proxy):
            why = "must be a module that is called once and returns one tensor"
            valid = {key: value for key, value in once.items() if key and isinstance(value, fx.Proxy)}
            raise SplitError(f"at: {name!r} {why}; choose some of: {listing(name, valid)}")
    with torch.no_grad():
        ShapeProp(fx.GraphModule(whole, graph)).propagate(x.clone())
    parts = []
    for name in names:
        node = once[name].node
        axes = list(range(2, _rank(name, node)))
        with graph.inserting_after(node):  # at once: a later layer may write into the tensor, and the vector is what stays
            parts.append(graph.call_function(pooled, (node, axes)))
    return parts


def tapped(model: nn.Module, names: Sequence[str], x: Tensor, classes: int) -> tuple[nn.Module, Split]:
    """A model of :func:`taps` as the module ``taps`` and a linear layer ``head`` from zero, and its two parts.

    Args:
        model: As in :func:`taps`.
        names: As in :func:`taps`.
        x: As in :func:`taps`.
        classes: Outputs of the head.
    """
    features = taps(model, names, x)
    with torch.no_grad():
        head = nn.Linear(features(x).shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    whole = nn.Sequential(OrderedDict(taps=features, head=head))
    return whole, Split(_only(whole, "taps", "input"), _only(copy.deepcopy(whole), "head", "z"), ("input",), ("taps",))


def _only(whole: nn.Module, name: str, taking: str) -> fx.GraphModule:
    """The part of a model that is one module, whose parameters keep their names in the model."""
    graph = fx.Graph()
    graph.output(graph.call_module(name, (graph.placeholder(taking),)))
    return fx.GraphModule(whole, graph, class_name=name.capitalize()).eval()


def _rank(name: str, node: fx.Node) -> int:
    found = node.meta.get("tensor_meta")
    if not isinstance(found, TensorMetadata) or len(found.shape) < 2 or found.dtype != torch.float32:
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, TensorMetadata) else type(found).__name__
        raise SplitError(f"at: the output of {name!r} must be float32 [N, C] or [N, C, ...], got {got}; choose another module")
    return len(found.shape)
