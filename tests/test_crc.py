"""Checksums: what is computed in passing equals zlib's over the bytes on disk."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.serialization import set_crc32_options

from tailor_dcp.crc import ChecksumStream, combine


@given(st.binary(max_size=3000), st.binary(max_size=3000))
def test_combined_checksums_are_those_of_the_whole(first: bytes, second: bytes) -> None:
    """The law that everything else rests on."""
    assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@pytest.mark.parametrize("length", [1 << 16, (1 << 20) + 1, (1 << 26) - 3])
def test_long_stretches_combine_too(length: int) -> None:
    """Lengths as tensors have them."""
    second = bytes(length)
    assert combine(zlib.crc32(b"abc"), zlib.crc32(second), length) == zlib.crc32(second, zlib.crc32(b"abc"))


def test_stretches_too_long_to_try_combine_as_powers_do() -> None:
    """Beyond 4 GB: appending a + b bytes is appending a and then b."""
    a, b, zero = (5 << 30) + 7, (3 << 31) + 1, 0
    assert combine(combine(0x1234, zero, a), zero, b) == combine(0x1234, zero, a + b)


@pytest.fixture(params=[True, False], ids=["zip's CRCs", "none in the zip"])
def _crc_option(request: pytest.FixtureRequest) -> Iterator[None]:
    set_crc32_options(request.param)
    yield
    set_crc32_options(True)


CONTENTS = {
    "small tensor": torch.arange(10),
    "large tensor": torch.randn(70_000),
    "two of one size": [torch.randn(40_000), torch.randn(40_000)],
    "two sizes": {"a": torch.randn(40_000), "b": torch.randn(50_000)},
    "shared storage": [(shared := torch.randn(40_000)), shared],
    "an archive's signature inside": torch.frombuffer(bytearray(b"PK\x01\x02" * 500), dtype=torch.uint8),
    "the signature before a large one": [
        torch.frombuffer(bytearray(b"PK\x01\x02" + bytes(400)), dtype=torch.uint8),
        torch.randn(40_000),
    ],
    "bf16": torch.randn(70_000).bfloat16(),
    "a view": torch.randn(200, 1000)[:, ::2],
    "no tensor": {"step": 3, "text": "x" * 100_000},
}


@pytest.mark.usefixtures("_crc_option")
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_a_blob_that_torch_saves_has_its_checksum(content: object) -> None:
    """Whatever is saved, and whether or not torch computes checksums of its own."""
    raw = io.BytesIO()
    stream = ChecksumStream(raw)
    torch.save(content, stream)
    stream.flush()
    assert stream.blobs == {0: zlib.crc32(raw.getvalue())}


@given(st.lists(st.lists(st.binary(max_size=50), max_size=4), max_size=6), st.integers(0, 2))
def test_each_blob_has_its_own_checksum(blobs: list[list[bytes]], large: int) -> None:
    """A flush ends a blob; an empty one leaves no trace."""
    raw = io.BytesIO()
    stream, expected = ChecksumStream(raw), {}
    for pieces in blobs:
        start = raw.tell()
        for piece in (*pieces, bytes(large * 40_000)):
            assert stream.write(memoryview(bytearray(piece))) == len(piece)
        stream.flush()
        if raw.tell() > start:
            expected[start] = zlib.crc32(raw.getvalue()[start:])
    assert stream.blobs == expected
    assert stream.tell() == raw.tell()
