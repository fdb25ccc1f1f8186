"""Merge methods that other packages bring along."""

from __future__ import annotations

from tailor_dcp.methods.base import Method
from tailor_dcp.plugins import Plugins
from tailor_dcp.recipes.errors import RecipeError

GROUP = "tailor_dcp.merge_methods"
"""The entry point group; an entry's name is the method's name in recipes."""


def _problem(name: str, found: object) -> str | None:
    if not isinstance(found, Method):
        return "it is not a tailor_dcp.methods.Method"
    return None if found.name == name else f"it calls itself {found.name!r}"


PLUGINS: Plugins[Method] = Plugins(GROUP, "merge method", RecipeError, _problem)
