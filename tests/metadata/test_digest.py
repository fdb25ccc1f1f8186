"""The digest and the seal: the same for the same content however it is pickled, another for any other."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_safe_pickle import metadatas, sharded
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from tailor_dcp.errors import UnreadableMetadataError
from tailor_dcp.metadata.digest import digest, plain
from tailor_dcp.metadata.pickle_writer import dumps
from tailor_dcp.metadata.record import DIGEST
from tailor_dcp.metadata.safe_pickle import loads
from tailor_dcp.metadata.seal import LENGTH, is_intact


@settings(max_examples=100)
@given(metadatas())
def test_it_is_the_same_however_it_was_pickled(metadata: Metadata) -> None:
    told = digest(metadata)
    assert told is not None
    for data in (pickle.dumps(metadata), pickle.dumps(metadata, 2), dumps(metadata)):
        assert digest(loads(data, "it")) == told


def _chunk(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata["model.layers.1.weight"].chunks[1]


def _place(metadata: Metadata) -> tuple[MetadataIndex, _StorageInfo]:
    return list(metadata.storage_data.items())[3]


def _properties(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata["model.layers.1.weight"].properties


def _key(metadata: Metadata) -> None:
    metadata.state_dict_metadata = {f"{key}x": value for key, value in metadata.state_dict_metadata.items()}


def _order(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.layers.1.weight"].chunks.reverse()


def _hint(metadata: Metadata) -> None:
    object.__setattr__(_place(metadata)[0], "index", 1 << 20)


def _swap(metadata: Metadata) -> None:
    (_, one), (_, other) = list(metadata.storage_data.items())[1:3]
    one.relative_path, other.relative_path = other.relative_path, one.relative_path
    one.offset, other.offset = other.offset, one.offset


CHANGES: dict[str, Callable[[Metadata], object]] = {
    "key": _key,
    "order of chunks": _order,
    "chunk's offset": lambda m: setattr(_chunk(m), "offsets", torch.Size([9, 0])),
    "chunk's size": lambda m: setattr(_chunk(m), "sizes", torch.Size([3, 8])),
    "one chunk more": lambda m: m.state_dict_metadata["model.layers.1.weight"].chunks.append(
        ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([0, 0]))
    ),
    "size": lambda m: setattr(m.state_dict_metadata["model.layers.1.weight"], "size", torch.Size([64, 4])),
    "dtype": lambda m: setattr(_properties(m), "dtype", torch.float16),
    "requires_grad": lambda m: setattr(
        m.state_dict_metadata["model.layers.1.weight"].properties, "requires_grad", True
    ),
    "hint": _hint,
    "path": lambda m: setattr(_place(m)[1], "relative_path", "x"),
    "offset": lambda m: setattr(_place(m)[1], "offset", _place(m)[1].offset + 1),
    "length": lambda m: setattr(_place(m)[1], "length", 5),
    "transforms": lambda m: setattr(_place(m)[1], "transform_descriptors", ("zstd",)),
    "places swapped": _swap,
    "planner_data": lambda m: m.planner_data.update(x=("x",)),
    "tuple made a list": lambda m: m.planner_data.update({"train.step": ["train", "step"]}),
    "checkpoint_id": lambda m: setattr(m.storage_meta, "checkpoint_id", "run/step-2"),
    "save_id": lambda m: setattr(m.storage_meta, "save_id", "ie"),
    "modules": lambda m: m.storage_meta.modules.append("x"),
    "version": lambda m: setattr(m, "version", "1.0.1"),
    "record": lambda m: vars(m).update(tailor={"format": 2, "step": True}),
    "no record": lambda m: vars(m).pop("tailor"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_anything_else_changes_it(change: str) -> None:
    metadata = sharded(4, 3)
    vars(metadata)["tailor"] = {"format": 2, "step": 1}
    changed = copy.deepcopy(metadata)
    CHANGES[change](changed)
    assert digest(changed) not in (None, digest(metadata))


def test_it_does_not_cover_itself() -> None:
    metadata = sharded(2, 2)
    vars(metadata)["tailor"] = {"format": 2}
    told = digest(metadata)
    vars(metadata)["tailor"][DIGEST] = told
    assert digest(metadata) == told


@pytest.mark.parametrize("odd", [{"a": {1, 2}}, {"a": object()}, {"a": torch.ones(1)}])
def test_there_is_none_of_what_is_no_plain_value(odd: Any) -> None:
    """A save that carries such a thing is none of ours, and must not fail for it."""
    metadata = sharded(2, 2)
    metadata.planner_data = odd
    assert digest(metadata) is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=300)
@given(VALUES, VALUES)
def test_no_two_values_have_the_same_bytes(one: Any, other: Any) -> None:
    """Neither values of other types nor other nestings."""
    assert (plain(one) == plain(other)) == (repr(one) == repr(other))


# The seal ---------------------------------------------------------------------------------


@settings(max_examples=60)
@given(metadatas(), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_every_changed_bit_breaks_the_seal(metadata: Metadata, at: float, bit: int) -> None:
    """Or the seal itself, which then is none."""
    data = bytearray(dumps(metadata))
    assert is_intact(bytes(data)) is True
    place = int(at * len(data))
    data[place] ^= 1 << bit
    inside = place >= len(data) - LENGTH
    assert is_intact(bytes(data)) in ((False, None) if inside else (False,))
    if not inside:
        with pytest.raises(UnreadableMetadataError, match="checksum differs"):
            loads(bytes(data), "it")


def test_what_has_no_seal_is_read_as_ever() -> None:
    data = pickle.dumps(sharded(2, 2))
    assert is_intact(data) is None
    assert loads(data, "it") == sharded(2, 2)
