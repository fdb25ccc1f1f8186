"""Patterns of layers: regular expressions that users give."""

from __future__ import annotations

from collections.abc import Iterator

from tailor_dcp.layers import LayerMap
from tests.fuzz.mutators.texts import texts
from tests.fuzz.target import Target

_NAMES = ("model.layers.0.w", "lm_head.w", "a")


def parse(data: bytes) -> None:
    """Compile it, and match names with it that are short: what a user's own expression costs is the user's."""
    layers = LayerMap((data.decode("utf-8", "surrogateescape"),))
    assert all(layers.layer(name) for name in _NAMES)


def seeds() -> Iterator[bytes]:
    """Patterns as the documentation has them, and what ``re`` refuses in odd ways."""
    yield rb"(?P<layer>model\.layers\.[0-3])\."
    yield from (
        b"lm_head|embed",
        b"(",
        b"a{99999999999999999999}",
        b"(?P<layer>)",
        b"(?<=a*)b",
        b"(" * 120 + b")" * 120,
    )


_WORDS = (
    r"\.", r"\d+", "(?P<layer>", "(?P=layer)", "(?:", "(?i)", "(?<=", "(?>", "*+", "{2,5}", "|", ")", "[0-9]", "[^",
    "]", "$", r"\Z", r"\x", r"\N{", r"\1", "*", "?", "model", "layers", "layer", "(?(1)", "{4294967295}", "(",
    "(?-i:", "[[:", "^", "+?",
)  # fmt: skip
TARGET = Target(parse, seeds, texts(_WORDS), tuple(word.encode() for word in _WORDS), longest=240)
