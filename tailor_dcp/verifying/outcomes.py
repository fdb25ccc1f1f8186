"""Outcomes: what came of every stretch that was read, in as little memory as it takes.

A run may have tens of millions of them. As objects each takes three hundred bytes; so where they are many, what is good
is packed, each into one row of a table of its file, and unpacked while a checkpoint that has the file is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch

from tailor_dcp.verifying.blob_checks import Kind, Seen, Want
from tailor_dcp.verifying.checkpoint_check import FileId

_ROW = np.dtype([("offset", "<i8"), ("length", "<i8"), ("crc", "<i8"), ("mark", "<i8"), ("form", "<u4")])
_NONE = -1
"""No checksum, or no mark: where a mark is a hash it may be negative, but Python never makes this one."""

_UNTRIED = ("gone", "unread")
_MOST = 1 << 20

Stretch = tuple[int, int]
"""The first byte and the number of bytes."""

_Form = tuple[Kind, tuple[int, ...] | None, torch.dtype | None]
"""What many stretches have in common."""


class Outcomes:
    """Remembers outcomes by file.

    Args:
        most: outcomes that are not packed yet.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most, self._opened = most, 0
        self._open: dict[FileId, dict[Want, Seen]] = {}
        self._untried: set[tuple[FileId, Want]] = set()
        self._packed: dict[FileId, npt.NDArray[np.void]] = {}
        self._rest: dict[FileId, dict[Want, Seen]] = {}
        self._forms: list[_Form] = []
        self._numbers: dict[_Form, int] = {}

    def of(self, file: FileId) -> Mapping[Want, Seen]:
        """Return what came of a file's stretches."""
        return self._of(file)

    def note(self, file: FileId, seen: Mapping[Want, Seen]) -> None:
        """Take in what came of more stretches of a file."""
        self._of(file).update(seen)
        self._opened += len(seen)
        self._untried.difference_update((file, want) for want in seen)
        self._untried |= {(file, want) for want, found in seen.items() if found.outcome in _UNTRIED}

    def settle(self) -> None:
        """Forget what could not be read, since it is tried again for whoever needs it next; pack what is too much."""
        for file, want in self._untried:
            self._open[file].pop(want, None)
        self._untried.clear()
        if self._opened > self._most:
            for file, seen in self._open.items():
                good = {want: found for want, found in seen.items() if found.outcome == "good"}
                if len(good) != len(self._packed.get(file, ())):
                    self._packed[file] = self._rows(good)
                self._rest[file] = {want: found for want, found in seen.items() if found.outcome != "good"}
            self._open.clear()
            self._opened = 0

    def count(self) -> int:
        """Return how many stretches were checked."""
        known = sum(map(len, self._open.values())) - len(self._untried)
        closed = [len(of[file]) for of in (self._packed, self._rest) for file in of if file not in self._open]
        return known + sum(closed)

    def marks(self, file: FileId) -> Iterator[tuple[Stretch, int]]:
        """Yield the marks of a file's stretches that are good."""
        if file in self._open:
            for want, seen in self._open[file].items():
                if seen.outcome == "good" and seen.mark is not None:
                    yield (want.offset, want.length), seen.mark
        else:
            for offset, length, _, mark, _ in self._packed[file].tolist() if file in self._packed else ():
                if mark != _NONE:
                    yield (offset, length), mark

    def _of(self, file: FileId) -> dict[Want, Seen]:
        if file not in self._open:
            self._open[file] = {**self._unpacked(file), **self._rest.get(file, {})}
            self._opened += len(self._open[file])
        return self._open[file]

    def _rows(self, good: Mapping[Want, Seen]) -> npt.NDArray[np.void]:
        rows = [
            (
                offset,
                length,
                _NONE if crc is None else crc,
                _NONE if seen.mark is None else seen.mark,
                self._number((kind, shape, dtype)),
            )
            for (offset, length, kind, crc, shape, dtype), seen in good.items()
        ]
        return np.array(rows, _ROW)

    def _number(self, form: _Form) -> int:
        number = self._numbers.setdefault(form, len(self._forms))
        if number == len(self._forms):
            self._forms.append(form)
        return number

    def _unpacked(self, file: FileId) -> dict[Want, Seen]:
        found: dict[Want, Seen] = {}
        for offset, length, crc, mark, number in self._packed[file].tolist() if file in self._packed else ():
            kind, shape, dtype = self._forms[number]
            want = Want(offset, length, kind, None if crc == _NONE else crc, shape, dtype)
            found[want] = Seen("good", mark=None if mark == _NONE else mark)
        return found
