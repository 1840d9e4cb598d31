"""edgecl: continual learning on the device, prepared in PyTorch, run by a stock inference runtime.

:class:`Learner` here is the contract that every method fulfils; ``edgecl_device.Learner`` is the running one, which loads a
bundle and learns.
"""

from edgecl.channels import split_channels
from edgecl.codecs import Codec
from edgecl.engine import EagerEngine
from edgecl.learner import Learner, Problem, State
from edgecl.methods import METHODS
from edgecl.prepare import Prepared, prepare
from edgecl.preprocess import ImageU8, LogMel
from edgecl.splitting import Split, SplitError, split, widen_head
from edgecl.taps import taps
from edgecl.targets import DenseMap, MultiLabel, Vector

__all__ = [
    "METHODS",
    "Codec",
    "DenseMap",
    "EagerEngine",
    "ImageU8",
    "Learner",
    "LogMel",
    "MultiLabel",
    "Prepared",
    "Problem",
    "Split",
    "SplitError",
    "State",
    "Vector",
    "prepare",
    "split",
    "split_channels",
    "taps",
    "widen_head",
]
