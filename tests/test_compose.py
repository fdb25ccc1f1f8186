"""Composing metadata: what was written and what is carried, in one plain object."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tailor_dcp.errors import TailorError
from tailor_dcp.metadata.compose import CompositeMetadata, Shape, file_sizes, paths_of, rebase, uncovered, unstored
from tailor_dcp.metadata.digest import digest


def tensor(size: tuple[int, ...], *rows: tuple[int, int]) -> TensorStorageMetadata:
    """Return the entry of a tensor that is stored in chunks of rows."""
    chunks = [
        ChunkStorageMetadata(torch.Size([start, *(0 for _ in size[1:])]), torch.Size([count, *size[1:]]))
        for start, count in rows
    ]
    return TensorStorageMetadata(TensorProperties(), torch.Size(size), chunks)


def place(
    key: str, start: int | None, file: str, offset: int = 0, length: int = 10
) -> tuple[MetadataIndex, _StorageInfo]:
    return MetadataIndex(key, None if start is None else torch.Size([start])), _StorageInfo(file, offset, length)


@pytest.fixture
def composite() -> CompositeMetadata:
    plain = Metadata({"a": tensor((4,), (0, 2), (2, 2)), "b": tensor((2,), (0, 2)), "c": BytesStorageMetadata()})
    carried = dict([place("b", 0, "carried/x/f")])
    return CompositeMetadata(plain, carried, {"format": 1})


WRITTEN = dict([place("a", 0, "f"), place("a", 2, "f", 10), place("c", None, "f", 20)])


def test_carried_entries_join_what_the_writer_sets(composite: CompositeMetadata) -> None:
    """The writer's ``finish`` assigns what it wrote; the rest is there too, however often it does so."""
    for _ in range(2):
        composite.storage_data = dict(WRITTEN)
        assert composite.storage_data == WRITTEN | dict([place("b", 0, "carried/x/f")])


def test_it_pickles_as_a_plain_metadata_each_time(composite: CompositeMetadata) -> None:
    """For the file and again for the broadcast; nothing of this package is named."""
    composite.storage_data = dict(WRITTEN)
    for _ in range(2):
        data = pickle.dumps(composite)
        plain = pickle.loads(data)
        assert type(plain) is Metadata and b"tailor_dcp" not in data
        assert plain.storage_data == composite.storage_data
        assert plain.tailor == {"format": 1, "digest": digest(plain)}
        assert not hasattr(plain, "_carried")


def test_the_record_must_be_attached_last(composite: CompositeMetadata) -> None:
    """``dataclasses.replace`` drops what is no field: the reason why nothing replaces it afterwards."""
    composite.storage_data = dict(WRITTEN)
    plain = pickle.loads(pickle.dumps(composite))
    assert not hasattr(dataclasses.replace(plain), "tailor")


def test_what_was_not_written_is_not_committed(composite: CompositeMetadata) -> None:
    """Pickling is the last step before the commit; a chunk without a place ends it there."""
    composite.storage_data = {index: info for index, info in WRITTEN.items() if info.offset != 10}
    assert unstored(composite) == ["a"]
    with pytest.raises(TailorError, match="a was not written"):
        pickle.dumps(composite)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 3))
def test_chunks_that_add_up_cover_the_tensor(rows: list[int], columns: int) -> None:
    """Less or more than the whole is a problem, told with the key and both numbers."""
    starts = [sum(rows[:i]) for i in range(len(rows))]
    for size in (sum(rows), sum(rows) + 1):
        problems = uncovered(Metadata({"w": tensor((size, columns), *zip(starts, rows, strict=True))}))
        if size == sum(rows):
            assert problems == []
        else:
            assert len(problems) == 1
            assert f"{sum(rows) * columns} of its {size * columns} elements" in problems[0]


def test_a_scalar_and_an_empty_tensor_are_covered() -> None:
    """Adam's counter has no dimension; an idle expert's weight may have no element."""
    scalar = TensorStorageMetadata(
        TensorProperties(), torch.Size([]), [ChunkStorageMetadata(torch.Size([]), torch.Size([]))]
    )
    assert uncovered(Metadata({"step": scalar, "none": tensor((0, 3), (0, 0)), "bytes": BytesStorageMetadata()})) == []


@given(st.lists(st.tuples(st.sampled_from("fgh"), st.integers(0, 10**12), st.integers(0, 10**12)), max_size=8))
def test_a_file_must_reach_to_its_last_blob(blobs: list[tuple[str, int, int]]) -> None:
    """The longest of offset plus length counts."""
    placed = [place(f"k{i}", 0, *blob) for i, blob in enumerate(blobs)]
    assert file_sizes(placed) == {
        name: max(offset + length for file, offset, length in blobs if file == name) for name, _, _ in blobs
    }


def test_rebased_blobs_differ_in_their_file_alone() -> None:
    """Offset, length and transforms stay."""
    index, info = place("a", 0, "f", 5, 6)
    info.transform_descriptors = ["zstd"]
    (moved,) = dict(rebase([(index, info)], {"f": "../step-1/f"})).values()
    assert moved == _StorageInfo("../step-1/f", 5, 6, ["zstd"])


@given(st.lists(st.integers(0, 5), max_size=4), st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
def test_a_shape_knows_its_bytes(size: list[int], dtype: torch.dtype) -> None:
    """Over all ranks, in the state's own dtype."""
    assert Shape(torch.Size(size), dtype).bytes == math.prod(size) * torch.empty(0, dtype=dtype).element_size()
    assert Shape(None, None).bytes == 0


_NO_PATH = st.one_of(st.none(), st.integers(), st.tuples(), st.lists(st.text()), st.tuples(st.none()))


@given(told=st.dictionaries(st.sampled_from("abc"), _NO_PATH))
def test_what_is_no_path_is_not_taken_for_one(told: dict[str, object]) -> None:
    """Other planners keep what they like in planner_data, damaged files have anything there."""
    metadata = Metadata(dict.fromkeys("ab"), planner_data={**told, "b": ("model", "b", 0)})  # type: ignore[arg-type]
    assert paths_of(metadata) == {"a": ("a",), "b": ("model", "b", 0)}
    metadata.planner_data = list(told)
    assert paths_of(metadata) == {"a": ("a",), "b": ("b",)}
