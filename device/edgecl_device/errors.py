"""Every error the device package raises: each names the thing, the constraint, the value got and the mend.

After any of them the learner's state and its store are what they were before the call.
"""

RESTORE = "delete the file *-wal beside the store, if there is one, then restore the store from a copy, or delete it to start afresh"
"""The mend of a damaged store. SQLite would apply a write-ahead log that was left to whatever lies beside it."""


class EdgeclError(Exception):
    """Base class of every error raised by edgecl, on the host and on the device."""


class InputError(EdgeclError, ValueError):
    """A sample, label or option has a wrong shape, dtype, value or range."""


class BundleError(EdgeclError):
    """A bundle is missing a file, was altered, or does not fit together."""


class SchemaError(BundleError):
    """A manifest was written by a newer schema than this package reads."""


class StoreError(EdgeclError):
    """The store cannot be read or written."""


class StoreMismatchError(StoreError):
    """The store belongs to another bundle."""


class StoreFullError(StoreError):
    """The disk is full or the store reached its size limit; nothing was written."""


class PredictionError(EdgeclError):
    """A prediction is not finite: the state has grown beyond what its type can hold."""


class ClosedError(EdgeclError):
    """The learner is closed, or was closed because an interrupt hit it in the middle of an update."""


class BusyError(EdgeclError):
    """Another call of the learner is running: from another thread, or interrupted by the signal handler that makes this one."""


class StepMissingError(EdgeclError):
    """The method has no such step."""


class UpdateRefusedError(EdgeclError):
    """An update failed a check made inside the graph; the state is what it was."""


class ForgetRefusedError(EdgeclError):
    """A sample cannot be unlearned exactly any more, or never was learned."""
