"""The frozen part of a learner: preprocessing, what carries state from frame to frame, and the model up to the cut."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import traceback

from edgecl.given import Samples
from edgecl.learner import State, dtype_name
from edgecl.splitting import copied
from edgecl.trees import map_tree
from edgecl_device.errors import InputError
from edgecl_device.manifest import DTYPES, STREAM


class Trunk(nn.Module):
    """Preprocessing, then the frozen part of the model.

    Args:
        preprocess: One module (or None) for each input.
        model: The frozen part.
        inputs: Names of its inputs in its order.
        stream: What runs between the two and carries state from frame to frame, or None.

    Attributes:
        in_float: Of a trunk in int8 the float32 trunk that it was made of, for comparisons, as a tuple: it is no part.
    """

    def __init__(
        self, preprocess: Sequence[nn.Module | None], model: nn.Module, inputs: Sequence[str], stream: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.stream = stream
        self.preprocess = nn.ModuleList([nn.Identity() if module is None else module for module in preprocess])
        self.model = model
        self.inputs = tuple(inputs)
        self.in_float: tuple[Trunk, ...] = ()

    def prepared(self, x: Any) -> list[Tensor]:
        """The model's inputs, in its order, from one tensor or a mapping of named ones."""
        parts = [x] if isinstance(x, Tensor) else [x[name] for name in self.inputs]
        with traceback.annotate({"module": "preprocess"}):  # for the errors of capture
            return [module(part) for module, part in zip(self.preprocess, parts, strict=True)]

    def forward(self, x: Any) -> Any:
        """Latents of ``x``, of a stream's frame as the first one."""
        return self.model(*self.prepared(x)) if self.stream is None else self.advance(x, self.initial_state())[0]

    def advance(self, x: Any, state: State) -> tuple[Any, State]:
        """Latents of a stream's next frame, and the state behind it."""
        features, new = self.streamed(x, state)
        return self.model(features), new

    def streamed(self, x: Any, state: State) -> tuple[Tensor, State]:
        """What the model gets of a frame, and the state behind it."""
        stream: Any = self.stream
        with traceback.annotate({"module": "stream"}):
            features, new = stream(self.prepared(x)[0], {name.removeprefix(STREAM): tensor for name, tensor in state.items()})
        return features, {f"{STREAM}{name}": tensor for name, tensor in new.items()}

    def initial_state(self) -> State:
        """The stream's state before its first frame, new tensors by name; nothing without a stream."""
        stream: Any = self.stream
        return {} if stream is None else {f"{STREAM}{name}": tensor.clone() for name, tensor in stream.initial_state().items()}


def checked_stream(stream: Any, example: Samples) -> nn.Module:
    """A copy of a stream's module, its state checked."""
    if not isinstance(stream, nn.Module) or not callable(getattr(stream, "initial_state", None)):
        raise InputError(f"stream: must be a module with initial_state(), got {type(stream).__name__}; define it and forward(x, state)")
    if isinstance(example, Mapping):
        raise InputError(f"stream: is for models of one input, got {list(example)}; join them in one array")
    module: Any = stream
    state = module.initial_state()
    if not isinstance(state, Mapping) or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"stream: initial_state() must return tensors by name, got {type(state).__name__}; return a dict")
    for name, tensor in state.items():
        if not isinstance(name, str) or dtype_name(tensor.dtype) not in DTYPES or not bool(torch.isfinite(tensor).all()):
            raise InputError(f"stream: state {name!r} must be finite and of {', '.join(DTYPES)}, got {dtype_name(tensor.dtype)}; mend it")
    return copied(stream, "stream").eval()


def preprocessing(given: Any, example: Samples) -> list[nn.Module | None]:
    """Copies of the modules in front of each input, in their order."""
    if not isinstance(example, Mapping):
        return [None if given is None else copied(given, "preprocess")]
    if not isinstance(given, Mapping | None) or not set(given or ()) <= set(example):
        got = list(given) if isinstance(given, Mapping) else type(given).__name__
        raise InputError(f"preprocess: must be None or a mapping of some of {list(example)} to modules, got {got}; pass a dict")
    modules = [(given or {}).get(name) for name in example]
    return [None if module is None else copied(module, "preprocess") for module in modules]


def model_inputs(trunk: Trunk, example: Samples) -> Any:
    """What the model takes for the example: a tensor, or a mapping of its inputs to such."""
    if trunk.stream is not None:
        return _first_frame(trunk, torch.tensor(example))
    ready = trunk.prepared(map_tree(example, torch.tensor))
    return dict(zip(trunk.inputs, ready, strict=True)) if isinstance(example, Mapping) else ready[0]


def _first_frame(trunk: Trunk, frame: Tensor) -> Tensor:
    """What the model gets of a stream's first frame; the state behind it must be like the one before."""
    before = trunk.initial_state()
    features, after = trunk.streamed(frame, before)
    specs = [{name: (tuple(t.shape), t.dtype) for name, t in state.items()} for state in (before, after)]
    if specs[0] != specs[1] or not isinstance(features, Tensor):
        raise InputError(f"stream: must return a tensor and state as initial_state() has it, {specs[0]}, got {specs[1]}; keep its shapes")
    return features
