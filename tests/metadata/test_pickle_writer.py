"""Writing ``.metadata``: what ``pickle`` writes, to anybody's unpickler, in fewer bytes."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from test_safe_pickle import metadatas, same, sharded
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from tailor_dcp import LayerwisePlanner, LayerwiseWriter
from tailor_dcp.errors import UnreadableMetadataError
from tailor_dcp.metadata import pickle_columns, pickle_rows
from tailor_dcp.metadata.pickle_names import CHUNK, INDEX
from tailor_dcp.metadata.pickle_writer import dumps
from tailor_dcp.metadata.safe_pickle import loads
from tailor_dcp.metadata.seal import LENGTH
from tailor_dcp.raw_stretch import RAW, raw


@settings(max_examples=150)
@given(metadatas())
def test_it_says_what_pickle_says(stock: Metadata) -> None:
    """To pickle, whether in C or in Python, and to our own reader."""
    expected = pickle.loads(pickle.dumps(stock))
    data = dumps(stock)
    for made in (pickle.loads(data), pickle._Unpickler(io.BytesIO(data)).load()):
        assert made == expected
        assert vars(made).keys() == vars(expected).keys()
        hints = {index: index.index for index in expected.storage_data}
        assert {index: index.index for index in made.storage_data} == hints  # no part of what is compared
    assert same(loads(data, "it"), expected)


@pytest.mark.parametrize("ranks", [8, 64])
def test_many_rows_are_smaller_and_the_same(ranks: int) -> None:
    """Rows of every form: with hints and without, with offsets and without, raw stretches."""
    stock = sharded(ranks, 12)
    for number in range(20):
        stock.storage_data[MetadataIndex(f"a{number}")] = _StorageInfo("f", number, 1)
        stock.storage_data[MetadataIndex(f"b{number}", None, number)] = _StorageInfo("f", number, 1 << 40)
        stock.storage_data[MetadataIndex(f"c{number}", torch.Size([number]))] = raw("g", number, 3)
        stock.storage_data[MetadataIndex(f"d{number}", torch.Size([]), 7)] = raw("g", number, 3)
    data = dumps(stock)
    assert len(data) < 0.8 * len(pickle.dumps(stock))
    for made in (pickle.loads(data), loads(data, "it")):
        assert made == stock
        assert [i.index for i in made.storage_data] == [made_i.index for made_i in pickle.loads(data).storage_data]
        infos = {index.fqn: info.transform_descriptors for index, info in made.storage_data.items()}
        assert infos["c3"] == infos["d3"] == RAW
        assert infos["a3"] is None
    assert dumps(loads(data, "it")) == dumps(pickle.loads(data)) == data


def test_it_uses_only_instructions_of_its_protocol() -> None:
    for code, argument, _ in pickletools.genops(dumps(sharded(8, 12))):
        assert code.proto <= 4
        assert code.name != "PROTO" or argument == 4


@dataclass
class Place(_StorageInfo):
    """What another program may put there."""

    more: int = 0


@pytest.mark.parametrize(
    ("index", "info"),
    [
        (MetadataIndex("w", torch.Size([0]), 1 << 40), _StorageInfo("f", 0, 1)),
        (MetadataIndex("w", torch.Size([0])), _StorageInfo("f", -1, 1)),
        (MetadataIndex("w", torch.Size([0])), _StorageInfo("f", 0, 1 << 70)),
        (MetadataIndex("w", torch.Size([0])), _StorageInfo("f", 0, np.int64(1))),
        (MetadataIndex("w", torch.Size([0])), _StorageInfo("f", 0, 1, ["zstd"])),
        (MetadataIndex("w", torch.Size([0])), _StorageInfo("f", 0, 1, ())),
        (MetadataIndex("w", torch.Size([0])), Place("f", 0, 1, None, 5)),
        (MetadataIndex(("w",), torch.Size([0])), _StorageInfo("f", 0, 1)),
    ],
)
def test_what_no_row_has_room_for_is_pickled_all_the_same(index: Any, info: Any) -> None:
    stock = sharded(2, 3)
    stock.storage_data[index] = info
    assert pickle.loads(dumps(stock)) == stock


def test_other_containers_are_pickled_all_the_same() -> None:
    stock = sharded(2, 3)
    stock.storage_data = OrderedDict(stock.storage_data)
    assert type(pickle.loads(dumps(stock)).storage_data) is OrderedDict
    stock = sharded(2, 3)
    stock.state_dict_metadata["model.layers.0.weight"].chunks = (
        ChunkStorageMetadata(torch.Size([0]), torch.Size([1])),
    )
    assert type(pickle.loads(dumps(stock)).state_dict_metadata["model.layers.0.weight"].chunks) is tuple


def test_what_our_writer_leaves_is_read_by_stock(tmp_path: Path) -> None:
    state = {"model": {f"layers.{n}.weight": torch.full((3, n + 1), float(n)) for n in range(12)}, "step": 3}
    dcp.save(state, storage_writer=LayerwiseWriter(tmp_path / "step-1"), planner=LayerwisePlanner("full"))
    data = (tmp_path / "step-1" / ".metadata").read_bytes()
    stock = FileSystemReader(tmp_path / "step-1").read_metadata()
    stock.storage_meta.load_id = None
    assert same(loads(data, "it"), stock)
    assert pickle.POP_MARK in data
    loaded = {"model": {key: torch.zeros_like(value) for key, value in state["model"].items()}, "step": 0}
    dcp.load(loaded, checkpoint_id=tmp_path / "step-1", planner=dcp.DefaultLoadPlanner())
    assert loaded["step"] == 3
    assert all(torch.equal(loaded["model"][key], value) for key, value in state["model"].items())


# --- Rows that were tampered with ---


def rows_of(data: bytes, kind: object) -> tuple[int, pickle_rows.Layout, int]:
    """Return where the first rows begin, how they look and how many they are."""
    found: list[tuple[int, pickle_rows.Layout, int]] = []
    find = pickle_rows.Layout.find

    def noted(self: pickle_rows.Layout, within: bytes, start: int) -> Any:
        rows = find(self, within, start)
        if len(rows) and ("start" in self.columns) == (kind is INDEX):
            found.append((start, self, len(rows)))
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickle_rows.Layout, "find", noted)
        loads(data, "it")
    return found[0]


@pytest.mark.parametrize("kind", [CHUNK, INDEX], ids=["chunks", "places"])
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_columns_that_refer_to_anything_else_are_refused_as_ever(kind: object, draw: st.DataObject) -> None:
    """A reference to another value of the memo, or beyond it; a number that is negative as pickle reads it."""
    data = dumps(sharded(8, 3))
    start, layout, count = rows_of(data, kind)
    column = draw.draw(st.sampled_from(sorted(layout.columns)))
    width, at = layout.dtype.fields[column][:2]  # type: ignore[index]
    most = (1 << 8 * width.itemsize) - 1
    value = draw.draw(st.integers(0, 60) | st.sampled_from([most, most // 2 + 1, most // 2]))
    place = start + draw.draw(st.integers(0, count - 1)) * len(layout.row) + at
    bad = data[:place] + value.to_bytes(width.itemsize, "little") + data[place + width.itemsize :]
    outcomes = []
    for rows in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not rows:
                patch.setattr(pickle_columns, "_BEGINS", b"\0")
            try:
                outcomes.append(loads(bad, "it"))
            except UnreadableMetadataError as error:
                outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    if isinstance(outcomes[0], Metadata):
        assert same(outcomes[0], pickle.loads(bad))


def test_rows_with_an_odd_one_at_their_end_are_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a few megabytes of them would take hours."""
    stock = sharded(64, 3)
    data = bytearray(dumps(stock)[:-LENGTH] + b".")  # the seal would tell at once
    last = data.rindex(b"J")
    data[last + 1 : last + 5] = b"\xff\xff\xff\xff"  # a hint of -1
    looked = 0
    find = pickle_rows.Layout.find

    def counted(self: pickle_rows.Layout, within: bytes, start: int) -> Any:
        nonlocal looked
        rows = find(self, within, start)
        looked += len(rows)
        return rows

    monkeypatch.setattr(pickle_rows.Layout, "find", counted)
    with pytest.raises(UnreadableMetadataError, match="no non-negative"):
        loads(bytes(data), "it")
    chunks = sum(len(getattr(entry, "chunks", ())) for entry in stock.state_dict_metadata.values())
    assert 0 < looked <= chunks + len(stock.storage_data)
