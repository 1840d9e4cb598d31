"""What a failed export raises."""

from edgecl_device.errors import EdgeclError


class ExportError(EdgeclError):
    """A bundle failed a gate and was not written."""


def refuse(gate: str, why: str, mend: str) -> ExportError:
    """The error of a gate that was not passed."""
    return ExportError(f"gate {gate!r}: {why}; {mend}")
