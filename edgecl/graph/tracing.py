"""Tracing with ``make_fx``, for capture and for passes that run a graph again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx


def graph_of(run: Callable[..., Any], examples: Sequence[Tensor], table: Mapping[Any, Callable[..., Any]] | None = None) -> fx.GraphModule:
    """What ``run`` does with tensors like these, operators of the table decomposed; every node has its value's shape, and its place.

    ``make_fx`` takes the values' shapes from a mode that it makes anew for every value, which is half of its time, unless it finds one.
    """
    with traceback.preserve_node_meta(), tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        module = make_fx(run, decomposition_table=table)(*examples)
    for node, value in zip((n for n in module.graph.nodes if n.op == "placeholder"), examples, strict=True):
        node.meta.setdefault("val", value.to("meta"))
    return module
