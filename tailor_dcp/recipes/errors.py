"""What can be wrong with a recipe."""

from __future__ import annotations

from tailor_dcp.errors import TailorError


class RecipeError(TailorError, ValueError):
    """A recipe does not make sense, or asks for what its sources do not have; nothing was written."""
