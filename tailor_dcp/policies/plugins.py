"""Policies that other packages bring along."""

from __future__ import annotations

from dataclasses import is_dataclass

from tailor_dcp.errors import PolicyError
from tailor_dcp.plugins import Plugins
from tailor_dcp.policies.base import Policy

GROUP = "tailor_dcp.policies"
"""The entry point group; an entry's name is the policy's name in strings."""


def _problem(name: str, found: object) -> str | None:
    if not (isinstance(found, type) and issubclass(found, Policy)):
        return "it is not a subclass of tailor_dcp.policies.Policy"
    if found.name != name:
        # str(policy) goes by the class, and must be readable again.
        return f"its class calls itself {found.name!r}"
    return None if is_dataclass(found) else "it is not a dataclass"


PLUGINS: Plugins[type[Policy]] = Plugins(GROUP, "policy", PolicyError, _problem)
