"""Phases of a step, and the one gradient call that every trained method uses.

Costs are reported by phase. A step marks its parts with :func:`phase`; the marks travel with the captured nodes and
cost nothing in eager mode.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx import traceback

PHASES = ("encode", "replay_encode", "replay_decode", "augment", "forward", "input_gradient", "weight_gradient", "update")


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark the operators inside as belonging to ``name``, one of :data:`PHASES` or ``backward``.

    ``backward`` is split into input and weight gradients when costs are counted.
    """
    with traceback.annotate({"phase": name}):
        yield


def value_and_gradient(
    loss: Callable[[dict[str, Tensor]], tuple[Tensor, Any]], parameters: dict[str, Tensor], seed: Tensor
) -> tuple[Tensor, Any, dict[str, Tensor]]:
    """Loss, auxiliary result and ``seed`` times the gradient.

    The seed of the backward pass is where a learning rate costs nothing: the gradient arrives scaled, the reported
    loss does not.

    Args:
        loss: Maps the trained tensors to ``(loss [], auxiliary)``.
        parameters: Trained tensors by name; the backward pass stops at the shallowest of them.
        seed: float32 [], the cotangent of the loss.
    """
    value, auxiliary, (gradient,) = value_and_gradients(loss, parameters, [seed])
    return value, auxiliary, gradient


def value_and_gradients(
    loss: Callable[[dict[str, Tensor]], tuple[Tensor, Any]], parameters: dict[str, Tensor], seeds: Sequence[Tensor]
) -> tuple[Tensor, Any, list[dict[str, Tensor]]]:
    """Losses, auxiliary result and one gradient a seed, from one forward pass.

    Args:
        loss: Maps the trained tensors to ``(losses, auxiliary)``, losses of any shape.
        parameters: As :func:`value_and_gradient` takes them.
        seeds: Cotangents of the losses, each of their shape.
    """

    def marked(tensors: dict[str, Tensor]) -> tuple[Tensor, Any]:
        value, auxiliary = loss(tensors)
        if traceback.has_preserved_node_meta():
            _mark_backward(value)
        return value, auxiliary

    with phase("forward"):
        value, pullback, auxiliary = cast(Any, torch.func.vjp(marked, parameters, has_aux=True))
    with phase("backward"):
        gradients = [pullback(seed)[0] for seed in seeds]
    return value, auxiliary, gradients


def _mark_backward(value: Tensor) -> None:
    """While captured, let each backward operator carry the sequence number of the forward operator that it belongs to."""
    waiting, seen = [value.grad_fn], set()
    while waiting:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        waiting += [before for before, _ in function.next_functions]
        function.register_prehook(partial(_enter_backward, function._sequence_nr()))
        function.register_hook(_leave_backward)


def _enter_backward(number: int, gradients: Any) -> None:
    traceback.set_grad_fn_seq_nr(number)


def _leave_backward(results: Any, gradients: Any) -> None:
    traceback.reset_grad_fn_seq_nr()


class _Marked(fx.Interpreter):
    """Runs a traced module node by node, each under the path of the module whose code called it."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # no "While executing ..." behind an error's message

    def run_node(self, n: fx.Node) -> Any:
        path = next(reversed(n.meta.get("nn_module_stack") or {"": None}))
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        # Not the base class's run_node: it puts the node's own marks in place of those that are open, the phase among them.
        with traceback.annotate({"module": path}) if path else nullcontext():
            return getattr(self, n.op)(n.target, args, kwargs)


@contextmanager
def module_paths(*modules: nn.Module) -> Iterator[None]:
    """While inside, operators captured in a submodule's forward carry its dotted path in the user's model."""
    open_marks: list[Any] = []
    handles = []
    before = dict(traceback.current_meta.get("custom", {}))

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            mark = traceback.annotate({"module": path})
            mark.__enter__()
            open_marks.append(mark)

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    split = [module for module in modules if isinstance(module, fx.GraphModule)]
    for module in modules:
        for path, child in module.named_modules():
            handles.append(child.register_forward_pre_hook(enter(path)))
            handles.append(child.register_forward_hook(leave))
    for module in split:  # split() leaves no call of a container behind, only where each node came from
        module.forward = _Marked(module).run
    try:
        yield
    finally:
        for module in split:
            del module.forward
        for handle in handles:
            handle.remove()
        while open_marks:
            open_marks.pop().__exit__(None, None, None)
        # after an exception the marks above closed later than those around them and have put those back
        traceback.current_meta.pop("custom", None)
        if before:
            traceback.current_meta["custom"] = before
