"""A captured step: a flat graph of ATen operators with named inputs, outputs and constants."""

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, fx

from edgecl_device.errors import EdgeclError
from edgecl_device.manifest import TensorSpec

Kind = Literal["state", "data"]


class GraphError(EdgeclError):
    """A step cannot be captured, lowered or costed."""


class UnsupportedOperatorError(GraphError):
    """A step has an operator that cannot be counted or exported; see :func:`unsupported`."""


@dataclass(frozen=True)
class Port:
    """An input or output of a step: a state tensor, or data."""

    spec: TensorSpec
    kind: Kind

    @property
    def name(self) -> str:
        """Dotted name, as the bundle has it."""
        return self.spec.name


@dataclass(frozen=True)
class StepGraph:
    """One step as a flat graph.

    Attributes:
        name: The step's name, for instance ``learn``.
        module: Placeholders, constants (``get_attr``), operators, one output tuple.
        inputs: One port a placeholder, in order.
        outputs: One port an element of the output tuple, in order.
        properties: What the passes have ensured so far (:mod:`edgecl.graph.passes`).
    """

    name: str
    module: fx.GraphModule
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    properties: frozenset[str] = field(default_factory=frozenset)

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes in the order in which they run."""
        return list(self.module.graph.nodes)

    @property
    def operators(self) -> Iterator[fx.Node]:
        """The nodes that call an ATen operator."""
        return (n for n in self.module.graph.nodes if n.op == "call_function" and n.target is not operator.getitem)

    @property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes, in the order of ``inputs``."""
        return [n for n in self.module.graph.nodes if n.op == "placeholder"]

    @property
    def results(self) -> list[fx.Node]:
        """The nodes that compute the outputs, in the order of ``outputs``."""
        return list(self.module.graph.output_node().args[0])  # type: ignore[arg-type]

    def constant(self, node: fx.Node) -> Tensor:
        """The tensor behind a ``get_attr`` node."""
        value = getattr(self.module, str(node.target))
        assert isinstance(value, Tensor)
        return value.detach()

    def constants(self) -> dict[str, Tensor]:
        """Every frozen tensor of the graph, by attribute name."""
        return {str(n.target): self.constant(n) for n in self.module.graph.nodes if n.op == "get_attr"}

    def copy(self) -> "StepGraph":
        """The same graph with nodes of its own, on the same constants."""
        return replace(self, module=fx.GraphModule(self.module, copy.deepcopy(self.module.graph)))

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph in PyTorch on tensors in the order of ``inputs``, node by node: passes leave no code to compile."""
        return tuple(fx.Interpreter(self.module).run(*inputs))


def value_of(node: fx.Node) -> Any:
    """Example value of a node: a tensor (fake or real), or a tuple of them."""
    return node.meta["val"]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's tensor."""
    return tuple(int(s) for s in value_of(node).shape)


def where_in_model(node: fx.Node) -> str:
    """:func:`module_of`, in words where there is none."""
    return module_of(node) or "the model's top level"


def module_of(node: fx.Node) -> str:
    """Path of the submodule that a node comes from, empty for none; for a backward node without, that of the nearest operator before."""
    seen: set[fx.Node] = set()
    queue = [node]
    while queue:
        current = queue.pop(0)
        path = (current.meta.get("custom") or {}).get("module")
        if path:
            return str(path)
        if (node.meta.get("custom") or {}).get("phase") != "backward":
            break
        seen.add(current)
        queue += [n for n in current.all_input_nodes if n not in seen]
    return ""


def _reason(operator: str) -> str:
    return "is fused attention, which has no rule" if "attention" in operator else "is not supported"


def unsupported(step: str, node: fx.Node, reason: str = "") -> UnsupportedOperatorError:
    """The error for an operator that a step cannot have: step, operator, place in the user's model, and the mend."""
    why = reason or _reason(str(node.target))
    return UnsupportedOperatorError(
        f"step {step!r}: operator {node.target} in {where_in_model(node)} {why}; replace it in the model, or cut the model "
        "elsewhere: the trunk needs no gradients (docs/contract.md lists the layers, docs/adding-a-method.md says how to add one)"
    )
