"""A learner for a try: what it writes goes with it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgecl_device.learner import Learner
from edgecl_device.manifest import read_manifest


@contextmanager
def tried(bundle: Path) -> Iterator[Learner]:
    """A learner in memory; of a bundle that keeps its replay rows in a file, in a temporary folder.

    Args:
        bundle: The bundle's folder.

    Raises:
        EdgeclError: as :meth:`Learner.load`.
    """
    replay = read_manifest(bundle).replay
    if replay is None or not replay.in_file:
        with Learner.load(bundle) as learner:
            yield learner
        return
    with tempfile.TemporaryDirectory() as scratch, Learner.load(bundle, Path(scratch) / "l.db", rows=Path(scratch) / "rows.bin") as learner:
        yield learner
