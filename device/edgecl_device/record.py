"""One sample as the steps take it, and its entry in the store's log."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgecl_device.errors import InputError
from edgecl_device.event import Event
from edgecl_device.manifest import Array, Manifest, TensorSpec


@dataclass(frozen=True, eq=False)
class Sample:
    """A sample, with its target where there is one.

    Attributes:
        id: Its number, by which it can be forgotten.
        z: Its features by name.
        target: As a step takes it; None for a sample to adapt to.
        weight: Its weight.
        lr: The learning rate of its update.
    """

    id: int
    z: Mapping[str, Array]
    target: Array | None
    weight: float
    lr: float

    def inputs(self) -> dict[str, Array]:
        """What every step may name, by name."""
        weight, lr = np.array([self.weight], np.float32), np.array(self.lr, np.float32)
        target = {} if self.target is None else {"target": self.target}
        return {**self.z, **target, "weight": weight, "lr": lr}


class Record:
    """How the log keeps a sample: a class index in the column of its own; any other target, and the state of a stream, behind the features.

    Args:
        manifest: Of the bundle; no store has entries of two bundles.
        read: Whether anybody will read what was learned, to recover or to revise it; else an entry holds no features.
    """

    def __init__(self, manifest: Manifest, read: bool = True) -> None:
        self._read = read
        self._features = Layout(manifest.features)
        self._target = manifest.target
        stored = manifest.target.stored(manifest.max_classes)
        self._behind = Layout([] if stored is None else [stored])
        self._stream = Layout(manifest.stream)

    @property
    def nbytes(self) -> int:
        """Bytes of a sample's features and of what is kept behind them."""
        if not self._read:
            return 0
        return self._features.nbytes + self._behind.nbytes + self._stream.nbytes

    def event(self, seq: int, sample: Sample, stream: Mapping[str, Array]) -> Event:
        """The entry of a sample that was learned or adapted to, with the state of the stream at that time."""
        kept = self._features.pack(sample.z) + self._kept(sample.target) + self._stream.pack(stream) if self._read else None
        kind = "adapt" if sample.target is None else "learn"
        return Event(seq, kind, sample.id, self._label(sample.target), sample.weight, sample.lr, None, kept)

    def sample(self, event: Event) -> Sample:
        """The sample of an entry.

        Raises:
            InputError: when its bytes are of another length.
        """
        features, behind, _ = self._parts(event)
        z, kept = self._features.unpack(features), self._behind.unpack(behind)
        if event.kind == "adapt":
            return Sample(int(event.sample_id or 0), z, None, _number(event.weight), _number(event.lr))
        target = kept["target"][None].astype(self._target.dtype) if kept else np.array([event.label], np.int64)
        return Sample(int(event.sample_id or 0), z, target, _number(event.weight), _number(event.lr))

    def features(self, event: Event) -> bytes:
        """The features of an entry as :meth:`edgecl_device.pending.Pending.pack` writes them."""
        return self._parts(event)[0]

    def stream(self, event: Event) -> dict[str, Array]:
        """The state of the stream when a sample was learned."""
        return self._stream.unpack(self._parts(event)[2])

    def relabelled(self, event: Event, target: Array) -> Event:
        """The same entry with another target."""
        features, _, stream = self._parts(event)
        features += self._kept(target) + stream
        return dataclasses.replace(event, label=self._label(target), features=features)

    def _parts(self, event: Event) -> tuple[bytes, bytes, bytes]:
        data = event.features or b""
        if len(data) != self.nbytes:
            raise InputError(f"features: must be {self.nbytes} bytes, got {len(data)}; log the sample again")
        first, second = self._features.nbytes, self._features.nbytes + self._behind.nbytes
        return data[:first], data[first:second], data[second:]

    def _label(self, target: Array | None) -> int | None:
        return None if target is None or self._behind.specs else int(target[0])

    def _kept(self, target: Array | None) -> bytes:
        """What is kept of a target behind the features; zeros in the place of none, so that all entries are of one length."""
        return b"".join((spec.zeros() if target is None else target).astype(spec.dtype).tobytes() for spec in self._behind.specs)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


class Layout:
    """Named tensors as raw little-endian values, in the order of their specs.

    >>> layout = Layout([TensorSpec("z", (1, 2), "float32")])
    >>> layout.unpack(layout.pack({"z": np.array([[1, 2]], np.float32)}))["z"].tolist()
    [[1.0, 2.0]]
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.specs = specs
        self.nbytes = sum(spec.nbytes for spec in specs)

    def pack(self, values: Mapping[str, Array]) -> bytes:
        """The values as bytes."""
        return b"".join(values[spec.name].tobytes() for spec in self.specs)

    def unpack(self, data: bytes) -> dict[str, Array]:
        """The inverse of :meth:`pack`; the arrays cannot be written to."""
        values, offset = {}, 0
        for spec in self.specs:
            values[spec.name] = np.frombuffer(data[offset : offset + spec.nbytes], spec.dtype).reshape(spec.shape)
            offset += spec.nbytes
        return values
