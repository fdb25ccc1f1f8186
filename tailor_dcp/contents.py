"""Contents: what a checkpoint's keys are, which layers they belong to, and which files hold them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from torch.distributed.checkpoint.filesystem import _StorageInfo

from tailor_dcp.base import Base
from tailor_dcp.errors import DamagedSourceError, LoadError
from tailor_dcp.file_marks import mark_of
from tailor_dcp.inspection import unit_records
from tailor_dcp.layers import Entry, LayerMap
from tailor_dcp.location import is_in_run, is_within, real
from tailor_dcp.metadata.compose import paths_of, shape_of
from tailor_dcp.metadata.record import UnitRecord
from tailor_dcp.store_path import reason
from tailor_dcp.stores import is_remote, stats
from tailor_dcp.units import Unit


class Contents:
    """A checkpoint whose metadata was read, seen by key.

    Attributes:
        base: the checkpoint.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self._paths: dict[str, Path] = {}
        self._unchanged: set[str] = set()

    # Found when they are first asked for: a fast load asks only if something is wrong.

    @cached_property
    def units(self) -> dict[Unit, UnitRecord]:
        """Its units, in the model's order."""
        return unit_records(self.base)

    @cached_property
    def _unit_of(self) -> dict[str, Unit]:
        return {key: unit for unit, held in self.units.items() for key in held.keys}

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return self.base.location.folder

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The names of its layers, in the model's order."""
        return tuple(dict.fromkeys(unit.layer for unit in self.units))

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """The parameter's name and the kind of each key that the names alone tell."""
        stored = self.base.metadata.state_dict_metadata
        paths = paths_of(self.base.metadata)
        return LayerMap().classify(paths, {key for key, entry in stored.items() if shape_of(entry).size is not None})

    @cached_property
    def by_name(self) -> dict[tuple[str, str], list[str]]:
        """The keys of each parameter and kind; several if the checkpoint holds several models of one shape."""
        found: dict[tuple[str, str], list[str]] = {}
        for key, entry in self.entries.items():
            found.setdefault((entry.fqn, entry.unit.kind), []).append(key)
        return found

    def layer(self, key: str) -> str | None:
        """Return the layer that a key belongs to, None for what belongs to none."""
        unit = self._unit_of.get(key)
        return unit.layer if unit else None

    def described(self, key: str) -> str:
        """Return what a key is, for messages: its layer, its kind and the step it comes from."""
        unit = self._unit_of.get(key)
        origin = self.units[unit].origin if unit else self.base.origin
        what = f"{key} of layer {unit.layer}" if unit else key
        return what if origin.step is None else f"{what} as of step {origin.step}"

    def file(self, info: _StorageInfo) -> Path:
        """Return the real path of the file that holds a blob.

        Raises:
            LoadError: it lies outside of the checkpoint's run.
        """
        name = info.relative_path
        if name not in self._paths:
            path, run = self.base.path(name), self.base.location.run
            # A web server takes ``%2e%2e`` for ``..``.
            coded = is_remote(path) and "%" in name
            elsewhere = coded and not is_within(unquote(str(path)), unquote(str(run)))
            if elsewhere or not is_in_run(path, self.base.location):
                raise LoadError(
                    f"{self.folder} refers to the file {name}, which lies outside of its run {run}, so it was not "
                    f"opened; use a checkpoint whose files lie inside of the run."
                )
            self._paths[name] = real(path)
        return self._paths[name]

    def check_files(self, blobs: Iterable[tuple[str, _StorageInfo]]) -> None:
        """Check that files are there, long enough and, where another program wrote them, the ones that were linked.

        Args:
            blobs: what will be read: the key and its place.

        Raises:
            LoadError: naming the first file that is missing, cannot be reached, is too short or has changed, and what
                it holds.
        """
        ends: dict[str, tuple[int, str, _StorageInfo]] = {}
        for key, info in blobs:
            if info.offset < 0 or info.length < 0:
                raise LoadError(f"{self.folder} tells an impossible place for {key}; use another checkpoint.")
            end = info.offset + info.length
            if end > ends.get(info.relative_path, (-1, "", info))[0]:
                ends[info.relative_path] = (end, key, info)
        found = stats([self.file(info) for _, _, info in ends.values()])
        for (end, key, info), status in zip(ends.values(), found, strict=True):
            self._check_file(self.file(info), status, end, key)
            self._check_mark(info, key)

    def _check_file(self, path: Path, status: os.stat_result | OSError | None, end: int, key: str) -> None:
        if isinstance(status, OSError):
            raise LoadError(
                f"{path} cannot be reached ({reason(status)}), but holds {self.described(key)} for {self.folder}; see "
                f"to it, and load again."
            )
        if status is not None and status.st_size >= end:
            return
        state = "is missing" if status is None else f"has {status.st_size} bytes where at least {end} are needed"
        raise LoadError(
            f"{path} {state}, but holds {self.described(key)} for {self.folder}; restore the file, or take that layer "
            f"from another step with LayerwiseLoadPlanner(steps=...)."
        )

    def _check_mark(self, info: _StorageInfo, key: str) -> None:
        """Look into a file that another program wrote, once."""
        name = info.relative_path
        mark = self.base.record.marks.get(name) if self.base.record else None
        if mark is None or name in self._unchanged:
            return
        try:
            changed = mark_of(self.file(info)) != mark
        except DamagedSourceError as error:
            raise LoadError(f"{str(error).rstrip('.')}, but holds {self.described(key)} for {self.folder}.") from error
        if changed:
            raise LoadError(
                f"{self.file(info)} has changed since {self.folder} was linked to it, and held {self.described(key)}; "
                f"restore the file, or convert its checkpoint anew."
            )
        self._unchanged.add(name)
