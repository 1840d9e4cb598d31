"""edgecl: continual learning on the device, prepared in PyTorch, run by a stock inference runtime.

:class:`Learner` here is the contract that every method fulfils; ``edgecl_device.Learner`` is the running one, which loads a
bundle and learns.
"""

from edgecl.codecs import Codec
from edgecl.engine import EagerEngine
from edgecl.learner import Learner, Problem, State
from edgecl.methods import METHODS
from edgecl.prepare import Prepared, prepare
from edgecl.preprocess import ImageU8
from edgecl.splitting import Split, SplitError, split, widen_head
from edgecl.taps import taps

__all__ = [
    "METHODS",
    "Codec",
    "EagerEngine",
    "ImageU8",
    "Learner",
    "Prepared",
    "Problem",
    "Split",
    "SplitError",
    "State",
    "prepare",
    "split",
    "taps",
    "widen_head",
]
