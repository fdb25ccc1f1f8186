"""Policies that other packages bring along, found by their entry points."""

from __future__ import annotations

from dataclasses import is_dataclass
from importlib.metadata import EntryPoint, entry_points

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies.base import Policy

GROUP = "tailor_dcp.policies"
"""The entry point group; an entry's name is the policy's name in strings."""


def plugin_names() -> set[str]:
    """Return the names of all policies that installed packages offer, without importing any."""
    return {entry.name for entry in entry_points(group=GROUP)}


def find_plugin(name: str) -> type[Policy] | None:
    """Import the policy that an installed package offers under a name.

    Args:
        name: the policy's name in strings.

    Returns:
        The policy's class; None if no package offers the name.

    Raises:
        PolicyError: several packages offer the name, the import fails, or what it gives is not a
            policy of that name.
    """
    # A package can be on the path twice; that is no conflict as long as both say the same.
    entries = {entry.value: entry for entry in entry_points(group=GROUP, name=name)}
    if not entries:
        return None
    if len(entries) > 1:
        offers = " and ".join(sorted(_described(entry) for entry in entries.values()))
        raise PolicyError(f"The policy {name!r} is offered by {offers}: uninstall all but one of them.")
    return _imported(next(iter(entries.values())))


def _imported(entry: EntryPoint) -> type[Policy]:
    try:
        found = entry.load()
    except Exception as error:  # an import runs the package's code, which may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise PolicyError(f"The policy {entry.name!r} of {_described(entry)} cannot be imported ({reason}).") from error
    problem = _problem(entry.name, found)
    if problem is not None:
        raise PolicyError(f"The policy {entry.name!r} of {_described(entry)} cannot be used: {problem}.")
    return found  # type: ignore[no-any-return]  # _problem has looked


def _problem(name: str, found: object) -> str | None:
    """Say why an object is not the class of a policy of this name; None if it is one."""
    if not (isinstance(found, type) and issubclass(found, Policy)):
        return "it is not a subclass of tailor_dcp.policies.Policy"
    if found.name != name:
        # str(policy) goes by the class, and must be readable again.
        return f"its class calls itself {found.name!r}"
    return None if is_dataclass(found) else "it is not a dataclass"


def _described(entry: EntryPoint) -> str:
    if entry.dist is None:
        return f"the entry point {entry.value!r}"
    return f"{entry.dist.name} {entry.dist.version} (entry point {entry.value!r})"
