"""What ExecuTorch's delegate XNNPACK takes of a program; needs the package."""

import warnings
from collections import defaultdict
from typing import Any

import torch
from torch.fx.passes.infra.partitioner import Partition
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from edgecl_export.targets.partition import parts_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what the package deprecates in others
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec, PartitionResult

LEAST_ELEMENTS = 512
"""A part of a graph whose tensors are all smaller stays with the portable kernels, convolutions apart: a delegate's call takes some
microseconds."""

AT_ONCE = 5
"""Tensors that XNNPACK concatenates at once."""

MOST_JOINED = 9
"""It concatenates as many in two operators, the taps of a 3 x 3 kernel for one; of more it would copy the first ones again and again."""

_PLAIN = frozenset(
    f"aten.{name}"
    for names in (
        "abs.default add.Tensor addmm.default bmm.default cat.default clamp.default constant_pad_nd.default div.Tensor exp.default",
        "log.default maximum.default minimum.default mm.default mul.Tensor neg.default permute_copy.default rsqrt.default",
        "sigmoid.default slice_copy.Tensor sqrt.default sub.Tensor tanh.default view_copy.default",
    )
    for name in names.split()
)
"""Operators that XNNPACK takes as they are; others it may write as something else first, or fuse."""

_FEW_PASSES = [CompileSpec("dqlinear_partitioner", b"")]
"""Lets XNNPACK's preprocessing rewrite products of matrices and nothing else, in a fraction of the time of all its rewrites."""


class DropCopies(PassBase):
    """Every tensor is dense here, so that a copy of one to make it dense does nothing."""

    def call(self, graph_module: Any) -> PassResult:
        """Changes the graph in place."""
        for node in graph_module.graph.nodes:
            if node.op == "call_function" and node.target.__name__ == "dim_order_ops._clone_dim_order.default":
                source = node.args[0]
                if source.op == "call_function" and source.meta["val"].dim_order() == node.meta["val"].dim_order():
                    node.replace_all_uses_with(source)
                    graph_module.graph.erase_node(node)
        return PassResult(graph_module, True)


class Partitioner(XnnpackPartitioner):  # type: ignore[misc]
    """XNNPACK for every part of a graph that is worth the call."""

    def generate_partitions(self, ep: Any) -> list[Partition]:
        """Parts in the order in which they run."""
        units = [unit for unit in self.get_matched_nodes_from_configs(ep) if not any(_joins(node, MOST_JOINED) for node in unit)]
        parts = [part for part in parts_of(ep.graph.nodes, units) if any(map(_worth_it, part))]
        return [Partition(id=number, nodes=part) for number, part in enumerate(parts)]

    def partition(self, exported_program: Any) -> PartitionResult:
        """Tag each part; one of operators that XNNPACK takes as they are is not rewritten for it."""
        result = super().partition(exported_program)
        few = DelegationSpec(self.delegation_spec.backend_id, _FEW_PASSES)
        tagged: dict[str, list[Any]] = defaultdict(list)
        for node in exported_program.graph.nodes:
            if node.op == "call_function" and "delegation_tag" in node.meta:
                tagged[node.meta["delegation_tag"]].append(node)
        for tag, nodes in tagged.items():
            if all(node.target.__name__ in _PLAIN and not _joins(node, AT_ONCE) for node in nodes):
                result.partition_tags[tag] = few
        return result

    def ops_to_not_decompose(self, ep: Any) -> tuple[list[Any], None]:
        """Judged here and for all nodes of an operator at once: a check of single nodes costs two more passes over the whole program."""
        operators, supported = super().ops_to_not_decompose(ep)
        nodes = [node for node in ep.graph.nodes if node.op == "call_function"]
        return [op for op in operators if all(supported(node) for node in nodes if node.target is op)], None


def _joins(node: Any, limit: int) -> bool:
    """Whether a node concatenates more tensors than that."""
    return node.op == "call_function" and node.target.__name__ == "aten.cat.default" and len(node.args[0]) > limit


def _worth_it(node: Any) -> bool:
    """Whether a node alone is worth a delegate's call: a convolution, integers, or a tensor of some size (a slice's: what it copies)."""
    name = str(node.target)
    values = [n.meta.get("val") for n in ([node] if "slice" in name else [node, *node.all_input_nodes])]
    return "convolution" in name or "quantize" in name or any(isinstance(v, torch.Tensor) and v.numel() >= LEAST_ELEMENTS for v in values)
