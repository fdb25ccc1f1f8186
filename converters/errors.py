"""What can go wrong in a conversion."""

from __future__ import annotations

from tailor_dcp.errors import TailorError


class ConversionError(TailorError):
    """The source cannot be converted as asked; nothing was written."""


class DamagedSourceError(ConversionError):
    """A file of the source is missing, cut off, or contradicts another; nothing was written."""
