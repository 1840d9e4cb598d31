"""SparCL: sparse training with replay. Weight masks that move, gradients of some weights only, and samples left out that are easy.

Source: Wang, Zhan, Gong, Yuan, Niu, Jian, Ren, Ioannidis, Wang, Dy, "SparCL: Sparse Continual Learning on the Edge", NeurIPS 2022; replay
is ER (Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning") or DER++ (Buzzega et al., "Dark Experience for General
Continual Learning", NeurIPS 2020).

    importance of a weight    |w| + alpha |dL~(task) / dw| + beta |dL(memory) / dw|          L~ over the current classes alone
    TDM, a refresh            drop the least important, grow as many at random; more live while a task is new
    DGM, a refresh            gradients of the (1 - q) weights with the largest alpha |dL~| + beta |dL| are used, until the next
    an update                 w <- w - lr g where the gradient mask is set; masked weights are exactly zero

``granularity="unstructured"`` masks single weights, as in the paper. It saves no work on a dense kernel and none is claimed: its nominal
MACs stand beside the realised ones. ``granularity="structured"`` masks blocks of output channels. A sparse layer then is a smaller dense
one, its weights compact, its channels' numbers in the state: shapes stay, so that a new mask is new state and no new export.
Hidden channels between two sparse layers leave both of them; DGM computes the weight gradient of the chosen blocks alone.

Deviations from the paper. There is one stream and no epochs: a task is new for ``grow_for`` updates from the first sample of a class on,
masks are refreshed every ``refresh_every`` updates, and the current classes are those of the last ``window`` samples. The gradients of
both terms come from replayed rows, of the current classes for the first. Batch norm keeps its stored statistics, rows are latents behind
the frozen trunk, plain SGD as in the paper. The first masks are by magnitude. Grown weights start at the bundle's own values (of a pair
of layers those of the first, while the second starts at zero, so that no score changes): from zero, the paper's ``regrow="zero"``, both
layers of a pair would be zero, and a channel behind a closed rectifier had no gradient ever. DDR drops in each window of epochs the
samples that were misclassified least. In a stream a sample comes once: with ``skip_above`` the step ``gate`` runs its forward pass, and a
sample whose class already has that probability is not learned and not stored. Removal epoch by epoch is :class:`edgecl.removal.Removal`,
for training on the host.

Deviations from the authors' code (neu-spiral/SparCL at 3f983f3), where the paper is followed. Their score has one gradient for both
terms, that of the last batch of the epoch before, already masked, so that it is zero wherever a weight is masked. Their ``er`` branch
reads an option that no parser defines. They simulate: dense products, masks multiplied in, percentiles on the host. Their DDR counts
changes from right to wrong within five epochs. DER++ there draws the rows of its two terms apart; here they are every other row of one
draw.

| | bytes of state beyond the dense layers | MACs of learn |
|---|---|---|
| unstructured, P weights | ceil(P / 8) a mask, two masks | those of the dense net; nominal ones by ``edgecl.masks`` |
| structured, density d | d P weights in place of P; 8 bytes a block, and a moving block | d of theirs, of weight gradients 1 - q |
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from edgecl.graph.phases import value_and_gradient, value_and_gradients
from edgecl.learner import Problem, State, StepResult, one_hot
from edgecl.masks import Density
from edgecl.methods._features import require
from edgecl.methods._losses import cross_entropy
from edgecl.methods._replay import ReplayLearner, check_rows
from edgecl.methods._sparse_form import Choice, Form
from edgecl.methods._structured import Structured
from edgecl.methods._suffix import check_training
from edgecl.methods._unstructured import Unstructured
from edgecl_device.errors import InputError
from edgecl_device.manifest import AGE, ReplaySpec, TensorSpec

MOST_UPDATES = 1 << 24
"""What a counter in float32 holds exactly."""

FORMS: dict[str, type[Form]] = {"structured": Structured, "unstructured": Unstructured}


class SparCL(ReplayLearner):
    """See the module.

    State: that of a trained suffix, masks (:mod:`edgecl.methods._structured`, :mod:`edgecl.methods._unstructured`), ``since`` float32 [K],
    samples since each class was seen, and with refreshes ``age`` and ``fresh`` float32 []: updates since the last one and a new class.
    """

    name = "sparcl"
    summary = "sparse training with replay: masks that move, gradients of some weights only (SparCL)"
    AGES = "since"

    @dataclass(frozen=True)
    class Config:
        """Hyperparameters.

        Attributes:
            lr: Default learning rate; the device may give another with each sample.
            rows_per_step: Stored rows mixed into one update (r); with ``distill`` as many again for its term.
            capacity_bytes: Budget of the replay memory.
            codec: ``float32``, ``uint8``, ``packed`` or ``pq`` (:mod:`edgecl.codecs`).
            policy: ``reservoir`` or ``largest-class``.
            loss: ``er-ace``, the new sample's loss over the current classes as in SparCL, or ``er``, over all seen ones.
            window: Samples for which a class counts as current.
            replay_weight: Of the rows' cross-entropy.
            distill: Of the squared error to the scores that rows keep: above 0 it is DER++, whose rows hold 4 K bytes more.
            granularity: ``structured`` or ``unstructured``.
            sparsity: Share of a sparse layer's weights that are masked (s).
            gradient_sparsity: Share of its weights whose gradient is not used (q), at least ``sparsity``; equal: all living ones are.
            block: Channels of a unit, for structured masks.
            sparse: Patterns of the names of sparse layers' weights; None is every convolution of one group with a kernel above 1x1, or of
                a suffix that has none, every convolution of one group.
            grow: Share of the weights that live more while a task is new.
            grow_for: Updates for which a task is new.
            exchange: Share of the weights that a refresh drops and grows.
            regrow: Where grown weights start: ``base``, the bundle's values, which are then frozen constants of ``refresh``, or ``zero``.
            refresh_every: Updates between refreshes; 0 for masks that stay.
            alpha: Weight of the current classes' gradient in a score.
            beta: Weight of all rows' gradient.
            skip_above: A sample is not learned when its class already has more than this probability; 1 learns all.
            trainable: Patterns of parameter names, or None for all but the norms' affine parameters.
            seed: Key of the device's generator.
            bits: Of the ``packed`` codec.
            subquantizers: Of the ``pq`` codec.
            centroids: Of the ``pq`` codec.
        """

        lr: float = 0.03
        rows_per_step: int = 8
        capacity_bytes: int = 256 << 10
        codec: str = "uint8"
        policy: str = "reservoir"
        loss: str = "er-ace"
        window: int = 50
        replay_weight: float = 1.0
        distill: float = 0.0
        granularity: str = "structured"
        sparsity: float = 0.75
        gradient_sparsity: float = 0.8
        block: int = 1
        sparse: tuple[str, ...] | None = None
        grow: float = 0.01
        grow_for: int = 500
        exchange: float = 0.01
        regrow: str = "base"
        refresh_every: int = 30
        alpha: float = 0.5
        beta: float = 1.0
        skip_above: float = 1.0
        trainable: tuple[str, ...] | None = None
        seed: int = 0
        bits: int = 4
        subquantizers: int = 8
        centroids: int = 64

        def __post_init__(self) -> None:
            check_training(self)
            check_rows(self)
            require(self.granularity in FORMS, "granularity", f"be one of {', '.join(FORMS)}", self.granularity, "use 'structured'")
            require(0 <= self.sparsity < 1, "sparsity", "be in [0, 1)", self.sparsity, "0.75 is the paper's first")
            ok = self.sparsity <= self.gradient_sparsity < 1
            require(ok, "gradient_sparsity", "be in [sparsity, 1)", self.gradient_sparsity, f"{self.sparsity} uses all living ones")
            require(self.block >= 1, "block", "be at least 1 channel", self.block, "use 1, or 8")
            for name in ("grow", "exchange"):
                require(0 <= getattr(self, name) < 1, name, "be in [0, 1)", getattr(self, name), "0.01 is the paper's")
            for name in ("alpha", "beta", "replay_weight", "distill"):
                value = getattr(self, name)
                require(0 <= value < math.inf, name, "be finite and at least 0", value, "see the paper's values in docs/methods/sparcl.md")
            for name, mend in (("grow_for", "500 is a good start"), ("refresh_every", "30 is the paper's, 0 keeps the masks")):
                ok = 0 <= getattr(self, name) <= MOST_UPDATES
                require(ok, name, f"be in [0, {MOST_UPDATES}] updates", getattr(self, name), mend)
            require(self.regrow in ("zero", "base"), "regrow", "be 'zero' or 'base'", self.regrow, "use 'base'")
            require(0 < self.skip_above <= 1, "skip_above", "be in (0, 1]", self.skip_above, "1 skips none")
            patterns: Any = self.sparse  # the values of a configuration are of any type
            ok = patterns is None or (isinstance(patterns, tuple) and all(isinstance(p, str) for p in patterns))
            require(ok, "sparse", "be None or a tuple of patterns", self.sparse, "use ('layer*.conv*.weight',) for one")
            require(0 <= self.seed < 2**64, "seed", "be in [0, 2**64)", self.seed, "0 is as good as any")

    def __init__(self, problem: Problem, config: Any = None, *, suffix: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(problem, config, suffix=suffix, masks=masks)
        if self.masks:
            raise InputError(f"masks: sparcl has masks of its own, got some for {sorted(self.masks)}; leave them out")
        self.form = FORMS[self.config.granularity](self.suffix, self._sparse_layers(), self.config)

    def _sparse_layers(self) -> list[str]:
        """Paths of the sparse convolutions."""
        layers = {
            n: m for n, m in self.suffix.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1 and f"{n}.weight" in self.trained
        }
        patterns = self.config.sparse
        if patterns is None:
            wide = [name for name, layer in layers.items() if max(layer.kernel_size) > 1]
            found = wide or list(layers)
        else:
            for pattern in patterns:
                if not any(fnmatchcase(f"{name}.weight", pattern) for name in layers):
                    known = [f"{name}.weight" for name in layers]
                    raise InputError(f"sparse: {pattern!r} matches no trained convolution of one group; there are {known}")
            found = [name for name in layers if any(fnmatchcase(f"{name}.weight", p) for p in patterns)]
        if not found:
            raise InputError("sparse: the suffix trains no convolution of one group that could be sparse; cut the model further up")
        return found

    def init(self) -> State:
        """The suffix's weights under the first masks, no class seen."""
        state = super().init()
        weights = {name: state.pop(f"param.{name}") for name in self.trained}
        classes, window = self.problem.max_classes, float(self.config.window)
        steps = {AGE: torch.zeros(()), "fresh": torch.zeros(())} if self.config.refresh_every else {}
        return {**self.form.init(weights), **state, "since": torch.full((classes,), window), **steps}

    @property
    def replay(self) -> ReplaySpec:  # type: ignore[override]
        """Rows of codes, with ``distill`` also the scores at the time."""
        config = self.config
        scores = (TensorSpec("logits", (self.problem.max_classes,), "float32"),) if config.distill else ()
        rows = config.rows_per_step * (2 if config.distill else 1)
        draws = self.form.draws if config.refresh_every else ()
        return ReplaySpec((*self.row_fields(), *scores), rows, config.capacity_bytes, config.policy, config.seed, draws=draws)

    @property
    def steps(self) -> dict[str, Any]:
        """Those of a learner; ``gate`` only where ``skip_above`` is below 1."""
        return {name: step for name, step in super().steps.items() if name != "gate" or self.config.skip_above < 1}

    @property
    def refresh_every(self) -> int:
        """``refresh_every``."""
        return int(self.config.refresh_every)

    def prime(self, state: State, z: Any, target: Tensor, weight: Tensor | None = None) -> StepResult:
        """Count a base sample and return its replay row, with the scores that the sparse net has for it."""
        outputs, new = super().prime(state, z, target, weight)
        if self.config.distill:
            outputs["row.logits"] = self._of(state, self.parameters(state), self._decode(self._encode(z)))
        return outputs, new

    def predict(self, state: State, z: Any) -> StepResult:
        """Scores float32 [1, K] of the latent as a row would hold it."""
        scores = self._of(state, self.parameters(state), self._decode(self._encode(z)))
        return {"scores": self.masked(scores, state)}, {}

    def learn(self, state: State, z: Any, target: Tensor, weight: Tensor, lr: Tensor, replay: dict[str, Any]) -> StepResult:
        """One step on the new sample and the drawn rows; ``row.z`` is the sample's own row."""
        config, rows = self.config, self.replay.rows_per_step
        code = self._encode(z)
        counted = {**self.counted(state, target), **self._aged(state, target)}
        allowed = self._allowed(counted, rows)
        assert allowed is not None
        real = replay["weight"]
        batch = self._join(self._decode(code), self._decode(self._filled(replay["z"], code, real)))
        targets = torch.cat([target, replay["target"]])
        old, copied = self._split(real)
        weights = torch.cat([weight, old * config.replay_weight])

        def loss(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            scores = self._of(state, parameters, batch)
            value = (cross_entropy(scores, targets, allowed) * weights).sum()
            if config.distill:
                error = scores[1:] - replay["logits"]
                value = value + ((error * error).mean(1) * copied).sum() * config.distill
            return value, scores

        parameters = self.parameters(state)
        value, scores, gradients = value_and_gradient(loss, parameters, lr)
        new = {f"param.{name}": tensor for name, tensor in self.form.updated(parameters, gradients, state).items()}
        if config.refresh_every:
            seen = (state["count"] * one_hot(target, self.problem.max_classes).reshape(-1)).sum()
            new |= {AGE: state[AGE] + 1.0, "fresh": torch.where(seen > 0, state["fresh"] + 1.0, 0.0)}
        outputs = {"scores": self.masked(scores[:1], state), "loss": value, **self._row(code)}
        if config.distill:
            outputs["row.logits"] = scores[:1] * 1.0  # not the tensor that another output is
        return outputs, {**new, **counted}

    def gate(self, state: State, z: Any, target: Tensor) -> StepResult:
        """Whether a sample is worth an update, ``worth`` bool []: what its class already has is no more than ``skip_above``."""
        scores = self.predict(state, z)[0]["scores"]
        has = (torch.softmax(scores, 1) * one_hot(target, self.problem.max_classes)).sum()
        return {
            "scores": scores,
            "loss": cross_entropy(scores, target, state["count"] > 0).sum(),
            "worth": has <= self.config.skip_above,
        }, {}

    def refresh(self, state: State, replay: dict[str, Any], draw: Mapping[str, Tensor] = MappingProxyType({})) -> StepResult:
        """New masks from the gradients on replayed rows: of the current classes, over those alone, and of all."""
        config, targets, real = self.config, replay["target"], replay["weight"]
        current, seen = state["since"] < config.window, state["count"] > 0
        batch = self._decode(self._filled(replay["z"], self._first(replay["z"]), real))
        hot = one_hot(targets, self.problem.max_classes)
        here = real * (hot * current.to(torch.float32)).sum(1)

        def losses(parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            scores = self._of(state, parameters, batch)
            pairs = ((here, current), (real, seen))
            means = [(cross_entropy(scores, targets, allowed) * w).sum() / w.sum().clamp_min(1.0) for w, allowed in pairs]
            return torch.stack(means), {}

        _, _, gradients = value_and_gradients(losses, self.parameters(state), [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])])
        new = (state["fresh"] < config.grow_for).reshape(1)
        choice = Choice(gradients[0], gradients[1], config.alpha, config.beta, new, draw)
        return {}, {**self.form.refreshed(state, choice), AGE: state[AGE] * 0.0}

    def densities(self) -> dict[str, Density]:
        """Shares of each sparse layer's weights, for :func:`edgecl.masks.nominal_macs`."""
        return self.form.densities()

    def _of(self, state: State, parameters: dict[str, Tensor], z: Any) -> Tensor:
        return self.form.scores(self.called, parameters, state, z)

    def _split(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the rows [r] in the loss on their targets, and with ``distill`` in that on their scores: every other row's each."""
        if not self.config.distill:
            return real / real.sum().clamp_min(1.0), real[:0]
        second = torch.arange(real.shape[0]) % 2 == 1
        old, copied = torch.where(second, real, 0.0), torch.where(second, 0.0, real)
        return old / old.sum().clamp_min(1.0), copied / copied.sum().clamp_min(1.0)

    def _first(self, rows: Any) -> Any:
        """The first row, in place of filler."""
        return self._whole({name: part[:1] for name, part in self._parts(rows).items()})
