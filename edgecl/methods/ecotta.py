"""EcoTTA: small meta networks beside the parts of a frozen network, so that adaptation keeps few maps for its backward pass.

Source: Song et al. 2023, "EcoTTA: Memory-Efficient Continual Test-time Adaptation via Self-distilled Regularization", as in the community's
code (github.com/Lily-Le/EcoTTA; the authors' was not found). Part k of the frozen network, E_k, gets ``x_k = BN(E_k(x_{k-1})) +
ReLU(BN(Conv3x3(x_{k-1})))``. The meta networks are trained on labelled source samples first, then on the entropy of reliable predictions:

    loss = mean over H_i < ``margin`` ln C of H_i  +  ``anchor`` sum (theta - theta_warm)^2

Deviations. ``detached``: frozen parts pass no gradient back, so that an update keeps each meta network's maps and nothing of the frozen
parts; in the code that was published it goes through them, and their maps are kept as well (``detached=False``). The paper pulls each x_k
towards E_k's own output by its mean distance (``pull="outputs"``), which undoes the warm-up; the default pulls the weights to those behind
it. One loss and one step, where the code takes two. Without a reliable row nothing moves. The warm-up's augmentations are the caller's:
pass augmented samples to ``fit``. Before it, a meta network's first norm is set to its part's own statistics, so that it changes nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgecl.learner import Problem, State
from edgecl.methods._features import require
from edgecl.methods._norms import ROWS
from edgecl.methods._parts import META, Sum, default_parts, with_meta
from edgecl.methods._suffix import zeros
from edgecl.methods._warmup import source_statistics, warmed_up
from edgecl.methods.affine_warmup import AffineWarmup
from edgecl.methods.tent import Tent
from edgecl_device.manifest import TensorSpec

PULLS = ("weights", "outputs")


class EcoTTA(Tent):
    """Entropy minimisation on meta networks.

    State: 4 (3 P + 2 C + K) bytes for P weights of the meta networks under Adam (2 P under momentum), P more with ``pull="weights"``, C
    channels with statistics and K classes. An update keeps ``sum_k |x_{k-1}| + 2 |x_k|`` values a row
    (:func:`edgecl.methods._parts.kept_elements`), and the inputs of norms behind the last part.
    """

    name = "ecotta"
    summary = "test-time adaptation of small meta networks beside frozen parts"

    @dataclass(frozen=True)
    class Config(AffineWarmup.Config):
        """Hyperparameters, beside those of affine_warmup.

        Attributes:
            parts: Names of the modules behind the cut where parts end, in their order; None for the containers with batch norms at the top.
            stem: Name of the module behind which the first part begins, for latents that are no map, as raw images; None for the latent.
            detached: Frozen parts pass no gradient back.
            margin: Of ln C: the entropy below which a row is reliable.
            pull: ``weights``, to those behind the warm-up, or ``outputs``, to the frozen parts' own (the paper's).
            anchor: Weight of the pull; 0 for none. The paper's, of ``outputs``, is 0.5.
        """

        lr: float = 5e-3
        optimizer: str = "momentum"
        parts: tuple[str, ...] | None = None
        stem: str | None = None
        detached: bool = True
        margin: float = 0.4
        pull: str = "weights"
        anchor: float = 0.1

        def __post_init__(self) -> None:
            super().__post_init__()
            parts: Any = self.parts  # the values of a configuration are of any type
            ok = parts is None or (isinstance(parts, tuple) and all(isinstance(name, str) for name in parts))
            require(ok, "parts", "be a tuple of module names", parts, "use ('layer1', 'layer2')")
            require(0 < self.margin < math.inf, "margin", "be finite and above 0", self.margin, "0.4 is the authors'")
            require(self.pull in PULLS, "pull", f"be one of {', '.join(PULLS)}", self.pull, "use 'weights'")
            require(0 <= self.anchor < math.inf, "anchor", "be finite and at least 0", self.anchor, "use 0 for none")

    def __init__(self, problem: Problem, config: Any = None, *, suffix: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        config = self.Config() if config is None else config
        latent = problem.features
        map_like = config.stem is not None or (isinstance(latent, TensorSpec) and len(latent.shape) == 4 and latent.dtype == "float32")
        require(map_like, "features", "be one float32 map [1, C, H, W]", latent, "cut elsewhere, or name a stem")
        parts = config.parts or default_parts(suffix)
        require(bool(parts), "parts", "name a module where a part ends", parts, "pass containers such as 'layer1', in their order")
        whole, self.maps = with_meta(suffix, zeros(latent), parts, config.stem, config.detached, config.seed)
        super().__init__(problem, config, suffix=whole, masks=masks)

    def _patterns(self) -> list[str]:
        """The meta networks' parameters."""
        return [name for name, _ in self.suffix.named_parameters() if name.startswith(f"{META}.")]

    def init(self) -> State:
        """Tent's state for the meta networks, and the weights that they are pulled to."""
        state = super().init()
        held = self.config.anchor and self.config.pull == "weights"
        return {**state, **({f"anchor.{name}": value.clone() for name, value in self.parameters(state).items()} if held else {})}

    def warm_up(self, state: State, latents: Any, target: Tensor) -> State:
        """Trained meta networks and all statistics; the weights are what they are pulled to from then on."""
        config = self.config
        own = {**state, **self._identities(state, latents)}
        new = warmed_up(self, own, latents, target, config.epochs, config.warmup_lr, config.batch, config.seed)
        anchors = {name: new[f"param.{name.removeprefix('anchor.')}"].clone() for name in state if name.startswith("anchor.")}
        return {**new, **anchors}

    def objective(self, scores: Tensor, state: State, parameters: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Mean entropy of reliable rows, and the pull."""
        entropy = self.entropy(scores, state)
        with torch.no_grad():
            bound = (state["count"] > 0).to(torch.float32).sum().log() * self.config.margin
            kept = (entropy < bound).to(torch.float32)
        return (entropy * kept).sum() / kept.sum().clamp_min(1.0) + self._pull(state, parameters), (kept,)

    def scores(self, parameters: dict[str, Tensor], z: Any) -> Tensor:
        """Scores of the suffix; where outputs are pulled, the parts' distances are noted on the way."""
        self._gaps: list[Tensor] = []
        wanted = self._gaps if self.config.pull == "outputs" and self.norms.mode == ROWS else None
        sums = [module for module in self.suffix.modules() if isinstance(module, Sum)]
        for module in sums:
            module.gaps = wanted
        try:
            return super().scores(parameters, z)
        finally:
            for module in sums:
                module.gaps = None

    def _pull(self, state: State, parameters: dict[str, Tensor]) -> Tensor:
        if not self.config.anchor:
            return torch.zeros(())
        if self.config.pull == "outputs":
            terms, self._gaps = self._gaps, []  # noted for this once
        else:
            away = [value - state[f"anchor.{name}"] for name, value in parameters.items()]
            terms = [(part * part).sum() for part in away]
        pull: Tensor = torch.stack(terms).sum() * self.config.anchor
        return pull

    def _identities(self, state: State, latents: Any) -> State:
        """Scales and shifts of the first norm of each meta network that undo its normalisation of source samples."""
        sums = [module for module in self.suffix.modules() if isinstance(module, Sum)]
        for module in sums:
            module.bypassed = True
        found, new = source_statistics(self, state, latents, self.config.batch), {}
        for module in sums:
            module.bypassed = False
        for k in range(len(self.maps) - 1):
            name = f"{META}.{k}.norm"
            norm: Any = self.suffix.get_submodule(name)
            new[f"param.{name}.weight"] = (found[f"stat.{name}.var"] + norm.eps).sqrt()
            new[f"param.{name}.bias"] = found[f"stat.{name}.mean"].clone()
        return new
