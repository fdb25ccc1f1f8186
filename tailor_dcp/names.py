"""Names of layers as people write them: globs, prefixes, and what they may have meant. Pure functions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

_BRACES = re.compile(r"\{([^{}]*)\}")


def alternatives(pattern: str) -> list[str]:
    """Return the plain globs that a pattern with braces stands for: ``{8,9}`` is either number."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [glob for part in braces[1].split(",") for glob in alternatives(before + part.strip() + after)]


def matches(name: str, pattern: str) -> bool:
    """Tell whether a layer's name is meant by a glob; ``{8,9}`` gives alternatives."""
    return any(fnmatchcase(name, glob) for glob in alternatives(pattern))


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
