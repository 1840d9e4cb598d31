"""Passes over step graphs."""

from edgecl.graph.passes.add import AddProducts
from edgecl.graph.passes.affine import ScaleKernels
from edgecl.graph.passes.base import Pass
from edgecl.graph.passes.clean import Clean
from edgecl.graph.passes.expand import SinkExpand
from edgecl.graph.passes.finite import ProveFinite
from edgecl.graph.passes.fold import FoldConstants, FoldConvolutionAffine
from edgecl.graph.passes.integers import WriteIntegers
from edgecl.graph.passes.lower import ApplyRules
from edgecl.graph.passes.masks import PackMasks
from edgecl.graph.passes.merge import MergeEqual
from edgecl.graph.passes.parts import SinkIntoParts
from edgecl.graph.passes.recompute import Recompute
from edgecl.graph.passes.rows import HoldRows
from edgecl.graph.passes.scale import ScaleMaps
from edgecl.graph.passes.schedule import NarrowEarly, UpdateEarly, WidenLate
from edgecl.graph.passes.select import SelectChannels
from edgecl.graph.passes.sums import JoinSums
from edgecl.graph.passes.vectors import JoinVectors

__all__ = [
    "AddProducts",
    "ApplyRules",
    "Clean",
    "FoldConstants",
    "FoldConvolutionAffine",
    "HoldRows",
    "JoinSums",
    "JoinVectors",
    "MergeEqual",
    "NarrowEarly",
    "PackMasks",
    "Pass",
    "ProveFinite",
    "Recompute",
    "ScaleKernels",
    "ScaleMaps",
    "SelectChannels",
    "SinkExpand",
    "SinkIntoParts",
    "UpdateEarly",
    "WidenLate",
    "WriteIntegers",
]
