"""Passes over step graphs."""

from edgecl.graph.passes.affine import ScaleKernels
from edgecl.graph.passes.base import Pass
from edgecl.graph.passes.clean import Clean
from edgecl.graph.passes.fold import FoldConstants, FoldConvolutionAffine
from edgecl.graph.passes.lower import ApplyRules
from edgecl.graph.passes.merge import MergeEqual
from edgecl.graph.passes.rows import HoldRows
from edgecl.graph.passes.schedule import UpdateEarly
from edgecl.graph.passes.sums import JoinSums
from edgecl.graph.passes.vectors import JoinVectors

__all__ = [
    "ApplyRules",
    "Clean",
    "FoldConstants",
    "FoldConvolutionAffine",
    "HoldRows",
    "JoinSums",
    "JoinVectors",
    "MergeEqual",
    "Pass",
    "ScaleKernels",
    "UpdateEarly",
]
