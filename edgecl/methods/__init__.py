"""The methods, one file each. A new method enters by one line in :data:`METHODS`."""

from edgecl.learner import Learner
from edgecl.methods.affine_warmup import AffineWarmup
from edgecl.methods.bn_stats import BatchStatistics
from edgecl.methods.clr import Clr
from edgecl.methods.cotta import CoTTA
from edgecl.methods.eata import Eata
from edgecl.methods.ecotta import EcoTTA
from edgecl.methods.finetune import Finetune
from edgecl.methods.frozen import Frozen
from edgecl.methods.joint import Joint
from edgecl.methods.latent_replay import LatentReplay
from edgecl.methods.ncm import NearestMean
from edgecl.methods.ridge import Ridge
from edgecl.methods.slda import StreamingLDA
from edgecl.methods.sparcl import SparCL
from edgecl.methods.tent import Tent

METHODS: dict[str, type[Learner]] = {
    method.name: method
    for method in (
        Frozen,
        Finetune,
        NearestMean,
        StreamingLDA,
        Ridge,
        LatentReplay,
        Clr,
        SparCL,
        Joint,
        BatchStatistics,
        Tent,
        Eata,
        AffineWarmup,
        EcoTTA,
        CoTTA,
    )
}
"""Every method by name."""

__all__ = [
    "METHODS",
    "AffineWarmup",
    "BatchStatistics",
    "Clr",
    "CoTTA",
    "Eata",
    "EcoTTA",
    "Finetune",
    "Frozen",
    "Joint",
    "LatentReplay",
    "NearestMean",
    "Ridge",
    "SparCL",
    "StreamingLDA",
    "Tent",
]
