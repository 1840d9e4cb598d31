"""The eager engine: runs the step functions themselves, in PyTorch, behind the same interface as a device runtime."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pickle import PicklingError
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from edgecl.given import check_device
from edgecl.learner import Learner, State, call_encode, call_step
from edgecl.trees import unflatten_like
from edgecl_device.checks import short
from edgecl_device.errors import InputError
from edgecl_device.manifest import STREAM, Array

Parts = TypeVar("Parts")


class EagerEngine:
    """Holds a learner's state and runs its steps; ``edgecl_device.Learner`` drives it like any other engine.

    Args:
        trunk: The frozen trunk, run as the step ``encode``.
        learner: The method.
        device: PyTorch's device to run on; copies of trunk and learner go there.

    Raises:
        InputError: when there is no such device.
    """

    name = "eager"

    def __init__(self, trunk: nn.Module, learner: Learner, device: str = "cpu") -> None:
        check_device(device)
        self._device = torch.device(device)
        self._trunk, self._learner = parts_on(device, (trunk, learner))
        self._state: State = {}
        self.load({name: value.numpy() for name, value in learner.init().items()})
        self._pending: State = {}

    def load(self, state: Mapping[str, Array]) -> None:
        """Copy every state tensor in."""
        self._state = self._tensors(state)
        self._pending = {}

    def state(self, names: Collection[str] | None = None) -> dict[str, Array]:
        """Copies of every state tensor, or of those named."""
        return {name: self._state[name].detach().cpu().numpy().copy() for name in (self._state if names is None else names)}

    def put(self, state: Mapping[str, Array]) -> None:
        """Copy some state tensors in, which fit."""
        self._state = {**self._state, **self._tensors(state)}

    def run(self, step: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one step and return its outputs; inputs that the step does not take are ignored."""
        tensors = self._tensors(inputs)
        with torch.no_grad(), running_on(self._device):
            if step == "encode":
                x = tensors["x"] if "x" in tensors else {name.removeprefix("x."): value for name, value in tensors.items()}
                stream = {name: tensor for name, tensor in self._state.items() if name.startswith(STREAM)}
                outputs, self._pending = call_encode(self._trunk, x, stream)
                return to_arrays(outputs)
            tree = unflatten_like(self._learner.inputs_of(step), tensors)
            outputs, self._pending = call_step(self._learner, step, self._state, tree)
        return to_arrays(outputs)

    def commit(self) -> None:
        """Make what the last ``run`` wrote the state."""
        self._state = {**self._state, **self._pending}
        self._pending = {}

    def close(self) -> None:
        """Nothing to release."""

    def _tensors(self, arrays: Mapping[str, Array]) -> dict[str, Tensor]:
        return {name: to_tensor(value).to(self._device) for name, value in arrays.items()}


def parts_on(device: str, parts: Parts) -> Parts:
    """Trunk, learner or both: themselves for the CPU, else copies there."""
    return parts if torch.device(device).type == "cpu" else copies_on(device, parts)


def copies_on(device: str, parts: Parts) -> Parts:
    """Copies whose tensors, wherever they hold some, are on a device.

    Raises:
        InputError: when pickle cannot save them: a class is none that it finds, or a module has parametrizations.
    """
    saved = BytesIO()
    try:
        torch.save(parts, saved)
    except (PicklingError, AttributeError, TypeError, RuntimeError) as error:  # whatever pickle, and a parametrized module, raise
        raise InputError(
            f"device: the model and what stands in front must be such that pickle saves them, for a copy on {device!r} "
            f"({short(str(error))}); define classes at the top of a module, and remove parametrizations"
        ) from error
    saved.seek(0)
    found: Parts = torch.load(saved, map_location=device, weights_only=False)  # what was just saved
    return found


@contextmanager
def running_on(device: str | torch.device) -> Iterator[None]:
    """What PyTorch makes inside is made on a device.

    Convolutions on a GPU are of whole float32, where cuDNN's own choice is TF32, and always by the same algorithms.
    """
    if torch.device(device).type == "cpu":
        yield  # it is anyway, and every operator would take longer
        return
    with torch.device(device), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def on_device(device: str | torch.device, tensors: Mapping[str, Tensor]) -> State:
    """The tensors, on a device."""
    return {name: value.to(device) for name, value in tensors.items()}


def to_tensor(value: Any) -> Tensor:
    """A NumPy array as a tensor with memory of its own."""
    return torch.tensor(value)


def to_arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Tensors as NumPy arrays."""
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}
