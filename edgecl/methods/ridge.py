"""Recursive ridge regression: learn, weight, relabel and forget exactly, one sample at a time.

The readout is at every moment the solution of  min_W  sum_i w_i |W^T phi_i - t_i|^2 + gamma |W|^2,  where phi is the
sample's feature vector (optionally relu(z A) with a fixed random A) and t its target: one-hot, real values, or a 1 for each label. With
R = (sum_i w_i phi_i phi_i^T + gamma I)^-1, one sample changes it by

    e = t - W^T phi        g = R phi        s = 1 + w phi.g
    R <- R - (w/s) g g^T                    W <- W + (w/s) g e^T

A negative w takes a learned sample out: ``forget`` is ``learn`` with -w. ``relabel`` from t to t' leaves R and adds
w (R phi) (t' - t)^T to W.

Source: recursive least squares by Sherman-Morrison; block form in Zhuang et al., "ACIL: Analytic class-incremental
learning with absolute memorization and privacy protection", NeurIPS 2022; random ReLU features as in McDonnell et al.,
"RanPAC", NeurIPS 2023. Deviations: one sample at a time; signed weights; features of unit length, so that gamma has one
meaning; a projection is scaled to unit length again.

float32 suffices up to some 2e6 gamma samples. R's eigenvalues lie between 1 / gamma and 1 / (samples + gamma), the latter along
the features' mean, and the smallest get lost in the rounding of the largest. Beyond, set ``reflect``, or take a larger gamma or
``dtype="float64"``.

With ``reflect`` R is kept as H R H, where the reflection H = I - 2 v v^T takes the mean feature vector of the first base samples
to the first axis (Householder, J. ACM 1958). What were small differences of large entries are small entries then, which
float32 keeps. gamma I and the solution stay the same. Without base samples H is I.

R changes by u u^T with u = g sqrt(|w/s|): u_i u_j is the same number as u_j u_i, so R stays symmetric bit for bit. With ``delay`` the
u wait, and R changes by several at once (:mod:`edgecl.methods._inverse`).

Drift: with ``drift`` = lambda < 1, R is divided by lambda before each sample, so a sample's weight decays by lambda with
every later one, and gamma decays too. In directions that no sample excites R would grow without bound. Therefore lambda
is raised, up to 1, for a step that would take trace(R) over ``trace_cap``. A sample's present weight is then not known
exactly, so ``forget`` and ``relabel`` are not offered.

| | bytes of state | MACs of predict | MACs of learn, forget | MACs of relabel |
|---|---|---|---|---|
| K classes, M features, float32 | 4 (M^2 + M K + K + 1) | M K | 2 M^2 + 2 M K + M | M^2 + M K + M |

float64 takes 8 (M^2 + M K) + 4 (K + 1) bytes. A projection from d features adds d M MACs to each, and 4 d M bytes of
constants (8 d M in float64); ``reflect`` adds 4 M MACs to learn, forget and relabel, and 4 M bytes of constants (8 M). ``delay`` = B
adds 4 (B M + B + 1) bytes of state; learn and forget then take M^2 + 2 M K + 2 B M + M MACs, relabel 2 B M more, and refresh B M^2, every
B updates and behind every forget.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgecl.graph.phases import phase
from edgecl.learner import Learner, Nested, Problem, State, StepResult, mask_unseen, one_hot
from edgecl.methods._features import check_delay, check_types, dtype_of, reflection_to_first_axis, require, unit, vector
from edgecl.methods._inverse import Inverse
from edgecl.trees import leaves, map_tree
from edgecl_device.errors import InputError, StepMissingError
from edgecl_device.manifest import TensorSpec

MEAN_OF = 1000
"""About so many base samples, evenly spread, make the mean of the reflection: a projection of all could fill the memory."""

HOST_BYTES = 4 * 1024**3
"""Most that state and constants of a method with a square matrix may take on the host; checked before they are made."""


def require_bytes(nbytes: int, parameter: str, value: str, mend: str) -> None:
    """Raise an InputError that names the parameter when a learner would take more than :data:`HOST_BYTES`."""
    if nbytes > HOST_BYTES:
        need = f"{HOST_BYTES / 1024**3:,.0f} GiB, got {value}, which need {nbytes / 1024**3:,.1f} GiB"
        raise InputError(f"{parameter}: state and constants must take at most {need}; {mend}")


class Ridge(Learner):
    """Recursive ridge regression.

    State: ``inverse`` [M, M], the R above, or H R H; ``readout`` [M, K], the W above, both of ``Config.dtype``; ``count`` float32
    [K], samples by class (not weights), for other targets [1], samples; ``min_s`` float32 [], the smallest s of any update.

    >>> from edgecl.learner import Problem
    >>> learner = Ridge(Problem(TensorSpec("z", (1, 2), "float32"), max_classes=3), Ridge.Config(gamma=1.0))
    >>> state, z, one = learner.init(), torch.tensor([[2.0, 0.0]]), torch.ones(1)
    >>> outputs, new = learner.learn(state, z, torch.tensor([1]), one)
    >>> new["readout"].tolist(), outputs["health.s"].item()
    ([[0.0, 0.5, 0.0], [0.0, 0.0, 0.0]], 2.0)
    >>> learner.forget(new, z, torch.tensor([1]), one)[1]["readout"].tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """

    name = "ridge"
    targets = ("class", "vector", "multilabel")
    summary = "recursive ridge regression; learns, weights, relabels and forgets exactly"

    @dataclass(frozen=True)
    class Config:
        """Hyperparameters.

        Attributes:
            gamma: Regulariser, in units of squared feature length (1 per sample with ``unit_norm``).
            unit_norm: Divide every feature vector by its length, before and after the projection.
            projection: Units of a fixed random ReLU projection, or None for the features as they are.
            projection_seed: Seed of the projection's N(0, 1) entries.
            drift: Factor in (0, 1] by which old samples' weights decay at every new one; 1 keeps all.
            trace_cap: With drift below 1, the bound on trace(R); None is the trace at the start, M / gamma.
            dtype: ``float32`` or ``float64``, of R and W.
            reflect: Keep R in reflected coordinates: for more than 2e6 gamma samples in float32. The base samples of the first ``fit``
                set the reflection.
            delay: Updates that wait until the step ``refresh`` takes them into R together, 0 for none: see :mod:`edgecl.methods._inverse`.
                docs/results.md has what that saves.
            tau: Share of R's precision that one update may lose. Taking a sample out needs s > tau: the last sample of a direction
                leaves with s = gamma / (gamma + w), so that gamma must be above tau w to forget it. Adding a sample cannot make s less
                than 1, so that s < 1 - tau proves R broken; s > tau / eps is a weight too large beside gamma. All these are refused.
        """

        gamma: float = 0.1
        unit_norm: bool = True
        projection: int | None = None
        projection_seed: int = 0
        drift: float = 1.0
        trace_cap: float | None = None
        dtype: str = "float32"
        reflect: bool = False
        delay: int = 0
        tau: float = 1e-2

        def __post_init__(self) -> None:
            check_types(self)
            require(0 < self.gamma < math.inf, "gamma", "be finite and above 0", self.gamma, "0.1 suits unit-norm features")
            require(
                self.projection is None or self.projection >= 1,
                "projection",
                "be None or at least 1 unit",
                self.projection,
                "use None to learn on the features as they are",
            )
            require(0 <= self.projection_seed < 2**64, "projection_seed", "be in [0, 2**64)", self.projection_seed, "0 is as good as any")
            require(0 < self.drift <= 1, "drift", "be above 0 and at most 1", self.drift, "use 1.0 to keep all samples")
            if self.trace_cap is not None:
                require(
                    0 < self.trace_cap < math.inf,
                    "trace_cap",
                    "be finite and above 0",
                    self.trace_cap,
                    "use None for the trace at the start",
                )
                require(self.drift < 1, "trace_cap", "be None without drift", self.trace_cap, "set drift below 1 or drop it")
            check_delay(self.delay)
            require(
                not self.delay or self.drift == 1, "delay", "be 0 with drift below 1, which divides R at every update", self.delay, "use 0"
            )
            require(0 < self.tau < 1, "tau", "be between 0 and 1", self.tau, "1e-2 suits float32")
            dtype_of(self.dtype)

    def __init__(self, problem: Problem, config: Any = None) -> None:
        super().__init__(problem, config)
        self._dtype = dtype_of(self.config.dtype)
        features, units = problem.feature_size, self.config.projection
        self._size = units or features
        numbers = self._size * (self._size + problem.max_classes + (features if units else 0))
        name, mend = ("projection", "take fewer units") if units else ("features", "cut behind a pooling layer or set a projection")
        value = (f"{units:,} units for " if units else "") + f"{features:,} features and {problem.max_classes:,} classes"
        require_bytes(numbers * self._dtype.itemsize, name, value, mend)
        self._projection: Tensor | None = None
        if units is not None:
            generator = torch.Generator().manual_seed(self.config.projection_seed)
            self._projection = torch.randn(features, self._size, generator=generator).to(self._dtype)
        self._reflection = torch.zeros(self._size, 1, dtype=self._dtype) if self.config.reflect else None
        self._inverse = Inverse("inverse", self._size, self.config.delay, self._dtype)
        self._trace_cap = self.config.trace_cap or self._size / self.config.gamma

    def init(self) -> State:
        """No sample: R is I / gamma, W is zero."""
        return {
            **self._inverse.init(self.config.gamma),
            "readout": torch.zeros(self._size, self.problem.max_classes, dtype=self._dtype),
            "count": torch.zeros(self.problem.max_classes if self._classes else 1),
            "min_s": torch.ones(()),
        }

    def calibrate(self, latents: Any) -> None:
        """Set the reflection, if there is one, from the mean of latents [N, ...]; before anything is learned."""
        if self._reflection is None:
            return
        stride = max(1, len(leaves(latents)[0]) // MEAN_OF)
        with torch.no_grad():
            self._reflection = reflection_to_first_axis(self._phi(map_tree(latents, lambda tensor: tensor[::stride])).mean(0))

    def step_inputs(self) -> dict[str, Nested | TensorSpec]:
        """Those of every method, and ``new_target`` for ``relabel``."""
        return {**super().step_inputs(), "new_target": self.problem.target.spec("new_target")}

    def threshold(self, probability: float) -> float:
        """The probability itself: ridge estimates the 0 or 1 of a label."""
        return probability

    @property
    def steps(self) -> dict[str, Callable[..., StepResult]]:
        """The steps by name; without ``forget`` and ``relabel`` under drift, where they would not be exact."""
        inexact = ("forget", "relabel") if self.config.drift < 1 else ()
        return {name: step for name, step in super().steps.items() if name not in inexact}

    def predict(self, state: State, z: Any) -> StepResult:
        """Scores W^T phi, float32 [1, K]."""
        scores = torch.mm(self._phi(z), state["readout"])
        return {"scores": self._masked(scores, state)}, {}

    def learn(self, state: State, z: Any, target: Tensor, weight: Tensor) -> StepResult:
        """Add a sample.

        ``loss`` [] is the squared error |t - W^T phi|^2 of the prediction before the update; ``health.s`` [] and
        ``health.min_s`` [] are this update's s and the smallest so far. ``guard`` is false when s is out of ``tau``'s
        bounds (R has lost its precision or its sign, or would) or ``count`` would fall below zero.
        """
        return self._update(state, z, target, weight, 1.0)

    def forget(self, state: State, z: Any, target: Tensor, weight: Tensor) -> StepResult:
        """Take a learned sample out; ``z`` must be bit-identical and ``weight`` the same. Outputs as for ``learn``."""
        self._need_exactness("forget")
        return self._update(state, z, target, weight * -1.0, -1.0)

    def relabel(self, state: State, z: Any, target: Tensor, new_target: Tensor, weight: Tensor) -> StepResult:
        """Move a learned sample from ``target`` to ``new_target``.

        ``guard`` is false when nothing was learned, of ``target``'s class. ``health.s`` [] is 1 - w phi.g, what ``forget`` would divide
        by: g is what the sample has left of R along itself, known to that share of R's precision.
        """
        self._need_exactness("relabel")
        with phase("forward"):
            phi = self._phi(z)
        g = self._reflected(self._inverse.times(state, self._reflected(phi))) * weight.to(self._dtype)
        change = self._row(new_target) - self._row(target)
        outputs = {
            "guard": (self._count_of(state["count"], target) > 0).reshape(()),
            "health.s": (1.0 - torch.mm(g, phi.t())).to(torch.float32).reshape(()),
        }
        readout = torch.addmm(state["readout"], g.t(), change)
        if not self._classes:
            return outputs, {"readout": readout}
        return outputs, {"readout": readout, "count": state["count"] + change.to(torch.float32).reshape(-1)}

    def refresh(self, state: State) -> StepResult:
        """Take what waits into R; with ``delay`` only."""
        return {}, self._inverse.refreshed(state)

    @property
    def refresh_every(self) -> int:
        """``delay``."""
        return int(self.config.delay)

    def _update(self, state: State, z: Any, target: Tensor, weight: Tensor, samples: float) -> StepResult:
        """Add ``samples`` (1 or -1) of signed ``weight`` [1]."""
        with phase("forward"):
            phi = self._phi(z)
            scores = torch.mm(phi, state["readout"])
        t = self._row(target)
        w = weight.to(self._dtype).unsqueeze(1)
        if self.config.drift < 1:
            state = {**state, "inverse": state["inverse"] / self._decay(state["inverse"])}
        error = t - scores
        reflected = self._reflected(phi)
        g = self._inverse.times(state, reflected)
        s = torch.mm(g, reflected.t()) * w + 1.0
        ratio = w / s
        u = g * torch.maximum(ratio, ratio * -1.0).sqrt()
        count = state["count"] + (t.to(torch.float32).reshape(-1) * samples if self._classes else samples)
        s_out = s.to(torch.float32).reshape(())
        known = self._count_of(count, target).reshape(()) >= 0
        room = self._inverse.has_room(state)
        tau = self.config.tau
        lowest, highest = (1 - tau if samples > 0 else tau), tau / torch.finfo(self._dtype).eps
        sane = known & (s_out > lowest) & (s_out < highest)
        outputs = {
            "scores": self._masked(scores, state),
            "loss": (error * error).sum().to(torch.float32),
            "guard": sane if room is None else sane & room,
            "health.s": s_out,
            "health.min_s": torch.minimum(state["min_s"], s_out),
        }
        return outputs, {
            **self._inverse.less(state, u, ratio < 0),
            "readout": torch.addmm(state["readout"], (self._reflected(g) * ratio).t(), error),
            "count": count,
            # Not the output's tensor again: one tensor must not be both a result and state.
            "min_s": torch.minimum(state["min_s"], s_out),
        }

    def _phi(self, z: Any) -> Tensor:
        x = vector(z, self.config.unit_norm, self._dtype)
        if self._projection is None:
            return x
        x = torch.mm(x, self._projection).relu()
        return unit(x) if self.config.unit_norm else x

    def _reflected(self, x: Tensor) -> Tensor:
        """H x of a row x [1, M]; H is its own inverse."""
        return x if self._reflection is None else torch.addmm(x, torch.mm(x, self._reflection) * -2.0, self._reflection.t())

    def _decay(self, inverse: Tensor) -> Tensor:
        """Lambda of this step [1]: ``drift``, or as much nearer to 1 as keeps trace(R) within the cap."""
        diagonal = inverse.reshape(-1).index_select(0, torch.arange(0, self._size**2, self._size + 1))
        needed = diagonal.sum(0, keepdim=True) / self._trace_cap
        return torch.minimum(needed.clamp_min(self.config.drift), torch.ones(1, dtype=self._dtype))

    @property
    def _classes(self) -> bool:
        return self.problem.target.kind == "class"

    def _row(self, target: Tensor) -> Tensor:
        """The target as a row [1, K] of the least-squares problem."""
        return one_hot(target, self.problem.max_classes, self._dtype) if self._classes else target.to(self._dtype)

    def _count_of(self, count: Tensor, target: Tensor) -> Tensor:
        """Samples [1] of the target's class, or in all where there is none."""
        return count.index_select(0, target) if self._classes else count

    def _masked(self, scores: Tensor, state: State) -> Tensor:
        return mask_unseen(scores.to(torch.float32), state["count"]) if self._classes else scores.to(torch.float32)

    def _need_exactness(self, step: str) -> None:
        if step not in self.steps:
            raise StepMissingError(f"{step}: ridge with drift {self.config.drift} < 1 cannot do this exactly; set drift to 1")
