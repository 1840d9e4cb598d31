"""CLR: a task is a kernel of nine taps a channel behind each frozen convolution, the norms, and a head; nothing of it is shared.

Source: Ge et al. 2023, "CLR: Channel-wise Lightweight Reprogramming for Continual Learning" (ICCV). Every convolution with a kernel of more
than one tap is followed by a depthwise 3x3 convolution that starts as the identity (Dirac), so that the first prediction is the frozen
network's, to the bit. A task trains these kernels, scale and shift of all norms, and its head, and has norm statistics of its own. What
other tasks learned cannot change: they are other values of the same state (``docs/contract.md``, tasks).

Deviations. The authors train a task offline, in batches (:mod:`edgecl.reprogram` does); here a step takes one sample as well. Then
norms use stored statistics, which each sample moves: ``m' = m + a d`` and ``v' = v + a (v_x - v) + a (1 - a) d^2`` with
``d = m_x - m``. That is the running average of ``v + m^2`` less the square of the new mean, so that the spread of the means of single
samples counts; batch norm's own rule leaves it out. With replay rows, recent samples of the same task, a full batch is normalised by
its own statistics as in training mode. Convolutions of one dimension get a kernel of three taps. Classes that a task has not seen are
masked.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgecl.graph.phases import phase
from edgecl.learner import UNSEEN, Problem, State, StepResult
from edgecl.methods._features import check_types, require
from edgecl.methods._losses import losses
from edgecl.methods._norms import blended
from edgecl.methods._optim import OptimiserConfig
from edgecl.methods._reprogram import Batch, TaskNorm, last_layer, reprogrammed, with_moments
from edgecl.methods._rows import CodedRows
from edgecl.methods._suffix import NORMS, zeros
from edgecl.methods.finetune import Finetune
from edgecl_device.manifest import ReplaySpec, TensorSpec
from edgecl_device.memory import POLICIES

STATISTICS = ("running_mean", "running_var")
SHRINK = 8.0
"""Samples for which the mean variance of all features counts in the variance of each, when a task is identified."""
SMALLEST_VARIANCE = 1e-12
MOST_ROWS = 4096


class Clr(CodedRows, Finetune):
    """One optimiser step on a task's kernels, norms and head, for one sample and, with ``task_rows``, recent ones of the task.

    State, all of it one task's: ``param.NAME`` (P values, two or three times P with momentum or Adam), ``stat.NAME`` (mean and variance
    of every batch norm), ``count`` [K]; ``feature.mean`` and ``feature.var`` [D] and ``feature.count`` []: of the frozen features, by
    which :meth:`identify` tells tasks apart. MACs a sample: forward, and backward down to the first convolution behind the cut.
    """

    name = "clr"
    tasks = True
    summary = "a small set of kernels, norms and a head for each task on a frozen network; tasks never touch each other"

    @dataclass(frozen=True)
    class Config(OptimiserConfig):
        """Hyperparameters, beside those of :class:`edgecl.methods._optim.OptimiserConfig`.

        Attributes:
            full: Convolutions of one tap get a kernel, too (the authors' CLR-Full).
            share: Share of an update's own mean and variance in the running ones.
            task_rows: Stored samples of the task in an update; 0 stores none.
            capacity_bytes: Budget of the replay memory.
            codec: ``float32`` or ``uint8``, of the rows.
            policy: ``reservoir`` or ``largest-class``.
            seed: Key of the device's generator.
        """

        full: bool = False
        share: float = 0.01
        task_rows: int = 0
        capacity_bytes: int = 256 << 10
        codec: str = "float32"
        policy: str = "reservoir"
        seed: int = 0

        def __post_init__(self) -> None:
            check_types(self)
            require(0 <= self.lr < math.inf, "lr", "be finite and at least 0", self.lr, "0.01 is a good start")
            self.optimiser()
            require(0 < self.share <= 1, "share", "be above 0 and at most 1", self.share, "0.01 averages over about 100 samples")
            require(0 <= self.task_rows <= MOST_ROWS, "task_rows", f"be within 0 and {MOST_ROWS}", self.task_rows, "15 makes batches of 16")
            require(self.codec in ("float32", "uint8"), "codec", "be 'float32' or 'uint8'", self.codec, "'uint8' is a quarter")
            require(self.policy in POLICIES, "policy", f"be one of {', '.join(POLICIES)}", self.policy, "use 'reservoir'")
            require(self.capacity_bytes >= 1024, "capacity_bytes", "be at least 1024", self.capacity_bytes, "262144 is usual")
            require(0 <= self.seed < 2**64, "seed", "be in [0, 2**64)", self.seed, "0 is as good as any")

    def __init__(self, problem: Problem, config: Any = None, *, suffix: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        features = {"z": problem.features} if isinstance(problem.features, TensorSpec) else problem.features
        for spec in features.values():
            require(spec.dtype == "float32", spec.name, "be float32 features", spec.dtype, "convert the model with float()")
        head = last_layer(suffix)
        mend = "let the model call its head as a module, the last nn.Linear or convolution of its forward"
        require(head != "", "suffix", "call a linear layer or a convolution as its head", "none", mend)
        full = getattr(self.Config() if config is None else config, "full", False)
        network = reprogrammed(suffix, full, head)
        self.head = tuple(f"{head}.{name}" for name, _ in network.get_submodule(head).named_parameters())
        self.kernels = tuple(name for name, _ in network.named_parameters() if name.endswith(".reprogram.weight"))
        taps = "" if full else " of more than one tap"
        mend = "cut the model further up, " + ("" if full else "set full=True for those of one tap, ") + "or take finetune"
        require(len(self.kernels) > 0, "suffix", f"hold a convolution{taps} to put a kernel behind", "none", mend)
        super().__init__(problem, config, suffix=network, masks=masks)
        assert isinstance(self.suffix, torch.fx.GraphModule)
        self._learning, self.norms = with_moments(self.suffix)
        self.code_rows(self.config.codec, self.config)

    def _patterns(self) -> list[str]:
        """The new kernels, scale and shift of every norm, and the head."""
        norms = [
            f"{path}.{name}"
            for path, module in self.suffix.named_modules()
            if isinstance(module, (*NORMS, TaskNorm))
            for name, _ in module.named_parameters(recurse=False)
        ]
        return [*self.kernels, *norms, *self.head]

    def init(self) -> State:
        """The frozen network itself, no class seen."""
        size = self._described(zeros(self.problem.features)).numel()
        buffers = dict(self.suffix.named_buffers())
        statistics = {f"stat.{name}.{kind}": buffers[f"{name}.{kind}"].clone() for name in dict.fromkeys(self.norms) for kind in STATISTICS}
        features = {"feature.mean": torch.zeros(size), "feature.var": torch.zeros(size), "feature.count": torch.zeros(())}
        return {**super().init(), **statistics, **features}

    @property
    def fresh(self) -> tuple[str, ...]:
        """State that a new task starts with zeros: what counts samples, and the optimiser's."""
        return tuple(name for name in self.init() if not name.startswith(("param.", "stat.")))

    def task_values(self) -> dict[str, int]:
        """Values that a task adds to the network: new kernels, scale and shift of norms, their statistics, and its head."""
        parameters = self.parameters(self.init())
        head = sum(parameters[name].numel() for name in self.head)
        kernels = sum(parameters[name].numel() for name in self.kernels)
        statistics = sum(value.numel() for name, value in self.init().items() if name.startswith("stat."))
        affine = sum(value.numel() for value in parameters.values()) - head - kernels
        return {"kernels": kernels, "affine": affine, "statistics": statistics, "head": head}

    @property
    def replay(self) -> ReplaySpec | None:
        """Recent samples of the task, for a configuration that takes them."""
        config = self.config
        if not config.task_rows:
            return None
        return ReplaySpec(self.row_fields(), config.task_rows, config.capacity_bytes, config.policy, config.seed)

    def step_inputs(self) -> dict[str, Any]:
        """Those of finetune, and ``replay``: rows of codes, their targets, and 1 for a real row or 0 for filler."""
        if self.replay is None:
            return super().step_inputs()
        rows = self.config.task_rows
        inputs = self.row_inputs(self.replay.fields, rows)
        target = inputs.pop("target", TensorSpec("target", (rows,), "int64"))
        return {**super().step_inputs(), "replay": {**inputs, "target": target, "weight": TensorSpec("weight", (rows,), "float32")}}

    @property
    def steps(self) -> dict[str, Any]:
        """The steps of this configuration: with rows ``learn`` takes them."""
        return {**super().steps, "learn": self.learn_with_rows if self.config.task_rows else self.learn}

    def prime(self, state: State, z: Any, target: Tensor, weight: Tensor | None = None) -> StepResult:
        """Count a base sample, take in its features, and return its replay row, if there are such."""
        _, new = super().prime(state, z, target, weight)
        return self._stored(z), {**new, **self._noted(state, z)}

    def predict(self, state: State, z: Any) -> StepResult:
        """Scores of the network as this task has it, float32 [1, K, ...]."""
        return {"scores": self.masked(self._predicted(state, z), state).to(torch.float32)}, {}

    def learn(self, state: State, z: Any, target: Tensor, weight: Tensor, lr: Tensor) -> StepResult:
        """One step on the loss of this sample times ``weight`` [1]; norms use their stored statistics."""
        return self._step(state, z, z, target, weight, lr, torch.ones_like(weight), None)

    def learn_with_rows(self, state: State, z: Any, target: Tensor, weight: Tensor, lr: Tensor, replay: dict[str, Any]) -> StepResult:
        """One step on this sample and the mean of r stored rows; with all r rows there, norms use the batch's statistics."""
        real = replay["weight"]
        batch = self._join(z, self._filled(self._decode(replay["z"]), z, real))
        rows = torch.cat([torch.ones_like(weight), real])
        targets = torch.cat([target, replay["target"].to(target.dtype)])
        weights = torch.cat([weight, real / real.sum().clamp_min(1.0)])
        return self._step(state, z, batch, targets, weights, lr, rows / rows.sum(), real.sum() - (len(real) - 0.5))

    def identify(self, state: State, z: Any) -> StepResult:
        """``likelihood`` float32 []: logarithm of the density of the sample's features under the task's.

        A Gaussian with the mean and variance of each feature, the variance shrunk towards the mean of all; -1e30 below two samples.
        """
        count, own = state["feature.count"], state["feature.var"]
        share = SHRINK / (count + SHRINK)
        variance = (own + (own.mean() - own) * share).clamp_min(SMALLEST_VARIANCE)
        away = self._described(z) - state["feature.mean"]
        density = (variance.log() + away * away / variance).sum() * -0.5
        return {"likelihood": torch.where(count < 2, UNSEEN, density)}, {}

    def _step(
        self, state: State, z: Any, batch: Any, targets: Tensor, weights: Tensor, lr: Tensor, share: Tensor, full: Batch
    ) -> StepResult:
        """One optimiser step on a batch whose first row is the new sample ``z``."""
        counted = self.counted(state, targets[:1])
        allowed = counted["count"] > 0 if counted else None

        def loss(parameters: dict[str, Tensor]) -> tuple[Tensor, Any]:
            scores, found = self._told(parameters, state, batch, share, full)
            return (losses(self.problem.target, scores, targets, allowed) * weights).sum(), (scores, found)

        value, (scores, found), new = self.descend(state, loss, lr)
        if full is not None:
            with phase("forward"):
                scores = self._predicted(state, z)
        outputs = {"scores": self.masked(scores, state).to(torch.float32), "loss": value.to(torch.float32), **self._stored(z)}
        return outputs, {**new, **self.tracked(state, found, self.config.share), **self._noted(state, z), **counted}

    def in_training(self, parameters: dict[str, Tensor], state: State, batch: Any) -> tuple[Tensor, Any]:
        """Scores [N, K, ...] of a batch whose norms use its own statistics, and the pairs of moments that :meth:`tracked` takes."""
        count = len(next(iter(self._parts(batch).values())))
        return self._told(parameters, state, batch, torch.full((count,), 1.0 / count), True)

    def tracked(self, state: State, found: Any, rate: float) -> State:
        """Running statistics after a pair of moments for each call of a norm, in their order."""
        new: State = {}
        for name, (mean, variance) in zip(self.norms, found, strict=True):
            keys = [f"stat.{name}.{kind}" for kind in STATISTICS]
            before, spread = (new.get(key, state[key]) for key in keys)
            new |= dict(zip(keys, blended(before, spread, mean, variance, rate), strict=True))
        return new

    def _told(self, parameters: dict[str, Tensor], state: State, batch: Any, share: Tensor, full: Batch) -> tuple[Tensor, Any]:
        found: Any = self.called(self._learning, {**parameters, **self._statistics(state)}, batch, share, full)
        return found[0], found[1]

    def _statistics(self, state: State) -> dict[str, Tensor]:
        return {key.removeprefix("stat."): value for key, value in state.items() if key.startswith("stat.")}

    def _predicted(self, state: State, z: Any) -> Tensor:
        return self.scores({**self.parameters(state), **self._statistics(state)}, z)

    def _noted(self, state: State, z: Any) -> State:
        """Mean and variance of the features so far, by Welford's rule."""
        count, found = state["feature.count"] + 1.0, self._described(z)
        away = found - state["feature.mean"]
        mean = state["feature.mean"] + away / count
        variance = state["feature.var"] + (away * (found - mean) - state["feature.var"]) / count
        return {"feature.mean": mean, "feature.var": variance, "feature.count": count}

    def _described(self, z: Any) -> Tensor:
        """The features of a sample by which tasks are told apart, [D]: of maps mean and deviation of each channel."""
        found = []
        for part in self._parts(z).values():
            if part.dim() < 3:
                found.append(part.reshape(-1))
                continue
            axes = list(range(2, part.dim()))
            mean = part.mean(axes, keepdim=True)
            away = part - mean
            found += [mean.reshape(-1), ((away * away).mean(axes) + SMALLEST_VARIANCE).sqrt().reshape(-1)]
        return torch.cat(found)

    def _stored(self, z: Any) -> dict[str, Tensor]:
        """The sample's row, for a configuration that stores any."""
        return self._row(self._encode(z)) if self.config.task_rows else {}
