"""Cut a model in two: a frozen trunk that runs once a sample, and the suffix that learns.

:func:`split` works on the graph that :mod:`torch.fx` records, so it cuts through containers and between branches and
needs no change to the model's code. The user's model is never changed: both parts are copies.
"""

import copy
import difflib
import keyword
import operator
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from edgecl_device.errors import EdgeclError


class SplitError(EdgeclError, ValueError):
    """A model cannot be cut at this place, or its head cannot be widened."""


@dataclass(frozen=True)
class Split:
    """The two parts of a model; ``suffix(trunk(x))`` is what the model computed, to the bit.

    Attributes:
        trunk: From the input up to and including the named module.
        suffix: The rest.
        inputs: Names of the parameters of the model's forward, in its order, which is the trunk's.
        features: Names of the tensors that cross the cut. One: trunk returns it and suffix takes it as a plain tensor.
            Several: trunk returns and suffix takes a ``dict[str, Tensor]`` with these keys.
    """

    trunk: fx.GraphModule
    suffix: fx.GraphModule
    inputs: tuple[str, ...]
    features: tuple[str, ...]


def split(model: nn.Module, at: str, inputs: Sequence[str] | None = None) -> Split:
    """Cut ``model`` after the module named ``at``.

    The cut follows the order of execution: what runs until ``at`` has ended is the trunk. A tensor that skips past ``at``
    crosses the cut beside it. Both parts are copies in eval mode; their ``state_dict`` keys are the model's, and forward
    hooks on leaf modules such as ``layer3.0.conv1`` fire in them (containers leave no call behind). A parameter that both
    parts use becomes two. Neither part changes its input in place. Tracing keeps values, not the backward pass that a
    ``torch.autograd.Function`` defines: before training the suffix call :func:`check_backward`.

    Args:
        model: Any module of tensor inputs that ``torch.fx`` can trace.
        at: Dotted name of a container or a leaf, as in ``model.named_modules()``.
        inputs: Names of the parameters of its forward, in any order; None for a model of one input, whatever it is called.

    Raises:
        SplitError: when the name is unknown, is called more than once, or leaves a part empty; when the model takes other
            inputs or does not use one, cannot be copied or traced, or holds float16 or bfloat16; when a value that is no tensor would
            cross the cut.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> parts = split(net, at="1")
    >>> x = torch.ones(1, 4)
    >>> bool(torch.equal(parts.suffix(parts.trunk(x)), net(x)))
    True
    >>> sorted(parts.suffix.state_dict())
    ['2.bias', '2.weight']
    """
    if not isinstance(at, str):
        raise SplitError(f"at: must be the name of a module, got {at!r}; pass one of model.named_modules()")
    whole, tracer, graph, names = traced(model, inputs)
    nodes, front, crossing = cut(tracer, graph, at)
    back = [node for node in graph.nodes if node not in front]
    keys = set(model.state_dict())
    trunk = _trunk(whole, [node for node in nodes if node in front], crossing, keys)
    suffix = _suffix(copy.deepcopy(whole), back, crossing, keys)
    return Split(trunk, suffix, names, tuple(node.name for node in crossing))


def cut(tracer: "_Tracer", graph: fx.Graph, at: str) -> tuple[list[fx.Node], set[fx.Node], list[fx.Node]]:
    """Where a cut after the module ``at`` lies in what :func:`traced` returned.

    Returns:
        All nodes but the output; those of the trunk; those of the trunk whose tensors cross the cut, in their order.

    Raises:
        SplitError: when the model cannot be cut there.
    """
    nodes = [node for node in graph.nodes if node.op != "output"]
    ends = {name: spans[0][1] for name, spans in tracer.spans.items() if len(spans) == 1 and spans[0][0] < spans[0][1] < len(nodes)}
    if at not in ends:
        raise SplitError(_why_not(at, tracer.spans, ends, len(nodes)))
    front = set(nodes[: ends[at]])
    for node in nodes[ends[at] :]:  # `a, b = module(x)`: what crosses are its tensors, not the tuple
        if node.target is operator.getitem and isinstance(node.args[1], int) and node.args[0] in front:
            front.add(node)
    used = {source for node in graph.nodes if node not in front for source in node.all_input_nodes if source.op != "get_attr"}
    crossing = [node for node in nodes if node in used & front]
    _check_tensors(at, crossing, nodes)
    return nodes, front, crossing


def traced(
    model: nn.Module, inputs: Sequence[str] | None = None, training: bool = False
) -> tuple[nn.Module, "_Tracer", fx.Graph, tuple[str, ...]]:
    """A copy of ``model`` in eval or training mode, the tracer that went through it, its graph, and the names of its inputs in their order.

    Raises:
        SplitError: when the model cannot be copied or traced, takes other inputs (see :func:`split`), or holds float16 or bfloat16.
    """
    whole = copied(model).train(training)
    for path, _ in whole.named_modules():
        odd = [part for part in path.split(".") if keyword.iskeyword(part) or not part.isprintable() or set(part) & set("'\"\\")]
        if odd:
            raise SplitError(
                f"model: module {path!r} must have a plain name, which torch.fx can write into code, got {odd[0]!r}; rename it"
            )
    for name, tensor in [*whole.named_parameters(), *whole.named_buffers()]:
        if tensor.dtype in (torch.float16, torch.bfloat16):
            raise SplitError(f"model: {name} must be of a type that bundles have, got {tensor.dtype}; call model.float()")
    tracer = _Tracer()
    graph = _trace(tracer, whole)
    return whole, tracer, graph, _inputs(graph, inputs)


def recorded(model: nn.Module) -> fx.Graph:
    """What a module computes, operations in place as such.

    Raises:
        SplitError: when it cannot be traced.
    """
    return _trace(_Tracer(), model)


def check_backward(parts: Split) -> None:
    """Check that the suffix can be trained: its operators have the backward pass that the model gave them.

    Raises:
        SplitError: naming the first ``torch.autograd.Function`` of the suffix and its module.
    """
    for node in parts.suffix.graph.nodes:
        if _FUNCTION in node.meta:
            raise SplitError(
                f"model: {node.meta[_FUNCTION]} lies behind the cut, and tracing loses its backward pass; write it as plain "
                "operators, cut behind it, or take a method that trains no layer of the model"
            )


def widen_head(model: nn.Module, name: str, classes: int) -> nn.Module:
    """Copy ``model`` with room for ``classes`` classes in its linear layer ``name``.

    The new rows of weight and bias are zero, the old ones bit-identical.

    Raises:
        SplitError: when ``name`` is no ``nn.Linear``, or has more outputs than ``classes`` already.

    >>> wide = widen_head(nn.Sequential(nn.Linear(4, 3)), "0", classes=5)
    >>> wide(torch.zeros(1, 4)).shape
    torch.Size([1, 5])
    """
    wide = copied(model)
    linears = {key: module for key, module in wide.named_modules() if isinstance(module, nn.Linear) and key}
    if name not in linears:
        raise SplitError(f"name: must be an nn.Linear of the model, got {name!r}; choose one of: {listing(name, linears)}")
    head = linears[name]
    extra = classes - head.out_features
    if extra < 0:
        raise SplitError(f"classes: must be at least the {head.out_features} outputs of {name!r}, got {classes}; widen, never narrow")
    head.weight = nn.Parameter(_pad_rows(head.weight, extra), head.weight.requires_grad)
    if head.bias is not None:
        head.bias = nn.Parameter(_pad_rows(head.bias, extra), head.bias.requires_grad)
    head.out_features = classes
    return wide


def copied(model: nn.Module, what: str = "model") -> nn.Module:
    """A deep copy of a module; ``what`` is the parameter that errors name.

    Raises:
        SplitError: when it is no module, or holds what cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise SplitError(f"{what}: must be a torch.nn.Module, got {type(model).__name__}; pass a module, not a function")
    tensors: list[tuple[str, Any]] = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, value in tensors if is_lazy(value)]
    if lazy:
        raise SplitError(f"{what}: {lazy[0]} has no values yet, must have them (a lazy module); run the model once on a sample before")
    if hasattr(model, "_orig_mod"):
        raise SplitError(f"{what}: is compiled, must be the plain module; pass {what}._orig_mod, or the module before torch.compile")
    try:
        return copy.deepcopy(model)
    except Exception as error:  # a tensor that was computed, a lock, a file: each raises what it likes
        raise SplitError(
            f"{what}: cannot be copied ({str(error).partition(chr(10))[0].rstrip('.')}); let forward keep no result in the module, and "
            "call torch.nn.utils.remove_weight_norm on layers with the old weight_norm"
        ) from error


def _pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([tensor.detach(), tensor.new_zeros(rows, *tensor.shape[1:])])


_AUGMENTED = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


class _Proxy(fx.Proxy):
    """Records ``a += b`` as it runs; fx's own proxy records ``a = a + b``, which differs where two names hold the tensor."""


def _recorder(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in _AUGMENTED:
    setattr(_Proxy, f"__{_function.__name__}__", _recorder(_function))


_FUNCTION = "autograd_function"
_APPLY = torch.autograd.Function.apply.__code__


class _Tracer(fx.Tracer):
    """Records each module's nodes and result, which nodes come from a custom autograd function, and where tracing stopped."""

    def __init__(self) -> None:
        super().__init__(param_shapes_constant=True)
        self.spans: dict[str, list[tuple[int, int]]] = {}
        self.results: dict[str, Any] = {}
        self.place = ""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        frame: FrameType | None = sys._getframe()
        while frame is not None:  # fx traces through the function's forward; its callers are the only sign of it
            if frame.f_code is _APPLY:
                node.meta[_FUNCTION] = f"{frame.f_locals['cls'].__name__}, called in {module_place(self.place)},"
            frame = frame.f_back
        return node

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, caller, start = self.path_of_module(m), self.place, len(self.graph.nodes)
        self.place = name  # stays after an exception: the innermost module that failed
        result = super().call_module(m, forward, args, kwargs)
        self.place = caller
        self.spans.setdefault(name, []).append((start, len(self.graph.nodes)))
        self.results[name] = result
        return result


def _trace(tracer: _Tracer, model: nn.Module) -> fx.Graph:
    try:
        graph = tracer.trace(model)
    except Exception as error:  # tracing runs the user's code, which may raise anything
        own = Path(torch.__file__).parent
        frames = [f for f in traceback.extract_tb(error.__traceback__) if own not in Path(f.filename).parents and f.filename != __file__]
        line = f", {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
        raise SplitError(
            f"model: cannot be traced, in {module_place(tracer.place)}{line}: {error}; make this code independent of the input's values,"
            " or cut a submodule of the model that does not contain it"
        ) from error
    return graph


def _inputs(graph: fx.Graph, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Parameters of the model's forward, which must be the wanted ones."""
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    names = tuple(str(node.target) for node in nodes)
    if wanted is None and len(names) != 1:
        raise SplitError(
            f"model: forward must take one tensor, got {list(names)}; pass a mapping of them, or wrap it in a module that takes one"
        )
    if wanted is not None and sorted(wanted) != sorted(names):
        raise SplitError(f"model: forward must take {sorted(wanted)}, as the example has them, got {sorted(names)}; name them alike")
    unused = [str(node.target) for node in nodes if not node.users]
    if unused:
        raise SplitError(f"model: forward must use every input, does not use {unused}; leave it out")
    return names


def module_place(module: str) -> str:
    """What errors call a module of the model, by its path; the model's own is empty."""
    return f"module {module!r}" if module else "the model's own forward"


def _why_not(at: str, spans: dict[str, list[tuple[int, int]]], ends: dict[str, int], total: int) -> str:
    names = f"choose one of: {listing(at, ends)}"
    if not ends:
        names = "no module is called once and has something behind it; give every call, and what follows, a module of its own"
    if at not in spans:
        return f"at: no module named {at!r} is called by the model; {names}"
    if len(spans[at]) > 1:
        return f"at: {at!r} is called {len(spans[at])} times, so the cut is ambiguous; {names}"
    start, end = spans[at][0]
    if start == end:
        return f"at: {at!r} computes nothing; {names}"
    return f"at: nothing is left for the suffix after {at!r}; {names}"


def listing(name: str, valid: dict[str, Any]) -> str:
    """Valid names, close matches first."""
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    return ", ".join(close + [other for other in valid if other not in close]) or "(none)"


_SIZE_METHODS = {"size", "dim", "numel", "stride", "ndimension"}
_SIZE_FIELDS = {"shape", "ndim", "dtype", "device"}


def _check_tensors(at: str, crossing: list[fx.Node], nodes: list[fx.Node]) -> None:
    """Sizes and numbers derived from sizes cannot cross: a bundle's features are tensors."""
    plain: set[fx.Node] = set()
    for node in nodes:
        size = node.op == "call_method" and node.target in _SIZE_METHODS
        field = node.target is getattr and node.args[1] in _SIZE_FIELDS
        sources = node.all_input_nodes
        derived = node.target in vars(operator).values() and bool(sources) and all(source in plain for source in sources)
        if size or field or derived:
            plain.add(node)
    for node in crossing:
        if node in plain:
            raise SplitError(
                f"at: cutting at {at!r} leaves the size {node.format_node()} on one side and its use on the other;"
                " compute it after the cut, write flatten(1) for view(x.size(0), -1), or cut elsewhere"
            )


def _trunk(root: nn.Module, nodes: list[fx.Node], crossing: list[fx.Node], keys: set[str]) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    _copy_nodes(graph, nodes, copies)
    values = {node.name: copies[node] for node in crossing}
    graph.output(copies[crossing[0]] if len(crossing) == 1 else values)
    return part_of(root, graph, [node for node in graph.nodes if node.op == "placeholder"], "Trunk", keys)


def _suffix(root: nn.Module, nodes: list[fx.Node], crossing: list[fx.Node], keys: set[str]) -> fx.GraphModule:
    graph = fx.Graph()
    z = graph.placeholder("z")
    copies = {node: z if len(crossing) == 1 else graph.call_function(operator.getitem, (z, node.name)) for node in crossing}
    inputs = list(copies.values())
    _copy_nodes(graph, nodes, copies)
    return part_of(root, graph, inputs, "Suffix", keys)


def _copy_nodes(graph: fx.Graph, nodes: list[fx.Node], copies: dict[fx.Node, fx.Node]) -> None:
    """Copy ``nodes``, and the parameters that they fetch, wherever the model fetched them first."""
    for node in nodes:
        if node.op == "get_attr":
            continue
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in copies:
                copies[source] = graph.node_copy(source)
        copies[node] = graph.node_copy(node, copies.__getitem__)


def part_of(root: nn.Module, graph: fx.Graph, inputs: list[fx.Node], title: str, keys: set[str]) -> fx.GraphModule:
    """A part of a model, in eval mode, which does not change its input in place.

    Args:
        root: A copy of the model, whose modules it keeps.
        graph: What it computes.
        inputs: Nodes whose tensors belong to the caller.
        title: Name of its class.
        keys: Of the model's ``state_dict``; other buffers are not persistent.
    """
    for node in inputs:
        if _overwritten(root, graph, node):
            with graph.inserting_after(node):
                clone = graph.call_method("clone", (node,))
            node.replace_all_uses_with(clone)
            clone.args = (node,)
    part = fx.GraphModule(root, graph, class_name=title)
    for name, buffer in list(part.named_buffers()):
        if name not in keys:  # fx makes every tensor it stores persistent
            owner, _, field = name.rpartition(".")
            part.get_submodule(owner).register_buffer(field, buffer, persistent=False)
    for name, parameter in list(part.named_parameters(remove_duplicate=False)):
        if not parameter.is_floating_point():  # indices: no method can train them
            owner, _, field = name.rpartition(".")
            delattr(part.get_submodule(owner), field)
            part.get_submodule(owner).register_buffer(field, parameter.data)
    return part.eval()


def _overwritten(root: nn.Module, graph: fx.Graph, tensor: fx.Node) -> bool:
    """Whether an in-place operation may write into ``tensor``, which belongs to the caller."""
    aliases = {tensor}
    for node in graph.nodes:
        if not node.args or node.args[0] not in aliases:
            continue
        module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        if _in_place(node, module):
            return True
        if module is None or isinstance(module, (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout)):
            aliases.add(node)  # a function or method may return a view
    return False


def _in_place(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    named = name.endswith("_") and not name.endswith("__")
    return named or node.target in _AUGMENTED or bool(node.kwargs.get("inplace", False))
