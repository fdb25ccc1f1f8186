"""Converters between checkpoint formats and tailor_dcp's layout."""

from tailor_dcp.errors import ConversionError, DamagedSourceError

from .convert import Converted, convert
from .options import Options

__all__ = ["ConversionError", "Converted", "DamagedSourceError", "Options", "convert"]
