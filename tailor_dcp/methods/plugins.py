"""Merge methods that other packages bring along, found by their entry points."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from tailor_dcp.methods.base import Method
from tailor_dcp.recipes.errors import RecipeError

GROUP = "tailor_dcp.merge_methods"
"""The entry point group; an entry's name is the method's name in recipes."""


def plugin_names() -> set[str]:
    """Return the names of all merge methods that installed packages offer, without importing any."""
    return {entry.name for entry in entry_points(group=GROUP)}


def find_plugin(name: str) -> Method | None:
    """Import the merge method that an installed package offers under a name.

    Returns:
        The method; None if no package offers the name.

    Raises:
        RecipeError: several packages offer the name, the import fails, or what it gives is not a
            method of that name.
    """
    # A package can be on the path twice; that is no conflict as long as both say the same.
    entries = {entry.value: entry for entry in entry_points(group=GROUP, name=name)}
    if not entries:
        return None
    if len(entries) > 1:
        offers = " and ".join(sorted(_described(entry) for entry in entries.values()))
        raise RecipeError(f"The merge method {name!r} is offered by {offers}: uninstall all but one of them.")
    return _imported(next(iter(entries.values())))


def _imported(entry: EntryPoint) -> Method:
    try:
        found = entry.load()
    except Exception as error:  # an import runs the package's code, which may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RecipeError(
            f"The merge method {entry.name!r} of {_described(entry)} cannot be imported ({reason})."
        ) from error
    if isinstance(found, Method) and found.name == entry.name:
        return found
    problem = (
        f"it calls itself {found.name!r}" if isinstance(found, Method) else "it is not a tailor_dcp.methods.Method"
    )
    raise RecipeError(f"The merge method {entry.name!r} of {_described(entry)} cannot be used: {problem}.")


def _described(entry: EntryPoint) -> str:
    if entry.dist is None:
        return f"the entry point {entry.value!r}"
    return f"{entry.dist.name} {entry.dist.version} (entry point {entry.value!r})"
