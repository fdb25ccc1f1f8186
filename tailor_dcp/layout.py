"""Layout: which blobs go into which new file, at which place, by which rank. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch

SMALLEST_FILE = 64 << 20
"""Bytes; below this a second file costs more than a second thread gains."""
SMALLEST_WHOLE = 1 << 20
"""Bytes; smaller files are put together, however easily each could be copied as it is."""


class Stretch(NamedTuple):
    """A blob's place, or a raw stretch's, of which a blob is made.

    Attributes:
        file: the file's name.
        offset: the first byte.
        length: how many bytes.
        shape: of the chunk that a raw stretch is; None for a blob.
        dtype: its dtype.
    """

    file: str
    offset: int
    length: int
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.offset + self.length


class Blob(NamedTuple):
    """A blob to be written.

    Attributes:
        stretch: where it comes from.
        size: its bytes; a raw stretch gets a frame.
        crc: CRC-32 of the stretch, None where nobody knows it.
        key: an entry of the state dict that needs it.
    """

    stretch: Stretch
    size: int
    crc: int | None
    key: str


class NewFile(NamedTuple):
    """A file to be written.

    Attributes:
        name: its name.
        blobs: what it holds, one behind the other.
        whole: whether these are all bytes of one file, in their order.
    """

    name: str
    blobs: tuple[Blob, ...]
    whole: bool

    @property
    def size(self) -> int:
        """Its bytes."""
        return sum(blob.size for blob in self.blobs)

    @property
    def places(self) -> list[int]:
        """Where each blob begins."""
        return [0, *accumulate(blob.size for blob in self.blobs)][:-1]


class Plan(NamedTuple):
    """What decides the layout.

    Attributes:
        prefix: what the names of a rank's files begin with; ``{rank}`` is filled in.
        ranks: that share the work.
        threads: of each.
        largest: bytes after which a new file is begun.
        whole: bytes of each file that is better copied as it is: block by block, or by the store itself.
    """

    prefix: str
    ranks: int
    threads: int
    largest: int
    whole: Mapping[str, int]


class _Group(NamedTuple):
    """Blobs that stay together: those of a whole file, or one alone."""

    blobs: tuple[Blob, ...]
    whole: bool
    size: int


def lay_out(blobs: Sequence[Blob], plan: Plan) -> list[list[NewFile]]:
    """Deal blobs to ranks and to files.

    What lies together stays together, as it is copied in one go then. Every thread has a file to write, if that
    is worth it: no two can write into one at the same time.

    Returns:
        Each rank's files.
    """
    order = {name: number for number, name in enumerate(dict.fromkeys(blob.stretch.file for blob in blobs))}
    ordered = sorted(blobs, key=lambda blob: (order[blob.stretch.file], blob.stretch.offset))
    groups: list[_Group] = []
    for name, held in groupby(ordered, key=lambda blob: blob.stretch.file):
        of_file = tuple(held)
        if _is_whole(of_file, plan.whole.get(name), plan.largest):
            groups.append(_Group(of_file, True, sum(blob.size for blob in of_file)))
        else:
            groups += [_Group((blob,), False, blob.size) for blob in of_file]
    return [_files(share, rank, plan) for rank, share in enumerate(_cut(groups, plan.ranks))]


def _is_whole(blobs: tuple[Blob, ...], size: int | None, largest: int) -> bool:
    """Tell whether blobs are a whole file, and worth one of their own."""
    if size is None or not SMALLEST_WHOLE <= size <= largest or blobs[-1].stretch.end != size:
        return False
    ends = [0, *(blob.stretch.end for blob in blobs[:-1])]
    return all(blob.stretch.shape is None and blob.stretch.offset == end for blob, end in zip(blobs, ends, strict=True))


def _files(groups: Sequence[_Group], rank: int, plan: Plan) -> list[NewFile]:
    """Deal one rank's blobs to files."""
    parts = [(group.blobs, True) for group in groups if group.whole]
    loose = [group for group in groups if not group.whole]
    size = sum(group.size for group in loose)
    wanted = min(plan.largest, max(SMALLEST_FILE, size // (2 * plan.threads)))
    for share in _cut(loose, min(len(loose), -(-size // max(1, wanted)))):
        parts += [(blobs, False) for blobs in _filled(share, plan.largest)]
    prefix = plan.prefix.format(rank=rank)
    return [NewFile(f"{prefix}{number}.distcp", *part) for number, part in enumerate(parts)]


def _cut(groups: Sequence[_Group], count: int) -> list[list[_Group]]:
    """Cut a sequence into ``count`` parts of about equal size."""
    shares: list[list[_Group]] = [[] for _ in range(max(1, count))]
    total, done = max(1, sum(group.size for group in groups)), 0
    for group in groups:
        # Where its middle lies tells which part it belongs to.
        shares[min(len(shares) - 1, len(shares) * (2 * done + group.size) // (2 * total))].append(group)
        done += group.size
    return shares


def _filled(groups: Sequence[_Group], largest: int) -> list[tuple[Blob, ...]]:
    """Fill files, one after the other."""
    files: list[list[Blob]] = []
    end = 0
    for group in groups:
        if not files or end + group.size > largest:
            files.append([])
            end = 0
        files[-1] += group.blobs
        end += group.size
    return [tuple(file) for file in files]
