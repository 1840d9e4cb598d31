"""Affine warm-up: the norms' affine parameters, trained on source samples first, then TENT from there.

A control for methods that train on labelled source samples before they adapt, as EcoTTA: what part of their gain is the training's. With
the same samples and augmentations, and no update afterwards (``lr`` of 0), it is the other control. Of the project; no publication.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from edgecl.learner import State
from edgecl.methods._features import require
from edgecl.methods._warmup import warmed_up
from edgecl.methods.tent import Tent


class AffineWarmup(Tent):
    """TENT from affine parameters that the first ``fit`` has trained on its labelled samples. State and costs are tent's."""

    name = "affine_warmup"
    summary = "the norms' affine parameters trained on source samples, then tent (a control)"

    @dataclass(frozen=True)
    class Config(Tent.Config):
        """Hyperparameters, beside those of tent.

        Attributes:
            epochs: Passes over the samples of the first ``fit``.
            warmup_lr: Learning rate of SGD with momentum at their start; it falls to zero along a cosine.
            batch: Samples a step.
        """

        epochs: int = 2
        warmup_lr: float = 0.05
        batch: int = 64

        def __post_init__(self) -> None:
            super().__post_init__()
            require(1 <= self.epochs <= 1000, "epochs", "be 1 to 1,000 passes over the source samples", self.epochs, "2 are enough")
            require(0 <= self.warmup_lr < 1e3, "warmup_lr", "be at least 0 and below 1,000", self.warmup_lr, "0.05 is usual")
            require(self.batch >= 2, "batch", "be at least 2 samples, as statistics are of batches", self.batch, "64 is usual")

    def warm_up(self, state: State, latents: Any, target: Tensor) -> State:
        """Trained affine parameters, and the statistics that go with them."""
        config = self.config
        return warmed_up(self, state, latents, target, config.epochs, config.warmup_lr, config.batch, config.seed)
