"""Converters between checkpoint formats and tailor_dcp's layout."""

from .convert import Converted, convert
from .errors import ConversionError, DamagedSourceError
from .options import Options

__all__ = ["ConversionError", "Converted", "DamagedSourceError", "Options", "convert"]
