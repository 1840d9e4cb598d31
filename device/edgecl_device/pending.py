"""Encoded samples that wait for a label."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from edgecl_device.errors import InputError
from edgecl_device.manifest import Array, TensorSpec
from edgecl_device.memory import take
from edgecl_device.record import Layout


class Pending:
    """The features of the last predictions, by sample id; the oldest goes when one too many comes.

    >>> pending = Pending((TensorSpec("z", (1, 2), "float32"),), capacity=1)
    >>> for sample_id in (0, 1):
    ...     pending.add(sample_id, {"z": np.ones((1, 2), np.float32)})
    >>> list(pending.samples)
    [1]
    """

    def __init__(self, specs: Sequence[TensorSpec], capacity: int) -> None:
        self.specs = specs
        self._layout = Layout(specs)
        self.capacity = capacity
        self.samples: OrderedDict[int, dict[str, Array]] = OrderedDict()

    def add(self, sample_id: int, z: dict[str, Array]) -> None:
        """Keep the features of one prediction."""
        self.samples[sample_id] = z
        if len(self.samples) > self.capacity:
            self.samples.popitem(last=False)

    def get(self, sample_id: int) -> dict[str, Array]:
        """The features of a prediction.

        Raises:
            InputError: when it does not wait any more.
        """
        if sample_id not in self.samples:
            raise InputError(
                f"sample_id: {sample_id} does not wait for a label: it was learned, or left out by the method's gate, or is older than the "
                f"last {self.capacity} predictions (pending_capacity), or is none of this store's; pass the sample itself"
            )
        return self.samples[sample_id]

    def alike(self, features: bytes) -> list[int]:
        """The ids of all predictions of the same features, as :meth:`pack` writes them."""
        return [sample_id for sample_id, z in self.samples.items() if self.pack(z) == features]

    @contextmanager
    def reverting(self) -> Iterator[None]:
        """Go back to what waits now when anything inside fails."""
        before = self.samples.copy()
        try:
            yield
        except BaseException:
            self.samples = before
            raise

    def discard(self, sample_id: int) -> None:
        """Drop a prediction that waits no more; harmless when it is gone."""
        self.samples.pop(sample_id, None)

    def snapshot(self) -> dict[str, Array]:
        """``pending.sample_id`` int64 [n], oldest first, and ``pending.NAME`` [n, ...]."""
        tensors = {"pending.sample_id": np.array(list(self.samples), np.int64)}
        for spec in self.specs:
            values = [z[spec.name] for z in self.samples.values()]
            tensors[f"pending.{spec.name}"] = np.stack(values) if values else np.empty((0, *spec.shape), spec.dtype)
        return tensors

    def restore(self, tensors: Mapping[str, Array]) -> None:
        """Take over what :meth:`snapshot` returned.

        Raises:
            InputError: when it does not fit; nothing is changed then.
        """
        n = len(tensors["pending.sample_id"]) if "pending.sample_id" in tensors else 0
        ids = take(tensors, TensorSpec("pending.sample_id", (n,), "int64"))
        values = {spec.name: take(tensors, TensorSpec(f"pending.{spec.name}", (n, *spec.shape), spec.dtype)) for spec in self.specs}
        self.samples.clear()
        for i, sample_id in enumerate(ids):
            self.samples[int(sample_id)] = {name: value[i] for name, value in values.items()}

    def pack(self, z: Mapping[str, Array]) -> bytes:
        """One sample's features as the log keeps them: raw little-endian values, in the order of the specs."""
        return self._layout.pack(z)
