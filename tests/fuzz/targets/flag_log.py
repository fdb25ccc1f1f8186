"""A flag log: its saves are what its lines say, and its history never goes back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from random import Random

from tailor_dcp.recipes.flags import read_flags
from tests.fuzz.mutators.trees import jsons
from tests.fuzz.scratch import put
from tests.fuzz.target import Target


def parse(data: bytes) -> None:
    """Read it; compare the last line; go through its history."""
    flags = read_flags(put(data, "flags.jsonl"))
    said = [json.loads(line) for line in data.split(b"\n") if line.strip()]
    assert [(one["step"], set(one["flag"])) for one in said] == [(save.step, set(save.units)) for save in flags.saves]
    for at in (0, 100, 1 << 70):
        history = flags.history(at)
        assert all(a.step < b.step for a, b in pairwise(history)), "a history that goes back"
        assert all(save.step <= at for save in history)


def seeds() -> Iterator[bytes]:
    """Logs, one of a run that went back."""
    yield b'{"step": 20, "flag": [0, 1, 2]}\n{"step": 40, "flag": [0]}\n\n{"step": 30, "flag": []}\n'
    yield b'{"step": 1, "flag": [1], "time": 1.5}\r\n'
    yield b'{"step": -1, "flag": [1]}\n'
    yield b'{"step": 1, "flag": [1048576]}\n'
    yield b'{"step": true, "flag": [1]}\n[]\n'
    yield b"[" * 2000


_WORDS = ("step", "flag")
_json = jsons(_WORDS)


def _mutate(data: bytes, random: Random) -> bytes:
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    match random.randrange(6):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, random.choice(lines))
        case 2:
            lines[at] = b'{"step":%d,"flag":[%d]}' % (random.randrange(100), random.randrange(9))
        case _:
            lines[at] = _json(lines[at], random)
    return b"\n".join(lines)


TARGET = Target(
    parse, seeds, _mutate, (b'"step":', b'"flag":', b"[0]", b"\n", b"1e5", b"NaN", b"\xef\xbb\xbf"), longest=2048
)
