"""Latent replay: stored latents of old samples are mixed into every update of the suffix.

Source: Pellegrini et al. 2020, "Latent Replay for Real-Time Continual Learning"; rows quantised as in Ravaglia et al. 2021
(QLR-CL) or product-quantised as in Hayes et al. 2020 (REMIND); the asymmetric loss is ER-ACE, Caccia et al. 2022, "New Insights on
Reducing Abrupt Representation Change in Online Continual Learning".

Deviations: the trunk is frozen and batch norm keeps its stored statistics (batch statistics mean nothing for single
samples). ER-ACE's current loss runs over the classes of a recent window of samples, because over the one class of a
single sample its gradient is zero; while the window holds fewer than two classes, over all seen ones. Learning and prediction both see
the decoded latent. Predictions may come from a running average of the weights (Soutif-Cormerais et al. 2023, "Improving Online
Continual Learning Performance and Stability with Temporal Ensembles").

The schedule by class is REMIND's, written out: ``lr_y = lr * decay ** (n_y // every)``, with n_y the samples of the class learned before
this one, base samples not among them. REMIND steps one scheduler a class, all of them on one optimiser. In PyTorch from 1.4 on each step
multiplies the optimiser's present rate, so that the classes' decays compound; copying those lines gives another method.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from edgecl.codecs import CODECS
from edgecl.graph.phases import phase
from edgecl.learner import Problem, State, StepResult, one_hot
from edgecl.methods._augment import ENTRIES, MOST_SIDE, PLACES, beta_quantiles, crop, crop_sizes, mix
from edgecl.methods._dropout import Site, with_masks
from edgecl.methods._features import require
from edgecl.methods._losses import losses, soft_cross_entropy
from edgecl.methods._replay import ReplayLearner, check_rows
from edgecl.methods.finetune import Finetune
from edgecl_device.manifest import DrawSpec, ReplaySpec, TensorSpec


class LatentReplay(ReplayLearner, Finetune):
    """Experience replay on latents: ``loss = new_weight * L(new sample) + mean of L(r stored rows)``, L that of the target's kind.

    ``health.reconstruction`` is the squared error of this sample's decoded latent over its square, for codecs that lose something: far
    above the figure in the manifest it says that the samples have drifted from those that the codec was fitted on.

    State: that of finetune, for targets of one class 4 K bytes for the window, and the trained weights again with ``average``; beside it
    the replay memory. MACs a sample: (1 + r) times the suffix's forward and backward pass.
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
            policy: ``reservoir`` or ``largest-class`` (evict from the class with the most rows; for targets of one class only).
            loss: ``er``, or for targets of one class ``er-ace``.
            new_weight: Weight of the new sample's loss beside the mean of the stored rows'; 1 is ER's. Below 1 a run of samples of
                one class pulls less.
            average: Decay of the running average of the trained weights with which ``predict`` works; 0 is the weights themselves.
            window: Samples for which a class counts as current, for ``er-ace``.
            seed: Key of the device's generator.
            crop: Random resized crop of every feature map of an update, the new sample's among them (:mod:`edgecl.methods._augment`).
            mixup: Alpha of Beta(alpha, alpha) for mixing pairs of stored rows, one share an update; then 2 r rows are drawn. 0 mixes none.
            dropout: The suffix's dropout modules act in the update (:mod:`edgecl.methods._dropout`); dropout within attention and
                recurrent layers stays off.
            lr_decay: Factor of a class's learning rate after each ``lr_decay_every`` samples of it; 1 keeps it.
            lr_decay_every: Samples of a class.
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
        crop: bool = False
        mixup: float = 0.0
        dropout: bool = False
        lr_decay: float = 1.0
        lr_decay_every: int = 100

        def __post_init__(self) -> None:
            super().__post_init__()
            check_rows(self)
            require(0 < self.new_weight < math.inf, "new_weight", "be finite and above 0", self.new_weight, "1 is ER's own")
            require(0 <= self.average < 1, "average", "be in [0, 1)", self.average, "0.99 averages over about 100 samples")
            require(0 <= self.mixup <= 1, "mixup", "be in [0, 1]", self.mixup, "0.1 is REMIND's, 0 mixes nothing")
            require(0 < self.lr_decay <= 1, "lr_decay", "be in (0, 1]", self.lr_decay, "0.5 is REMIND's, 1 keeps the rate")
            require(self.lr_decay_every >= 1, "lr_decay_every", "be at least 1 sample", self.lr_decay_every, "100 is REMIND's")

        @classmethod
        def remind(cls, rows_per_step: int = 50, subquantizers: int = 32, centroids: int = 256, **changes: Any) -> Self:
            """REMIND's settings (Hayes et al. 2020, as in the authors' code), for a map such as 512x7x7.

            The authors' loss is the mean over the new sample and r rows; here the new sample's, by ``new_weight``, stands beside the
            rows' mean, so that ``lr`` and ``weight_decay`` are theirs (0.1 and 1e-5) times r / (r + 1) and its inverse. Deviations: weight
            decay is decoupled, batch norm keeps its stored statistics and its affine parameters.

            Args:
                rows_per_step: Mixed rows (r).
                subquantizers: Bytes a position.
                centroids: Codewords a sub-quantiser.
                changes: Other fields, for instance ``capacity_bytes``: REMIND's 959,665 rows take 1.5 GB.
            """
            r = rows_per_step
            settings: dict[str, Any] = {
                "lr": 0.1 * r / (r + 1), "optimizer": "momentum", "momentum": 0.9, "weight_decay": 1e-5 * (r + 1) / r,
                "rows_per_step": r, "new_weight": 1 / r, "codec": "pq", "subquantizers": subquantizers, "centroids": centroids,
                "policy": "largest-class", "crop": True, "mixup": 0.1, "lr_decay": 0.5, "lr_decay_every": 100,
            }  # fmt: skip
            return cls(**{**settings, **changes})

        @classmethod
        def remind_edge(cls, **changes: Any) -> Self:
            """The same at the size of a small device: 8 bytes a position, 64 codewords, 8 rows an update."""
            return cls.remind(8, 8, 64, **changes)

    def __init__(self, problem: Problem, config: Any = None, *, suffix: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(problem, config, suffix=suffix, masks=masks)
        features = {"": problem.features} if isinstance(problem.features, TensorSpec) else problem.features
        kind = problem.target.kind
        if kind != "class":
            for name, plain in (("loss", "er"), ("mixup", 0.0), ("lr_decay", 1.0), *([("crop", False)] if kind == "map" else [])):
                value = getattr(self.config, name)
                require(value == plain, name, f"be {plain!r} for targets of kind {kind}", value, f"use {plain!r}")
        if self.config.crop:
            shapes = [list(spec.shape) for spec in features.values()]
            ok = len(shapes) == 1 and len(shapes[0]) == 4 and max(shapes[0][2:]) <= MOST_SIDE
            mend = f"leave it out, or cut the model at one map [1, C, H, W] of at most {MOST_SIDE} positions a side"
            require(ok, "crop", f"be False for a latent of {shapes}", True, mend)
            self._sizes = crop_sizes(*shapes[0][2:])
        self._sites: tuple[Site, ...] = ()
        if self.config.dropout:
            rows = 1 + self.config.rows_per_step
            batch = {name: torch.zeros(rows, *spec.shape[1:]) for name, spec in features.items()}
            self._dropping, self._sites = with_masks(self.suffix, self._whole(batch))
        if self.config.mixup:
            self._shares = beta_quantiles(self.config.mixup)

    def init(self) -> State:
        """Finetune's state, for each class the samples since it was last seen and, with a schedule, those learned."""
        ages = {"age": torch.full((self.problem.max_classes,), float(self.config.window))} if self._ages else {}
        state = {**super().init(), **ages}
        averages = {f"average.{name}": state[f"param.{name}"].clone() for name in self.trained} if self.config.average else {}
        schedule = {"learned": torch.zeros(self.problem.max_classes)} if self.config.lr_decay < 1 else {}
        return {**state, **averages, **schedule}

    @property
    def replay(self) -> ReplaySpec:  # type: ignore[override]
        """Rows of codes, drawn and evicted by the device."""
        config, draws = self.config, []
        if config.crop:
            draws += [DrawSpec("size", (1 + self._drawn,), ENTRIES), DrawSpec("place", (1 + self._drawn, 2), PLACES)]
        if config.mixup:
            draws.append(DrawSpec("share", (1,), ENTRIES))
        draws += [site.draw for site in self._sites]
        return ReplaySpec(self.row_fields(), self._drawn, config.capacity_bytes, config.policy, config.seed, draws=tuple(draws))

    @property
    def _drawn(self) -> int:
        """Stored rows that one update takes: two for each mixed one."""
        rows: int = self.config.rows_per_step
        return 2 * rows if self.config.mixup else rows

    def predict(self, state: State, z: Any) -> StepResult:
        """Scores float32 [1, K] of the latent as a row would hold it."""
        scores = self.scores(self._predictors(state), self._decode(self._encode(z)))
        return {"scores": self.masked(scores, state)}, {}

    # Steps are fed by the names of their inputs, never through the base class.
    def learn(  # type: ignore[override]
        self,
        state: State,
        z: Any,
        target: Tensor,
        weight: Tensor,
        lr: Tensor,
        replay: dict[str, Any],
        draw: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> StepResult:
        """One step on the new sample and r stored rows; ``row.z`` is the sample's own row."""
        config, rows = self.config, self.config.rows_per_step
        code = self._encode(z)
        counted = {**self.counted(state, target), **self._aged(state, target)}
        allowed = self._allowed(counted, rows)
        decoded, real = self._decode(code), replay["weight"]
        batch = self._join(decoded, self._decode(self._filled(replay["z"], code, real)))
        if config.crop:
            with phase("augment"):
                maps = crop(self._parts(batch)[self._names[0]], draw["size"], draw["place"], self._sizes)
                batch = self._whole({self._names[0]: maps})
        targets = torch.cat([target, replay["target"].to(target.dtype)])
        if config.mixup:
            with phase("augment"):
                batch, targets = self._mixed(batch, one_hot(targets, self.problem.max_classes), draw["share"], real[rows:])
            real = real[:rows]
        weights = torch.cat([weight * config.new_weight, real / real.sum().clamp_min(1.0)])

        with phase("augment"):
            dropped = {site.draw.name: site.mask(draw[site.draw.name]) for site in self._sites}

        def loss(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            scores = self._dropped(parameters, batch, dropped) if config.dropout else self.scores(parameters, batch)
            if config.mixup:
                return (soft_cross_entropy(scores, targets, allowed) * weights).sum(), scores
            return (losses(self.problem.target, scores, targets, allowed) * weights).sum(), scores

        schedule: State = {}
        if config.lr_decay < 1:
            fresh = one_hot(target, self.problem.max_classes).reshape(-1)
            lr = lr * config.lr_decay ** ((state["learned"] * fresh).sum() / config.lr_decay_every).floor()
            schedule = {"learned": state["learned"] + fresh}
        value, scores, new = self.descend(state, loss, lr)
        if config.average or config.crop or config.dropout:
            with phase("forward"):
                scores = self.scores(self._predictors(state), decoded)
        outputs = {"scores": self.masked(scores[:1], state), "loss": value, **self._row(code)}
        if not CODECS[config.codec].lossless:
            outputs["health.reconstruction"] = self._error(z, decoded)
        return outputs, {**new, **self._average(state, new), **schedule, **counted}

    def _mixed(self, batch: Any, truth: Tensor, drawn: Tensor, partners: Tensor) -> tuple[Any, Tensor]:
        """The new sample, and each stored row mixed with its partner, where it has a real one; maps and targets alike."""
        rows = self.config.rows_per_step
        share = torch.where(partners > 0, self._shares.index_select(0, drawn), 1.0)
        mixed = {name: torch.cat([part[:1], mix(part[1:], share, rows)]) for name, part in self._parts(batch).items()}
        return self._whole(mixed), torch.cat([truth[:1], mix(truth[1:], share, rows)])

    def _dropped(self, parameters: dict[str, Tensor], batch: Any, masks: dict[str, Tensor]) -> Tensor:
        """Scores [1 + r, K, ...] of the suffix with these masks where it drops."""
        return self.called(self._dropping, parameters, batch, masks)

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
