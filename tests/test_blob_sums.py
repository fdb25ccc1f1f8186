"""Sums of blobs: they agree with zlib's, and see a changed byte wherever torch.save has a checksum for it."""

from __future__ import annotations

import io
import zlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.serialization import get_crc32_options, set_crc32_options

from tailor_dcp.blob_sums import BlobSums, Sum


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


SMALL, LARGE, OBJECT = saved(torch.arange(10.0)), saved(torch.arange(400_000.0)), saved({"lr": 0.1})
BLOBS = (SMALL, LARGE, OBJECT, b"no archive" * 1000, b"neither" * 300_000)
CHECKED = (True, True, True, None, None)


def fed(blobs: list[bytes], known: list[int | None], cuts: list[int]) -> list[Sum]:
    """Feed all bytes in pieces of these sizes, again and again."""
    sums = BlobSums(zip(map(len, blobs), known, strict=True))
    data, at, turn = memoryview(b"".join(blobs)), 0, 0
    found: list[Sum] = []
    while at < len(data):
        piece = data[at : at + cuts[turn % len(cuts)]]
        found += sums.feed(piece)
        at, turn = at + len(piece), turn + 1
    return found


@settings(max_examples=15)
@given(
    chosen=st.lists(st.sampled_from(range(len(BLOBS))), min_size=1, max_size=4),
    cuts=st.lists(st.integers(700, 1 << 20), min_size=1, max_size=3),
    known=st.booleans(),
)
def test_it_agrees_with_zlib(chosen: list[int], cuts: list[int], known: bool) -> None:
    """However the bytes are cut."""
    blobs = [BLOBS[number] for number in chosen]
    crcs = [zlib.crc32(blob) for blob in blobs]
    told: list[int | None] = [*crcs] if known else [None] * len(blobs)
    good = [True if known else CHECKED[number] for number in chosen]
    assert fed(blobs, told, cuts) == [Sum(*pair) for pair in zip(crcs, good, strict=True)]


@settings(max_examples=15)
@given(at=st.floats(0, 1, exclude_max=True), blob=st.sampled_from([SMALL, LARGE]), bit=st.integers(0, 7))
def test_a_changed_bit_of_a_tensor_is_seen(at: float, blob: bytes, bit: int) -> None:
    """Where its own bytes lie; a checksum of the whole blob sees any."""
    tensor = torch.load(io.BytesIO(blob))
    start = blob.index(tensor.numpy().tobytes())
    damaged = bytearray(blob)
    damaged[start + int(at * tensor.nbytes)] ^= 1 << bit
    assert fed([bytes(damaged)], [None], [1 << 20])[0].good is False
    assert fed([bytes(damaged)], [zlib.crc32(blob)], [1 << 20])[0].good is False


def test_what_torch_computed_no_checksum_of() -> None:
    """There is nothing to compare, which is no damage."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        blobs = [saved(torch.arange(10.0)), saved(torch.arange(400_000.0))]
    finally:
        set_crc32_options(before)
    assert [one.good for one in fed(blobs, [None, None], [1 << 20])] == [None, None]


def test_a_small_archive_that_is_cut_off() -> None:
    """It is damaged, not something else."""
    assert fed([SMALL[:-30]], [None], [1 << 20])[0].good is False
