"""The contract: a learner is named state plus named pure steps.

A step is a method ``step(state, **inputs) -> (outputs, new_state)`` over named tensors of fixed shape, written once in
PyTorch. It never mutates what it is given, draws no random number and branches on no tensor value; the eager engine
runs it as it is, :mod:`edgecl.graph` captures it, and export turns the captured graph into what the device runs.
``new_state`` holds only the tensors that the step changed.
"""

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from edgecl.trees import flatten_tree, unflatten_like
from edgecl_device.errors import InputError
from edgecl_device.manifest import AGE, UNSEEN_SCORE, AdaptSpec, ReplaySpec, TargetSpec, TensorSpec

State = dict[str, Tensor]
StepResult = tuple[dict[str, Tensor], State]
Nested = Mapping[str, Any]
"""A tensor spec, or a mapping of names to such (any depth); flattened with dots."""

STEPS = ("predict", "learn", "forget", "relabel", "refresh", "gate", "track", "adapt", "identify")
"""Names a method may give its steps, in the order in which they are listed."""


@dataclass(frozen=True)
class Problem:
    """What every learner is told about the task.

    Attributes:
        features: Spec of one encoded sample ``z``, batch dimension of 1 included: one tensor, or a mapping of named ones.
        max_classes: Classes or labels that the state has room for, of real vectors the number of values: scores are [1, max_classes],
            for a map [1, max_classes, H, W].
        target: What a sample's target is; one class index by default.
    """

    features: TensorSpec | dict[str, TensorSpec]
    max_classes: int
    target: TargetSpec = field(default_factory=TargetSpec)

    def __post_init__(self) -> None:
        if self.target.kind in ("class", "map") and self.max_classes < 2:
            raise InputError(f"max_classes: must be at least 2, got {self.max_classes}; leave room for new classes")

    @property
    def feature_size(self) -> int:
        """Elements of one encoded sample."""
        specs = [self.features] if isinstance(self.features, TensorSpec) else list(self.features.values())
        return sum(int(torch.Size(s.shape).numel()) for s in specs)


class Learner(ABC):
    """Base class of every method.

    A method sets ``name`` and ``Config`` (a frozen dataclass of hyperparameters), and defines :meth:`init`,
    :meth:`predict` and those of the other steps that it has. See ``docs/adding-a-method.md``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type]
    targets: ClassVar[tuple[str, ...]] = ("class",)
    """Kinds of targets (:class:`edgecl_device.manifest.TargetSpec`) that the method learns."""
    host_only: ClassVar[bool] = False
    """Whether the method has no step for the device, as offline training."""
    tasks: ClassVar[bool] = False
    """Whether all of its state is one task's, so that the device may keep one for each of several tasks."""

    def __init__(self, problem: Problem, config: Any = None) -> None:
        if problem.target.kind not in self.targets:
            raise InputError(f"target: {self.name} serves {', '.join(self.targets)}, got {problem.target.kind}; take another method")
        self.problem = problem
        self.config = self.Config() if config is None else config
        if not isinstance(self.config, self.Config):
            raise InputError(f"config: must be a Config of {self.name}, got {type(self.config).__name__}; see edgecl methods")
        for name, value in self.config_dict().items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{name}: must be finite, got {value}; give a number")

    @abstractmethod
    def init(self) -> State:
        """A new state. Every call returns new tensors, no two of which are the same object."""

    @abstractmethod
    def predict(self, state: State, z: Any) -> StepResult:
        """Scores float32 [1, max_classes, ...] under the name ``scores``; unseen classes score :data:`UNSEEN`."""

    def step_inputs(self) -> dict[str, Nested | TensorSpec]:
        """Specs of the inputs that this method's steps may name as parameters."""
        return {
            "z": self.problem.features,
            "target": self.problem.target.spec("target"),
            "weight": TensorSpec("weight", (1,), "float32"),
            "lr": TensorSpec("lr", (), "float32"),
        }

    def prime(self, state: State, z: Any, target: Tensor, weight: Tensor | None = None) -> StepResult:
        """Take in a base sample on the host, before export: ``learn`` with ``weight`` (1), unless the method says otherwise.

        Outputs named ``row.NAME`` are the sample's replay row.

        Raises:
            InputError: when a weight is given that the method does not take.
        """
        if "weight" in self.inputs_of("learn"):
            return self.steps["learn"](state, z, target, weight=torch.ones(1) if weight is None else weight)
        self.refuse_weight(weight)
        return self.steps["learn"](state, z, target)

    def refuse_weight(self, weight: Tensor | None) -> None:
        """Refuse a base sample's weight."""
        if weight is not None:
            raise InputError(f"weight: {self.name} takes no weight of a base sample; leave it out, or repeat samples")

    def calibrate(self, latents: Any) -> None:  # noqa: B027  # most methods have nothing to fit
        """Fit what is frozen, such as a codec's range, on latents [N, ...] of the first base samples, before they are taken in."""

    def warm_up(self, state: State, latents: Any, target: Tensor) -> State:
        """What training on the labelled base samples of the first ``fit`` changes, before they are taken in; by default nothing.

        Args:
            state: As :meth:`init` made it.
            latents: [N, ...], or a mapping of such.
            target: As a step takes them, [N, ...].
        """
        return {}

    def reconstruction(self, latents: Any) -> float:
        """Squared error of latents [N, ...] as replay rows hold them, over their square; 0 for methods that store none or lose nothing."""
        return 0.0

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """Frozen tables of the replay codecs, each once: part of the frozen weights, and a line of their own in the ledger."""
        return ()

    def threshold(self, probability: float) -> float:
        """The score of a label at this probability: its logit, unless the method says otherwise."""
        return math.log(probability / (1 - probability))

    @property
    def default_lr(self) -> float:
        """Learning rate that the device uses unless it is given another; 0 for methods without one."""
        return float(getattr(self.config, "lr", 0.0))

    @property
    def refresh_every(self) -> int:
        """Updates after which the step ``refresh`` runs, as counted by the state ``age``, float32 []; 0 without such a step."""
        return 0

    @property
    def steps(self) -> dict[str, Callable[..., StepResult]]:
        """The steps that this method has, by name."""
        return {name: getattr(self, name) for name in STEPS if hasattr(self, name) and (name != "refresh" or self.refresh_every)}

    def inputs_of(self, step: str) -> dict[str, Nested | TensorSpec]:
        """Specs of one step's inputs by parameter name, in the order of its signature."""
        known = self.step_inputs()
        parameters = list(inspect.signature(self.steps[step]).parameters)[1:]
        return {name: known[name] for name in parameters}

    @property
    def replay(self) -> ReplaySpec | None:
        """How the device fills the ``replay`` input, for methods that have one."""
        return None

    @property
    def adaptation(self) -> AdaptSpec | None:
        """When the device runs ``adapt``, for methods that have this step."""
        return None

    @property
    def fresh(self) -> tuple[str, ...]:
        """State that a new task of a method with ``tasks`` starts with zeros; the rest starts as in the bundle."""
        return ()

    @property
    def forgets_exactly(self) -> bool:
        """Whether ``forget`` after ``learn`` equals never having learned."""
        return "forget" in self.steps

    def config_dict(self) -> dict[str, Any]:
        """Hyperparameters as plain values, for the manifest."""
        return dataclasses.asdict(self.config)


def call_step(learner: Learner, step: str, state: State, inputs: Mapping[str, Any]) -> StepResult:
    """Run one step as every engine does: with the output ``finite``, bool [], when it writes state."""
    outputs, new_state = learner.steps[step](dict(state), **inputs)
    return ({**outputs, "finite": all_finite(new_state)} if new_state else outputs), new_state


def update_macs(macs: Mapping[str, int], refresh_every: int, adapt_every: int = 1) -> int:
    """MACs of one update by those of the steps: ``learn`` and ``gate``, and a share of ``refresh``, which serves several, rounded up.

    For methods that adapt those of one sample: ``track``, and its share of ``adapt``.

    >>> update_macs({"learn": 100, "refresh": 30}, 4), update_macs({"track": 50, "adapt": 1000}, 0, 64)
    (108, 66)
    """
    own = sum(macs.get(step, 0) for step in ("gate", "learn", "track")) + -(-macs.get("adapt", 0) // adapt_every)
    return own + (-(-macs["refresh"] // refresh_every) if refresh_every else 0)


def refreshed(learner: Learner, state: State, draw: Callable[[str], Mapping[str, Any]] | None = None) -> State:
    """The state behind an update: ``refresh`` has run where it is due.

    Args:
        learner: The method.
        state: Its state.
        draw: Gives rows and integers by name to a ``refresh`` that takes any (:meth:`edgecl_device.memory.ReplayMemory.draw_aside`).
    """
    if not learner.refresh_every or state[AGE] < learner.refresh_every:
        return state
    specs, drawn = learner.inputs_of("refresh"), {}
    if specs and draw is not None:
        drawn = {name: torch.from_numpy(array) for name, array in draw("refresh").items()}
    return {**state, **call_step(learner, "refresh", state, unflatten_like(specs, drawn))[1]}


def call_encode(trunk: Any, x: Any, stream: State) -> StepResult:
    """Run the trunk as every engine does: with the output ``finite`` when it carries state from frame to frame.

    Args:
        trunk: Maps ``x`` to ``z``; with a stream its ``advance`` maps ``x`` and state to ``z`` and new state.
        x: One sample.
        stream: The state that it carries; empty for a trunk that has none.
    """
    if not stream:
        return flatten_tree({"z": trunk(x)}), {}
    z, new = trunk.advance(x, stream)
    return {**flatten_tree({"z": z}), "finite": all_finite(new)}, new


JOINED = 4096
"""Tensors up to so many values are checked together: one operator more costs a runtime more than a copy of them."""


def all_finite(state: State) -> Tensor:
    """Whether no tensor holds NaN or infinity, bool []. A sum is not finite when one of its terms is not."""
    floats = [tensor for tensor in state.values() if tensor.is_floating_point()]
    small = [tensor.reshape(-1).to(torch.float32) for tensor in floats if tensor.numel() <= JOINED]
    sums = [tensor.sum().reshape(1).to(torch.float32) for tensor in floats if tensor.numel() > JOINED]
    total = torch.cat([torch.zeros(1), *small, *sums]).sum()
    return (total - total) == 0


UNSEEN = UNSEEN_SCORE
"""Score of a class that has not been learned yet."""


def dtype_name(dtype: torch.dtype) -> str:
    """NumPy's name of a torch dtype."""
    return str(dtype).removeprefix("torch.")


def one_hot(target: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class indices int64 [N] as rows [N, classes] of zeros and a one, in operators that every runtime has."""
    return (target.unsqueeze(1) == torch.arange(classes)).to(dtype)


def mask_unseen(scores: Tensor, count: Tensor) -> Tensor:
    """Scores [1, K, ...] with :data:`UNSEEN` in place of the classes whose count [K] is zero."""
    return torch.where(count.reshape(1, -1, *[1] * (scores.dim() - 2)) > 0, scores, UNSEEN)


def flatten_features(z: Any) -> Tensor:
    """One encoded sample as a vector [1, d]; a mapping's tensors are joined in its order."""
    parts = [z] if isinstance(z, Tensor) else list(z.values())
    flat = [part.flatten(1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)
