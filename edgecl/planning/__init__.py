"""Plans: where to cut a network, which method learns behind it, and on how much, within a budget and measured on the user's data."""

from edgecl.planning.costs import FLASH, RAM, Costs, Limits
from edgecl.planning.data import class_by_class, validation_split
from edgecl.planning.planner import Planned, Settings, default_configs, plan
from edgecl.planning.refusal import InfeasibleError
from edgecl.planning.search import Option
from edgecl.planning.space import Candidate, Network

__all__ = [
    "FLASH",
    "RAM",
    "Candidate",
    "Costs",
    "InfeasibleError",
    "Limits",
    "Network",
    "Option",
    "Planned",
    "Settings",
    "class_by_class",
    "default_configs",
    "plan",
    "validation_split",
]
