"""Put a finished folder in place of another, so that whatever ends the process leaves one whole folder there.

This module imports nothing beyond the standard library.
"""

import ctypes
import os
import secrets
import shutil
import sys
from pathlib import Path

ASIDE = "edgecl-old-"
"""Start of the name, beside the destination, that a replaced folder has for a moment where the system cannot swap two folders."""

_AT_FDCWD = -100
_SWAP = 2
"""``RENAME_EXCHANGE`` of Linux and ``RENAME_SWAP`` of macOS."""


def place(new: Path, destination: Path) -> None:
    """Move the folder ``new`` to ``destination``; what was there is deleted afterwards, or lies at ``new``.

    Where the system can swap two names, a kill at any moment leaves the old or the new folder at the destination. Elsewhere there are
    two renames: an exception between them puts the old folder back, and a kill leaves it beside the destination, under a name that
    begins with :data:`ASIDE`.

    Raises:
        OSError: when the folder cannot be moved; the old one is at the destination then.
    """
    if not destination.exists():
        new.rename(destination)
        return
    if _swapped(new, destination):
        return
    old = destination.with_name(f"{ASIDE}{secrets.token_hex(4)}")
    try:
        destination.rename(old)
        new.rename(destination)
    except BaseException:  # Ctrl-C, too: it may come before or after either rename
        if old.exists() and not destination.exists():
            old.rename(destination)
        raise
    finally:
        if destination.exists():
            shutil.rmtree(old, ignore_errors=True)


def _swapped(left: Path, right: Path) -> bool:
    """Swap two names in one step of the file system; false where system or file system cannot."""
    names = os.fsencode(left), os.fsencode(right)
    try:
        if sys.platform == "linux":
            return ctypes.CDLL(None).renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _SWAP) == 0  # type: ignore[no-any-return]
        if sys.platform == "darwin":
            return ctypes.CDLL(None).renamex_np(*names, _SWAP) == 0  # type: ignore[no-any-return]
    except (AttributeError, OSError):  # a C library without it
        return False
    return False
