"""Frames of torch.save archives, against torch.save and torch.load themselves."""

from __future__ import annotations

import io
import zipfile
import zlib

import pytest
import torch

from tailor_dcp.frames import frame

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4, 5), (1, 100_000)])
def test_a_framed_tensor_is_what_torch_saves(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """torch.load gives the tensor back, contiguous and alone in its storage, and the archive passes its own test."""
    tensor = (torch.randn(shape) * 50).to(dtype)
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    before, after = frame(shape, dtype, zlib.crc32(data))
    archive = io.BytesIO(before + data + after)
    loaded = torch.load(archive, weights_only=True)
    assert loaded.dtype == dtype
    assert loaded.shape == shape
    assert loaded.is_contiguous()
    assert loaded.reshape(-1).view(torch.uint8).numpy().tobytes() == data
    assert zipfile.ZipFile(archive).testzip() is None
    saved = io.BytesIO()
    torch.save(tensor, saved)
    assert len(saved.getvalue()) == len(archive.getvalue())
    assert saved.getvalue()[: len(before)] == before


def test_a_wrong_checksum_is_seen_by_others() -> None:
    """The CRC is where zip tools look for it: one that does not fit is reported."""
    before, after = frame((4,), torch.float32, 1)
    assert zipfile.ZipFile(io.BytesIO(before + bytes(16) + after)).testzip() == "archive/data/0"
