"""Batch norm statistics that follow the stream: adaptation without a gradient.

Source: Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift adaptation"; Nado et al. 2020,
"Evaluating Prediction-Time Batch Normalization for Robustness under Covariate Shift". Deviations: ``each`` averages v + mu^2, not v, as
the spread of the images' own means is part of the variance (worth 3 points of error on corrupted CIFAR-10 in single images). Variances
are biased ones. Each prediction is by statistics that hold its own sample.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from edgecl.graph.phases import phase
from edgecl.learner import Problem, State, StepResult
from edgecl.methods._adapt import AdaptConfig, AdaptiveLearner
from edgecl.methods._norms import MIXED, MOVED, ROWS
from edgecl_device.errors import InputError
from edgecl_device.manifest import AdaptSpec, ReplaySpec


class BatchStatistics(AdaptiveLearner):
    """Statistics of the batch norms, in three ways.

    ``each``: every sample, or batch, moves the stored statistics by ``share`` (an exponential average). ``source``: those of a sample, or
    batch, take part by ``share`` beside the source's (BN-alpha). ``rows``: every so many samples the statistics become those of a memory's
    rows (prediction-time batch norm, at single samples).

    State: 4 (2 C + K) bytes for C channels and K classes, with ``source`` 8 C more. MACs a sample: those of the suffix, once; with
    ``rows`` again for each row of an update.
    """

    name = "bn_stats"
    summary = "test-time statistics of the batch norms, no gradient"

    @dataclass(frozen=True)
    class Config(AdaptConfig):
        """Hyperparameters, beside those of :class:`edgecl.methods._adapt.AdaptConfig`.

        Attributes:
            statistics: ``each``, ``source`` or ``rows``.
            share: Of ``each`` (0.05 is RoTTA's) and ``source`` (0.1 is BN-alpha's).
        """

        kinds: ClassVar[tuple[str, ...]] = ("each", "source", "rows")

    def __init__(self, problem: Problem, config: Any = None, **parts: Any) -> None:
        super().__init__(problem, config, **parts)
        if not self.norms.names:
            raise InputError("suffix: must have a batch norm, got none behind the cut; cut the model further up")

    def _patterns(self) -> list[str]:
        """Nothing is trained."""
        return []

    def init(self) -> State:
        """The source's statistics, twice where they take part in each new one."""
        state = super().init()
        return {**state, **({f"source.{name}": value for name, value in self.norms.initial().items()} if self._kind == "source" else {})}

    @property
    def steps(self) -> dict[str, Callable[..., StepResult]]:
        """The steps by name; ``track`` only beside a memory."""
        return {name: step for name, step in super().steps.items() if name != "track" or self._kind == "rows"}

    def inputs_of(self, step: str) -> dict[str, Any]:
        """Those of the base class; ``adapt`` takes rows of the memory, or the sample itself."""
        if step != "adapt":
            return super().inputs_of(step)
        name = "replay" if self._kind == "rows" else "z"
        return {name: self.step_inputs()[name]}

    @property
    def replay(self) -> ReplaySpec | None:
        """Rows, where the statistics are theirs."""
        return super().replay if self._kind == "rows" else None

    @property
    def adaptation(self) -> AdaptSpec:
        """On each sample, unless the statistics are those of rows."""
        spec = super().adaptation
        return spec if self._kind == "rows" else dataclasses.replace(spec, every=1)

    def adapt(self, state: State, z: Any = None, replay: Mapping[str, Any] | None = None) -> StepResult:
        """New statistics from ``z`` [N, ...] or ``replay``; ``scores`` [N, K] are by them, ``loss`` [] is the mean entropy."""
        with phase("forward"):
            if self._kind == "rows":
                assert replay is not None
                scores, found = self.scored(state, self._decode(replay["z"]), ROWS, reports=True)
            elif self._kind == "source":
                source = {name.replace("source.", "stat.", 1): value for name, value in state.items() if name.startswith("source.")}
                scores, found = self.scored({**state, **source}, z, MIXED, self.config.share, reports=True)
            else:
                scores, found = self.scored(state, z, MOVED, self.config.share, reports=True)
            loss = self.entropy(scores, state).mean()
        new = {f"stat.{name}": value for name, value in found.items()}
        return {"scores": self.masked(scores, state).to(torch.float32), "loss": loss.to(torch.float32)}, new

    @property
    def _kind(self) -> str:
        kind: str = self.config.statistics
        return kind
