"""The plan of a compaction, as it lies on the disk from before the first checkpoint is touched until the last one is.

It lies where anybody can write, so nothing in it is trusted: what it says of bytes is compared with them.
"""

from __future__ import annotations

import os
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tailor_dcp.carry import sync_folder

_PLAN = "plan.json"
_NEW = r"__\d+_[^/]*-[0-9a-f]{8}\.distcp"

Stretch = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
"""First byte and length."""


class Move(BaseModel):
    """One file's live bytes on their way to another.

    Attributes:
        new: what the new file is called.
        old: the old one's names, relative to the run.
        live: the stretches that the new one holds, in their order, one behind the other.
    """

    model_config = ConfigDict(strict=True, frozen=True, ignored_types=(cached_property,))

    new: Annotated[str, Field(pattern=rf"\A{_NEW}\z")]
    old: tuple[str, ...]
    live: tuple[Stretch, ...]

    @cached_property
    def places(self) -> dict[Stretch, int]:
        """Where each stretch begins in the new file."""
        places, end = {}, 0
        for stretch in self.live:
            places[stretch] = end
            end += stretch[1]
        return places

    @property
    def is_sound(self) -> bool:
        """Whether it can be one that was made here: no two stretches share a byte."""
        return all(start + length <= then for (start, length), (then, _) in pairwise(self.live))


class Plan(BaseModel):
    """What a compaction does.

    Attributes:
        moves: one for each file.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    format: Literal[1] = 1
    moves: tuple[Move, ...]


def write_plan(plan: Plan, stage: Path) -> None:
    """Put a plan into a folder, complete or not at all."""
    partial = stage / f"{_PLAN}.tmp"
    with partial.open("w") as stream:
        stream.write(plan.model_dump_json())
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(stage / _PLAN)
    sync_folder(stage)
    sync_folder(stage.parent)


def read_plan(stage: Path) -> Plan | None:
    """Return the plan that lies in a folder; None if there is none, or what lies there is none."""
    path = stage / _PLAN
    if path.is_symlink() or not path.is_file():
        return None
    try:
        plan = Plan.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return plan if all(move.is_sound for move in plan.moves) else None
