"""History: what each checkpoint of a run tells of itself, read one after another and kept small."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tailor_dcp.base import Base, open_base
from tailor_dcp.census import DOOMED, STRIPPED
from tailor_dcp.errors import TailorError
from tailor_dcp.inspection import unit_records
from tailor_dcp.location import METADATA, locate, real
from tailor_dcp.metadata.compose import file_sizes, shape_of, unstored
from tailor_dcp.metadata.record import Origin
from tailor_dcp.raw_stretch import is_raw
from tailor_dcp.sketch import Moved, moved, relative, unpack
from tailor_dcp.store_path import is_url
from tailor_dcp.stores import sizes as sizes_of
from tailor_dcp.units import STEP, Unit

FileId = tuple[int, int] | str
"""What a file is whatever it is called: device and inode, or an object's address."""

_MOST, _LONGEST = 2**62, 1e11
"""A record may come from anybody: what is larger is no number of bytes, saves or steps, and no time in seconds."""


@dataclass(frozen=True)
class HeldUnit:
    """One unit as a checkpoint holds it.

    Attributes:
        origin: the save whose values it has.
        whole: bytes of its tensors in the training state's dtypes.
        drift: how far it moved from what the checkpoint before held; None where both hold one save's values, or nothing
            tells.
    """

    origin: Origin
    whole: int
    drift: float | None = None


@dataclass(frozen=True)
class HeldFile:
    """A data file that a checkpoint refers to.

    Attributes:
        size: its bytes.
        live: bytes that this checkpoint reads.
    """

    size: int
    live: int


@dataclass(frozen=True)
class Held:
    """What a committed checkpoint tells of itself.

    Attributes:
        folder: its path.
        origin: its own save.
        time: when it was saved, seconds since the epoch.
        seconds: how long that took; None where nobody measured it.
        policy: the policy; None for a stock planner.
        carry: how it refers to earlier bytes; None for a stock planner.
        parent: the save that it carries from.
        units: what it holds.
        written: bytes that its save wrote to data files.
        full: bytes that a full save would have written, in the training state's dtypes.
        files: the data files that it refers to.
        metadata: bytes of ``.metadata``.
        missing: files that it needs and that are not there or too short, and keys that are in none.
        outside: files that lie outside of the run, which were not looked at.
    """

    folder: Path
    origin: Origin
    time: float
    seconds: float | None
    policy: str | None
    carry: str | None
    parent: Origin | None
    units: Mapping[Unit, HeldUnit]
    written: int
    full: int
    files: Mapping[FileId, HeldFile]
    metadata: int
    missing: tuple[str, ...]
    outside: tuple[str, ...]


@dataclass(frozen=True)
class OtherFolder:
    """A folder of a run that is none of the checkpoints in question.

    Attributes:
        name: its name.
        bytes: of the files in it; one that has other names counts too.
        why: what it is instead.
    """

    name: str
    bytes: int
    why: str


@dataclass
class History:
    """What was found in a run.

    Attributes:
        held: the checkpoints, in the order in which they were saved.
        unreadable: names and reasons of those that cannot be read.
        others: the other folders.
        series: the series that there are besides.
        dead: bytes of each data file that no checkpoint reads.
    """

    held: list[Held] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    others: list[OtherFolder] = field(default_factory=list)
    series: set[str] = field(default_factory=set)
    dead: dict[FileId, int] = field(default_factory=dict)


def read_history(run: Path, series: str, sketches: bool, progress: Callable[[int, int], None] | None = None) -> History:
    """Read the metadata of all checkpoints of a run, no tensor.

    Args:
        run: the run's folder, or its address.
        series: which checkpoints of each step.
        sketches: whether to tell drift from the sketches in the records.
        progress: is told how many of how many checkpoints are read.
    """
    found = History()
    folders = _folders(run, series, found)
    last: Base | None = None
    read: dict[FileId, dict[int, int]] = {}
    for done, folder in enumerate(folders):
        try:
            base = open_base(folder)
            before = _before(base, last, folders) if sketches else None
            found.held.append(_held(base, before, _files(base, run, read, found.dead)))
            last = base
        except (TailorError, OSError) as error:
            found.unreadable.append((locate(folder).name, str(error)))
        if progress:
            progress(done + 1, len(folders))
    found.held.sort(key=lambda held: held.time)
    return found


# Folders -----------------------------------------------------------------------------------


def _folders(run: Path, series: str, found: History) -> list[Path]:
    """Return the committed checkpoints in the order of their steps, and note what else there is."""
    folders: list[tuple[int, Path]] = []
    top = locate(run / "step-0").run  # as a checkpoint of the run would have it
    for folder in sorted(path for path in run.iterdir() if path.is_dir() and not path.is_symlink()):
        here = locate(folder / series if series else folder)
        mine = here.step is not None and here.run == top and not folder.name.startswith(DOOMED)
        if mine and (here.folder / METADATA).exists():
            folders.append((here.step or 0, here.folder))
            continue
        paths = list(folder.rglob("*"))
        committed = [path.parent for path in paths if path.name == METADATA]
        found.series |= {at.series for path in committed if (at := locate(path)).step is not None} - {""}
        if mine and committed:
            continue  # of another series
        why = _what(folder, paths, committed, here.step)
        if why:
            total = sum(size or 0 for size in sizes_of(paths))
            found.others.append(OtherFolder(folder.name, total, why))
    return [folder for _, folder in sorted(folders)]


def _what(folder: Path, paths: list[Path], committed: list[Path], step: int | None) -> str | None:
    if folder.name.startswith(DOOMED):
        return "a prune that was cut off is removing it; the next one goes on"
    if committed:
        return "committed, but its name tells no step"
    if any(path.name == STRIPPED for path in paths):
        return "pruned; it only holds files that other checkpoints refer to"
    if step is None:
        return None
    return "not committed: a save is writing it, or was cut off" if paths else "empty: a save has just begun in it"


def _before(base: Base, last: Base | None, folders: list[Path]) -> Base | None:
    """Return the checkpoint that this one carries from, or else the one with the step before."""
    parent = base.record.parent if base.record else None
    if parent is None or last is None or last.save_id == parent.save_id:
        return last
    for folder in folders:  # the run went back, so the parent is not the last one that was read
        if locate(folder).name == parent.folder:
            try:
                other = open_base(folder)
            except (TailorError, OSError):
                return last
            return other if other.save_id == parent.save_id else last
    return last


# One checkpoint ----------------------------------------------------------------------------


def _held(base: Base, before: Base | None, named: _Named) -> Held:
    record = base.record
    path = base.location.folder / METADATA
    status = path.stat()
    units = {unit: held for unit, held in unit_records(base).items() if unit.kind != STEP}
    drifts = _drifts(base, before) if before is not None else {}
    carried = {
        key
        for held in (record.units.values() if record else ())
        if held.origin.save_id != base.save_id
        for key in held.keys
    }
    infos = [info for index, info in base.metadata.storage_data.items() if index.fqn not in carried]
    return Held(
        folder=base.location.folder,
        origin=_sane(base.origin),
        time=record.time if record and 0 <= record.time < _LONGEST else status.st_mtime,
        seconds=record.seconds if record and 0 <= (record.seconds or -1) < _LONGEST else None,
        policy=record.policy if record else None,
        carry=record.carry if record else None,
        parent=record.parent if record else None,
        units={
            unit: HeldUnit(
                _sane(held.origin),
                _amount(sum(base.source_shape(key).bytes for key in held.keys)),
                drifts.get(unit),
            )
            for unit, held in units.items()
        },
        written=_amount(sum(info.length for info in infos if not is_raw(info))),
        full=_amount(sum(_whole(base, key) for key in base.metadata.state_dict_metadata)),
        files=named.files,
        metadata=status.st_size,
        missing=(*named.missing, *(f"{key} (in no file)" for key in unstored(base.metadata))),
        outside=named.outside,
    )


class _Named(NamedTuple):
    files: dict[FileId, HeldFile]
    missing: tuple[str, ...]
    outside: tuple[str, ...]


def _files(base: Base, run: Path, read: dict[FileId, dict[int, int]], dead: dict[FileId, int]) -> _Named:
    """Return what a checkpoint names: files in the run, those that are missing, those outside of the run.

    Args:
        base: the checkpoint.
        run: the run's folder.
        read: the blobs that earlier checkpoints read in files that have dead bytes so far.
        dead: the dead bytes of each file so far; both are brought up to date.
    """
    blobs: dict[str, dict[int, int]] = {}
    for info in base.metadata.storage_data.values():  # tied weights may share their bytes
        blobs.setdefault(info.relative_path, {})[info.offset] = _amount(info.length)
    root, needed = real(run), file_sizes(base.metadata.storage_data.items())
    places = {name: real(base.path(name)) for name in sorted(blobs)}
    inside = {name: path for name, path in places.items() if path.is_relative_to(root)}
    found: dict[FileId, HeldFile] = {}
    missing = []
    for (name, path), size in zip(inside.items(), sizes_of(list(inside.values())), strict=True):
        if size is None or size < needed[name]:
            missing.append(name)
        if size is None:
            continue
        identity = _identity(path)
        live = sum(blobs[name].values()) + (found[identity].live if identity in found else 0)
        found[identity] = HeldFile(size, min(size, live))
        if dead.get(identity) != 0:
            known = read.setdefault(identity, {})
            known |= blobs[name]
            dead[identity] = max(0, size - sum(known.values()))
        if dead[identity] == 0:
            read.pop(identity, None)
    return _Named(found, tuple(missing), tuple(name for name in places if name not in inside))


def _identity(path: Path) -> FileId:
    if is_url(path):
        return str(path)
    status = path.stat()
    return status.st_dev, status.st_ino


def _whole(base: Base, key: str) -> int:
    """Return the bytes that a key would take in the training state's dtype: its tensor, and what is around it."""
    stored = sum(info.length for _, info in base.blobs[key])
    around = stored - shape_of(base.metadata.state_dict_metadata[key]).bytes
    return base.source_shape(key).bytes + max(0, around)


def _drifts(base: Base, before: Base) -> dict[Unit, float]:
    """Estimate from sketches how far each unit moved that was written since the checkpoint before."""
    if base.record is None or before.record is None:
        return {}
    found = {}
    for unit, held in base.record.units.items():
        other = before.record.units.get(unit)
        if unit.kind == STEP or other is None or other.origin.save_id == held.origin.save_id:
            continue
        parts = [_moved(key, base, before) for key in held.keys if _counts(base, key)]
        known = [part for part in parts if part is not None]
        if known and len(known) == len(parts) and math.isfinite(change := relative(known)):
            found[unit] = change
    return found


def _moved(key: str, base: Base, before: Base) -> Moved | None:
    size = base.source_shape(key).size
    assert base.record is not None
    assert before.record is not None
    packed = base.record.sketches.get(key), before.record.sketches.get(key)
    if size is None or packed[0] is None or packed[1] is None:
        return None
    try:
        now, then = unpack(packed[0]), unpack(packed[1])
    except ValueError:  # somebody else's record
        return None
    return moved(then, now, math.prod(size)) if len(now) == len(then) else None


def _counts(base: Base, key: str) -> bool:
    dtype = base.source_shape(key).dtype
    return dtype is not None and dtype.is_floating_point


def _sane(origin: Origin) -> Origin:
    step = origin.step if origin.step is not None and abs(origin.step) < _MOST else None
    return origin._replace(step=step, nth=_amount(origin.nth))


def _amount(number: int) -> int:
    return min(max(number, 0), _MOST)
