"""Raw blobs: where a head is believed, torch.load finds the same tensor in the same bytes."""

from __future__ import annotations

import io
import sys
import zipfile
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.raw_blobs import HEAD, plain

DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@given(st.sampled_from(DTYPES), st.lists(st.integers(1, 5), max_size=4), st.booleans())
def test_plain_tensors(dtype: torch.dtype, shape: list[int], followed: bool) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    blob = saved(tensor)
    found = plain((blob + (saved(tensor) if followed else b""))[:HEAD], len(blob))
    assert found is not None
    assert (found.shape, found.dtype) == (tuple(shape), dtype)
    assert blob[found.start : found.start + found.bytes] == raw(tensor)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(4, 5).t(),
        torch.zeros(10)[3:7],
        torch.zeros(0, 3),
        torch.nn.Parameter(torch.zeros(3)),
        torch.zeros(3, dtype=torch.complex64).conj(),
        torch.zeros(3, 3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        [torch.zeros(3)],
        {"a": 1},
        3,
    ],
    ids=str,
)
def test_anything_else_is_left_to_torch(value: Any) -> None:
    blob = saved(value)
    assert plain(blob[:HEAD], len(blob)) is None


def test_an_archive_with_compressed_records() -> None:
    """Some other program's zip: the bytes are not there as they are in memory."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(torch.zeros(100)))) as old, zipfile.ZipFile(stream, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info), zipfile.ZIP_DEFLATED)
    blob = stream.getvalue()
    assert plain(blob[:HEAD], len(blob)) is None


def test_a_blob_that_was_cut_off() -> None:
    blob = saved(torch.zeros(100))
    for length in (0, 10, 30, 100, 600, 704, 710):
        assert plain(blob[: min(length, HEAD)], length) is None


@given(st.integers(0, 703), st.integers(0, 7))
def test_a_flipped_bit_never_gives_another_tensor(place: int, bit: int) -> None:
    """Either the head is not believed, or torch.load reads the very same from it, or refuses it."""
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    blob = bytearray(saved(tensor))
    blob[place] ^= 1 << bit
    found = plain(bytes(blob[:HEAD]), len(blob))
    if found is None:
        return
    try:
        theirs = torch.load(io.BytesIO(bytes(blob)), weights_only=True)
    except Exception:
        return  # torch is stricter about names that nothing depends on
    assert (found.shape, found.dtype) == (tuple(theirs.shape), theirs.dtype)
    assert bytes(blob[found.start : found.start + found.bytes]) == raw(theirs)


def test_bytes_of_a_machine_with_another_order_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "byteorder", "big" if sys.byteorder == "little" else "little")
        torch.save(torch.arange(5.0), stream)
    blob = stream.getvalue()
    assert plain(blob[:HEAD], len(blob)) is None
    assert not torch.equal(torch.load(io.BytesIO(blob)), torch.arange(5.0))
