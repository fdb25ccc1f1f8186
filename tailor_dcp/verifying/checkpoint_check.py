"""The check of one checkpoint: its metadata by itself, its files, and the bytes that it needs of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from tailor_dcp.archives import Archived, archived_in, touched
from tailor_dcp.base import Base
from tailor_dcp.contents import Contents
from tailor_dcp.errors import DamagedSourceError, LoadError
from tailor_dcp.file_marks import mark_of
from tailor_dcp.inspection import OTHER
from tailor_dcp.raw_stretch import is_raw
from tailor_dcp.store_path import reason
from tailor_dcp.stores import is_remote, stats
from tailor_dcp.units import Unit
from tailor_dcp.verifying.blob_checks import Want
from tailor_dcp.verifying.failures import is_gone, is_lost, unread
from tailor_dcp.verifying.findings import Finding, State
from tailor_dcp.verifying.structure import Problem, stretch_problem

FileId = tuple[int, int] | str
"""What a file is whatever it is called: device and inode, or an object's address."""


class Place(NamedTuple):
    """A file that a checkpoint names and that is there.

    Attributes:
        name: as the checkpoint calls it.
        path: where it is.
        id: what it is.
        size: its bytes.
    """

    name: str
    path: Path
    id: FileId
    size: int


class Part(NamedTuple):
    """A chunk of a tensor, or an entry that is none.

    Attributes:
        at: its key and offset.
        info: its place.
        want: what the file must hold there; None for a raw stretch.
    """

    at: MetadataIndex
    info: _StorageInfo
    want: Want | None


@dataclass
class CheckpointCheck:
    """What is found out about one checkpoint.

    Attributes:
        base: the checkpoint.
        name: what it is called.
        units: the units that are looked at; None for all, and for what belongs to none.
        findings: what is wrong with it, or could not be checked.
        unverifiable_bytes: bytes that nothing tells anything about.
    """

    base: Base
    name: str
    units: Collection[Unit] | None = None
    findings: list[Finding] = field(default_factory=list)
    unverifiable_bytes: int = 0

    @property
    def is_doubtful(self) -> bool:
        """Whether anything was found to be wrong, or could not be read."""
        return any(finding.state == "damaged" or finding.undecided for finding in self.findings)

    @cached_property
    def contents(self) -> Contents:
        """The checkpoint seen by key."""
        return Contents(self.base)

    def unit(self, key: str | None) -> Unit | None:
        """Return the unit that a key belongs to; None for what belongs to none."""
        return self._units.get(key) if key is not None else None

    @cached_property
    def _units(self) -> dict[str, Unit]:
        return {key: unit for unit, held in self.contents.units.items() for key in held.keys}

    @cached_property
    def parts(self) -> list[Part]:
        """What it needs, in the order of its entries."""
        crcs = self.base.record.crcs if self.base.record else {}
        shapes = self._shapes()
        return [
            Part(index, info, None if is_raw(info) else _want(index, info, crcs, shapes))
            for index, info in self.base.metadata.storage_data.items()
            if info.offset >= 0 and info.length >= 0 and self._is_asked(index.fqn)
        ]

    def _is_asked(self, key: str) -> bool:
        return self.units is None or (self.unit(key) or OTHER) in self.units

    def _shapes(self) -> dict[str, dict[tuple[int, ...], Want]]:
        """Return a want for each chunk by key and offset, place and checksum still to be filled in."""
        found: dict[str, dict[tuple[int, ...], Want]] = {}
        for key, entry in self.base.metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                dtype = entry.properties.dtype
                # A chunk without elements may begin where another begins, too.
                chunks = sorted(entry.chunks, key=_elements) if len(entry.chunks) > 1 else entry.chunks
                found[key] = {
                    tuple(chunk.offsets): Want(0, 0, "tensor", None, tuple(chunk.sizes), dtype) for chunk in chunks
                }
        return found

    # Findings -------------------------------------------------------------------------------

    def problem(self, problem: Problem) -> None:
        """Note a problem of the metadata."""
        if problem.key is not None and not self._is_asked(problem.key):
            return
        layer, kind = self._unit_names(problem.key)
        self.findings.append(
            Finding(
                checkpoint=self.name,
                state=problem.state,
                what=problem.what,
                file=problem.file,
                layer=layer,
                kind=kind,
                key=problem.key,
                chunk=problem.chunk,
            )
        )

    def blob(self, part: Part, why: str) -> None:
        """Note that a blob is not what it must be."""
        key, chunk = part.at.fqn, part.at.offset
        what = f"the chunk of {key} at {list(chunk)}" if chunk else key
        name = part.info.relative_path
        layer, kind = self._unit_names(key)
        self.findings.append(
            Finding(
                checkpoint=self.name,
                state="damaged",
                what=f"{what[0].upper() if chunk else what[0]}{what[1:]} in {name} {why}.",
                file=name,
                layer=layer,
                kind=kind,
                key=key,
                chunk=None if chunk is None else tuple(chunk),
                blobs=1,
                bytes=part.info.length,
            )
        )

    def lot(
        self, parts: Iterable[Part], state: State, what: str, file: str | None = None, *, undecided: bool = False
    ) -> None:
        """Note what concerns many blobs: one finding for each unit that is, or may be, damaged, else one for all."""
        by_unit: dict[Unit | None, list[Part]] = {}
        for part in parts:
            told = state == "damaged" or undecided
            by_unit.setdefault(self.unit(part.at.fqn) if told else None, []).append(part)
        for unit, lot in by_unit.items():
            keys = {part.at.fqn for part in lot}
            size = sum(part.info.length for part in lot)
            if state == "unverifiable":
                self.unverifiable_bytes += size
            layer, kind = (unit.layer, unit.kind) if unit else (None, None)
            key = keys.pop() if len(keys) == 1 else None
            self.findings.append(
                Finding(
                    checkpoint=self.name,
                    state=state,
                    what=what,
                    file=file,
                    layer=layer,
                    kind=kind,
                    key=key,
                    blobs=len(lot),
                    bytes=size,
                    undecided=undecided,
                )
            )

    def unread(self, parts: Iterable[Part], file: str, why: str) -> None:
        """Note that blobs of a file could not be read, which says nothing about them."""
        self.lot(parts, "unverifiable", f"{file} {why}.", file, undecided=True)

    def _unit_names(self, key: str | None) -> tuple[str | None, str | None]:
        unit = self.unit(key)
        return (unit.layer, unit.kind) if unit else (None, None)

    # Files ----------------------------------------------------------------------------------

    def places(self) -> dict[str, Place]:
        """Return the files that are where they must be, with all bytes that are needed; note the others."""
        parts: dict[str, list[Part]] = {}
        for part in self.parts:
            parts.setdefault(part.info.relative_path, []).append(part)
        paths = {name: path for name in parts if (path := self._inside(name, parts[name])) is not None}
        found: dict[str, Place] = {}
        for (name, path), status in zip(paths.items(), stats(list(paths.values())), strict=True):
            if status is None:
                self.lot(parts[name], "damaged", f"{name} is missing, or is no file.", name)
                continue
            if isinstance(status, OSError):
                self._unreachable(parts[name], name, path, status)
                continue
            needed, size = max(part.info.offset + part.info.length for part in parts[name]), status.st_size
            if size < needed:
                cut = [part for part in parts[name] if part.info.offset + part.info.length > size]
                self.lot(cut, "damaged", f"{name} has {size} bytes where {needed} are needed: it was cut off.", name)
            found[name] = Place(name, path, str(path) if is_remote(path) else (status.st_dev, status.st_ino), size)
        return found

    def _unreachable(self, parts: list[Part], name: str, path: Path, error: OSError) -> None:
        if is_lost(error, path):
            self.lot(parts, "damaged", f"{name} cannot be read: {reason(error)}.", name)
        else:
            self.unread(parts, name, unread(error))

    def _inside(self, name: str, parts: list[Part]) -> Path | None:
        try:
            return self.contents.file(parts[0].info)
        except LoadError:
            self.lot(parts, "damaged", f"{name} lies outside of the run, so it was not opened.", name)
            return None

    def linked(self, places: Mapping[str, Place]) -> list[tuple[Part, tuple[Want, ...]]]:
        """Check the raw stretches, as far as another program's files can be.

        Returns:
            The stretches in archives of ``torch.save``, and the records there that they have bytes of.
        """
        by_file: dict[str, list[Part]] = {}
        for part in self.parts:
            if part.want is None and part.info.relative_path in places:
                problem = stretch_problem(part.at, part.info, self.base.metadata)
                if problem is not None:
                    self.problem(problem)
                by_file.setdefault(part.info.relative_path, []).append(part)
        return [found for name, parts in by_file.items() for found in self._linked(places[name], parts)]

    def _linked(self, place: Place, parts: list[Part]) -> Iterator[tuple[Part, tuple[Want, ...]]]:
        name, mark = place.name, self.base.record.marks.get(place.name) if self.base.record else None
        try:
            if mark is not None and mark_of(place.path) != mark:
                self.lot(parts, "damaged", f"{name} has changed since the checkpoint was linked to it.", name)
                return
            records = [record for record in archived_in(place.path) if record.crc]
        except DamagedSourceError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and not is_gone(cause):
                self._unreachable(parts, name, place.path, cause)
            else:
                self.lot(parts, "damaged", str(error), name)
            return
        covered = {id(part): wants for part in parts if (wants := _covering(records, part.info))}
        yield from ((part, covered[id(part)]) for part in parts if id(part) in covered)
        untold = [part for part in parts if id(part) not in covered]
        sampled = "its size and samples of it are those of when it was linked" if mark else "no mark of it was noted"
        self.lot(
            untold,
            "unverifiable",
            f"{name} is another program's file, of whose bytes there is no checksum: {sampled}.",
            name,
        )


def _covering(records: Sequence[Archived], info: _StorageInfo) -> tuple[Want, ...]:
    """Return the records of an archive that a stretch has bytes of; none if it also has others."""
    found = tuple(touched(records, info.offset, info.length))
    reached = info.offset
    for record in found:
        if record.start > reached:
            return ()
        reached = record.start + record.length
    if reached < info.offset + info.length:
        return ()
    return tuple(Want(record.start, record.length, "entry", record.crc) for record in found)


def _want(
    index: MetadataIndex,
    info: _StorageInfo,
    crcs: Mapping[str, Mapping[int, int]],
    shapes: Mapping[str, Mapping[tuple[int, ...], Want]],
) -> Want:
    known = crcs.get(info.relative_path, {}).get(info.offset)
    if info.transform_descriptors:
        return Want(info.offset, info.length, "transformed", known)
    shaped = shapes.get(index.fqn, {}).get(tuple(index.offset or ()))
    if shaped is None:
        return Want(info.offset, info.length, "entry", known)
    return Want(info.offset, info.length, "tensor", known, shaped.shape, shaped.dtype)


def _elements(chunk: ChunkStorageMetadata) -> int:
    return chunk.sizes.numel()
