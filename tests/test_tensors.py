"""Tensors that are read by stretches, against torch tensors in memory."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.converters import DamagedSourceError
from tailor_dcp.converters.streams import Part, stream
from tailor_dcp.tensors import Cast, Given, Piece, Readable, Stored, Zeros, cast, close_files


def written(folder: Path, tensor: torch.Tensor, cuts: list[int]) -> Stored:
    """Write a tensor in pieces to several files, in reverse order and with gaps, and say where they are."""
    flat, pieces = tensor.reshape(-1), []
    edges = sorted({0, *cuts, flat.numel()})
    for number, (start, stop) in reversed(list(enumerate(pairwise(edges)))):
        path = folder / f"file{number % 3}"
        gap = b"\xff" * (number % 5)
        with path.open("ab") as stream:
            stream.write(gap)
            offset = stream.tell()
            stream.write(flat[start:stop].view(torch.uint8).numpy().tobytes())
        pieces.append(Piece(path, offset, start, stop - start))
    return Stored(tensor.shape, tensor.dtype, tuple(sorted(pieces, key=lambda piece: piece.start)))


@given(data=st.data())
def test_any_stretch_of_a_stored_tensor_is_read(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """However its elements are spread over files, and whatever dtype they have."""
    shape = data.draw(st.lists(st.integers(1, 6), max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]))
    count = math.prod(shape)
    tensor = (torch.randn(count) * 100).to(dtype).reshape(shape)
    stored = written(tmp_path_factory.mktemp("t"), tensor, data.draw(st.lists(st.integers(0, count), max_size=4)))
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    assert torch.equal(stored.read(start, stop), tensor.reshape(-1)[start:stop])
    assert torch.equal(stored.whole(), tensor)
    assert torch.equal(cast(stored, torch.float16).whole(), tensor.half() if dtype.is_floating_point else tensor)
    close_files()


@given(data=st.data())
def test_joined_stretches_follow_each_other(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A tensor put together from stretches of others is their concatenation."""
    folder = tmp_path_factory.mktemp("t")
    parts, expected = [], []
    for number in range(data.draw(st.integers(1, 4))):
        count = data.draw(st.integers(1, 20))
        tensor = torch.randn(count)
        (folder / str(number)).mkdir()
        stored = written(folder / str(number), tensor, data.draw(st.lists(st.integers(0, count), max_size=2)))
        first = data.draw(st.integers(0, count - 1))
        length = data.draw(st.integers(0, count - first))
        readable: Readable = stored if data.draw(st.booleans()) else Given(tensor)
        parts.append(Part(readable, first, length))
        expected.append(tensor[first : first + length])
    whole = torch.cat(expected)
    made = stream([whole.numel()], torch.float32, parts)
    assert torch.equal(made.whole(), whole)
    middle = whole.numel() // 2
    assert torch.equal(made.read(middle, whole.numel()), whole[middle:])
    with pytest.raises(ValueError, match="do not make up"):
        stream([whole.numel() + 1], torch.float32, parts)
    close_files()


def test_what_is_in_no_file() -> None:
    """Tensors in memory, zeros and other dtypes are read by stretches as well."""
    tensor = torch.randn(4, 5)
    readables: list[tuple[Readable, torch.Tensor]] = [
        (Given(tensor.t()), tensor.t()),
        (Zeros(torch.Size([2, 3]), torch.bfloat16), torch.zeros(2, 3, dtype=torch.bfloat16)),
        (Cast(Given(tensor), torch.bfloat16), tensor.bfloat16()),
        (Given(torch.tensor(3.0)), torch.tensor(3.0)),
    ]
    for readable, expected in readables:
        assert torch.equal(readable.whole(), expected)
        assert readable.bytes == expected.numel() * expected.itemsize
        assert torch.equal(readable.read(0, 1), expected.reshape(-1)[:1])


def test_a_file_that_is_short_or_gone_is_named(tmp_path: Path) -> None:
    """The sentence tells which file it is."""
    stored = written(tmp_path, torch.randn(1000), [])
    path = stored.pieces[0].path
    with path.open("r+b") as stream:
        stream.truncate(3996)
    with pytest.raises(DamagedSourceError, match=rf"{path} ends before"):
        stored.whole()
    close_files()
    path.unlink()
    with pytest.raises(DamagedSourceError, match=str(path)):
        stored.whole()


def test_many_files_are_not_all_kept_open(tmp_path: Path) -> None:
    """A conversion of thousands of shards stays below what a process may open."""
    pieces = []
    for number in range(300):
        path = tmp_path / str(number)
        path.write_bytes(bytes([number % 256]))
        pieces.append(Piece(path, 0, number, 1))
    stored = Stored(torch.Size([300]), torch.uint8, tuple(pieces))
    assert stored.whole().tolist() == [number % 256 for number in range(300)]
    held = [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(link.resolve())]
    assert len(held) <= 128
    close_files()
