"""Changing pickles, instruction by instruction."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from random import Random

from tests.fuzz.mutators.values import NUMBERS, TEXTS, Mutate

_FIXED = {**dict.fromkeys(b"K\x80qh", 1), b"M"[0]: 2, **dict.fromkeys(b"Jrj", 4), **dict.fromkeys(b"G\x95", 8)}
_COUNTED = {**dict.fromkeys(b"\x8cU\x8aC", 1), **dict.fromkeys(b"XBT", 4), **dict.fromkeys(b"\x8d\x8e\x96", 8)}
_LINES = {**dict.fromkeys(b"ci", 2), **dict.fromkeys(b"PILFSV", 1)}


@lru_cache(maxsize=512)
def instructions(data: bytes) -> tuple[bytes, ...]:
    """Cut a pickle into its instructions; what is none ends up in pieces of a byte."""
    found, at = [], 0
    while at < len(data):
        code, end = data[at], at + 1
        if width := _COUNTED.get(code):
            end += width + int.from_bytes(data[end : end + width], "little")
        end += _FIXED.get(code, 0)
        for _ in range(_LINES.get(code, 0)):
            end = data.find(b"\n", end) + 1 or len(data)
        found.append(data[at:end])
        at = end
    return tuple(found)


def number(value: int) -> bytes:
    """Return the instruction that pushes a number."""
    if 0 <= value < 256:
        return b"K%c" % value
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def text(value: str) -> bytes:
    """Return the instruction that pushes a text."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


_PIECES = (
    *map(number, NUMBERS), *map(text, TEXTS), b"N", b"\x88", b"\x89", b")", b"]", b"}", b"(", b"t", b"u", b"e", b"s",
    b"a", b"R", b"b", b"\x81", b"\x85", b"\x86", b"\x87", b"\x94", b"\x93", b"1", b"0", b"2", b".", b"Q", b"C\x03abc",
    b"G\x7f\xf8\0\0\0\0\0\0", b"G\xff\xf0\0\0\0\0\0\0", b"h\0", b"h\1", b"h\2", b"j\3\0\0\0", b"](K\0e",
)  # fmt: skip


def pickles(more: Sequence[bytes] = ()) -> Mutate:
    """Return a mutator of pickles, which also puts given pieces in."""
    pieces = (*_PIECES, *more)

    def mutate(data: bytes, random: Random) -> bytes:
        parts = list(instructions(data))
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            _change(parts or [b"N"], pieces, random)
        return b"".join(parts)

    return mutate


def _change(parts: list[bytes], pieces: Sequence[bytes], random: Random) -> None:
    """Change a list of instructions in one place."""
    at, other = random.randrange(len(parts)), random.randrange(len(parts))
    stop = at + random.choice((1, 1, 1, 2, 3, 8, 30))
    match random.randrange(10):
        case 0:
            del parts[at:stop]
        case 1:
            parts[at:at] = parts[at:stop] * random.choice((1, 1, 2, 12))
        case 2:
            parts[other:other] = parts[at:stop]
        case 3:
            parts.insert(at, random.choice(pieces))
        case 4:
            parts[at] = random.choice(pieces)
        case 5:
            parts[at], parts[other] = parts[other], parts[at]
        case 6:  # another place of the memo, another length
            parts[at] = parts[at][:1] + random.randbytes(1) + parts[at][2:]
        case 7:
            parts[at] = random.choice([part for part in parts if part[:1] == parts[at][:1]])
        case _:
            parts[at] = _another(parts[at], random)


def _another(part: bytes, random: Random) -> bytes:
    """Return another number for a number, and another text for a text."""
    if part[:1] in b"KMJ\x8a":
        return number(random.choice(NUMBERS) if random.random() < 0.5 else random.randrange(64))
    if part[:1] in b"\x8cX":
        return text(random.choice(TEXTS))
    return part[:1] + random.randbytes(len(part) - 1)
