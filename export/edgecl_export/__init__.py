"""edgecl_export: writes and checks bundles."""

from edgecl_export.bundle import Exported, export
from edgecl_export.verify import ExportError, Gate

__all__ = ["ExportError", "Exported", "Gate", "export"]
