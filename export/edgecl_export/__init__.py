"""edgecl_export: writes and checks bundles."""

from edgecl_export.bundle import Exported, export
from edgecl_export.errors import ExportError
from edgecl_export.verify import Gate

__all__ = ["ExportError", "Exported", "Gate", "export"]
