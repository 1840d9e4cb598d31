"""How to look for plans, and what was found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgecl.planning.candidates import default_configs
from edgecl.planning.latents import At
from edgecl.planning.limits import Limits
from edgecl.planning.search import Option, Round, front
from edgecl_device.errors import InputError


@dataclass(frozen=True)
class Settings:
    """How to look for plans.

    Attributes:
        engine: The runtime on the device.
        pending: Predictions that may wait for a delayed label; one is enough for predict, then learn.
        configs: Hyperparameters by method, of the methods to try; those of the registry that learn on the device by default.
        at: Cuts to try; chosen among the network's own by default.
        samples: Most samples in use, training and validation together.
        orders: Stream orders of the best plans.
        seconds: Time for measuring accuracy; no stream is begun after it.
        top: Plans wanted.
    """

    engine: str = "onnx"
    pending: int = 1
    configs: Mapping[str, Any] = field(default_factory=default_configs)
    at: Sequence[At] = ()
    samples: int = 1000
    orders: int = 3
    seconds: float = 300.0
    top: int = 10


@dataclass
class Planned:
    """What was found.

    Attributes:
        limits: The budget.
        options: Everything within it, the best first: by mean accuracy on all samples, the cheaper one first where that is equal; then
            what was left behind.
        rounds: How accuracy was measured.
        counts: Depths in all and within the limit of MACs; at those candidates in all, left by lower bounds, and within the budget.
        unsuited: Why candidates cannot be built, and how many.
        validation: Held-out samples.
        seconds: Time that it took.
    """

    limits: Limits
    options: list[Option]
    rounds: list[Round]
    counts: dict[str, int]
    unsuited: dict[str, int]
    validation: int
    seconds: float

    @property
    def best(self) -> Option:
        """The most accurate option; of those measured in several stream orders where there are such, as one order may be lucky.

        Raises:
            InputError: when no accuracy could be measured.
        """
        measured = [option for option in self.options if option.accuracy]
        if not measured:
            why = next((option.failed for option in self.options if option.failed), "the time was up")
            raise InputError(f"data: must allow some learner to learn it, none could be measured ({why}); mend that")
        most = max(len(option.accuracy) for option in measured)
        return next(option for option in measured if len(option.accuracy) >= min(most, 2))

    def front(self) -> list[Option]:
        """What no other option beats in accuracy and all costs at once, and the best; of those measured on all samples."""
        measured = [option for option in self.options if option.accuracy]
        kept = {id(option) for option in [*front(measured, lambda option: option.mean), self.best]}
        return [option for option in measured if id(option) in kept]
