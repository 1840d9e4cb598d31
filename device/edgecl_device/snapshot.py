"""Snapshots: the portable form of everything a learner knows, one safetensors blob that every runner reads and writes.

Tensors: ``state.NAME``; ``memory.*`` (:meth:`edgecl_device.memory.ReplayMemory.snapshot`); ``pending.NAME`` and
``pending.sample_id``, the features of predictions that wait for a label (only in the automatic snapshot). The rest is JSON
under the metadata key ``edgecl``: ``class_names`` (null where a class has none), ``class_counts``, ``totals`` and
``health`` (the figures of the last update).
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edgecl_device.errors import RESTORE, StoreError
from edgecl_device.manifest import Array


@dataclass(frozen=True)
class Snapshot:
    """Tensors by name, and what is not a tensor.

    >>> blob = Snapshot({"state.mean": np.zeros((2, 3), np.float32)}, {"class_names": ["mug", None]}).pack()
    >>> Snapshot.unpack(blob).meta
    {'class_names': ['mug', None]}
    """

    tensors: dict[str, Array]
    meta: dict[str, Any]

    def pack(self) -> bytes:
        """The snapshot as a safetensors file."""
        tensors = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in self.tensors.items()}
        return bytes(save(tensors, {"edgecl": json.dumps(self.meta, sort_keys=True)}))

    @staticmethod
    def unpack(blob: bytes) -> "Snapshot":
        """Read a blob that :meth:`pack` wrote.

        Raises:
            StoreError: when it is not one.
        """
        try:
            tensors = load(blob)
            header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
            return Snapshot(tensors, dict(json.loads(header["__metadata__"]["edgecl"])))
        except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise StoreError(f"snapshot: is damaged ({error}); {RESTORE}") from error

    def under(self, prefix: str) -> dict[str, Array]:
        """The tensors whose name begins with ``prefix``, which is cut off."""
        return {name.removeprefix(prefix): array for name, array in self.tensors.items() if name.startswith(prefix)}
