"""Reads rows (``pickle_rows``): a whole run of chunks or places at a time, column by column.

Rows are told by all their bytes but the columns, so they can say nothing else; and what the columns refer to is looked
at before it is used. Where anything is odd, nothing is taken, and the file is interpreted one instruction at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from tailor_dcp.metadata.pickle_machine import Machine
from tailor_dcp.metadata.pickle_names import CHUNK, INDEX, MAX_LENGTH, Asked
from tailor_dcp.metadata.pickle_rows import layouts

_BEGINS = b")\x81}("  # after the class: an instance is made, and nothing notes it in the memo
Rows = npt.NDArray[Any]


class _OddError(Exception):
    """A column has what no honest row has."""


def read_rows(m: Machine, asked: Asked, start: int) -> bool:
    """Read the rows that begin where the file refers to a class; false if there are none."""
    if start < m.odd or not m.data.startswith(_BEGINS, m.pos):
        return False
    if asked not in m.layouts:
        m.layouts[asked] = layouts(asked, m.where.get)
    for layout in m.layouts[asked]:
        rows = layout.find(m.data, start)
        if len(rows):
            try:
                m.stack += _READERS[asked](m, rows)
            except _OddError:
                m.odd = start + rows.nbytes
                return False
            m.pos = start + rows.nbytes
            return True
    return False


def _chunks(m: Machine, rows: Rows) -> Iterable[object]:
    return map(ChunkStorageMetadata, *(_fetched(m, rows[name], torch.Size) for name in ("offsets", "sizes")))


def _places(m: Machine, rows: Rows) -> Iterable[object]:
    names = rows.dtype.names or ()
    infos = [_fetched(m, rows["path"], str), _numbers(rows["start"], 63), _numbers(rows["length"], 63)]
    if "transforms" in names:
        infos.append(_fetched(m, rows["transforms"], tuple, _are_transforms))
    hints = _numbers(rows["hint"], 31) if "hint" in names else repeat(None, len(rows))
    offsets = _fetched(m, rows["at"], torch.Size) if "at" in names else repeat(None, len(rows))
    indexes = _indexes(_fetched(m, rows["fqn"], str), hints, offsets)
    return chain.from_iterable(zip(indexes, map(_StorageInfo, *infos), strict=True))


def _indexes(
    fqns: Iterable[str], hints: Iterable[int | None], offsets: Iterable[torch.Size | None]
) -> list[MetadataIndex]:
    """Make keys of ``storage_data``; their own ``__init__`` would copy each offset."""
    made, new, put = [], MetadataIndex.__new__, object.__setattr__
    for fqn, hint, offset in zip(fqns, hints, offsets, strict=True):
        index = new(MetadataIndex)
        put(index, "fqn", fqn)
        put(index, "index", hint)
        if offset is not None:
            put(index, "offset", offset)
        made.append(index)
    return made


def _numbers(column: npt.NDArray[Any], bits: int) -> list[int]:
    """Return a column's numbers, none of which is negative as pickle reads it."""
    if (column >> bits).any():
        raise _OddError
    numbers: list[int] = column.tolist()
    return numbers


def _fetched(m: Machine, numbers: npt.NDArray[Any], kind: type, fit: Callable[[Any], bool] | None = None) -> list[Any]:
    """Return what is in the memo at the given indexes, all of it of one kind."""
    if int(numbers.max()) >= len(m.memo):
        raise _OddError
    values = list(map(m.memo.__getitem__, numbers.tolist()))
    if set(map(type, values)) - {kind} or (fit and not all(fit(m.memo[number]) for number in np.unique(numbers))):
        raise _OddError
    return values


def _are_transforms(names: tuple[Any, ...]) -> bool:
    return len(names) <= MAX_LENGTH and not set(map(type, names)) - {str}


_READERS: dict[Asked, Callable[[Machine, Rows], Iterable[object]]] = {CHUNK: _chunks, INDEX: _places}
