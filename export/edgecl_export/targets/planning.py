"""Places of a program's tensors in ExecuTorch's arenas; needs the package.

Its own planner puts tensors into shared objects, each as large as its largest tensor, and leaves gaps: up to 13 % of a learning step's
arena. Here the tensors of a method lie as :func:`edgecl.graph.memory.arrange` places them, where that takes less.
"""

import warnings
from collections.abc import Iterable
from typing import Any

from edgecl.graph.memory import Buffer, arrange

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what the package deprecates in others
    from executorch.exir.memory_planning import MemoryAlgoResult, MemoryPlanningAlgorithmSuite, SpecAllocResult, greedy
    from executorch.exir.passes import MemoryPlanningPass


def planner(*, ports: bool = True) -> Any:
    """The pass that plans a method's memory: by the better of ExecuTorch's own planner and :func:`by_lifetimes`.

    Args:
        ports: Whether inputs and outputs lie in the arena too, as ExecuTorch has it by default.
    """
    return MemoryPlanningPass(MemoryPlanningAlgorithmSuite([greedy, by_lifetimes]), alloc_graph_input=ports, alloc_graph_output=ports)


def by_lifetimes(alignment: int, specs: Iterable[Any], module: Any, signature: Any, extra_padding: int = 0) -> Any:
    """A planning algorithm of ExecuTorch: as :func:`edgecl.graph.memory.arrange` places tensors."""
    every = list(specs)
    for spec in every:
        spec.realign(alignment)
    wanted = [Buffer(str(i), s.allocated_memory, *s.lifetime) for i, s in enumerate(every) if s.storage_base is None]
    offsets = {id(every[int(buffer.name)]): buffer.offset for buffer in arrange(wanted)}
    found = {}
    for spec in every:
        root, offset = spec, 0
        while root.storage_base is not None:  # it lies in another tensor
            root, offset = root.storage_base, offset + root.storage_base_offset
        found[spec] = SpecAllocResult(mem_id=1, mem_obj_id=0, mem_offset=offsets[id(root)] + offset)
    total = max((found[spec].mem_offset + spec.allocated_memory for spec in every), default=0)
    return MemoryAlgoResult(found, [0, total + extra_padding if every else 0])
