"""Entries of the store's log."""

import zlib
from dataclasses import dataclass

EVENT_OVERHEAD = 64
"""Bytes that the log's cap counts for one event beside its features and name: its row's integers and SQLite's cell."""


@dataclass(frozen=True)
class Event:
    """One entry of the log.

    Attributes:
        seq: Its number; they rise by one.
        kind: ``learn``, ``adapt``, ``add_class``, ``reset_stream``, ``reset_adaptation``, ``add_task``, ``switch_task`` or ``drop_task``.
            Forgetting and relabelling change the log itself and renew the snapshot, so that nothing is left to replay.
        sample_id: The sample, or None.
        label: Class index, or None.
        weight: Sample weight, or None.
        lr: Learning rate, or None.
        name: Name of a class or task, or None.
        features: The encoded sample's raw little-endian bytes, behind them those of a target that is no class index and of
            a stream's state (:class:`edgecl_device.record.Record`); of a new task the name of the one that it is a copy of; or None.
    """

    seq: int
    kind: str
    sample_id: int | None = None
    label: int | None = None
    weight: float | None = None
    lr: float | None = None
    name: str | None = None
    features: bytes | None = None

    @property
    def nbytes(self) -> int:
        """What the log's cap counts for it."""
        return EVENT_OVERHEAD + len(self.features or b"") + len((self.name or "").encode())

    @property
    def crc(self) -> bytes:
        """CRC-32 of all fields, 4 bytes little-endian, by which the store finds damage that SQLite does not see."""
        fields = (self.seq, self.kind, self.sample_id, self.label, self.weight, self.lr, self.name)
        return crc(repr(fields).encode(), self.features or b"")


def crc(*parts: bytes) -> bytes:
    """CRC-32 of some bytes, 4 bytes little-endian: every row then takes the same space, which an integer does not in SQLite.

    >>> crc(b"1234", b"56789").hex()
    '2639f4cb'
    """
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value.to_bytes(4, "little")
