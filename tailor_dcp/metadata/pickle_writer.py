"""Writes ``.metadata``: a pickle like DCP's own, smaller, sooner written and sooner read, by DCP too.

Nearly all of a large one is chunks and their places, and most of these repeat a few thousand names, sizes and offsets.
Those are written once, ahead of everything; chunks and places follow as rows (``pickle_rows``).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from tailor_dcp.collector import collector_off
from tailor_dcp.metadata.pickle_names import CHUNK, INDEX, INFO, TYPES
from tailor_dcp.metadata.pickle_rows import Layout, layouts
from tailor_dcp.metadata.seal import SealedStream

_PROTOCOL = 4  # DCP's own
_CLASSES = {CHUNK: ChunkStorageMetadata, INDEX: MetadataIndex, INFO: _StorageInfo}
_NAMES = tuple(name for kind in _CLASSES.values() for name in TYPES[kind])


def dumps(metadata: Metadata) -> bytes:
    """Return the bytes of a ``.metadata`` file, which ``pickle.loads`` makes the same ``Metadata`` of."""
    stream = io.BytesIO()
    dump(metadata, stream)
    return stream.getvalue()


def dump(metadata: Metadata, stream: IO[bytes]) -> None:
    """Write ``metadata`` as a pickle, and seal it."""
    sealed = SealedStream(stream)
    with collector_off():
        try:
            lists, places = _Chunks(metadata), _Places(metadata)
        except _UnusualError:  # what other programs put there is left to the general pickler
            sealed.write(pickle.dumps(metadata, _PROTOCOL).removesuffix(pickle.STOP))
        else:
            _Pickler(sealed, lists, places).write_file(metadata)
    sealed.end()


class _UnusualError(Exception):
    """Something is of a type, or so large, that no row has room for it."""


def _are(values: Iterable[object], kind: type) -> None:
    if set(map(type, values)) - {kind}:
        raise _UnusualError


class _Chunks:
    """The chunks of all tensors, one after the other."""

    def __init__(self, metadata: Metadata) -> None:
        entries = [e for e in metadata.state_dict_metadata.values() if type(e) is TensorStorageMetadata]
        self.lists = {id(entry.chunks): entry.chunks for entry in entries}
        _are(self.lists.values(), list)
        chunks = list(chain.from_iterable(self.lists.values()))
        _are(chunks, ChunkStorageMetadata)
        self.offsets, self.sizes = [chunk.offsets for chunk in chunks], [chunk.sizes for chunk in chunks]
        _are(chain(self.offsets, self.sizes), torch.Size)

    def rows(self, layout: Layout, numbers: dict[Any, int]) -> dict[int, npt.NDArray[Any]]:
        """Return the rows of each list, by the list's ``id``."""
        rows = layout.dump({"offsets": _indexes(self.offsets, numbers), "sizes": _indexes(self.sizes, numbers)})
        ends = np.cumsum([len(chunks) for chunks in self.lists.values()])[:-1]
        return dict(zip(self.lists, np.split(rows, ends), strict=True)) if self.lists else {}


class _Places:
    """The entries of ``storage_data``, by what they have and lack."""

    def __init__(self, metadata: Metadata) -> None:
        self.dict = metadata.storage_data
        if type(self.dict) is not dict:
            raise _UnusualError
        _are(self.dict, MetadataIndex)
        _are(self.dict.values(), _StorageInfo)
        self.groups: dict[tuple[bool, bool, bool], list[tuple[MetadataIndex, _StorageInfo]]] = {}
        for entry in self.dict.items():
            index, info = entry
            form = index.index is None, index.offset is None, info.transform_descriptors is not None
            self.groups.setdefault(form, []).append(entry)
        _are((index.fqn for index in self.dict), str)
        _are((info.relative_path for info in self.dict.values()), str)
        self.columns = {form: self._columns(form, group) for form, group in self.groups.items()}

    def _columns(
        self, form: tuple[bool, bool, bool], group: list[tuple[MetadataIndex, _StorageInfo]]
    ) -> dict[str, Sequence[Any]]:
        no_hint, no_offset, transforms = form
        columns: dict[str, Sequence[Any]] = {
            "fqn": [index.fqn for index, _ in group],
            "path": [info.relative_path for _, info in group],
            "start": _numbers([info.offset for _, info in group], 63),
            "length": _numbers([info.length for _, info in group], 63),
        }
        if not no_hint:
            columns["hint"] = _numbers([index.index for index, _ in group], 31)
        if not no_offset:
            columns["at"] = [index.offset for index, _ in group]
            _are(columns["at"], torch.Size)
        if transforms:
            columns["transforms"] = [info.transform_descriptors for _, info in group]
            _are(columns["transforms"], tuple)
            _are(chain.from_iterable(columns["transforms"]), str)
            if not all(columns["transforms"]):  # no pickler notes an empty tuple in its memo
                raise _UnusualError
        return columns


def _numbers(values: Sequence[Any], bits: int) -> Any:
    _are(values, int)
    if values and not 0 <= min(values) <= max(values) < 1 << bits:
        raise _UnusualError
    return np.array(values, np.uint64)


def _indexes(values: Sequence[Any], numbers: dict[Any, int]) -> npt.NDArray[np.uint32]:
    return np.fromiter(map(numbers.__getitem__, values), np.uint32, len(values))


class _Pickler(pickle._Pickler):  # the C one has no hook for a list or a dict
    """Python's own pickler, except for chunks and places, and for texts and sizes: equal ones are one."""

    write: Any  # no type stub has what the base class has
    memo: Any

    def __init__(self, stream: SealedStream, chunks: _Chunks, places: _Places) -> None:
        super().__init__(stream, _PROTOCOL)
        self._chunks, self._places = chunks, places
        self._shared: dict[Any, Any] = {}
        self._lists: dict[int, npt.NDArray[Any]] = {}

    def write_file(self, metadata: Metadata) -> None:
        """Write all but the last instruction."""
        self.write(pickle.PROTO + bytes([_PROTOCOL]))
        self._put_shared()
        self.save(metadata)

    def _put_shared(self) -> None:
        """Put into the memo what rows refer to, and drop it from the stack."""
        self.write(pickle.MARK)
        where: dict[object, int] = {asked: self._number(kind) for asked, kind in _CLASSES.items()}
        where |= {name: self._number(name) for name in _NAMES}
        chunks, tables = self._chunks, self._places.columns.values()
        columns = {name: [table.get(name, ()) for table in tables] for name in ("at", "fqn", "path", "transforms")}
        columns["at"] += [chunks.offsets, chunks.sizes]
        by = {name: self._numbered(chain.from_iterable(lists)) for name, lists in columns.items()}
        self.write(pickle.POP_MARK)
        self._lists = chunks.rows(layouts(CHUNK, where.get)[0], by["at"])
        by_columns = {layout.columns: layout for layout in layouts(INDEX, where.get)}
        self._tables = []
        for table in tables:
            filled: dict[str, Any] = {n: _indexes(v, by[n]) if n in by else v for n, v in table.items()}
            layout = next(layout for names, layout in by_columns.items() if set(names) == set(table))
            self._tables.append(layout.dump(filled))

    def _numbered(self, values: Iterable[Any]) -> dict[Any, int]:
        return {value: self._number(value) for value in dict.fromkeys(values)}

    def _number(self, value: object) -> int:
        """Write a value; return its index in the memo."""
        self.save(value)
        return int(self.memo[id(self._shared.get(value, value))][0])

    def save(self, obj: object, save_persistent_id: bool = True) -> None:
        """Write any object."""
        if type(obj) in (str, torch.Size):
            obj = self._shared.setdefault(obj, obj)
        if (rows := self._lists.get(id(obj))) is not None:
            self.write(pickle.EMPTY_LIST)
            self._put_rows([rows], pickle.APPENDS)
        elif obj is self._places.dict:
            self.write(pickle.EMPTY_DICT)
            self._put_rows(self._tables, pickle.SETITEMS)
        else:
            super().save(obj, save_persistent_id)  # type: ignore[misc]

    def _put_rows(self, tables: Iterable[npt.NDArray[Any]], end: bytes) -> None:
        for rows in tables:
            if len(rows):
                self.write(pickle.MARK)
                self.write(rows.tobytes())
                self.write(end)
