"""Inspecting: what a checkpoint holds, where it comes from, and what it costs on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tailor_dcp.base import Base, open_base
from tailor_dcp.collector import collector_off
from tailor_dcp.errors import DamagedSourceError, NoCheckpointError
from tailor_dcp.file_marks import mark_of
from tailor_dcp.layers import LayerMap
from tailor_dcp.location import METADATA, is_within
from tailor_dcp.metadata.compose import file_sizes, paths_of, shape_of, unstored
from tailor_dcp.metadata.record import Origin, UnitRecord
from tailor_dcp.raw_stretch import is_raw
from tailor_dcp.runs import latest
from tailor_dcp.store_path import place
from tailor_dcp.stores import sizes as sizes_of
from tailor_dcp.units import Unit

OTHER = Unit("(training state)", "other")
"""What belongs to no layer and is written in every save: step, scheduler, RNG, param groups."""


@dataclass(frozen=True)
class UnitView:
    """One unit of a checkpoint.

    Attributes:
        layer: the layer's name.
        kind: ``weight`` or the optimizer state's name.
        bytes: bytes on disk that hold it, framing included.
        tensor_bytes: bytes of the tensors alone.
        dtypes: the dtypes it is stored in.
        origin_step: the step whose values they are; None if that save's folder told no step.
        stale_steps: steps between the origin and this checkpoint.
        stale_saves: saves between them.
        files: the files that hold it, relative to the checkpoint's folder.
    """

    layer: str
    kind: str
    bytes: int
    tensor_bytes: int
    dtypes: tuple[str, ...]
    origin_step: int | None
    stale_steps: int | None
    stale_saves: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` finds. All sizes in bytes.

    Attributes:
        path: the checkpoint's folder.
        step: its step.
        save_id: the id of the save that made it.
        policy: the policy it was saved with; None for a stock planner.
        carry: how it refers to earlier bytes; None for a stock planner.
        parent: the checkpoint it carries from, None if none.
        units: its units, in the model's order.
        written: bytes that this save wrote to data files.
        full: bytes of tensors that a full save would have written, in the training state's dtypes.
        live: bytes that loading this checkpoint reads.
        pinned: dead bytes in the files it holds: kept on disk, never read.
        metadata: size of ``.metadata``.
        missing: files that it needs and that are not there, too short or changed since they were linked; tensors of
            which it tells no file.
        linked: another program's files that it has tensors in, which only ``LayerwiseReader`` reads.
    """

    path: str
    step: int | None
    save_id: str
    policy: str | None
    carry: str | None
    parent: str | None
    units: tuple[UnitView, ...]
    written: int
    full: int
    live: int
    pinned: int
    metadata: int
    missing: tuple[str, ...]
    linked: tuple[str, ...] = ()

    @property
    def stalest(self) -> dict[str, int]:
        """The steps by which the stalest unit of each kind lags behind: what resuming here loses."""
        worst: dict[str, int] = {}
        for unit in self.units:
            worst[unit.kind] = max(worst.get(unit.kind, 0), unit.stale_steps or 0)
        return worst

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain builtins, for ``--json``."""
        return {**asdict(self), "stalest": self.stalest}


@collector_off()
def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Look into a checkpoint's metadata; no tensor is read as such and nothing is executed.

    Raises:
        NoCheckpointError: the folder holds no committed checkpoint.
        UnreadableMetadataError: its ``.metadata`` is damaged or hostile.
    """
    folder = place(path)
    if not (folder / METADATA).exists():
        raise NoCheckpointError(_what_instead(folder))
    base = open_base(folder)
    names = sorted({info.relative_path for info in base.metadata.storage_data.values()})
    sizes = dict(zip(names, sizes_of([base.path(name) for name in names]), strict=True))
    needed = file_sizes(base.metadata.storage_data.items())
    # Tied weights may share their bytes.
    live = sum({(i.relative_path, i.offset): i.length for i in base.metadata.storage_data.values()}.values())
    record = base.record
    return Inspection(
        path=str(folder),
        step=base.origin.step,
        save_id=base.save_id,
        policy=record.policy if record else None,
        carry=record.carry if record else None,
        parent=record.parent.folder if record and record.parent else None,
        units=tuple(_views(base)),
        written=_written(base),
        full=sum(base.source_shape(key).bytes for key in base.metadata.state_dict_metadata),
        live=live,
        pinned=max(0, sum(size or 0 for size in sizes.values()) - live),
        metadata=(folder / METADATA).stat().st_size,
        missing=(
            *sorted(n for n, size in sizes.items() if size is None or size < needed[n]),
            *sorted(f"{n} (changed)" for n, size in sizes.items() if size is not None and _changed(n, base)),
            *(f"{key} (in no file)" for key in unstored(base.metadata)),
        ),
        linked=tuple(sorted({info.relative_path for info in base.metadata.storage_data.values() if is_raw(info)})),
    )


def unit_records(base: Base) -> dict[Unit, UnitRecord]:
    """Return a checkpoint's units, found from the names alone where a stock planner saved it."""
    if base.record is not None:
        return dict(base.record.units)
    metadata = base.metadata.state_dict_metadata
    paths = paths_of(base.metadata)
    entries = LayerMap().classify(paths, {key for key, entry in metadata.items() if shape_of(entry).size is not None})
    keys: dict[Unit, list[str]] = {}
    for key, entry in entries.items():
        keys.setdefault(entry.unit, []).append(key)
    return {unit: UnitRecord(base.origin, tuple(of_unit)) for unit, of_unit in keys.items()}


def _views(base: Base) -> Iterable[UnitView]:
    units = unit_records(base)
    for unit, held in units.items():
        yield _view(unit, held.origin, held.keys, base)
    owned = {key for held in units.values() for key in held.keys}
    rest = tuple(key for key in base.metadata.state_dict_metadata if key not in owned)
    if rest:
        yield _view(OTHER, base.origin, rest, base)


def _view(unit: Unit, origin: Origin, keys: Iterable[str], base: Base) -> UnitView:
    infos = [info for key in keys for _, info in base.blobs[key]]
    shapes = [shape_of(base.metadata.state_dict_metadata[key]) for key in keys]
    step = base.origin.step
    return UnitView(
        layer=unit.layer,
        kind=unit.kind,
        bytes=sum(info.length for info in infos),
        tensor_bytes=sum(shape.bytes for shape in shapes),
        dtypes=tuple(dict.fromkeys(str(s.dtype).removeprefix("torch.") for s in shapes if s.dtype is not None)),
        origin_step=origin.step,
        stale_steps=None if step is None or origin.step is None else step - origin.step,
        stale_saves=base.origin.nth - origin.nth,
        files=tuple(dict.fromkeys(info.relative_path for info in infos)),
    )


def _written(base: Base) -> int:
    carried: set[str] = set()
    if base.record is not None:
        units = base.record.units.values()
        carried = {key for unit in units if unit.origin.save_id != base.save_id for key in unit.keys}
    infos = (info for index, info in base.metadata.storage_data.items() if index.fqn not in carried)
    return sum(info.length for info in infos if not is_raw(info))


def _changed(name: str, base: Base) -> bool:
    mark = base.record.marks.get(name) if base.record else None
    if mark is None or not is_within(base.path(name), base.location.run):
        return False
    try:
        return mark_of(base.path(name)) != mark
    except DamagedSourceError:
        return True


def _what_instead(folder: Path) -> str:
    if not folder.exists():
        return f"{folder} does not exist."
    newest = latest(folder)
    if newest is not None:
        return f"{folder} is a run, not a checkpoint; its newest checkpoint is {newest}."
    return f"{folder} holds no committed checkpoint: it has no {METADATA}, as after a save that was cut off."
