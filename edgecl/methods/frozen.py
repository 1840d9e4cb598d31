"""Frozen: the network as it was trained, which learns nothing. The floor that every learner must beat."""

from dataclasses import dataclass

from edgecl.methods._suffix import SuffixLearner


class Frozen(SuffixLearner):
    """The pretrained network; classes that it was not trained on are never predicted.

    State: 4 K bytes (class counts). MACs a prediction: those of the suffix.
    """

    name = "frozen"
    summary = "the pretrained network, unchanged"

    @dataclass(frozen=True)
    class Config:
        """No hyperparameters."""
