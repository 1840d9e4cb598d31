"""Latent replay: stored latents of old samples are mixed into every update of the suffix.

Source: Pellegrini et al. 2020, "Latent Replay for Real-Time Continual Learning"; rows quantised as in Ravaglia et al. 2021
(QLR-CL) or product-quantised as in Hayes et al. 2020 (REMIND); the asymmetric loss is ER-ACE, Caccia et al. 2022, "New Insights on
Reducing Abrupt Representation Change in Online Continual Learning".

Deviations: the trunk is frozen and batch norm keeps its stored statistics (batch statistics mean nothing for single
samples). ER-ACE's current loss runs over the classes of a recent window of samples, because over the one class of a
single sample its gradient is zero; while the window holds fewer than two classes, over all seen ones. Learning and prediction both see
the decoded latent. Predictions may come from a running average of the weights (Soutif-Cormerais et al. 2023, "Improving Online
Continual Learning Performance and Stability with Temporal Ensembles").
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgecl.codecs import CODECS
from edgecl.graph.phases import phase
from edgecl.learner import Problem, State, StepResult, mask_unseen, one_hot
from edgecl.methods._features import SMALLEST_NORM, require
from edgecl.methods._suffix import cross_entropy
from edgecl.methods.finetune import Finetune
from edgecl_device.manifest import ReplaySpec, TensorSpec
from edgecl_device.memory import POLICIES


class LatentReplay(Finetune):
    """Experience replay on latents: ``loss = new_weight * CE(new sample) + mean of CE(r stored rows)``.

    ``health.reconstruction`` is the squared error of this sample's decoded latent over its square, for codecs that lose something: far
    above the figure in the manifest it says that the samples have drifted from those that the codec was fitted on.

    State: that of finetune, 4 K bytes for the window, and the trained weights again with ``average``; beside it the replay memory. MACs
    a sample: (1 + r) times the suffix's forward and backward pass.
    """

    name = "latent_replay"
    summary = "replay of stored latents (ER or ER-ACE) into every update of the suffix"

    @dataclass(frozen=True)
    class Config(Finetune.Config):
        """Hyperparameters, beside those of finetune.

        Attributes:
            rows_per_step: Stored rows mixed into one update (r).
            capacity_bytes: Budget of the replay memory.
            codec: ``float32``, ``uint8``, ``packed`` or ``pq`` (:mod:`edgecl.codecs`).
            bits: Of the ``packed`` codec, 1 to 8 a value.
            subquantizers: Of the ``pq`` codec, bytes a position.
            centroids: Of the ``pq`` codec, codewords a sub-quantiser.
            policy: ``reservoir`` or ``largest-class`` (evict from the class with the most rows).
            loss: ``er`` or ``er-ace``.
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
        bits: int = 4
        subquantizers: int = 8
        centroids: int = 64

        def __post_init__(self) -> None:
            super().__post_init__()
            require(self.rows_per_step >= 1, "rows_per_step", "be at least 1", self.rows_per_step, "8 is a good start")
            require(self.codec in CODECS, "codec", f"be one of {', '.join(CODECS)}", self.codec, "use 'uint8'")
            for codec in CODECS.values():
                codec.of(self)  # checks what it takes of these values
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
        self._names = list(features)
        self.codecs = {name: CODECS[self.config.codec].of(self.config) for name in self._names}
        self._rows = {name: self.codecs[name].row_spec(spec) for name, spec in features.items()}

    def init(self) -> State:
        """Finetune's state, and for each class the samples since it was last seen."""
        state = {**super().init(), "age": torch.full((self.problem.max_classes,), float(self.config.window))}
        averages = {f"average.{name}": state[f"param.{name}"].clone() for name in self.trained} if self.config.average else {}
        return {**state, **averages}

    def calibrate(self, latents: Any) -> None:
        """Fit the codecs on latents [N, ...] of base samples."""
        for name, part in self._parts(latents).items():
            self.codecs[name].fit(part)

    def reconstruction(self, latents: Any) -> float:
        """Squared error of decoded latents [N, ...] over their square."""
        with torch.no_grad():
            return float(self._error(latents, self._decode(self._encode(latents))))

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """Those of the codecs."""
        return tuple(table for codec in self.codecs.values() for table in codec.constants())

    @property
    def replay(self) -> ReplaySpec:
        """Rows of codes, drawn and evicted by the device."""
        fields = tuple(TensorSpec(f"z.{name}" if name else "z", row.shape, row.dtype) for name, row in self._rows.items())
        return ReplaySpec(fields, self.config.rows_per_step, self.config.capacity_bytes, self.config.policy, self.config.seed)

    def step_inputs(self) -> dict[str, Any]:
        """Those of finetune, and ``replay``: r rows of codes, their targets, and 1 for a real row or 0 for filler."""
        memory, rows = self.replay, self.config.rows_per_step
        specs = [TensorSpec(f.name, (rows, *f.shape), f.dtype) for f in memory.fields]
        z = specs[0] if self._names == [""] else dict(zip(self._names, specs, strict=True))
        replay = {"z": z, "target": TensorSpec("target", (rows,), "int64"), "weight": TensorSpec("weight", (rows,), "float32")}
        return {**super().step_inputs(), "replay": replay}

    def prime(self, state: State, z: Any, target: Tensor) -> StepResult:
        """Count a base sample and return its replay row."""
        _, new = super().prime(state, z, target)
        return self._row(self._encode(z)), new

    def predict(self, state: State, z: Any) -> StepResult:
        """Scores float32 [1, K] of the latent as a row would hold it."""
        scores = self.scores(self._predictors(state), self._decode(self._encode(z)))
        return {"scores": mask_unseen(scores, state["count"])}, {}

    # Steps are fed by the names of their inputs, never through the base class.
    def learn(  # type: ignore[override]
        self, state: State, z: Any, target: Tensor, weight: Tensor, lr: Tensor, replay: dict[str, Any]
    ) -> StepResult:
        """One step on the new sample and r stored rows; ``row.z`` is the sample's own row."""
        code = self._encode(z)
        fresh = one_hot(target, self.problem.max_classes).reshape(-1)
        count = state["count"] + fresh
        age = torch.where(fresh > 0, 0.0, state["age"] + 1.0)
        seen = (count > 0).unsqueeze(0)
        rows, real = self.config.rows_per_step, replay["weight"]
        decoded = self._decode(code)
        batch = self._join(decoded, self._decode(self._filled(replay["z"], code, real)))
        targets = torch.cat([target, replay["target"]])
        allowed = torch.cat([self._current(age, seen), seen.expand(rows, -1)])
        weights = torch.cat([weight * self.config.new_weight, real / real.sum().clamp_min(1.0)])

        def loss(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            scores = self.scores(parameters, batch)
            return (cross_entropy(scores, targets, allowed) * weights).sum(), scores

        value, scores, new = self.descend(state, loss, lr)
        if self.config.average:
            with phase("forward"):
                scores = self.scores(self._predictors(state), decoded)
        outputs = {"scores": mask_unseen(scores[:1], state["count"]), "loss": value, **self._row(code)}
        if not CODECS[self.config.codec].lossless:
            outputs["health.reconstruction"] = self._error(z, decoded)
        return outputs, {**new, **self._average(state, new), "count": count, "age": age}

    def _current(self, age: Tensor, seen: Tensor) -> Tensor:
        """Classes that the new sample's softmax runs over, bool [1, K]."""
        if self.config.loss == "er":
            return seen
        window = (age < self.config.window).unsqueeze(0)
        return torch.where(window.to(torch.float32).sum() < 2, seen, window)

    def _filled(self, rows: Any, code: Any, real: Tensor) -> Any:
        """Rows with this sample's code in place of filler: of zeros a suffix may make NaN, which no weight of zero takes away."""
        own = self._parts(code)
        return self._whole(
            {
                name: torch.where((real > 0).reshape(-1, *[1] * (part.dim() - 1)), part, own[name])
                for name, part in self._parts(rows).items()
            }
        )

    def _error(self, z: Any, decoded: Any) -> Tensor:
        """Squared error over squared length, float32 []."""
        pairs = [(part, self._parts(decoded)[name]) for name, part in self._parts(z).items()]
        error = torch.stack([((part - other) * (part - other)).sum() for part, other in pairs]).sum()
        return error / torch.stack([(part * part).sum() for part, _ in pairs]).sum().clamp_min(SMALLEST_NORM)

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
        with phase("replay_encode"):
            return self._whole({name: self.codecs[name].encode(part) for name, part in self._parts(z).items()})

    def _decode(self, code: Any) -> Any:
        with phase("replay_decode"):
            return self._whole({name: self.codecs[name].decode(part) for name, part in self._parts(code).items()})

    def _join(self, first: Any, rest: Any) -> Any:
        parts = self._parts(rest)
        return self._whole({name: torch.cat([part, parts[name]]) for name, part in self._parts(first).items()})

    def _row(self, code: Any) -> dict[str, Tensor]:
        return {f"row.z.{name}" if name else "row.z": part for name, part in self._parts(code).items()}
