"""Rows: the entries of a DCP pickle that differ in numbers alone, written so that a run of them is also an array.

A pickler writes each number as short as it can, and notes each entry in its memo. The same pickle says the same to any
unpickler with numbers of one width and without those notes; then all entries of a kind have one length, and numpy
makes or checks a hundred thousand of them at once. What entries share (names, sizes, offsets) comes before them, once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from tailor_dcp.metadata.pickle_names import CHUNK, INDEX, INFO, Asked

Columns = Mapping[str, npt.NDArray[Any]]

# A name in braces is fetched from the memo, which has attributes' names and classes; one in angles is a column: a
# value's index in the memo (as text), or a number of four or eight bytes.
_CHUNK_ROW = b"{CHUNK})\x81}({offsets}j<offsets>{sizes}j<sizes>ub"
_INDEX_ROW = b"{INDEX})\x81}({fqn}j<fqn>{index}%s%sub{INFO})\x81}({relative_path}j<path>{offset}\x8a\x08<start:8>"
_INFO_ROW = b"{length}\x8a\x08<length:8>%sub"
# What an entry may lack: the hint where its chunk is, its offset, and transforms.
_HINTS = (b"J<hint>", b"N")
_OFFSETS = (b"{offset}j<at>", b"")
_TRANSFORMS = (b"", b"{transform_descriptors}j<transforms>")
_ROWS = {
    CHUNK: [_CHUNK_ROW],
    INDEX: [
        _INDEX_ROW % (hint, offset) + _INFO_ROW % transforms
        for hint, offset, transforms in product(_HINTS, _OFFSETS, _TRANSFORMS)
    ],
}
_PART = re.compile(rb"\{([A-Za-z_]+)\}|<([a-z]+)(:8)?>")
_MARKERS: dict[str, object] = {"CHUNK": CHUNK, "INDEX": INDEX, "INFO": INFO}
_FEWEST = 8  # rows; fewer are interpreted as soon as looked at in this way
_FIRST, _MOST = 64, 1 << 15  # rows that are compared at once


@dataclass(frozen=True)
class Layout:
    """How rows of one kind look in one file.

    Attributes:
        row: a row whose columns are zeros.
        dtype: the columns, each at its place in the row.
    """

    row: bytes
    dtype: np.dtype[Any]

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""
        return self.dtype.names or ()

    @cached_property
    def _fixed(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.uint8], int]:
        """The places and values of what is alike in all rows, and how many of these bytes lead."""
        varies = np.zeros(len(self.row), bool)
        for name in self.columns:
            width, start = self.dtype.fields[name]  # type: ignore[index, misc]
            varies[start : start + width.itemsize] = True
        places = np.flatnonzero(~varies)
        return places, np.frombuffer(self.row, np.uint8)[places], int(varies.argmax())

    def dump(self, columns: Columns) -> npt.NDArray[Any]:
        """Return rows with the given columns."""
        rows = np.frombuffer(bytearray(self.row * len(columns[self.columns[0]])), self.dtype)
        for name in self.columns:
            rows[name] = columns[name]
        return rows

    def find(self, data: bytes, start: int) -> npt.NDArray[Any]:
        """Return the rows that begin at a position; none if they are too few to be worth it."""
        places, values, leads = self._fixed
        width = len(self.row)
        for first in (start, start + (_FEWEST - 1) * width):
            if data[first : first + leads] != self.row[:leads]:
                return np.empty(0, self.dtype)
        most = (len(data) - start) // width
        every = np.frombuffer(data, np.uint8, most * width, start).reshape(most, width)
        count, step = 0, _FIRST
        while count < most:
            alike = (every[count : count + step, places] == values).all(axis=1)
            count += len(alike) if alike.all() else int(alike.argmin())
            if not alike.all():
                break
            step = min(2 * step, _MOST)
        return np.frombuffer(data, self.dtype, count, start)


def layouts(kind: Asked, where: Callable[[object], int | None]) -> list[Layout]:
    """Return how rows may look in a file.

    Args:
        kind: ``CHUNK``, or ``INDEX`` for an entry of ``storage_data``.
        where: the memo index of an attribute's name or of a class; None if it is not in the memo.
    """
    made = [_layout(row, where) for row in _ROWS[kind]]
    return [layout for layout in made if layout is not None]


def _layout(row: bytes, where: Callable[[object], int | None]) -> Layout | None:
    fixed, end = b"", 0
    names: list[str] = []
    formats: list[str] = []
    offsets: list[int] = []
    for part in _PART.finditer(row):
        fixed += row[end : part.start()]
        end = part.end()
        if part[1]:
            index = where(_MARKERS.get(part[1].decode(), part[1].decode()))
            if index is None:
                return None
            fixed += get(index)
        else:
            names.append(part[2].decode())
            formats.append("<u8" if part[3] else "<u4")
            offsets.append(len(fixed))
            fixed += bytes(8 if part[3] else 4)
    fixed += row[end:]
    spec = {"names": names, "formats": formats, "offsets": offsets, "itemsize": len(fixed)}
    return Layout(fixed, np.dtype(spec))  # type: ignore[call-overload]


def get(index: int) -> bytes:
    """Return the instruction that fetches a value from the memo."""
    return b"h%c" % index if index < 256 else b"j" + index.to_bytes(4, "little")
