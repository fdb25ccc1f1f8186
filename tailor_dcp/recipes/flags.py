"""StreamCheck's flag log: which units each save of a run wrote, and where each unit's newest copy is.

A line a save: ``{"step": 120, "flag": [0, 3, 4]}``; ``numbering`` says what the numbers mean. Whoever resumes after
a failure at step ``at`` takes each unit from the newest save at or below it that wrote the unit, and what none wrote
from a base: a checkpoint with everything.

A run that went back to an earlier step leaves lines of a past that is not its own. So a line takes back all lines
before it of its own step or a later one, and the newest of several lines of one step counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tailor_dcp.errors import TailorError
from tailor_dcp.location import locate
from tailor_dcp.merging.index import Index
from tailor_dcp.recipes import documents
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.native import Recipe, Take
from tailor_dcp.recipes.numbering import Numbering, numbering_of

LARGEST = 64 << 20
"""Bytes that a log may have; a million saves are less."""
_HIGHEST = 1 << 20  # no model has as many layers

Sources = Callable[[str], Index]


class Save(NamedTuple):
    """A line of a log.

    Attributes:
        step: the training step.
        units: the numbers of the units that were written.
        line: its number, from 1.
    """

    step: int
    units: frozenset[int]
    line: int


@dataclass(frozen=True)
class Flags:
    """A flag log.

    Attributes:
        name: its file.
        saves: its lines, in their order.
    """

    name: str
    saves: tuple[Save, ...]

    def history(self, at: int) -> list[Save]:
        """Return the saves that led to the run's newest state, up to a step, in the order of steps."""
        kept: list[Save] = []
        for save in self.saves:
            while kept and kept[-1].step >= save.step:
                kept.pop()
            kept.append(save)
        return [save for save in kept if save.step <= at]


def read_flags(path: str | os.PathLike[str]) -> Flags:
    """Read a flag log; empty lines are passed over, and so are keys other than ``step`` and ``flag``.

    Raises:
        RecipeError: it cannot be read, or a line is none of a flag log, which is named.
    """
    raw = documents.read(Path(path), LARGEST, "flag log", "a flag log, as logs/flags.jsonl")
    # Lines end with a newline alone: JSON may hold other separators that splitlines() knows.
    saves = [_save(line, f"{path}, line {n}", n) for n, line in enumerate(raw.split(b"\n"), 1) if line.strip()]
    if not saves:
        raise RecipeError(f"{path} is empty, so it does not tell what was saved.")
    return Flags(os.fspath(path), tuple(saves))


def _save(text: bytes, where: str, number: int) -> Save:
    example = 'a line is as {"step": 120, "flag": [0, 3, 4]}'
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError, too
        raise RecipeError(f"{where}: this is no JSON; {example}.") from error
    step, units = (found.get("step"), found.get("flag")) if isinstance(found, dict) else (None, None)
    if type(step) is not int or step < 0:
        raise RecipeError(f"{where}: there is no step that is a number; {example}.")
    if not isinstance(units, list) or not all(type(unit) is int and 0 <= unit < _HIGHEST for unit in units):
        raise RecipeError(f"{where}: 'flag' is no list of units' numbers; {example}.")
    return Save(step, frozenset(units), number)


def assemble(
    flags: Flags, at: int, run: str | os.PathLike[str], sources: Sources, base: str | os.PathLike[str] | None = None
) -> Recipe:
    """Return the recipe that puts together the newest copy of each unit at or below a step.

    What belongs to no layer (scheduler, generators, step) comes from the newest of the checkpoints.

    Args:
        flags: the log.
        at: the step, as that at which training failed.
        run: the folder with the checkpoints, ``checkpoint-<step>`` or ``step-<step>``.
        sources: returns what the checkpoint of a path holds.
        base: the checkpoint of what was never flagged, as a path or by its name in the run. By default the newest
            save at or below ``at`` that flags every unit; if there is none, the newest checkpoint with all of the
            model that the log does not mention. Flags as old as the base or older do not count.

    Raises:
        RecipeError: there is no base, a checkpoint is gone, or the log is of another model.
        TailorError: whatever opening a source says.
    """
    return _Assembly(flags, at, Path(run), sources).recipe(base)


def _as_native(base: str, takes: list[Take], train: str | None) -> str:
    """Return a native recipe that does the same: a log tells nothing without its run."""
    layers = {take.layers: take.source for take in takes}
    told = {"base": base, "layers": layers, "train": train}
    return yaml.safe_dump({key: value for key, value in told.items() if value}, sort_keys=False)


class _Assembly:
    def __init__(self, flags: Flags, at: int, run: Path, sources: Sources) -> None:
        self.flags, self.at, self.run, self.sources = flags, at, run, sources
        self.saves = flags.history(at)
        self.folders = self._folders()

    def recipe(self, base: str | os.PathLike[str] | None) -> Recipe:
        home = self._base() if base is None else self._given(base)
        step = locate(home).step
        if step is not None and step > self.at:
            raise RecipeError(f"The base {home} is of step {step}, after step {self.at}; name an earlier one.")
        numbering = numbering_of([self.sources(home)], self.flags.name)
        newest: dict[int, Save] = {}
        for save in self.saves:
            if step is None or save.step > step:
                newest |= dict.fromkeys(self._numbers(save, numbering), save)
        takes = [
            Take(layer, self._folder(newest[number], layer))
            for number, layers in numbering.units.items()
            if number in newest
            for layer in layers
        ]
        last = max(newest.values(), key=lambda save: save.step, default=None)
        train = str(self.folders[last.step][0]) if last else None
        return Recipe(home, tuple(takes), train=train, name=self.flags.name, text=_as_native(home, takes, train))

    def _folders(self) -> Mapping[int, list[Path]]:
        try:
            children = sorted(self.run.iterdir())
        except OSError as error:
            raise RecipeError(f"{self.run} is no run: {error.strerror}; name the folder of the checkpoints.") from error
        found: dict[int, list[Path]] = {}
        for child in children:
            here = locate(child)
            if here.step is not None and not here.series and child.is_dir():
                found.setdefault(here.step, []).append(child)
        return found

    def _folder(self, save: Save, layer: str) -> str:
        found = self.folders.get(save.step, [])
        if len(found) == 1:
            return str(found[0])
        told = f"{self.flags.name}, line {save.line}: {layer} was saved at step {save.step}"
        if found:
            raise RecipeError(f"{told}, which may be {found[0]} or {found[1]}; move one of them out of {self.run}.")
        raise RecipeError(
            f"{told}, but {self.run} has no checkpoint of that step; bring it back, or take a step before it with --at."
        )

    def _numbers(self, save: Save, numbering: Numbering) -> Iterator[int]:
        """Yield the units of a save. Tied embeddings are one unit, whichever of both was flagged."""
        highest = numbering.count + 2
        for number in sorted(save.units):
            if number > highest:
                raise RecipeError(
                    f"{self.flags.name}, line {save.line}: unit {number} is flagged, but the model has "
                    f"{numbering.count} layers, so units go from 0 to {highest}; it is the log of another model."
                )
            yield highest - 1 if numbering.tied and number == highest else number

    # The base ----------------------------------------------------------------------------

    def _given(self, base: str | os.PathLike[str]) -> str:
        name = os.fspath(base)
        inside = self.run / name
        return str(inside) if not Path(name).exists() and inside.exists() else name

    def _base(self) -> str:
        for save in reversed(self.saves):
            whole = save.units == frozenset(range(len(save.units))) and save.step in self.folders
            if whole and self._is_whole(folder := self._folder(save, "everything"), save):
                return folder
        logged = {save.step for save in self.flags.saves}
        for step in sorted(self.folders, reverse=True):
            if step <= self.at and step not in logged and self._is_whole(folder := str(self.folders[step][0]), None):
                return folder
        raise RecipeError(
            f"{self.flags.name} has no save at or below step {self.at} that flags everything, and {self.run} no other "
            f"full checkpoint; name the one that the run started from with --base."
        )

    def _is_whole(self, folder: str, save: Save | None) -> bool:
        """Tell whether a checkpoint holds the whole model, as far as names and the log can tell."""
        try:
            index = self.sources(folder)
            numbering = numbering_of([index], self.flags.name)
        except TailorError:
            return False
        units = numbering.units
        there = all(layer in index.layers for layers in units.values() for layer in layers)
        if save is not None:
            return there and units.keys() <= save.units
        return there and all(number <= numbering.count + 2 for other in self.saves for number in other.units)
