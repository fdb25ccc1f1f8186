"""Names of layers as people write them: globs, prefixes, and what they may have meant. Pure functions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

from tailor_dcp.errors import TailorError

_MOST = 10_000
_BRACES = re.compile(r"(?:(?<!\[)\{|\{(?!\]))((?:[^{}]|\[[{}]\])*)(?:(?<!\[)\}|\}(?!\]))")
"""Braces around alternatives; those in ``[{]`` and ``[}]`` are no more than themselves."""
_SIGNS = re.compile(r"[*?\[{}]")


@lru_cache(maxsize=1024)
def alternatives(pattern: str) -> tuple[str, ...]:
    """Return the plain globs that a pattern with braces stands for: ``{8,9}`` is either number.

    Raises:
        TailorError: they are too many.
    """
    globs = [pattern]
    while any(_BRACES.search(glob) for glob in globs):
        globs = [other for glob in globs for other in _opened(glob)]
        if len(globs) > _MOST:
            raise TailorError(f"{pattern!r} stands for more than {_MOST} names; write a glob with * instead.")
    return tuple(globs)


def _opened(glob: str) -> list[str]:
    """Return what a glob stands for once its first braces are opened."""
    braces = _BRACES.search(glob)
    if braces is None:
        return [glob]
    before, after = glob[: braces.start()], glob[braces.end() :]
    return [before + part.strip() + after for part in braces[1].split(",")]


def matches(name: str, pattern: str) -> bool:
    """Tell whether a layer's name is meant by a glob; ``{8,9}`` gives alternatives."""
    return any(fnmatchcase(name, glob) for glob in alternatives(pattern))


def literal(name: str) -> str:
    """Return the glob that means one name alone, whatever signs are in it: ``[*]`` is a star."""
    return _SIGNS.sub(lambda sign: f"[{sign[0]}]", name)


def below(name: str, prefix: str) -> bool:
    """Tell whether a dotted name is ``prefix`` itself or lies below it."""
    return name == prefix or name.startswith(f"{prefix}.")


def close(wanted: str, names: Iterable[str], most: int = 3) -> list[str]:
    """Return the names that resemble what was wanted, the closest first; at least one if there are any."""
    known = list(dict.fromkeys(names))
    found = difflib.get_close_matches(wanted, known, n=most, cutoff=0.6)
    return found or difflib.get_close_matches(wanted, known, n=1, cutoff=0.0)


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence has them: ``a, b or c``; ``nothing`` for none."""
    if len(names) < 2:
        return names[0] if names else "nothing"
    return f"{', '.join(names[:-1])} or {names[-1]}"
