"""Naming: what a key and a path become where a parameter is called otherwise. Pure functions."""

from __future__ import annotations

import re
from functools import lru_cache

from tailor_dcp.merging.index import Held

KeyPath = tuple[str | int, ...]


def renamed_text(text: str, held: Held, fqn: str, layer: str) -> str | None:
    """Return a key, or a part of one, as it is for another parameter.

    Wrappers may stand within a parameter's name in a key, so that only its layer's name is found in one piece.

    Args:
        text: where the name stands.
        held: what is called otherwise.
        fqn: the parameter's new name.
        layer: its layer's new name.

    Returns:
        The text; None if the name is not in it.
    """
    if held.fqn == fqn:
        return text
    for old, new in ((held.fqn, fqn), (held.layer, layer)):
        found = list(_whole(old).finditer(text))
        if found:
            return text[: found[-1].start()] + new + text[found[-1].end() :]
    return None


def renamed_path(path: KeyPath, held: Held, fqn: str, layer: str) -> KeyPath | None:
    """Return where a value of another parameter sits in a nested state dict; see ``renamed_text``.

    Most layouts have a name in one part of the path, some have a part for each module.
    """
    if held.fqn == fqn:
        return path
    for number in range(len(path) - 1, -1, -1):
        part = path[number]
        new = renamed_text(part, held, fqn, layer) if isinstance(part, str) else None
        if new is not None:
            return (*path[:number], new, *path[number + 1 :])
    whole = renamed_text(".".join(map(str, path)), held, fqn, layer)
    words = whole.split(".") if whole is not None else []
    sizes = [len(str(part).split(".")) for part in path]
    if sum(sizes) != len(words):
        return None
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    parts = [".".join(words[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
    return tuple(int(new) if isinstance(old, int) else new for old, new in zip(path, parts, strict=True))


@lru_cache(maxsize=1 << 12)
def _whole(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?:(?<=\.)|^){re.escape(name)}(?=\.|$)")
