"""Latent replay: stored latents of old samples are mixed into every update of the suffix.

Source: Pellegrini et al. 2020, "Latent Replay for Real-Time Continual Learning"; rows quantised to 8 bits as in Ravaglia
et al. 2021 (QLR-CL); the asymmetric loss is ER-ACE, Caccia et al. 2022, "New Insights on Reducing Abrupt Representation
Change in Online Continual Learning".

Deviations: the trunk is frozen and batch norm keeps its stored statistics (batch statistics mean nothing for single
samples). ER-ACE's current loss runs over the classes of a recent window of samples, because over the one class of a
single sample its gradient is zero. While a whole window holds one class it is zero all the same: a class that comes in such a run is
learned through its stored rows alone, late. Learning and prediction both see the decoded latent. Predictions may come from a running
average of the weights (Soutif-Cormerais et al. 2023, "Improving Online Continual Learning Performance and Stability with Temporal
Ensembles").
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgecl.codecs import CODECS
from edgecl.graph.phases import phase
from edgecl.learner import Problem, State, StepResult, one_hot
from edgecl.methods._features import require
from edgecl.methods._losses import losses
from edgecl.methods.finetune import Finetune
from edgecl_device.manifest import ReplaySpec, TensorSpec
from edgecl_device.memory import POLICIES


class LatentReplay(Finetune):
    """Experience replay on latents: ``loss = new_weight * L(new sample) + mean of L(r stored rows)``, L that of the target's kind.

    State: that of finetune, for targets of one class 4 K bytes for the window, and the trained weights again with
    ``average``; beside it the replay memory. MACs a sample: (1 + r) times the suffix's forward and backward pass.
    """

    name = "latent_replay"
    summary = "replay of stored latents (ER or ER-ACE) into every update of the suffix"

    @dataclass(frozen=True)
    class Config(Finetune.Config):
        """Hyperparameters, beside those of finetune.

        Attributes:
            rows_per_step: Stored rows mixed into one update (r).
            capacity_bytes: Budget of the replay memory.
            codec: ``float32`` or ``uint8``.
            policy: ``reservoir`` or ``largest-class`` (evict from the class with the most rows; for targets of one class only).
            loss: ``er``, or for targets of one class ``er-ace``.
            new_weight: Weight of the new sample's loss beside the mean of the stored rows'; 1 is ER's. Below 1 a run of samples of
                one class pulls less.
            average: Decay of the running average of the trained weights with which ``predict`` works; 0 is the weights themselves.
            window: Samples for which a class counts as current, for ``er-ace``.
            seed: Key of the device's generator.
        """

        rows_per_step: int = 8
        capacity_bytes: int = 256 << 10
        codec: str = "uint8"
        policy: str = "largest-class"
        loss: str = "er"
        new_weight: float = 1.0
        average: float = 0.0
        window: int = 50
        seed: int = 0

        def __post_init__(self) -> None:
            super().__post_init__()
            require(self.rows_per_step >= 1, "rows_per_step", "be at least 1", self.rows_per_step, "8 is a good start")
            require(self.codec in CODECS, "codec", f"be one of {', '.join(CODECS)}", self.codec, "use 'uint8'")
            require(self.policy in POLICIES, "policy", f"be one of {', '.join(POLICIES)}", self.policy, "use 'largest-class'")
            require(self.loss in ("er", "er-ace"), "loss", "be 'er' or 'er-ace'", self.loss, "use 'er'")
            require(0 < self.new_weight < math.inf, "new_weight", "be finite and above 0", self.new_weight, "1 is ER's own")
            require(0 <= self.average < 1, "average", "be in [0, 1)", self.average, "0.99 averages over about 100 samples")
            require(self.window >= 1, "window", "be at least 1 sample", self.window, "50 is a good start")

    def __init__(self, problem: Problem, config: Any = None, *, suffix: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(problem, config, suffix=suffix, masks=masks)
        features = {"": problem.features} if isinstance(problem.features, TensorSpec) else problem.features
        for spec in features.values():
            require(spec.dtype == "float32", spec.name, "be float32 features", spec.dtype, "convert the model with float()")
        kind = problem.target.kind
        require(kind == "class" or self.config.loss == "er", "loss", f"be 'er' for targets of kind {kind}", self.config.loss, "use 'er'")
        self._names = list(features)
        self.codecs = {name: CODECS[self.config.codec]() for name in self._names}

    def init(self) -> State:
        """Finetune's state, and for each class the samples since it was last seen."""
        ages = {"age": torch.full((self.problem.max_classes,), float(self.config.window))} if self._ages else {}
        state = {**super().init(), **ages}
        averages = {f"average.{name}": state[f"param.{name}"].clone() for name in self.trained} if self.config.average else {}
        return {**state, **averages}

    def calibrate(self, latents: Any) -> None:
        """Fit the codecs on latents [N, ...] of base samples."""
        for name, part in self._parts(latents).items():
            self.codecs[name].fit(part)

    @property
    def replay(self) -> ReplaySpec:
        """Rows of codes, drawn and evicted by the device."""
        features = self.problem.features
        specs = {"": features} if isinstance(features, TensorSpec) else features
        dtype = CODECS[self.config.codec].dtype
        fields = tuple(TensorSpec(f"z.{name}" if name else "z", spec.shape[1:], dtype) for name, spec in specs.items())
        stored = self.problem.target.stored(self.problem.max_classes)
        fields = fields if stored is None else (*fields, stored)
        return ReplaySpec(fields, self.config.rows_per_step, self.config.capacity_bytes, self.config.policy, self.config.seed)

    def step_inputs(self) -> dict[str, Any]:
        """Those of finetune, and ``replay``: r rows of codes, their targets, and 1 for a real row or 0 for filler."""
        memory, rows = self.replay, self.config.rows_per_step
        specs = {f.name: TensorSpec(f.name, (rows, *f.shape), f.dtype) for f in memory.fields}
        target = specs.pop("target", TensorSpec("target", (rows,), "int64"))
        z = specs["z"] if self._names == [""] else dict(zip(self._names, specs.values(), strict=True))
        replay = {"z": z, "target": target, "weight": TensorSpec("weight", (rows,), "float32")}
        return {**super().step_inputs(), "replay": replay}

    def prime(self, state: State, z: Any, target: Tensor, weight: Tensor | None = None) -> StepResult:
        """Count a base sample and return its replay row."""
        _, new = super().prime(state, z, target, weight)
        return self._row(self._encode(z)), new

    def predict(self, state: State, z: Any) -> StepResult:
        """Scores float32 [1, K] of the latent as a row would hold it."""
        scores = self.scores(self._predictors(state), self._decode(self._encode(z)))
        return {"scores": self.masked(scores, state)}, {}

    # Steps are fed by the names of their inputs, never through the base class.
    def learn(  # type: ignore[override]
        self, state: State, z: Any, target: Tensor, weight: Tensor, lr: Tensor, replay: dict[str, Any]
    ) -> StepResult:
        """One step on the new sample and r stored rows; ``row.z`` is the sample's own row."""
        code = self._encode(z)
        counted = {**self.counted(state, target), **self._aged(state, target)}
        allowed = self._allowed(counted)
        with phase("replay_decode"):
            batch = self._join(self._decode(code), self._decode(replay["z"]))
        targets = torch.cat([target, replay["target"].to(target.dtype)])
        real = replay["weight"]
        weights = torch.cat([weight * self.config.new_weight, real / real.sum().clamp_min(1.0)])

        def loss(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            scores = self.scores(parameters, batch)
            return (losses(self.problem.target, scores, targets, allowed) * weights).sum(), scores

        value, scores, new = self.descend(state, loss, lr)
        if self.config.average:
            with phase("forward"):
                scores = self.scores(self._predictors(state), self._decode(code))
        outputs = {"scores": self.masked(scores[:1], state), "loss": value, **self._row(code)}
        return outputs, {**new, **self._average(state, new), **counted}

    @property
    def _ages(self) -> bool:
        return self.problem.target.kind == "class"

    def _aged(self, state: State, target: Tensor) -> State:
        """Samples since each class was last seen, this one included."""
        if not self._ages:
            return {}
        return {"age": torch.where(one_hot(target, self.problem.max_classes).reshape(-1) > 0, 0.0, state["age"] + 1.0)}

    def _allowed(self, counted: State) -> Tensor | None:
        """Classes that the loss of each row runs over: seen ones, for the new sample under ``er-ace`` the current ones."""
        if not counted:
            return None
        seen = counted["count"] > 0
        if not self._ages:
            return seen
        current = seen if self.config.loss == "er" else counted["age"] < self.config.window
        return torch.cat([current.unsqueeze(0), seen.unsqueeze(0).expand(self.config.rows_per_step, -1)])

    def _predictors(self, state: State) -> dict[str, Tensor]:
        """The weights that predict: the running average, where there is one."""
        kind = "average" if self.config.average else "param"
        return {name: state[f"{kind}.{name}"] for name in self.trained}

    def _average(self, state: State, new: State) -> State:
        """The running average of the trained weights after this step: ``a + (1 - decay) (w - a)``, so that equal weights stay."""
        if not self.config.average:
            return {}
        # in flat shape, like every update: runtimes broadcast a scalar over trailing dimensions of size one slowly
        pairs = {name: (state[f"average.{name}"], new[f"param.{name}"]) for name in self.trained}
        return {
            f"average.{name}": (old.reshape(-1) + (now - old).reshape(-1) * (1 - self.config.average)).reshape(old.shape)
            for name, (old, now) in pairs.items()
        }

    def _parts(self, z: Any) -> dict[str, Tensor]:
        return {"": z} if isinstance(z, Tensor) else dict(z)

    def _whole(self, parts: dict[str, Tensor]) -> Any:
        return parts[""] if self._names == [""] else parts

    def _encode(self, z: Any) -> Any:
        return self._whole({name: self.codecs[name].encode(part) for name, part in self._parts(z).items()})

    def _decode(self, code: Any) -> Any:
        return self._whole({name: self.codecs[name].decode(part) for name, part in self._parts(code).items()})

    def _join(self, first: Any, rest: Any) -> Any:
        parts = self._parts(rest)
        return self._whole({name: torch.cat([part, parts[name]]) for name, part in self._parts(first).items()})

    def _row(self, code: Any) -> dict[str, Tensor]:
        return {f"row.z.{name}" if name else "row.z": part for name, part in self._parts(code).items()}
