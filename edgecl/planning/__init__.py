"""Plans: where to cut a network, which method learns behind it, and on how much, within a budget and measured on the user's data."""

from edgecl.planning.candidates import Candidate, default_configs
from edgecl.planning.data import validation_split
from edgecl.planning.limits import FLASH, Costs, Limits
from edgecl.planning.planner import plan
from edgecl.planning.refusal import InfeasibleError
from edgecl.planning.result import Planned, Settings
from edgecl.planning.search import Option
from edgecl.planning.space import Network

__all__ = [
    "FLASH",
    "Candidate",
    "Costs",
    "InfeasibleError",
    "Limits",
    "Network",
    "Option",
    "Planned",
    "Settings",
    "default_configs",
    "plan",
    "validation_split",
]
