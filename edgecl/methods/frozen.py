"""Frozen: the network as it was trained, which learns nothing. The floor that every learner must beat."""

from dataclasses import dataclass

from edgecl.methods._suffix import SuffixLearner


class Frozen(SuffixLearner):
    """The pretrained network; classes that it was not trained on are never predicted.

    State: 4 K bytes (class counts, where there are classes). MACs a prediction: those of the suffix.
    """

    name = "frozen"
    targets = ("class", "vector", "multilabel", "map")
    summary = "the pretrained network, unchanged"

    @dataclass(frozen=True)
    class Config:
        """No hyperparameters."""
