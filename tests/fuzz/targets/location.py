"""Where a checkpoint stands: any path's text has a run, a name, and a step or none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tailor_dcp.location import is_within, locate
from tailor_dcp.store_path import StorePath, is_url, place
from tests.fuzz.mutators.texts import texts
from tests.fuzz.target import Target


def parse(data: bytes) -> None:
    """Locate it. Only of a store in memory: no other is asked for anything."""
    text = data.decode("utf-8", "surrogateescape")
    if is_url(text) and not text.startswith("memory://"):
        text = "memory://" + text.partition("://")[2]
    if "\0" in text:
        return
    found = locate(text)
    assert found.folder.is_relative_to(found.run), "a checkpoint outside of its run"
    assert (found.step is None) or found.step >= 0
    assert isinstance(found.name, str)
    where = place(text)
    if isinstance(where, StorePath):
        inner = where / "x"
        assert isinstance(inner, StorePath) and isinstance(place(str(where)), StorePath)
        assert ".." not in where.resolve().key.split("/"), "a key that leads out of its folder"
        return
    assert isinstance(where, Path)
    if len(os.fsencode(text)) < 1000:
        is_within(where, "/tmp/run")


def seeds() -> Iterator[bytes]:
    """Names of folders."""
    yield from (
        b"run/step-20", b"run/checkpoint-200/optimizer_0", b"/a/global_step12", b"memory://bucket/run/step_7",
        b"200", b".", b"..", b"", b"/", b"memory://", b"memory://b/../../x", b"file:///a/step=3/",
        b"run/step-\xd9\xa3", b"a//b/./c", b"step-" + b"9" * 4400, b"~/run/step-1",
        b"memory://b/step-" + b"9" * 4400, b"local://x", b"S3://b/k", b"a::b://c",
    )  # fmt: skip


_WORDS = (
    "step-",
    "checkpoint-",
    "global_step",
    "memory://",
    "file://",
    "local://",
    "..",
    "/",
    "//",
    "::",
    "20",
    "optimizer_0",
)
TARGET = Target(parse, seeds, texts(_WORDS), tuple(word.encode() for word in _WORDS), longest=5000)
