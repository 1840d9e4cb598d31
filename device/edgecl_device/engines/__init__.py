"""Engines run a bundle's steps. The loop in :mod:`edgecl_device.learner` knows nothing else about a runtime."""

from collections.abc import Collection, Mapping
from typing import Protocol

from edgecl_device.manifest import Array


class Engine(Protocol):
    """A runtime that holds the learner's state and runs its steps.

    ``run`` never changes the state: what a step would write waits in a second set of buffers until ``commit``.
    """

    name: str

    def load(self, state: Mapping[str, Array]) -> None:
        """Copy every state tensor in; drops an uncommitted result."""

    def state(self, names: Collection[str] | None = None) -> dict[str, Array]:
        """Copies of every state tensor, or of those named."""

    def put(self, state: Mapping[str, Array]) -> None:
        """Copy some state tensors in, which fit."""

    def run(self, step: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one step and return copies of its outputs (new state not included)."""

    def commit(self) -> None:
        """Make what the last ``run`` wrote the state."""

    def close(self) -> None:
        """Release the runtime's memory."""
