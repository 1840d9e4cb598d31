"""Capture: a step, written as a Python function, becomes a flat graph of canonical ATen operators.

``make_fx`` traces the step once on example tensors, gradients and update included. Names come from the nesting of the
arguments, never from the tracer. Three silent traps of the tracer are closed here: equal tensor objects would be
merged into one input (every example is a new tensor), random operators would be baked in (refused), and batch norm
would keep its wrapped form (written as scale and shift, :mod:`edgecl.graph.canonical`).
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.fx import traceback
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from edgecl.graph.canonical import CANONICAL, LAYERS
from edgecl.graph.canonical.norms import running_statistics
from edgecl.graph.phases import module_paths, phase
from edgecl.graph.step import GraphError, Kind, Port, StepGraph, unsupported, where_in_model
from edgecl.graph.tracing import graph_of
from edgecl.learner import Learner, State, call_encode, call_step, dtype_name
from edgecl.onednn import without_onednn
from edgecl.trees import flatten_tree, unflatten_like
from edgecl_device.errors import EdgeclError
from edgecl_device.manifest import DTYPES, TensorSpec


def example(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    """A new tensor that fits a spec: small normal values, or zeros for integers."""
    dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.randn(spec.shape, generator=generator, dtype=dtype)
    return torch.zeros(spec.shape, dtype=dtype)


def capture(learner: Learner, step: str) -> StepGraph:
    """Capture one step of a learner.

    Raises:
        GraphError: when the step cannot be traced, naming the step and the cause.
    """
    default = "forward" if step == "predict" else "update"

    def run(state: dict[str, Tensor], data: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with phase(default):
            return call_step(learner, step, state, data)

    modules = [m for m in vars(learner).values() if isinstance(m, nn.Module)]
    return trace(step, run, learner.init(), learner.inputs_of(step), modules)


def capture_encode(trunk: nn.Module, x: Any, model: nn.Module | None = None, stream: State | None = None) -> StepGraph:
    """Capture the frozen trunk as the step ``encode``.

    Args:
        trunk: Maps ``x`` to one tensor or to a mapping of named ones; in eval mode.
        x: Spec of one input sample, batch dimension of 1 included, or a mapping of input names to such.
        model: The part of the trunk whose module paths are the user's own; the trunk itself by default.
        stream: The state that it carries from frame to frame, if any.
    """

    def run(state: dict[str, Tensor], data: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with phase("encode"), torch.no_grad():
            return call_encode(trunk, data["x"], state)

    return trace("encode", run, stream or {}, {"x": x}, [model or trunk])


def trace(
    name: str,
    run: Callable[[dict[str, Tensor], dict[str, Any]], tuple[dict[str, Tensor], dict[str, Tensor]]],
    state: dict[str, Tensor],
    inputs: Mapping[str, Any],
    modules: Sequence[nn.Module],
) -> StepGraph:
    """Trace ``run(state, inputs) -> (outputs, new_state)`` on examples of its inputs."""
    generator = torch.Generator().manual_seed(0)
    specs = flatten_tree(inputs)
    shared = sorted(state.keys() & specs.keys())
    if shared:
        raise GraphError(f"step {name!r}: {shared} name both a state tensor and an input; rename one")
    names = [*state, *specs]
    values = [t.detach().clone() for t in state.values()] + [example(s, generator) for s in specs.values()]
    found: dict[str, list[str]] = {}

    def flat(*tensors: Tensor) -> list[Tensor]:
        leaves = dict(zip(names, tensors, strict=True))
        with _FixedShapes(name):
            outputs, new_state = run({k: leaves[k] for k in state}, unflatten_like(dict(inputs), leaves))
        found["data"], found["state"] = list(outputs), list(new_state)
        return [*outputs.values(), *new_state.values()]

    with contextlib.ExitStack() as stack:
        stack.enter_context(module_paths(*modules))
        stack.enter_context(_Layers(name))
        stack.enter_context(_plain_operators())
        try:
            module = graph_of(torch.func.functionalize(flat), values, CANONICAL)
        except EdgeclError:
            raise
        except Exception as error:
            cause = str(error).strip().partition("\n")[0].rstrip(".")
            raise GraphError(
                f"step {name!r}: cannot be captured: {type(error).__name__}: {cause}; "
                "a step must be a pure function of fixed-shape tensors, without branches on their values"
            ) from error
    _name_backward(module)
    _check_operators(name, module)
    results: Any = module.graph.output_node().args[0]
    keys: list[tuple[str, Kind]] = [*((key, "data") for key in found["data"]), *((key, "state") for key in found["state"])]
    ports = [
        Port(TensorSpec(key, tuple(n.meta["val"].shape), dtype_name(n.meta["val"].dtype)), kind)
        for (key, kind), n in zip(keys, results, strict=True)
    ]
    _check_state(name, state, ports)
    ins = [
        Port(TensorSpec(k, tuple(v.shape), dtype_name(v.dtype)), "state" if k in state else "data")
        for k, v in zip(names, values, strict=True)
    ]
    return StepGraph(name, module, tuple(ins), tuple(ports))


_DENSE = (
    *("conv1d", "conv2d", "batch_norm", "group_norm", "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d"),
)


class _Layers(TorchFunctionMode):
    """Calls layers in the one form that a graph can have.

    They get dense channels-first inputs: for others PyTorch takes operators that set strides, which mean nothing in a graph. The copies
    that this makes are dropped again by :class:`edgecl.graph.passes.clean.Clean`. Randomised ReLU in eval mode is the leaky ReLU that
    PyTorch documents, while its operator counts as random.
    """

    DENSE = frozenset({
        F.conv_transpose1d, F.conv_transpose2d, torch.ops.aten.conv_transpose1d.default, torch.ops.aten.conv_transpose2d.input,
        *(getattr(F, name) for name in _DENSE),
        *(getattr(torch.ops.aten, name).default for name in _DENSE),  # of a trunk in int8, which torch.export has traced
    })  # fmt: skip

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.DENSE and args:
            args = (args[0].contiguous(), *args[1:])
        if func is F.rrelu:
            given = inspect.signature(F.rrelu).bind(*args, **kwargs)
            given.apply_defaults()
            x, lower, upper, training, inplace = given.arguments.values()
            if not training:
                return F.leaky_relu(x, (lower + upper) / 2, inplace)
        if func is F.batch_norm:
            given = inspect.signature(F.batch_norm).bind(*args, **kwargs)
            given.apply_defaults()
            x, mean, variance, weight, bias, training, momentum, eps = given.arguments.values()
            if training and mean is not None:
                _update_statistics(self.step, x, mean, variance, momentum)
                return F.batch_norm(x, None, None, weight, bias, True, momentum, eps)
        if func in LAYERS and not (len(args) > 2 and isinstance(args[2], Tensor)):  # those are packed sequences
            found = LAYERS[func](*args, **kwargs)
            if found is not NotImplemented:
                return found
        return func(*args, **kwargs)


def _update_statistics(step: str, x: Tensor, mean: Tensor, variance: Tensor, momentum: float) -> None:
    """What batch norm does to its running statistics in training mode, in operators that a graph shows."""
    place = (traceback.current_meta.get("custom") or {}).get("module") or "the model's top level"
    if not is_functorch_wrapped_tensor(mean):
        raise GraphError(
            f"step {step!r}: batch norm in {place} is in training mode and would change its running statistics, which are no state of this "
            "step; call model.eval(), or pass its buffers in and return them as state"
        )
    if x.numel() == x.shape[1]:
        raise GraphError(
            f"step {step!r}: batch norm in {place} is in training mode, where a channel must have more than one value; call model.eval()"
        )
    for running, new in zip((mean, variance), running_statistics(x, mean, variance, momentum), strict=True):
        running.copy_(new)


@contextlib.contextmanager
def _plain_operators() -> Iterator[None]:
    """Attention and recurrent layers as operators that every runtime has, not fused into one of this machine's libraries."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with without_onednn(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _FixedShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what makes a number or a shape of values: the graph would keep those of the example, and dead code hides the operator."""

    TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})

    def __init__(self, step: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.step = step

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = func is not torch.ops.aten.index.Tensor or any(i is not None and i.dtype == torch.bool for i in args[1])
        if self.TAGS & set(func.tags) and masked:  # an index of integers gives a shape of their own
            place = (traceback.current_meta.get("custom") or {}).get("module") or "the model's top level"
            raise GraphError(
                f"step {self.step!r}: operator {func} in {place} makes a number or a shape of a tensor's values, and those of a graph are "
                "fixed; write it with operators on tensors, such as torch.where, sums and maxima"
            )
        return func(*args, **(kwargs or {}))


def _name_backward(module: torch.fx.GraphModule) -> None:
    """Give every backward operator the module path of the forward operator that it belongs to."""
    paths: dict[int, str | None] = {}
    for node in module.graph.nodes:
        mark, number = node.meta.get("custom") or {}, node.meta.get("seq_nr")
        if mark.get("phase") != "backward":
            paths.setdefault(number, mark.get("module"))
        elif paths.get(number):
            node.meta["custom"] = {**mark, "module": paths[number]}


def _check_operators(name: str, module: torch.fx.GraphModule) -> None:
    """No operator draws random numbers, and every tensor is of a type that every runtime has."""
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if "attention" in str(node.target):  # tagged as random for its dropout, but refused for what it is
            raise unsupported(name, node)
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise GraphError(
                f"step {name!r}: draws random numbers in the graph ({node.target} in {where_in_model(node)}); "
                "put the module in eval mode, or pass the mask as an input"
            )
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and dtype_name(value.dtype) not in (*DTYPES, "int8"):
                raise unsupported(name, node, f"works in {dtype_name(value.dtype)}, which is not supported, convert the model with float()")


def _check_state(name: str, state: dict[str, Tensor], outputs: Sequence[Port]) -> None:
    for port in outputs:
        if port.kind == "state":
            if port.name not in state:
                raise GraphError(f"step {name!r}: returns unknown state {port.name!r}; init() makes {sorted(state)}")
            old = state[port.name]
            if (tuple(old.shape), dtype_name(old.dtype)) != (port.spec.shape, port.spec.dtype):
                raise GraphError(
                    f"step {name!r}: state {port.name!r} must stay {dtype_name(old.dtype)} {list(old.shape)}, "
                    f"the step returns {port.spec.dtype} {list(port.spec.shape)}"
                )
