"""Changing texts, word by word and line by line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from tests.fuzz.mutators.values import NUMBERS, TEXTS, Mutate

_TOKEN = re.compile(rb"\n *|[A-Za-z0-9_]+|.", re.DOTALL)
_PIECES = (
    b"\n", b"\n  ", b"\n    ", b": ", b"- ", b", ", b"[", b"]", b"{", b"}", b"|", b"'", b'"', b"\xff", b"2001-99-99",
    b"0x", b"1e999", b".nan", b"=", b"0b", b"...", b"---",
)  # fmt: skip


def texts(words: Sequence[str]) -> Mutate:
    """Return a mutator of texts, which also puts given words in."""
    own = [word.encode("utf-8", "surrogatepass") for word in (*words, *words, *TEXTS)]
    pieces = (*own, *_PIECES, *(str(number).encode() for number in NUMBERS))

    def mutate(data: bytes, random: Random) -> bytes:
        parts = _TOKEN.findall(data)
        for _ in range(random.choice((1, 1, 2, 4))):
            at, other = random.randrange(len(parts) + 1), random.randrange(len(parts) + 1)
            stop = at + random.choice((1, 1, 2, 5, 20))
            match random.randrange(5):
                case 0:
                    del parts[at:stop]
                case 1:
                    parts[at:at] = parts[at:stop]
                case 2:
                    parts[at : at + 1] = [random.choice(pieces)]
                case 3:
                    parts.insert(at, random.choice(pieces))
                case _:
                    parts[other:other] = parts[at:stop]
        return b"".join(parts)

    return mutate
