"""Remapping: the metadata of a merged checkpoint, made of its sources' metadata alone. Pure functions."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, BytesStorageMetadata, MetadataIndex

from tailor_dcp.base import Base
from tailor_dcp.contents import Contents
from tailor_dcp.file_marks import Mark
from tailor_dcp.merging.naming import KeyPath, renamed_path
from tailor_dcp.merging.param_groups import is_list, renamed_keys, renamed_list
from tailor_dcp.merging.resolve import Resolved, Slot
from tailor_dcp.metadata.compose import StorageData, paths_of
from tailor_dcp.metadata.record import Origin, Record, UnitRecord
from tailor_dcp.raw_stretch import RAW, is_raw
from tailor_dcp.units import WEIGHT, Unit

_OPTIMIZER = re.compile(r"(?:.*\.)?(?:optim\w*|param_groups)(?:\..*)?")

Read = Callable[[Contents, str], Any]


@dataclass(frozen=True)
class File:
    """A file of a source that the result needs.

    Attributes:
        path: where it is, symbolic links resolved.
        save_id: the save that wrote it.
        size: bytes that it must at least have.
        mark: what tells that it is still the one that was linked, if another program wrote it.
    """

    path: Path
    save_id: str
    size: int
    mark: Mark | None = None


@dataclass
class Remapped:
    """What the result's metadata says, with files under names of their own until they have a place.

    Attributes:
        entries: each key with its size, dtype and chunks.
        paths: each key with the path of its value in the nested state dict.
        storage: where each chunk is.
        files: the files that ``storage`` names.
        values: entries that are written anew, as their names of parameters change.
        crcs: checksums, by file and offset.
        units: each unit's origin and keys.
        narrowed: the training state's dtype of keys that are stored in a narrower one.
        ties: keys that share one storage.
        fingerprints: of keys that have one.
        marks: of files that have one, once they have a place.
    """

    entries: dict[str, STORAGE_TYPES] = field(default_factory=dict)
    paths: dict[str, KeyPath] = field(default_factory=dict)
    storage: StorageData = field(default_factory=dict)
    files: dict[str, File] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    crcs: dict[str, Mapping[int, int]] = field(default_factory=dict)
    units: dict[Unit, UnitRecord] = field(default_factory=dict)
    narrowed: dict[str, str] = field(default_factory=dict)
    ties: list[tuple[str, ...]] = field(default_factory=list)
    fingerprints: dict[str, int] = field(default_factory=dict)
    marks: dict[str, Mark] = field(default_factory=dict)

    def place(self, names: Mapping[str, str]) -> None:
        """Give the files the names that they have in the result's folder."""
        for info in self.storage.values():  # each is our own
            info.relative_path = names.get(info.relative_path, info.relative_path)
        self.marks = {names.get(name, name): file.mark for name, file in self.files.items() if file.mark}
        crcs, self.crcs = self.crcs, {}
        for file, blobs in crcs.items():
            known = self.crcs.get(name := names.get(file, file))
            self.crcs[name] = {**known, **blobs} if known else blobs

    def record(self, save_id: str, step: int | None, base: Base) -> Record:
        """Return the result's record: a save of its own, which wrote next to nothing.

        Args:
            save_id: its id.
            step: its training step.
            base: the recipe's base.
        """
        return Record(
            save_id=save_id,
            step=step,
            index=max([base.origin.nth, *(held.origin.nth for held in self.units.values())]),
            time=time.time(),
            policy="merge",
            carry="link",
            parent=base.origin if base.save_id else None,
            units=self.units,
            narrowed=self.narrowed,
            ties=tuple(self.ties),
            crcs=self.crcs,
            fingerprints=self.fingerprints,
            marks=self.marks,
        )


def remap(resolved: Resolved, sources: Mapping[str, Contents], read: Read) -> Remapped:
    """Return the metadata of what a recipe puts together.

    Args:
        resolved: where everything comes from.
        sources: the checkpoints by the recipe's names for them.
        read: reads an entry that is no tensor; asked for param groups' lists of names alone, and only where names
            change.
    """
    mapper = _Mapper(sources)
    for slot in resolved.slots.values():
        mapper.add_slot(slot)
    mapper.add_units(resolved)
    if resolved.train is not None:
        mapper.add_train(resolved, read)
    mapper.add_files()
    return mapper.made


class _Mapper:
    def __init__(self, sources: Mapping[str, Contents]) -> None:
        self.made = Remapped()
        self._sources = sources
        self._number = {name: number for number, name in enumerate(sources)}
        self._origins = {name: _origins(contents) for name, contents in sources.items()}
        self._names: dict[str, dict[str, str]] = {name: {} for name in sources}
        self._found: dict[str, File] = {}
        self._paths: dict[str, dict[str, KeyPath]] = {}
        self._ends: dict[str, int] = {}

    def add_slot(self, slot: Slot) -> None:
        """Take a parameter, buffer or optimizer state over."""
        path = renamed_path(self._like(slot), slot.like, slot.fqn, slot.unit.layer) or (slot.key,)
        self._add(slot.source, slot.held.key, slot.key, path)

    def add_units(self, resolved: Resolved) -> None:
        """Note each unit's origin, and which parameters share one storage."""
        held: dict[Unit, list[tuple[Origin, str]]] = {}
        for slot in resolved.slots.values():
            held.setdefault(slot.unit, []).append((self._origin(slot.source, slot.held.key), slot.key))
        for unit, found in held.items():
            oldest = min((origin for origin, _ in found), key=lambda origin: (origin.step or 0, origin.nth))
            self.made.units[unit] = UnitRecord(oldest, tuple(key for _, key in found))
        self.made.ties += resolved.ties

    def add_train(self, resolved: Resolved, read: Read) -> None:
        """Take over what belongs to no layer."""
        assert resolved.train is not None
        name, contents = resolved.train, self._sources[resolved.train]
        others = [key for key in contents.base.metadata.state_dict_metadata if key not in contents.entries]
        if not resolved.optimizer:
            others = [key for key in others if not _is_optimizers(key)]
        for old, keys in renamed_keys(others, resolved.renamed, resolved.dropped).items():
            for key, fqn, new in keys:
                path = self._path(name, old)
                if key != old:
                    path = tuple(part.replace(fqn, new) if isinstance(part, str) else part for part in path)
                if is_list(key) and resolved.renames:
                    self.made.values[key] = renamed_list(read(contents, key), resolved.renamed, resolved.dropped)
                    self.made.entries[key], self.made.paths[key] = BytesStorageMetadata(), path
                else:
                    self._add(name, old, key, path)

    def _add(self, source: str, old: str, key: str, path: KeyPath) -> None:
        base, made = self._sources[source].base, self.made
        made.entries[key], made.paths[key] = base.metadata.state_dict_metadata[old], path
        names = self._names[source]
        for index, info in base.blobs[old]:  # one for each shard: by far the most work is here
            mine = index if key == old else MetadataIndex(key, index.offset, index.index)
            name = names.get(info.relative_path) or self._file(source, info, old)
            transforms = info.transform_descriptors
            if transforms and is_raw(info):
                transforms = RAW  # one object for all of them
            made.storage[mine] = _StorageInfo(name, info.offset, info.length, transforms)
            self._ends[name] = max(self._ends[name], info.offset + info.length)
        if base.record is not None:
            if old in base.record.narrowed:
                made.narrowed[key] = base.record.narrowed[old]
            if old in base.record.fingerprints:
                made.fingerprints[key] = base.record.fingerprints[old]

    def _file(self, source: str, info: _StorageInfo, key: str) -> str:
        """Note a file that is needed, and return the name that it has for the time being."""
        name = f"{self._number[source]}/{info.relative_path}"
        self._names[source][info.relative_path], self._ends[name] = name, 0
        contents = self._sources[source]
        record = contents.base.record
        mark = record.marks.get(info.relative_path) if record else None
        if record and info.relative_path in record.crcs:
            self.made.crcs[name] = record.crcs[info.relative_path]  # of all its blobs, whichever are needed
        self._found[name] = File(
            contents.file(info), self._origin(source, key).save_id, 0, Mark(*mark) if mark else None
        )
        return name

    def add_files(self) -> None:
        """Note all files with the sizes that they must have."""
        self.made.files = {name: replace(file, size=self._ends[name]) for name, file in self._found.items()}

    def _origin(self, source: str, key: str) -> Origin:
        return self._origins[source].get(key, self._sources[source].base.origin)

    def _like(self, slot: Slot) -> KeyPath:
        """Return where what a key was made after sits; the result may need nothing else of it, and it be no DCP."""
        key, held = slot.like.key, slot.like
        if key in self._sources[slot.like_source].base.metadata.state_dict_metadata:
            return self._path(slot.like_source, key)
        return ("model", held.fqn) if held.kind == WEIGHT else ("optim", "state", held.fqn, held.kind)

    def _path(self, source: str, key: str) -> KeyPath:
        if source not in self._paths:
            self._paths[source] = paths_of(self._sources[source].base.metadata)
        return self._paths[source].get(key, (key,))


def _origins(contents: Contents) -> dict[str, Origin]:
    return {key: held.origin for held in contents.units.values() for key in held.keys}


def _is_optimizers(key: str) -> bool:
    return _OPTIMIZER.fullmatch(key) is not None
