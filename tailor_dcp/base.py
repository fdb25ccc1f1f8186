"""The base: the committed checkpoint that a save carries from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata

from tailor_dcp.errors import BaseError, TailorError, TailorWarning, UnreadableMetadataError
from tailor_dcp.lineage import Ancestor, Chain, stamp_of
from tailor_dcp.location import METADATA, Location, is_url, locate, same_folder
from tailor_dcp.metadata.compose import Blobs, Shape, blobs_by_key, shape_of, unstored
from tailor_dcp.metadata.record import Origin, Record, record_of, save_id_of
from tailor_dcp.metadata.safe_pickle import read
from tailor_dcp.raw_stretch import is_raw
from tailor_dcp.selection import Holdings
from tailor_dcp.store_path import place


@dataclass(frozen=True)
class Base:
    """A committed checkpoint, its metadata read and checked.

    ``record`` is None for a checkpoint that a stock planner wrote. ``files`` tells where files are that are not in its
    folder: those of a checkpoint that was put together in memory, whose sources were checked when they were opened.
    """

    location: Location
    save_id: str
    metadata: Metadata
    record: Record | None
    files: Mapping[str, Path] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Return where the file of a name is."""
        return self.files.get(name) or self._moved(name) or self.location.folder / name

    def _moved(self, name: str) -> Path | None:
        """Return where a file is that an absolute key names, if the run is no longer where it was saved."""
        old, run = self._run_when_saved, self.location.run
        if not name.startswith(f"{old}/") or (is_url(run) and old == f"/{run.relative_to(run.parents[-1])}"):
            return None
        return run / name[len(old) + 1 :]

    @cached_property
    def _run_when_saved(self) -> str:
        """The absolute key that the run had in its store when this was saved; no such thing where it was on a disk."""
        meta = self.metadata.storage_meta
        where = str(meta.checkpoint_id or "") if meta else ""
        # Arithmetic alone: the run may be on a disk by now, and its store out of reach.
        return str(locate(f"/{where.partition('://')[2].strip('/')}").run) if is_url(where) else "\0"

    @cached_property
    def origin(self) -> Origin:
        """This checkpoint's own save. Folders get renamed: the name tells the step only where there is no record."""
        if self.record is None:
            return Origin(self.save_id, self.location.step, self.location.name, 0)
        return Origin(self.save_id, self.record.step, self.location.name, self.record.index)

    @property
    def ancestor(self) -> Ancestor:
        """This checkpoint as an ancestor of the next save."""
        return Ancestor(str(self.location.folder), self.save_id)

    @cached_property
    def blobs(self) -> Blobs:
        """The stored blobs of each key."""
        return blobs_by_key(self.metadata)

    @cached_property
    def linked(self) -> frozenset[str]:
        """The keys whose bytes lie in another program's files, where DCP's own reader cannot read them."""
        return frozenset(index.fqn for index, info in self.metadata.storage_data.items() if is_raw(info))

    def holdings(self) -> Holdings:
        """Return what can be carried from here: all that a checkpoint which DCP's own reader loads may have."""
        if self.record is None:
            origins = dict.fromkeys(self.metadata.state_dict_metadata, self.origin)
        else:
            origins = {key: unit.origin for unit in self.record.units.values() for key in unit.keys}
        shapes = {k: self.source_shape(k) for k in self.metadata.state_dict_metadata if k not in self.linked}
        return Holdings(shapes, {key: origin for key, origin in origins.items() if key in shapes})

    def source_shape(self, key: str) -> Shape:
        """Return a key's global size and the dtype that the training state had it in."""
        stored = shape_of(self.metadata.state_dict_metadata[key])
        narrowed = self.record.narrowed.get(key) if self.record else None
        return Shape(stored.size, dtype_named(narrowed)) if narrowed else stored


def dtype_named(name: str) -> torch.dtype | None:
    """Return the dtype that ``str(dtype)`` writes as ``name``, None if there is none."""
    dtype = getattr(torch, name.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else None


def open_base(folder: Path) -> Base:
    """Read a committed checkpoint.

    Raises:
        NoCheckpointError: it is not committed.
        UnreadableMetadataError: its ``.metadata`` is damaged or hostile.
    """
    return base_of(read(folder / METADATA), folder)


def base_of(metadata: Metadata, folder: Path) -> Base:
    """Return a checkpoint whose metadata was read.

    Raises:
        UnreadableMetadataError: its record is damaged.
    """
    record = record_of(metadata, str(folder / METADATA))
    for unit, held in record.units.items() if record else ():
        unknown = [key for key in held.keys if key not in metadata.state_dict_metadata]
        if unknown:
            raise UnreadableMetadataError(
                f"{folder / METADATA} holds a damaged tailor_dcp record (the key {unknown[0]!r} of {unit} is not in "
                f"the checkpoint); plain dcp.load may still read it, but nothing can be carried from it."
            )
    return Base(locate(folder), save_id_of(metadata) or "", metadata, record)


def _open_whole(folder: Path) -> Base:
    """Read a committed checkpoint from which everything it names can be carried."""
    base = open_base(folder)
    missing = unstored(base.metadata)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UnreadableMetadataError(
            f"{folder / METADATA} does not tell where {missing[0]}{more} is stored, so it cannot be loaded either; "
            f"use another checkpoint."
        )
    return base


def check_explicit(folder: str | os.PathLike[str]) -> None:
    """Refuse, before training goes on, a ``base=`` that is not committed.

    Raises:
        BaseError: naming the folder and the way out.
    """
    try:
        (place(folder) / METADATA).stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise BaseError(f"base={str(folder)!r} cannot be read: {error.strerror}.") from error
    if stamp_of(folder) is None:
        raise BaseError(
            f"base={str(folder)!r} is not a committed checkpoint: it has no {METADATA}. Give a complete "
            f'checkpoint\'s folder, or base="auto" to write everything where there is nothing to carry from.'
        )


def open_explicit(folder: Path, target: Location) -> Base | None:
    """Open the checkpoint that the user names; None if it is the folder being written itself.

    Raises:
        BaseError: it is not committed, or damaged.
    """
    if same_folder(folder, target.folder):
        return None
    check_explicit(folder)
    try:
        return _open_whole(folder)
    except TailorError as error:
        raise BaseError(f"base={str(folder)!r} cannot be carried from: {error}") from error


def find(chain: Chain, target: Location) -> Base | None:
    """Return the newest ancestor that is committed; None means that everything is written.

    It never raises: ``base="auto"`` must not stop training. What is unusable is said in a warning.
    """
    # An asynchronous save is noted as asked for before it is planned: it is no ancestor of its own.
    chain = tuple(a for a in chain if a.asked is None or not same_folder(place(a.folder), target.folder))
    for ancestor in chain:
        for folder in _places(ancestor, target):
            base = _open_ancestor(ancestor, folder)
            if base is not None:
                return None if same_folder(folder, target.folder) else base
    if chain:
        warnings.warn(
            f"None of the checkpoints that this training state descends from (the newest is "
            f"{chain[0].folder}) is still committed; {target.folder} is written as a whole.",
            TailorWarning,
            stacklevel=2,
        )
    return None


def _places(ancestor: Ancestor, target: Location) -> Iterator[Path]:
    """Where an ancestor can be: beside the target, also in a run that was moved or copied, or where it was saved."""
    folder = place(ancestor.folder)
    beside = target.sibling(folder)
    yield beside
    if beside != folder:
        yield folder


def _open_ancestor(ancestor: Ancestor, folder: Path) -> Base | None:
    stamp = stamp_of(folder)
    if stamp is None or (ancestor.stamp is not None and stamp != ancestor.stamp):
        return None
    try:
        base = _open_whole(folder)
    except TailorError as error:
        warnings.warn(f"Nothing is carried from {folder}: {error}", TailorWarning, stacklevel=2)
        return None
    return base if _is(ancestor, base) else None


def _is(ancestor: Ancestor, base: Base) -> bool:
    """Tell whether a checkpoint is the ancestor, and not another save into the same folder."""
    if ancestor.asked is not None:
        return base.record is not None and base.record.time >= ancestor.asked
    return ancestor.save_id in (None, base.save_id)
