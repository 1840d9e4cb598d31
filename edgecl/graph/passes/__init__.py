"""Passes over step graphs."""

from edgecl.graph.passes.base import Pass
from edgecl.graph.passes.clean import Clean
from edgecl.graph.passes.fold import FoldConstants, FoldConvolutionAffine
from edgecl.graph.passes.lower import ApplyRules
from edgecl.graph.passes.schedule import UpdateEarly

__all__ = ["ApplyRules", "Clean", "FoldConstants", "FoldConvolutionAffine", "Pass", "UpdateEarly"]
