"""The 15 common corruptions and the 4 held-out ones, at CIFAR-10-C's constants; ``docs/streams.md`` lists them."""

from edgecl.streams.corruptions.table import CORRUPTIONS, EXTRA_CORRUPTIONS, corrupt

__all__ = ["CORRUPTIONS", "EXTRA_CORRUPTIONS", "corrupt"]
