"""Merge methods by name: ours, and those that other packages bring along."""

from __future__ import annotations

from importlib import import_module

from tailor_dcp.methods.base import Method
from tailor_dcp.methods.plugins import PLUGINS
from tailor_dcp.names import close, listed
from tailor_dcp.recipes.errors import RecipeError

# Ours are entry points too, but have to work from a source folder that nobody installed, and no other package may put
# itself in their place. A module is imported when one of its methods is asked for.
_OURS = {
    "passthrough": "passthrough",
    "linear": "linear",
    "slerp": "slerp",
    "nuslerp": "nuslerp",
    "multislerp": "multislerp",
    "karcher": "karcher",
    "task_arithmetic": "task_arithmetic",
    "ties": "ties",
    "dare_linear": "dare",
    "dare_ties": "dare",
    "della": "della",
    "della_linear": "della",
    "breadcrumbs": "breadcrumbs",
    "breadcrumbs_ties": "breadcrumbs",
    "model_stock": "model_stock",
    "sce": "sce",
    "nearswap": "nearswap",
    "arcee_fusion": "arcee_fusion",
}


def method_named(name: str) -> Method:
    """Return the merge method of a name.

    Raises:
        RecipeError: there is none, or the package that offers it is broken.
    """
    if name in _OURS:
        found: Method = getattr(import_module(f"tailor_dcp.methods.{_OURS[name]}"), name)
        return found
    plugin = PLUGINS.find(name)
    if plugin is None:
        near = listed([repr(known) for known in close(name, method_names())])
        raise RecipeError(f"There is no merge method {name!r}; did you mean {near}?")
    return plugin


def method_names() -> tuple[str, ...]:
    """Return the names of all merge methods, ours first, without importing any."""
    return (*_OURS, *sorted(PLUGINS.names() - set(_OURS)))
