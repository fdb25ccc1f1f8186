"""The token that a training state carries: a damaged one only costs a full save."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tailor_dcp.lineage import Token
from tests.fuzz.mutators.trees import jsons
from tests.fuzz.target import Target


def parse(data: bytes) -> None:
    """Read it, write it, read that."""
    token = Token.from_json(data.decode("utf-8", "surrogateescape"))
    if token is None:
        return
    assert isinstance(token.chain, tuple)
    again = Token.from_json(token.to_json())
    kept = tuple(a for a in token.ancestors if a.save_id)
    assert again is not None and (again.save_id, again.folder, again.ancestors) == (token.save_id, token.folder, kept)


def seeds() -> Iterator[bytes]:
    """Tokens."""
    yield json.dumps({"save_id": "1" * 32, "folder": "/run/step-1", "ancestors": [["/run/step-0", "0" * 32]]}).encode()
    yield json.dumps({"save_id": None, "folder": None, "ancestors": []}).encode()
    yield json.dumps({"save_id": 1, "folder": 2, "ancestors": {"ab": 1}}).encode()
    yield b"[" * 2000
    yield b"9" * 4400


_WORDS = ("save_id", "folder", "ancestors", "/run/step-0")
TARGET = Target(parse, seeds, jsons(_WORDS), tuple(word.encode() for word in _WORDS), longest=5000)
