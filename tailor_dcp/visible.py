"""Visible: texts of which every character can be seen. Names come from files that anybody wrote."""

from __future__ import annotations


def visible(text: str, lines: bool = True) -> str:
    r"""Return a text in which what is no character to be seen is written out, as ``\x1b``; new lines stay as asked."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (lines and c == "\n") else c.encode("unicode_escape").decode() for c in text)
