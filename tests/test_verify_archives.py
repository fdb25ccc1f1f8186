"""The layout of archives: of those that torch writes every bit is accounted for that means anything."""

from __future__ import annotations

import io
import zipfile
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_dcp.frames import outline
from tailor_dcp.verifying.archive_layout import LayoutError, Read, is_archive, records_of
from tailor_dcp.verifying.blob_checks import BlobCheck, Seen, Want

VALUES: list[Any] = [
    torch.arange(6.0).reshape(2, 3),
    torch.zeros(3, 4).t(),
    torch.zeros(0, 3),
    torch.tensor(3, dtype=torch.int8),
    torch.zeros(3, dtype=torch.complex64).conj(),
    torch.ones(3, 3).to_sparse(),
    {"a": [1, "é"], "b": torch.ones(2)},
    None,
]


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def by_another_version(value: Any, without: tuple[str, ...] = (".format_version", ".storage_alignment")) -> bytes:
    """Return an archive as torch versions write it that put fewer records into it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(value))) as old:
        writer = torch._C.PyTorchFileWriter(stream)
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            if name not in (*without, "version", ".data/serialization_id"):
                writer.write_record(name, old.read(info), info.file_size)
        writer.write_end_of_file()
    return stream.getvalue()


def reader(data: bytes) -> Read:
    return lambda at, count: data[at : at + count]


@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("write", [saved, by_another_version])
def test_it_finds_what_zipfile_finds(value: Any, write: Any) -> None:
    data = write(value)
    assert is_archive(reader(data), len(data))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        found = [(i.filename.partition("/")[2], archive.read(i), i.CRC) for i in archive.infolist()]
    ours = records_of(reader(data), len(data))
    assert [(one.name, data[one.start : one.start + one.size], one.crc) for one in ours] == found


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


def flips(data: bytes) -> Any:
    return st.integers(0, 8 * len(data) - 1)


def judged(data: bytes, tensor: torch.Tensor) -> Seen:
    check = BlobCheck(Want(0, len(data), "tensor", None, tuple(tensor.shape), tensor.dtype), reader(data))
    check.feed(memoryview(data))
    return check.end()


TENSORS = [torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(3, 4).t(), torch.zeros(0, 3), torch.tensor(2.0)]


@pytest.mark.parametrize("tensor", TENSORS, ids=_shape)
@pytest.mark.parametrize("write", [saved, by_another_version])
@settings(max_examples=100)
@given(data=st.data())
def test_a_flip_that_changes_what_torch_loads_is_seen(tensor: torch.Tensor, write: Any, data: st.DataObject) -> None:
    """Of whatever torch version the archive is, and however the tensor's elements lie."""
    blob = bytearray(write(tensor))
    assert judged(bytes(blob), tensor).outcome == "good"
    place = data.draw(flips(bytes(blob)))
    blob[place // 8] ^= 1 << place % 8
    if judged(bytes(blob), tensor).outcome == "good":
        loaded = torch.load(io.BytesIO(bytes(blob)), weights_only=True)
        assert torch.equal(loaded, tensor)
        assert loaded.stride() == tensor.stride()


@settings(max_examples=200)
@given(st.data())
def test_bytes_that_are_no_archive_are_refused_and_nothing_else(data: st.DataObject) -> None:
    """Cut, joined, overwritten: no other exception, and no reading beyond the end."""
    blob = saved(torch.arange(6.0))
    start = data.draw(st.integers(0, len(blob)))
    piece = data.draw(st.binary(max_size=40))
    odd = blob[:start] + piece + blob[data.draw(st.integers(0, len(blob))) :]
    try:
        records = records_of(reader(odd), len(odd))
    except LayoutError:
        return
    assert all(0 <= one.start <= one.start + one.size <= len(odd) for one in records)


@pytest.mark.parametrize(
    "tensor", [TENSORS[0], TENSORS[1], TENSORS[3], torch.randn(300, 1000)], ids=lambda t: str(t.shape)
)
def test_an_outline_is_what_torch_writes(tensor: torch.Tensor) -> None:
    made = outline(tuple(tensor.shape), tensor.dtype, None if tensor.is_contiguous() else tensor.stride())
    blob = saved(tensor)
    data = tensor.as_strided((tensor.numel(),), (1,)).numpy().tobytes()  # as they lie in memory
    assert made.length == len(blob)
    assert blob.startswith(made.before + data)
    after = blob[len(made.before) + len(data) :]
    assert made.ends(zlib.crc32(data), after)
    assert not made.ends(zlib.crc32(data) ^ 1, after)


def test_a_record_larger_than_four_gigabytes() -> None:
    """Its sizes stand where zip puts long ones; only what is around the data is made."""
    made = outline((1 << 30, 5), torch.float32)
    crc = 12345
    after = bytearray(made.after)
    for place in made.crcs:
        after[place : place + 4] = crc.to_bytes(4, "little")
    end = len(made.before) + made.data_bytes

    def read(at: int, count: int) -> bytes:
        return made.before[at : at + count] if at < len(made.before) else bytes(after[at - end : at - end + count])

    records = {one.name: one for one in records_of(read, made.length)}
    assert (records["data/0"].size, records["data/0"].crc) == (5 << 32, crc)
