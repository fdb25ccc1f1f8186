"""Plug-ins: what other packages bring along, found by their entry points and imported only when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from tailor_dcp.errors import TailorError

T = TypeVar("T")


@dataclass(frozen=True)
class Plugins(Generic[T]):
    """Everything of one kind that installed packages offer.

    Attributes:
        group: the entry point group; an entry's name is the name that users write.
        what: what it is, in messages.
        error: what is raised.
        problem: says why an object is none of the kind that has a name; None if it is one.
    """

    group: str
    what: str
    error: type[TailorError]
    problem: Callable[[str, object], str | None]

    def names(self) -> set[str]:
        """Return all names, importing nothing."""
        return {entry.name for entry in entry_points(group=self.group)}

    def find(self, name: str) -> T | None:
        """Import what is offered under a name; None if nothing is.

        Raises:
            TailorError: several packages offer the name, the import fails, or what it gives is none of the kind.
        """
        # A package can be on the path twice; that is no conflict as long as both say the same.
        entries = {entry.value: entry for entry in entry_points(group=self.group, name=name)}
        if not entries:
            return None
        if len(entries) > 1:
            offers = " and ".join(sorted(_described(entry) for entry in entries.values()))
            raise self.error(f"The {self.what} {name!r} is offered by {offers}: uninstall all but one of them.")
        return self._imported(next(iter(entries.values())))

    def _imported(self, entry: EntryPoint) -> T:
        named = f"The {self.what} {entry.name!r} of {_described(entry)}"
        try:
            found = entry.load()
        except Exception as error:  # an import runs the package's code, which may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise self.error(f"{named} cannot be imported ({reason}).") from error
        problem = self.problem(entry.name, found)
        if problem is not None:
            raise self.error(f"{named} cannot be used: {problem}.")
        return cast(T, found)


def _described(entry: EntryPoint) -> str:
    if entry.dist is None:
        return f"the entry point {entry.value!r}"
    return f"{entry.dist.name} {entry.dist.version} (entry point {entry.value!r})"
