"""Merging: a checkpoint put together from others, as a recipe says."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tailor_dcp.location import is_url, locate
from tailor_dcp.memory import peak_memory
from tailor_dcp.merging.computing import compute
from tailor_dcp.merging.picking import Outcome, pick
from tailor_dcp.merging.sources import Opener
from tailor_dcp.names import listed
from tailor_dcp.recipes import llmtailor, mergekit_schema
from tailor_dcp.recipes.documents import Document, load
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.mergekit_data import Plan
from tailor_dcp.recipes.native import Recipe
from tailor_dcp.recipes.native_file import native
from tailor_dcp.store_path import place

Progress = Callable[[int, int], None]

TARGETS = ("dcp", "hf", "zero3", "zero2", "zero1")
"""What a merge can write."""

_PLANS = frozenset({"merge_method", "models", "slices", "modules", "experts", "genome", "merges"})
"""Keys that mergekit's documents have, some of which are of those that are refused by name."""


@dataclass(frozen=True)
class Merged:
    """What a merge made.

    Attributes:
        path: where it is.
        format: ``dcp``, ``hf`` or one of DeepSpeed's.
        layers: how many layers it has.
        sources: the checkpoints that it was made of.
        linked: files that it shares with them.
        written: bytes of files that were written.
        live: bytes of tensors that it holds.
        notes: what the user should know.
        seconds: how long it took.
        peak_memory: the largest amount of memory that the process held, in bytes.
    """

    path: str
    format: str
    layers: int
    sources: tuple[str, ...]
    linked: int
    written: int
    live: int
    notes: tuple[str, ...]
    seconds: float
    peak_memory: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain builtins, for ``--json``."""
        return asdict(self)


def merge(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe | Plan,
    out: str | os.PathLike[str],
    *,
    to: str | None = None,
    materialize: bool = False,
    seed: int | None = None,
    world_size: int | None = None,
    allow: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> Merged:
    """Put a checkpoint together.

    Picking, renaming and repeating layers of DCP checkpoints reads no tensor and writes none: the result is a
    composite whose files are hard links. Everything else is computed and written tensor by tensor. The recipe is
    checked as a whole before anything is written; the result appears under its name when it is complete, and no source
    is changed.

    Args:
        recipe: a YAML file, or its content as plain data: a native recipe, mergekit's plan, or LLMTailor's.
        out: what to make; it must not exist.
        to: ``dcp``, ``hf``, ``zero3``, ``zero2`` or ``zero1``; by default ``hf`` for mergekit's plans of Hugging Face
            folders and ``dcp`` otherwise.
        materialize: copy the bytes, so that the result shares no file with its sources.
        seed: fixes what methods draw that draw random numbers; None to draw it and tell it in a note.
        world_size: ranks that a ZeRO checkpoint is written for; None for the base's own.
        allow: classes, as ``module.Class``, that may be unpickled.
        progress: is told how many of how many bytes are done.

    Raises:
        RecipeError: the recipe makes no sense, asks for what its sources do not have, or ``out`` cannot be made.
        TailorError: a source is damaged or unreadable.
    """
    start, tell = time.monotonic(), progress or (lambda *_: None)
    target = _target(out)
    if is_url(target) and to not in (None, "dcp"):
        raise RecipeError(
            f"{target} is on an object store, where only DCP results can be written; name a local folder."
        )
    if to is not None and to not in TARGETS:
        raise RecipeError(f"{to!r} is nothing that a merge can write; use {listed(TARGETS)}.")
    if materialize and to not in (None, "dcp"):
        raise RecipeError(f"--materialize is for DCP results; one in {to} has its own files anyway.")
    if world_size is not None and not (to or "").startswith("zero"):
        raise RecipeError("A world size is for ZeRO results alone (to zero3, zero2 or zero1); leave it out.")
    plan = recipe if isinstance(recipe, Recipe | Plan) else _read(recipe, allow)
    if isinstance(plan, Plan):
        done = compute(plan, target, to, materialize, world_size, allow, seed, tell)
    else:
        done = pick(plan, target, to or "dcp", materialize, world_size, allow, tell)
    return _merged(done, target, time.monotonic() - start)


def _read(recipe: str | os.PathLike[str] | Mapping[str, Any], allow: tuple[str, ...]) -> Recipe | Plan:
    """Read a recipe of any of the three kinds."""
    document = Document("the recipe", dict(recipe)) if isinstance(recipe, Mapping) else load(place(recipe))
    if llmtailor.is_plan(document.data):
        return llmtailor.translate(document, Opener(allow).index)
    if isinstance(document.data, dict) and _PLANS & document.data.keys():
        return mergekit_schema.parse(document.data, document.where, name=document.name, text=document.text)
    return native(document)


def _target(out: str | os.PathLike[str]) -> Path:
    target = locate(out).folder
    try:
        there = target.exists() or target.is_symlink()
    except OSError as error:
        raise RecipeError(f"{target} cannot be reached: {error.strerror}.") from error
    if there:
        raise RecipeError(f"{target} exists already; name a new folder, or remove it first.")
    return target


def _merged(done: Outcome, target: Path, seconds: float) -> Merged:
    written = sum(path.stat().st_size for path in target.rglob("*") if path.is_file() and path not in done.shared)
    return Merged(
        str(target),
        done.format,
        done.layers,
        done.sources,
        len(done.shared),
        written,
        done.live,
        done.notes,
        seconds,
        peak_memory(),
    )
