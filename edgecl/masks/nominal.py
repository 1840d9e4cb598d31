"""Nominal work of a masked step: what it would take where every masked product were skipped.

The figure beside it is the realised one, which the cost table counts on the graph: a mask that multiplies by zero saves nothing there.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Density:
    """Shares of a layer's weights.

    Attributes:
        weight: That are not masked.
        gradient: Whose gradient is computed.
    """

    weight: float = 1.0
    gradient: float = 1.0


def nominal_macs(layers: Mapping[str, Mapping[str, int]], densities: Mapping[str, Density], data: float = 1.0) -> int:
    """Multiply-accumulates of a dense step's layers, each times the share of its products that masks leave.

    Forward pass and input gradient shrink with the mask on the weights, the weight gradient with the mask on the gradient; layers without
    a mask, and everything that belongs to no layer, count whole.

    Args:
        layers: MACs by module path and phase (:func:`edgecl.graph.cost.count_by_module`), of a dense step.
        densities: By module path.
        data: Share of the samples that is trained on.

    >>> nominal_macs({"conv": {"forward": 100, "weight_gradient": 100}, "fc": {"forward": 8}}, {"conv": Density(0.25, 0.2)})
    53
    """
    whole = Density()
    total = 0.0
    for path, phases in layers.items():
        density = densities.get(path, whole)
        shares = {"forward": density.weight, "input_gradient": density.weight, "weight_gradient": density.gradient}
        total += sum(macs * shares.get(phase, 1.0) for phase, macs in phases.items())
    return round(total * data)
