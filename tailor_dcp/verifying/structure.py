"""Structure: whether metadata can be right by itself, before any file is looked at. Pure arithmetic."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from tailor_dcp.base import Base, dtype_named
from tailor_dcp.metadata.digest import digest, is_digest, is_newer
from tailor_dcp.metadata.record import ATTRIBUTE, DIGEST, KEYS, SEALED, Record
from tailor_dcp.metadata.seal import is_intact
from tailor_dcp.raw_stretch import bytes_of, is_raw
from tailor_dcp.verifying.coverage import TooManyCornersError, miscovered
from tailor_dcp.verifying.findings import State

_OURS = re.compile(r"(?:.*/)?__\d+_[0-9a-f]{8}_[^/]*\.distcp")
"""The names that this package gives to files, and nobody else."""


class Problem(NamedTuple):
    """Something that is wrong, or untold.

    Attributes:
        what: the sentence.
        key: the entry of the state dict that it concerns.
        chunk: where its chunk begins.
        file: the file that it concerns.
        state: whether it is wrong or only untold.
    """

    what: str
    key: str | None = None
    chunk: tuple[int, ...] | None = None
    file: str | None = None
    state: State = "damaged"


def authenticity(metadata: Metadata, data: bytes) -> Iterator[Problem]:
    """Yield what tells that a ``.metadata`` was changed since it was written, or that nothing would tell.

    Args:
        metadata: what was read.
        data: the file's bytes.
    """
    raw = getattr(metadata, ATTRIBUTE, None)
    if not isinstance(raw, dict):
        yield _without_record(metadata)
        return
    told, own = raw.get(DIGEST), digest(metadata)
    if DIGEST not in raw and not raw.keys() <= KEYS:
        names = ", ".join(sorted(map(repr, raw.keys() - KEYS)))[:200]
        yield Problem(f"The record of .metadata has no digest but an entry {names} that no save writes: it is damaged.")
    elif own is None or not is_digest(told) or is_newer(told, own):
        yield Problem(
            "Nothing tells whether .metadata is what was written: its record has no digest that this version knows.",
            state="unverifiable",
        )
    elif told != own:
        yield Problem(
            "The content of .metadata is not what was written: its digest differs, so what it says of keys, shapes, "
            "files and places may be wrong."
        )
    if raw.get(SEALED) is True and is_intact(data) is None:
        yield Problem("The bytes of .metadata are not those that were written: the checksum at their end is gone.")


def _without_record(metadata: Metadata) -> Problem:
    ours = next((i.relative_path for i in metadata.storage_data.values() if _OURS.fullmatch(i.relative_path)), None)
    if ours is not None:
        return Problem(
            f"The record is gone from .metadata, though {ours} is of a save that had one: it is damaged, or another "
            f"program wrote it anew."
        )
    return Problem(
        "Nothing tells whether .metadata is what was written: a stock planner saved this, which notes no digest.",
        state="unverifiable",
    )


def structure(base: Base) -> Iterator[Problem]:
    """Yield what contradicts itself."""
    yield from _chunks(base.metadata)
    yield from _places(base.metadata)
    yield from _overlaps(base)
    if base.record is not None:
        yield from _keys(base.record, base.metadata)


def _chunks(metadata: Metadata) -> Iterator[Problem]:
    """Each tensor has each of its elements once."""
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        try:
            odd = miscovered(entry.size, [(chunk.offsets, chunk.sizes) for chunk in entry.chunks])
        except TooManyCornersError:
            what = f"Whether the chunks of {key} fill it was not looked at: it is cut along too many dimensions."
            yield Problem(what, key, state="unverifiable")
            continue
        if odd is not None:
            how = f"in {odd.times} chunks" if odd.times > 0 else "in no chunk"
            yield Problem(
                f"{key} of size {list(entry.size)} has its element {list(odd.element)} {how}; each must be in one.", key
            )


def _places(metadata: Metadata) -> Iterator[Problem]:
    """Each chunk has a place, and nothing else has one."""
    needed: set[MetadataIndex] = set()
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            needed.update(MetadataIndex(key, chunk.offsets) for chunk in entry.chunks)
        else:
            needed.add(MetadataIndex(key))
    for index in needed - metadata.storage_data.keys():
        yield Problem(f".metadata does not say where {_named(index)} is stored.", index.fqn, _offset(index))
    for index in metadata.storage_data.keys() - needed:
        yield Problem(
            f".metadata says where {_named(index)} is stored, which is in no entry.", index.fqn, _offset(index)
        )
    for index, info in metadata.storage_data.items():
        if info.offset < 0 or info.length < 0:
            yield Problem(
                f"{_named(index)} lies at byte {info.offset} with {info.length} bytes, which no file has.",
                index.fqn,
                _offset(index),
                info.relative_path,
            )


def _overlaps(base: Base) -> Iterator[Problem]:
    """No two blobs have bytes in common, unless they are the same: tied weights."""
    infos = base.metadata.storage_data.values()
    rows = sorted({(info.relative_path, info.offset, info.length) for info in infos if info.length})
    for one, other in pairwise(rows):
        if one[0] == other[0] and one[1] + one[2] > other[1]:
            yield Problem(
                f"Two entries have the bytes from {other[1]} on of {one[0]} in common; each must have its own.",
                file=one[0],
            )


def _keys(record: Record, metadata: Metadata) -> Iterator[Problem]:
    """The record and the state dict have the same keys, and each key is in one unit."""
    stored = metadata.state_dict_metadata
    seen: set[str] = set()
    for unit, held in record.units.items():
        for key in held.keys:
            if key in seen:
                yield Problem(f"The record has {key} in more than one unit, one of which is {unit}.", key)
            seen.add(key)
    named: dict[str, Any] = {
        "narrowed": record.narrowed,
        "fingerprints": record.fingerprints,
        "sketches": record.sketches,
        "ties": {key: None for group in record.ties for key in group},
    }
    for what, keys in named.items():
        for key in keys:
            if key not in stored:
                yield Problem(f"The record tells of {key} under {what}, which is no entry of the checkpoint.", key)
    for key, name in record.narrowed.items():
        if dtype_named(name) is None:
            yield Problem(f"The record says that {key} was narrowed from {name!r}, which is no dtype.", key)


def stretch_problem(index: MetadataIndex, info: Any, metadata: Metadata) -> Problem | None:
    """Return what is wrong with a raw stretch's size."""
    entry = metadata.state_dict_metadata.get(index.fqn)
    if not is_raw(info) or not isinstance(entry, TensorStorageMetadata):
        return None
    chunk = next((c for c in entry.chunks if c.offsets == index.offset), None)
    if chunk is None or bytes_of(tuple(chunk.sizes), entry.properties.dtype) == info.length:
        return None
    return Problem(
        f"{_named(index)} has {info.length} bytes in {info.relative_path}, which its shape and dtype do not take.",
        index.fqn,
        _offset(index),
        info.relative_path,
    )


def _named(index: MetadataIndex) -> str:
    return index.fqn if not index.offset else f"the chunk of {index.fqn} at {list(index.offset)}"


def _offset(index: MetadataIndex) -> tuple[int, ...] | None:
    return None if index.offset is None else tuple(index.offset)
