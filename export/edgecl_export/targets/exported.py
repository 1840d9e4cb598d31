"""A step as the program that ExecuTorch takes.

``torch.export.export`` traces a module to find its operators, and ExecuTorch traces the result once more to write them out. A step is a
flat graph of plain operators already: here it is put into PyTorch's program as it is, which saves much of the time that a long recurrence
takes.
"""

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.utils import _pytree as pytree

from edgecl.graph.capture import example
from edgecl.graph.quantised import DEQUANTIZES, is_packed
from edgecl.graph.step import StepGraph

aten = torch.ops.aten


class PlainProgram(ExportedProgram):
    """A program whose operators are all written out."""

    def run_decompositions(self, decomp_table: Any = None, **options: Any) -> ExportedProgram:
        """An empty table, with which ExecuTorch makes sure of that, has nothing to do."""
        return self if decomp_table == {} else super().run_decompositions(decomp_table, **options)


def exported(step: StepGraph) -> ExportedProgram:
    """A step as PyTorch's program, its constants as buffers."""
    mode = FakeTensorMode()
    generator = torch.Generator().manual_seed(0)
    graph, constants = fx.Graph(), step.constants()
    examples = tuple(example(port.spec, generator) for port in step.inputs)
    nodes: dict[fx.Node, fx.Node] = {}
    buffers: dict[str, fx.Node] = {}
    for number, name in enumerate(constants):
        buffers[name] = _placeholder(graph, f"constant_{number}", mode.from_tensor(constants[name]))
    for number, (node, value) in enumerate(zip(step.placeholders, examples, strict=True)):
        nodes[node] = _placeholder(graph, f"input_{number}", mode.from_tensor(value))
    for node in step.nodes:
        if node.op == "get_attr":
            nodes[node] = buffers[str(node.target)]
        elif node.op == "call_function":
            nodes[node] = _copy(graph, node, nodes, mode)
    results = [nodes[node] for node in step.results]
    graph.output(tuple(results))
    graph.eliminate_dead_code()
    signature = ExportGraphSignature(
        [
            *(InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, True) for name, node in buffers.items()),
            *(InputSpec(InputKind.USER_INPUT, TensorArgument(nodes[node].name), None) for node in step.placeholders),
        ],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results],
    )
    specs = (pytree.tree_flatten((examples, {}))[1], pytree.tree_flatten(tuple(results))[1])
    call = ModuleCallEntry("", ModuleCallSignature([], [], *specs))
    return PlainProgram(torch.nn.Module(), graph, signature, constants, {}, [call], (examples, {}), {})


def _placeholder(graph: fx.Graph, name: str, value: Any) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def _copy(graph: fx.Graph, node: fx.Node, nodes: dict[fx.Node, fx.Node], mode: FakeTensorMode) -> fx.Node:
    """An operator; a reshape as a view, of a dense copy where it needs one."""

    def given(source: fx.Node) -> fx.Node:
        if source.target not in DEQUANTIZES or len(source.users) == 1:
            return nodes[source]
        return _call(graph, source.target, nodes[source].args, nodes[source].kwargs, mode)  # of its own: XNNPACK takes it with its reader

    if node.target in (aten.addmm.default, aten.mm.default) and not node.kwargs and is_packed(node.args[-1]):
        arguments: Any = node.args
        *bias, x, weight = arguments
        if weight.target is aten.permute.default:  # a linear layer, whose matrix in int8 XNNPACK takes as the layer has it
            return _call(graph, aten.linear.default, (given(x), given(weight.args[0]), *map(given, bias)), {}, mode)
    args: Any = fx.node.map_arg(node.args, given)
    kwargs: Any = fx.node.map_arg(node.kwargs, given)
    if node.target is not aten.reshape.default:
        return _call(graph, node.target, args, kwargs, mode)
    source, shape = args
    with mode:
        whole = source.meta["val"].reshape(shape)
    if not torch._C._is_alias_of(source.meta["val"], whole):  # type: ignore[attr-defined]
        source = _call(graph, aten.clone.default, (source,), {"memory_format": torch.contiguous_format}, mode)
    return _call(graph, aten.view.default, (source, shape), {}, mode)


def _call(graph: fx.Graph, target: Any, args: Any, kwargs: Any, mode: FakeTensorMode) -> fx.Node:
    new = graph.call_function(target, args, kwargs)
    values, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    with mode:
        new.meta["val"] = target(*values, **named)
    return new
