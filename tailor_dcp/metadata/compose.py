"""Composing: the metadata of a checkpoint whose bytes come from several saves. Pure arithmetic."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from tailor_dcp.errors import TailorError
from tailor_dcp.metadata.digest import digest
from tailor_dcp.metadata.record import ATTRIBUTE, DIGEST, SEALED

StorageData = dict[MetadataIndex, _StorageInfo]
Blobs = dict[str, list[tuple[MetadataIndex, _StorageInfo]]]
"""The stored blobs of each key of a state dict."""


class Shape(NamedTuple):
    """What must agree between two saves of one tensor. ``None`` twice for what is no tensor."""

    size: torch.Size | None
    dtype: torch.dtype | None

    @property
    def bytes(self) -> int:
        """The whole tensor's size over all ranks; 0 for what is no tensor."""
        if self.size is None or self.dtype is None:
            return 0
        return math.prod(self.size) * self.dtype.itemsize

    def stored_in(self, dtype: torch.dtype | None) -> int:
        """The whole tensor's size in another dtype; None for its own."""
        return self._replace(dtype=dtype).bytes if dtype is not None else self.bytes


def shape_of(entry: STORAGE_TYPES) -> Shape:
    """Return the global size and stored dtype of a key."""
    if isinstance(entry, TensorStorageMetadata):
        return Shape(entry.size, entry.properties.dtype)
    return Shape(None, None)


def paths_of(metadata: Metadata) -> dict[str, tuple[str | int, ...]]:
    """Return where in the nested state dict each key's value is; a key that is told nothing of is its own path.

    Other planners than DCP's own keep what they like in ``planner_data``.
    """
    told = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    return {key: told[key] if _is_path(told.get(key)) else (key,) for key in metadata.state_dict_metadata}


def _is_path(told: object) -> bool:
    return isinstance(told, tuple) and bool(told) and all(isinstance(part, str | int) for part in told)


def chunk_shape(index: MetadataIndex, stored: TensorStorageMetadata) -> torch.Size:
    """Return the shape of the stored chunk that an index tells of."""
    if index.index is not None and index.index < len(stored.chunks):
        hinted = stored.chunks[index.index]
        if index.offset is None or hinted.offsets == index.offset:
            return hinted.sizes
    return next((chunk.sizes for chunk in stored.chunks if chunk.offsets == index.offset), stored.size)


def blobs_by_key(metadata: Metadata) -> Blobs:
    """Group a checkpoint's stored blobs by the key that they belong to."""
    grouped: Blobs = {key: [] for key in metadata.state_dict_metadata}
    for index, info in metadata.storage_data.items():
        grouped.setdefault(index.fqn, []).append((index, info))
    return grouped


def file_sizes(blobs: Iterable[tuple[MetadataIndex, _StorageInfo]]) -> dict[str, int]:
    """Return how long each file must at least be to hold the given blobs."""
    sizes: dict[str, int] = {}
    for _, info in blobs:
        end = info.offset + info.length
        if end > sizes.get(info.relative_path, -1):
            sizes[info.relative_path] = end
    return sizes


def rebase(blobs: Iterable[tuple[MetadataIndex, _StorageInfo]], paths: Mapping[str, str]) -> StorageData:
    """Return the blobs as they are found under new paths.

    The entries are changed, not copied: there is one for each shard of each tensor, and the
    metadata that they come from was read for this alone.
    """
    rebased = {}
    for index, info in blobs:
        info.relative_path = paths.get(info.relative_path, info.relative_path)  # several entries may share one object
        rebased[index] = info
    return rebased


def uncovered(metadata: Metadata) -> list[str]:
    """Return one sentence for each tensor whose chunks do not add up to the whole.

    DCP checks this only when several ranks save.
    """
    problems = []
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        held, whole = sum(math.prod(chunk.sizes) for chunk in entry.chunks), math.prod(entry.size)
        if held != whole:
            problems.append(f"{key} of size {tuple(entry.size)} has chunks for {held} of its {whole} elements")
    return problems


def unstored(metadata: Metadata) -> list[str]:
    """Return the keys of which not every chunk has a place in a file."""
    placed = Counter(index.fqn for index in metadata.storage_data)
    return [key for key, entry in metadata.state_dict_metadata.items() if placed[key] < _chunks(entry)]


def _chunks(entry: STORAGE_TYPES) -> int:
    return len(entry.chunks) if isinstance(entry, TensorStorageMetadata) else 1


def sign(metadata: Metadata) -> None:
    """Note in the record, as the last thing before the file is written, what tells whether it was changed since."""
    record = getattr(metadata, ATTRIBUTE, None)
    if record is None:
        return
    record[SEALED] = True
    if not isinstance(metadata, CompositeMetadata):  # which notes it itself, whoever pickles it
        record[DIGEST] = digest(metadata)


def _nothing(metadata: Metadata) -> None:
    """Check nothing."""


class CompositeMetadata(Metadata):
    """A plain ``Metadata`` that takes in carried entries when the writer sets ``storage_data``.

    DCP's writers know only what they wrote themselves: their ``finish`` assigns
    ``storage_data`` and then pickles the object. No hook of the planner runs in between, so
    the object itself adds the carried entries. It pickles as a plain ``Metadata``: whoever
    reads it needs nothing of this package.
    """

    _carried: StorageData
    _check: Callable[[Metadata], None]

    def __init__(
        self,
        plain: Metadata,
        carried: StorageData,
        record: dict[str, Any],
        check: Callable[[Metadata], None] = _nothing,
    ) -> None:
        super().__init__(plain.state_dict_metadata)
        self.__dict__.update(plain.__dict__)
        self.__dict__["_carried"] = carried
        self.__dict__["_check"] = check
        self.__dict__[ATTRIBUTE] = record

    def __setattr__(self, name: str, value: object) -> None:
        if name == "storage_data" and isinstance(value, dict):
            value = {**value, **self._carried}
            self._note_seconds()
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return a plain ``Metadata`` with its digest; pickling is the last thing that happens before the commit.

        Raises:
            TailorError: something was not written, or is gone already. DCP's writers do not notice
                when one of their threads fails, and would commit without its part.
        """
        missing = unstored(self) if self.storage_data is not None else ()
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise TailorError(
                f"{missing[0]}{more} was not written, as a thread of the writer failed and said why on stderr; "
                f"nothing was committed. Make room or repair what it names, and save again."
            )
        if self.storage_data is not None:
            self._check(self)
            self.__dict__["_check"] = _nothing  # once committed it is pickled again, to tell the other ranks
        state = {k: v for k, v in self.__dict__.items() if k not in ("_carried", "_check", "state_dict_metadata")}
        state[ATTRIBUTE] = {**state[ATTRIBUTE], DIGEST: digest(self)}
        return (Metadata, (self.state_dict_metadata,), state)

    def _note_seconds(self) -> None:
        """Note how long the save took: a writer assigns the places once, when all data is written."""
        record = self.__dict__[ATTRIBUTE]
        if "time" in record:
            self.__dict__[ATTRIBUTE] = {**record, "seconds": max(0.0, time.time() - record["time"])}
