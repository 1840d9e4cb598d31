"""Order nodes for peak memory."""

from torch import fx

from edgecl.graph.passes.base import Pass
from edgecl.graph.step import StepGraph


class UpdateEarly(Pass):
    """Run each tensor's update as soon as its gradient exists, so that no two gradients wait for each other.

    Source: "fused backward" of Lv et al. 2023 (LOMO), and operator reordering of Lin et al. 2022,
    "On-Device Training Under 256KB Memory", section 3.3.
    """

    requires = frozenset({"no-dead-code"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        nodes = graph.nodes
        position = {node: i for i, node in enumerate(nodes)}
        order: list[fx.Node] = []
        done: set[fx.Node] = set()

        def place(node: fx.Node) -> None:
            if node in done or node.op == "output":
                return
            done.add(node)
            order.append(node)
            for user in sorted(node.users, key=position.__getitem__):
                if _is_update(user) and all(n in done for n in user.all_input_nodes):
                    place(user)

        for node in nodes:
            place(node)
        anchor = graph.module.graph.output_node()
        for node in order:
            anchor.prepend(node)
        graph.module.recompile()
        return graph


def _is_update(node: fx.Node) -> bool:
    return (node.meta.get("custom") or {}).get("phase") == "update"
