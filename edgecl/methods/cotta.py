"""CoTTA: a student follows the averaged predictions of its own running average, and single weights go back to the source by chance.

Source: Wang et al. 2022, "Continual Test-Time Domain Adaptation" (github.com/qinenergy/cotta). With s the student, t the teacher and a the
source network, all with the statistics of the rows, an update is

    y = mean over ``views`` of t(view(x)) where the mean confidence of a(x) is below ``threshold``, else t(x)
    loss = mean CE(softmax(y), s(x));  one step on all of s;  t <- d t + (1 - d) s
    each weight of s goes back to a's with chance ``restore``

Scores are y; single samples are predicted by the teacher. Deviations: the loss that is reported is less by y's own entropy, which has no
gradient, so that it is zero where both agree; views are zoom, shift, mirror image, brightness and contrast
(:mod:`edgecl.methods._views`), without rotation, blur, noise and hue; statistics of the views are of all together. A graph does not branch,
so that views are computed in every update, as in the authors' code for CIFAR. Which weights go back is a frozen table of random numbers
plus one drawn number a tensor, modulo one: each with the same chance, not independent of each other.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from edgecl.graph.phases import phase
from edgecl.learner import Problem, State, StepResult
from edgecl.methods._adapt import TrainedConfig
from edgecl.methods._features import require
from edgecl.methods._losses import soft_cross_entropy
from edgecl.methods._norms import ROWS, STORED, biases_before_norms
from edgecl.methods._views import GRAIN, view_draw, views
from edgecl.methods.tent import Tent
from edgecl_device.errors import InputError
from edgecl_device.manifest import DrawSpec, ReplaySpec, TensorSpec
from edgecl_device.memory import whole_bytes


class CoTTA(Tent):
    """Self-training of the whole suffix with a teacher.

    State: 4 (5 P + 2 C + K) bytes for P weights under Adam, C channels with statistics and K classes. MACs of an update of B rows: B times
    (3 + 2 + ``views``) forward passes, in which the student's backward pass counts twice.
    """

    name = "cotta"
    summary = "test-time self-training of all weights by an averaged teacher"

    @dataclass(frozen=True)
    class Config(TrainedConfig):
        """Hyperparameters, beside those of :class:`edgecl.methods._adapt.TrainedConfig`.

        Attributes:
            views: Of each row, for the teacher; 0 for the rows themselves. The authors take 32. Latents are then images, or maps like them.
            threshold: Mean confidence of the source network below which the views count: 0.92 for CIFAR-10, 0.72 for CIFAR-100.
            teacher: Decay of the teacher's weights.
            restore: Chance of a weight to go back to the source's.
        """

        views: int = 8
        threshold: float = 0.92
        teacher: float = 0.999
        restore: float = 0.01

        def __post_init__(self) -> None:
            super().__post_init__()
            require(0 <= self.views <= 256, "views", "be 0 to 256", self.views, "8 are a good start")
            require(0 <= self.threshold <= 1, "threshold", "be in [0, 1]", self.threshold, "0.92 suits ten classes")
            require(0 <= self.teacher < 1, "teacher", "be in [0, 1)", self.teacher, "0.999 is the authors'")
            require(0 <= self.restore < 1, "restore", "be in [0, 1)", self.restore, "0.01 is the authors'")

    def __init__(self, problem: Problem, config: Any = None, **parts: Any) -> None:
        super().__init__(problem, config, **parts)
        if self.config.reset == "loss":
            raise InputError("reset: must be 'never' or 'every' for cotta, whose loss is near 0 while all is well, got 'loss'; use 'every'")
        latent = problem.features
        if self.config.views:
            shape = list(latent.shape) if isinstance(latent, TensorSpec) else list(latent)
            ok = isinstance(latent, TensorSpec) and len(shape) == 4 and latent.dtype == "float32"
            require(ok, "views", f"be 0 for a latent of {shape}", self.config.views, "cut where one map [1, C, H, W] goes on, or set 0")
        generator = torch.Generator().manual_seed(self.config.seed)
        weights = self.parameters(super().init())
        self._table = {name: torch.rand(value.shape, generator=generator) for name, value in weights.items()} if self.config.restore else {}

    def _patterns(self) -> list[str]:
        """All but biases right in front of a batch norm, which takes them away: of a gradient that is a rounding Adam makes a step."""
        idle = biases_before_norms(self.suffix)
        return [name for name, _ in self.suffix.named_parameters() if name not in idle]

    def init(self) -> State:
        """Tent's state for the student; the teacher's and the source's weights."""
        state = super().init()
        copies = {f"{kind}.{name}": value.clone() for kind in ("teacher", "anchor") for name, value in self.parameters(state).items()}
        return {**state, **copies}

    @property
    def replay(self) -> ReplaySpec:
        """Rows, and the integers that views and restored weights are made of."""
        spec = super().replay
        assert spec is not None
        draws = [view_draw(spec.rows_per_step, self.config.views)] if self.config.views else []
        draws += [DrawSpec("restore", (len(self.trained),), GRAIN, "adapt")] if self.config.restore else []
        spec = replace(spec, draws=tuple(draws), capacity_bytes=0)
        return replace(spec, capacity_bytes=whole_bytes(spec, self.problem.max_classes))

    def step_inputs(self) -> dict[str, Any]:
        """Those of tent, and ``draw``."""
        return {**super().step_inputs(), "draw": {draw.name: draw.tensor for draw in self.replay.draws}}

    def predict(self, state: State, z: Any) -> StepResult:
        """Scores float32 [N, K] of the teacher with the stored statistics."""
        scores, _ = self.scored(state, z, STORED, parameters=self._of(state, "teacher"))
        return {"scores": self.masked(scores, state).to(torch.float32)}, {}

    def track(self, state: State, z: Any) -> StepResult:
        """Scores float32 [1, K] of the teacher for a sample, as tent's, and its row."""
        teacher = {f"param.{name}": value for name, value in self._of(state, "teacher").items()}
        return super().track({**state, **teacher}, z)

    # Steps are fed by the names of their inputs, never through the base class.
    def adapt(self, state: State, lr: Tensor, replay: dict[str, Any], draw: dict[str, Tensor]) -> StepResult:  # type: ignore[override]
        """One step of the student on all rows. ``scores`` [B, K] are the teacher's before it."""
        config, rows = self.config, self._decode(replay["z"])
        with phase("forward"):
            y, found = self.scored(state, rows, ROWS, parameters=self._of(state, "teacher"), reports=config.statistics == "rows")
            if config.views:
                with phase("augment"):
                    many = views(rows, draw["view"])
                seen, _ = self.scored(state, many, ROWS, parameters=self._of(state, "teacher"))
                averaged = seen.reshape(config.views, -1, seen.shape[1]).mean(0)
                source, _ = self.scored(state, rows, ROWS, parameters=self._of(state, "anchor"))
                confidence = torch.softmax(self.masked(source, state), 1).amax(1).mean()
                y = torch.where(confidence < config.threshold, averaged, y)
        truth, own = torch.softmax(self.masked(y, state), 1), self.entropy(y, state)

        def loss(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            scores, _ = self.scored(state, rows, ROWS, parameters=parameters)
            return (soft_cross_entropy(scores, truth, state["count"] > 0) - own).mean(), scores

        value, _, new = self.descend(state, loss, lr)
        for i, name in enumerate(self.trained):
            now, old = new[f"param.{name}"].reshape(-1), state[f"teacher.{name}"].reshape(-1)
            new[f"teacher.{name}"] = (old + (now - old) * (1 - config.teacher)).reshape(state[f"teacher.{name}"].shape)
            if config.restore:
                shift = draw["restore"][i : i + 1].to(torch.float32) * (1 / GRAIN)
                place = self._table[name].reshape(-1) + shift
                back = (place - place.floor()) < config.restore
                new[f"param.{name}"] = torch.where(back, state[f"anchor.{name}"].reshape(-1), now).reshape(state[f"anchor.{name}"].shape)
        outputs = {"scores": self.masked(y, state).to(torch.float32), "loss": value.to(torch.float32)}
        return outputs, {**new, **{f"stat.{name}": tensor for name, tensor in found.items()}}

    def _of(self, state: State, kind: str) -> dict[str, Tensor]:
        """The teacher's or the source's weights, by their names in the suffix."""
        return {name: state[f"{kind}.{name}"] for name in self.trained}
