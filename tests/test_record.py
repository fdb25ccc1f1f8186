"""The record: what comes back is what was written, and what is damaged is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from tailor_dcp.errors import UnreadableMetadataError
from tailor_dcp.metadata.record import Origin, Record, UnitRecord, from_builtins, record_of, save_id_of
from tailor_dcp.units import Unit

texts = st.text(max_size=12)
origins = st.builds(Origin, texts, st.none() | st.integers(), texts, st.integers(0))
units = st.dictionaries(
    st.builds(Unit, texts, texts),
    st.builds(UnitRecord, origins, st.lists(texts, max_size=3).map(tuple)),
    max_size=6,
)
sums = st.dictionaries(st.integers(0, 2**63), st.integers(0, 2**32 - 1), max_size=3)
records = st.builds(
    Record,
    save_id=texts,
    step=st.none() | st.integers(),
    index=st.integers(0),
    time=st.floats(allow_nan=False),
    policy=texts,
    carry=st.sampled_from(["link", "reference", "copy"]),
    parent=st.none() | origins,
    units=units,
    narrowed=st.dictionaries(texts, texts, max_size=3),
    ties=st.lists(st.lists(texts, max_size=3).map(tuple), max_size=3).map(tuple),
    crcs=st.dictionaries(
        texts, st.dictionaries(st.integers(0, 2**63), st.integers(0, 2**32 - 1), max_size=3), max_size=2
    ),
)


@given(records)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    """The serialised form loses nothing, neither values nor order."""
    raw = record.to_builtins()
    back = from_builtins(raw, "here")
    assert back == record
    assert list(dict.fromkeys(u.layer for u in back.units)) == list(dict.fromkeys(u.layer for u in record.units))


@given(records)
def test_a_record_of_the_first_format_is_still_read(record: Record) -> None:
    """It had checksums as dicts; whoever copies it on writes them as they are written now."""
    raw = record.to_builtins() | {"format": 1, "crcs": {file: dict(blobs) for file, blobs in record.crcs.items()}}
    back = from_builtins(raw, "here")
    assert back == record
    assert back.to_builtins()["crcs"] == record.to_builtins()["crcs"]


@given(st.dictionaries(st.integers(0, 2**63), st.integers(0, 2**32 - 1), min_size=1), st.integers(1, 11))
def test_checksums_that_are_cut_off_are_refused(blobs: dict[int, int], cut: int) -> None:
    """Twelve bytes a blob, and no part of one."""
    raw = Record("a", 1, 0, 0.0, "full", "link", None, {}, crcs={"f": blobs}).to_builtins()
    assert len(raw["crcs"]["f"]) == 12 * len(blobs)
    raw["crcs"]["f"] = raw["crcs"]["f"][:-cut]
    with pytest.raises(UnreadableMetadataError, match="cut off"):
        from_builtins(raw, "here")


@given(records)
def test_origins_are_listed_once(record: Record) -> None:
    """Thousands of units share a handful of saves."""
    raw = record.to_builtins()
    listed = [tuple(origin) for origin in raw["origins"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {tuple(unit.origin) for unit in record.units.values()}


@given(records, st.data())
def test_a_damaged_record_is_refused(record: Record, data: st.DataObject) -> None:
    """One field of another type: an error that names the file, never another exception or a half-read record."""
    raw = record.to_builtins()
    name = data.draw(st.sampled_from(sorted(raw)))
    wrong: Any = data.draw(st.sampled_from([b"bytes", 1.5, [[1]], {"a": {"b": 1}}, [{}], {1: 2}, "text", True]))
    raw[name] = wrong
    try:
        back = from_builtins(raw, "/run/step-1/.metadata")
    except UnreadableMetadataError as error:
        assert "/run/step-1/.metadata" in str(error)
    else:
        assert back.to_builtins()[name] == wrong


@pytest.mark.parametrize("number", [-1, 5, "0", None, 0.0])
def test_an_origin_that_is_not_listed_is_refused(number: Any) -> None:
    """A negative index would otherwise count from the end."""
    raw = Record("a", 1, 0, 0.0, "full", "link", None, {Unit("l", "weight"): UnitRecord(Origin("a", 1, "f", 0), ())})
    told = raw.to_builtins()
    told["units"]["l"]["weight"][0] = number
    with pytest.raises(UnreadableMetadataError):
        from_builtins(told, "here")


@pytest.mark.parametrize("raw", [{"format": 3}, {"format": "1"}, {}, [], "tailor", {"format": 1}])
def test_another_format_is_told_apart(raw: Any) -> None:
    """A newer version's record is refused, with the way that is left: plain dcp.load."""
    with pytest.raises(UnreadableMetadataError, match=r"plain dcp\.load"):
        from_builtins(raw, "here")


def test_fields_of_a_later_minor_version_are_ignored() -> None:
    """Tools may add their own."""
    record = Record("a", 1, 0, 0.0, "full", "link", None, {})
    assert from_builtins({**record.to_builtins(), "later": 1}, "here") == record


def test_json_can_hold_all_but_the_checksums() -> None:
    """Plain builtins; only the checksums are bytes."""
    record = Record("a", 1, 0, 0.0, "full", "link", None, {Unit("l", "w"): UnitRecord(Origin("a", 1, "f", 0), ("k",))})
    raw = record.to_builtins()
    assert json.loads(json.dumps(raw)) == raw


def test_stock_metadata_has_no_record_but_an_id() -> None:
    """Stock writers leave a save id of their own, by which a later stock save is told from an earlier one."""
    stock = Metadata({}, storage_meta=StorageMeta(save_id="stock's"))
    assert record_of(stock, "here") is None
    assert save_id_of(stock) == "stock's"
    assert save_id_of(Metadata({})) is None
    stock.tailor = {"save_id": "ours"}  # type: ignore[attr-defined]
    assert save_id_of(stock) == "ours"
