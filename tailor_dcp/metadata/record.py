"""The record: what a checkpoint's ``Metadata`` tells about itself beyond what DCP needs.

It rides along as the extra attribute ``tailor`` of plain builtins, which stock DCP pickles
and ignores. The serialised form is the contract, not these classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from tailor_dcp.errors import NewerFormatError, UnreadableMetadataError
from tailor_dcp.file_marks import Mark
from tailor_dcp.units import Unit

ATTRIBUTE = "tailor"
DIGEST = "digest"
"""The record's key for the digest of all metadata, the rest of the record included (``tailor_dcp.metadata.digest``)."""
SEALED = "sealed"
"""The record's key that says that the file has a seal (``tailor_dcp.metadata.seal``)."""
FORMAT = 2
_READ = (1, FORMAT)  # 1 had checksums as dicts

CarryMode = Literal["link", "reference", "copy"]


class Origin(NamedTuple):
    """The save whose training state a unit's bytes hold.

    Attributes:
        save_id: that save's id.
        step: its step, None if its folder's name told none.
        folder: its folder as it was called then; a name for people, never a path to open.
        nth: how many saves came before it in its line of ancestors.
    """

    save_id: str
    step: int | None
    folder: str
    nth: int


@dataclass(frozen=True)
class UnitRecord:
    """Where one unit's bytes come from, and which keys of the state dict belong to it."""

    origin: Origin
    keys: tuple[str, ...]


_SUM = np.dtype([("offset", "<u8"), ("crc", "<u4")])


class Sums(Mapping[int, int]):
    """The CRC-32 of each blob of a file, by its offset, as a record has them: half a million are not looked through.

    Args:
        packed: for each blob its offset (eight bytes, little-endian) and its CRC-32 (four bytes).
    """

    def __init__(self, packed: bytes) -> None:
        self.packed = packed

    @cached_property
    def _by_offset(self) -> dict[int, int]:
        rows = np.frombuffer(self.packed, _SUM)
        return dict(zip(rows["offset"].tolist(), rows["crc"].tolist(), strict=True))

    def __getitem__(self, offset: int) -> int:
        return self._by_offset[offset]

    def __iter__(self) -> Iterator[int]:
        return iter(self._by_offset)

    def __len__(self) -> int:
        return len(self.packed) // _SUM.itemsize


def packed(blobs: Mapping[int, int]) -> bytes:
    """Return the CRC-32 of each offset as a record stores them."""
    if isinstance(blobs, Sums):
        return blobs.packed
    rows = np.empty(len(blobs), _SUM)
    rows["offset"], rows["crc"] = list(blobs), list(blobs.values())
    return rows.tobytes()


@dataclass(frozen=True)
class Record:
    """What a checkpoint tells about itself.

    Attributes:
        save_id: the coordinator's random id of this save (32 hex digits).
        step: the training step, from the folder's name.
        index: how many saves came before this one in its line of ancestors.
        time: when it was planned, seconds since the epoch; always later than its parent's.
        policy: the policy as a string.
        carry: how earlier bytes are referred to.
        parent: the save it carries from, or would have; None for the first.
        units: each unit's origin and keys.
        narrowed: the training state's dtype of each key that was stored in a narrower one.
        ties: groups of keys that share one storage in the training state.
        crcs: CRC-32 of blobs: file, then offset. Only ``LayerwiseWriter`` fills it.
        fingerprints: of the values that the keys had at their origin, in the training state's dtype
            (``tailor_dcp.fingerprint``). Only saves whose policy needs them add any.
        sketches: of the values that the keys had at their origin, packed (``tailor_dcp.sketch``). Only saves
            whose policy needs drift add any.
        seconds: from planning to the commit; None where nobody measured it.
        marks: size and sampled checksum (``tailor_dcp.file_marks``) of files that another program wrote: a linked
            checkpoint's.
    """

    save_id: str
    step: int | None
    index: int
    time: float
    policy: str
    carry: CarryMode
    parent: Origin | None
    units: Mapping[Unit, UnitRecord]
    narrowed: Mapping[str, str] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    crcs: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    fingerprints: Mapping[str, int] = field(default_factory=dict)
    sketches: Mapping[str, bytes] = field(default_factory=dict)
    seconds: float | None = None
    marks: Mapping[str, Mark] = field(default_factory=dict)

    def to_builtins(self) -> dict[str, Any]:
        """Return the serialised form. Origins are listed once: thousands of units share a handful."""
        origins = list(dict.fromkeys(u.origin for u in self.units.values()))
        number = {origin: i for i, origin in enumerate(origins)}
        layers: dict[str, dict[str, list[Any]]] = {}
        for unit, held in self.units.items():
            layers.setdefault(unit.layer, {})[unit.kind] = [number[held.origin], list(held.keys)]
        return {
            "format": FORMAT,
            "save_id": self.save_id,
            "step": self.step,
            "index": self.index,
            "time": self.time,
            "policy": self.policy,
            "carry": self.carry,
            "parent": None if self.parent is None else list(self.parent),
            "origins": [list(origin) for origin in origins],
            "units": layers,
            "narrowed": dict(self.narrowed),
            "ties": [list(group) for group in self.ties],
            "crcs": {file: packed(blobs) for file, blobs in self.crcs.items()},
            # As text: they are wider than any integer of the formats that a record may pass through.
            "fingerprints": {key: f"{value:x}" for key, value in self.fingerprints.items()},
            "sketches": dict(self.sketches),
            "marks": {file: list(mark) for file, mark in self.marks.items()},
        }


class _Serialised(BaseModel):
    """Every field's type, checked strictly: a record may come from anybody."""

    model_config = ConfigDict(strict=True, extra="ignore")

    save_id: str
    step: int | None
    index: int
    time: float
    policy: str
    carry: CarryMode
    parent: list[str | int | None] | None
    origins: list[list[str | int | None]]
    units: dict[str, dict[str, list[Any]]]
    narrowed: dict[str, str] = {}
    ties: list[list[str]] = []
    crcs: dict[str, bytes | dict[int, int]] = {}
    fingerprints: dict[str, Annotated[str, Field(pattern=r"\A[0-9a-f]{1,32}\z")]] = {}
    sketches: dict[str, bytes] = {}
    seconds: float | None = None
    marks: dict[str, Annotated[list[int], Field(min_length=2, max_length=2)]] = {}


KEYS = frozenset({"format", *_Serialised.model_fields})
"""The keys of a serialised record that has no digest."""


def from_builtins(raw: object, source: str) -> Record:
    """Build the record from its serialised form.

    Raises:
        NewerFormatError: it is of a newer format than this version knows.
        UnreadableMetadataError: it is damaged.
    """
    version = raw.get("format") if isinstance(raw, dict) else None
    if type(version) is not int or version not in _READ:
        newer = type(version) is int and version > FORMAT
        raise (NewerFormatError if newer else UnreadableMetadataError)(
            f"{source} holds a tailor_dcp record of format {version!r}, but this version reads only "
            f"formats {' and '.join(map(str, _READ))}; plain dcp.load still reads the checkpoint."
        )
    try:
        s = _Serialised.model_validate(raw)
        origins = [_origin(o) for o in s.origins]
        units = {
            Unit(layer, kind): UnitRecord(origins[_index(number)], _strings(keys))
            for layer, kinds in s.units.items()
            for kind, (number, keys) in kinds.items()
        }
        parent = None if s.parent is None else _origin(s.parent)
        crcs = {file: _sums(blobs) for file, blobs in s.crcs.items()}
    except (ValidationError, ValueError, TypeError, IndexError) as error:
        raise UnreadableMetadataError(
            f"{source} holds a damaged tailor_dcp record ({_first_line(error)}); plain dcp.load may still "
            f"read the checkpoint, but nothing can be carried from it."
        ) from error
    return Record(
        save_id=s.save_id,
        step=s.step,
        index=s.index,
        time=s.time,
        policy=s.policy,
        carry=s.carry,
        parent=parent,
        units=units,
        narrowed=s.narrowed,
        ties=tuple(tuple(group) for group in s.ties),
        crcs=crcs,
        fingerprints={key: int(value, 16) for key, value in s.fingerprints.items()},
        sketches=s.sketches,
        seconds=s.seconds,
        marks={file: Mark(size, sample) for file, (size, sample) in s.marks.items()},
    )


def record_of(metadata: Metadata, source: str) -> Record | None:
    """Return the record that a checkpoint's metadata carries, None if a stock planner wrote it."""
    raw = getattr(metadata, ATTRIBUTE, None)
    return None if raw is None else from_builtins(raw, source)


def save_id_of(metadata: Metadata) -> str | None:
    """Return the id of the save that wrote this metadata; stock writers leave one too."""
    raw = getattr(metadata, ATTRIBUTE, None)
    named = raw if isinstance(raw, dict) else vars(metadata.storage_meta or StorageMeta())
    save_id = named.get("save_id")
    return save_id if isinstance(save_id, str) else None


def _origin(raw: Iterable[str | int | None]) -> Origin:
    save_id, step, folder, nth = raw
    if not (isinstance(save_id, str) and isinstance(folder, str) and isinstance(nth, int)):
        raise TypeError(f"{raw!r} is no origin")
    if isinstance(step, str):
        raise TypeError(f"{step!r} is no step")
    return Origin(save_id, step, folder, nth)


def _sums(blobs: bytes | dict[int, int]) -> Mapping[int, int]:
    if isinstance(blobs, dict):
        return blobs
    if len(blobs) % _SUM.itemsize:
        raise ValueError("the checksums of a file are cut off")
    return Sums(blobs)


def _index(number: object) -> int:
    if not isinstance(number, int) or number < 0:
        raise TypeError(f"{number!r} is no index of an origin")
    return number


def _strings(keys: object) -> tuple[str, ...]:
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise TypeError("the keys of a unit are not strings")
    return tuple(keys)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
