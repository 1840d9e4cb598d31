"""The methods, one file each. A new method enters by one line in :data:`METHODS`."""

from edgecl.learner import Learner
from edgecl.methods.finetune import Finetune
from edgecl.methods.frozen import Frozen
from edgecl.methods.joint import Joint
from edgecl.methods.latent_replay import LatentReplay
from edgecl.methods.ncm import NearestMean
from edgecl.methods.ridge import Ridge
from edgecl.methods.slda import StreamingLDA

METHODS: dict[str, type[Learner]] = {
    method.name: method for method in (Frozen, Finetune, NearestMean, StreamingLDA, Ridge, LatentReplay, Joint)
}
"""Every method by name."""

__all__ = ["METHODS", "Finetune", "Frozen", "Joint", "LatentReplay", "NearestMean", "Ridge", "StreamingLDA"]
