"""Globs of layers, with braces: as many plain globs as they stand for, or a refusal."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tailor_dcp.names import alternatives, below, close, listed, matches
from tests.fuzz.mutators.texts import texts
from tests.fuzz.target import Target

_NAMES = ("model.layers.0", "model.layers.12", "lm_head", "a")
_MATCHED = 8
_CLOSED = re.compile(r"\{[^{}]*\}")


def parse(data: bytes) -> None:
    """Open its braces, match names with it, and look for what may have been meant."""
    glob = data.decode("utf-8", "surrogateescape")
    found = alternatives(glob)
    assert found
    plain = [one.replace("[{]", "x").replace("[}]", "x") for one in found]  # so written a brace is no more than that
    assert not any(_CLOSED.search(one) for one in plain), "braces that are closed, and left"
    if len(found) <= _MATCHED:
        for name in _NAMES:
            matches(name, glob)
            below(name, glob)
    assert close(glob, _NAMES)
    assert listed([glob, *found[:3]])


def seeds() -> Iterator[bytes]:
    """Globs."""
    yield from (
        b"model.layers.{8,9}",
        b"*.{a,b}.{c,d}*",
        b"{{a,b},c}",
        b"[!a]*",
        b"{a,b}" * 6,
        b"{a,b}" * 14,
        b"}{",
        b"*" * 40,
    )
    yield b"{" + b",".join(b"%d" % n for n in range(20)) + b"}"


_WORDS = ("[{]", "[}]", "{a,b}", "{", "}", ",", "*", "?", "[!", "]", "model", "layers", ".", "12", "{8,9}", "[a-", "\\")
TARGET = Target(parse, seeds, texts(_WORDS), tuple(word.encode() for word in _WORDS), longest=80)
