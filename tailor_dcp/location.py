"""Where a checkpoint folder stands: its run, its step, its series. Pure arithmetic on paths."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from tailor_dcp.store_path import StorePath, is_url, place

__all__ = [
    "DEEPEST_SERIES",
    "METADATA",
    "Location",
    "is_in_run",
    "is_step",
    "is_url",
    "is_within",
    "locate",
    "real",
    "same_folder",
]

DEEPEST_SERIES = 2
"""Folders between a step's and its checkpoints: higher up, a number is somebody's home, not a step."""

METADATA = ".metadata"
"""A checkpoint is committed when the file of this name exists in its folder."""

# Longer numbers are no steps, and Python refuses to read those of thousands of digits.
_STEP_NAME = re.compile(r"(?:(?:global_?step|step|checkpoint)[-_=]?)?(\d{1,18})", re.IGNORECASE)


@dataclass(frozen=True)
class Location:
    """A checkpoint's place in its run.

    Attributes:
        folder: the checkpoint's absolute path, or its address on an object store.
        run: the folder whose sub-folders are the checkpoints of one training run.
        step: the training step that the folder's name tells, None if it tells none.
        series: what lies between the step's folder and the checkpoint (``optimizer_0`` in
            Accelerate's ``checkpoint-200/optimizer_0``); empty for most.
    """

    folder: Path
    run: Path
    step: int | None
    series: str

    @property
    def name(self) -> str:
        """The checkpoint as people call it: its path within the run."""
        name: str = self.folder.relative_to(self.run).as_posix()
        return self.folder.name if name == "." else name

    def sibling(self, folder: Path) -> Path:
        """Return where ``folder``, a checkpoint of this series in a run that was moved, would be now."""
        return self.run / locate(folder).name


def locate(checkpoint_id: str | os.PathLike[str]) -> Location:
    """Find run, step and series of a checkpoint folder from its name.

    The step is the integer of the nearest folder name of the form ``step-N``,
    ``checkpoint-N`` or ``global_stepN`` (any of ``-_=`` or nothing between), or all digits.
    """
    folder = _absolute(place(checkpoint_id))
    for above in (folder, *list(folder.parents)[:DEEPEST_SERIES]):
        found = _STEP_NAME.fullmatch(above.name)
        if found:
            series = folder.relative_to(above).as_posix()
            return Location(folder, _run(above), int(found[1]), "" if series == "." else series)
    return Location(folder, _run(folder), None, "")


def is_step(name: str) -> bool:
    """Tell whether a folder's name is that of a step."""
    return _STEP_NAME.fullmatch(name) is not None


def _run(step: Path) -> Path:
    """Return the folder that a step's is in. A bucket that is a checkpoint is a run of its own."""
    return step if isinstance(step, StorePath) and step.is_bucket else step.parent


def _absolute(path: Path) -> Path:
    if isinstance(path, StorePath):
        return path.resolve()
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would lose the step's name


def real(path: str | os.PathLike[str]) -> Path:
    """Return what a path leads to once every ``..`` and, on a disk, every symbolic link is resolved."""
    found = place(path)
    return found.resolve() if isinstance(found, StorePath) else Path(os.path.realpath(found))


def same_folder(a: Path, b: Path) -> bool:
    """Tell whether two paths lead to one folder, symbolic links followed."""
    return real(a) == real(b)


def is_within(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> bool:
    """Tell whether ``path`` lies inside ``root`` once every ``..`` and symbolic link is resolved."""
    return real(path).is_relative_to(real(root))


def is_in_run(path: str | os.PathLike[str], here: Location) -> bool:
    """Tell whether a file lies in a checkpoint's run; where its folder is a link, also in the run that it leads to."""
    return is_within(path, here.run) or is_within(path, locate(real(here.folder)).run)
