"""A theatre: a stage, and a process of stock torch that looks at what was left on it and knows what it must be."""

from __future__ import annotations

import re
import shutil
import subprocess
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailor_dcp import latest, open_checkpoint
from tests.crash.outside import UNREADABLE, Holdings, plain
from tests.crash.plan import Plan
from tests.crash.scenarios import ALL, MODEL, POLICY, Said, Scenario
from tests.crash.stage import Ending, Stage
from tests.support.fleet import Fleet
from tests.test_laws import Saved, check

Tree = dict[str, bytes]
_SAVE_ID = re.compile(r"(?<=__)(\d+)_[0-9a-f]{8}(?=_)|(?<=carried/)()[^/]+|(?<=\d-)()[0-9a-f]{8}(?=\.distcp)")


_PLACES = frozenset({"crcs", "digest", "sealed"})
"""What of a record is about the places of bytes."""


class LawBrokenError(AssertionError):
    """A law that does not hold."""


@dataclass(frozen=True)
class Baseline:
    """A scenario when nothing disturbs it.

    Attributes:
        folder: what it begins with.
        before: what its checkpoints hold, by folder.
        after: what they hold when the operation is done.
        names: the files that are there when it is done.
        files: their bytes, of a result that is no DCP checkpoint.
        newest: what ``latest`` answers before and after.
        calls: how many calls of each rank change something; of the second of two rivals, when both are there.
    """

    folder: Path
    before: Mapping[str, Holdings]
    after: Mapping[str, Holdings]
    names: tuple[str, ...]
    files: Tree
    newest: tuple[str | None, str | None]
    calls: tuple[int, ...]


class Theatre:
    """A stage, a process of stock torch, and room to play in.

    Args:
        room: an empty folder.
    """

    def __init__(self, room: Path) -> None:
        self.room, self.stage, self._stock = room, Stage(), Fleet(1, stock=True)
        self._baselines: dict[str, Baseline] = {}
        self._scenes = 0

    def close(self) -> None:
        """End the processes."""
        self.stage.close()
        self._stock.close()

    def baseline(self, name: str) -> Baseline:
        """Return how a scenario goes when nothing disturbs it; it must."""
        if name not in self._baselines:
            self._baselines[name] = self._undisturbed(ALL[name])
        return self._baselines[name]

    def place(self, name: str) -> Path:
        """Return a path where nothing is yet."""
        self._scenes += 1
        return self.room / f"{name}-{self._scenes}"

    def scene(self, name: str) -> Path:
        """Return a new folder that is as it is before the operation."""
        root = self.place(name)
        subprocess.run(["cp", "-a", self.baseline(name).folder, root], check=True)
        return root

    def operate(
        self, name: str, root: Path, plans: Mapping[int, Plan] | None = None, alone: bool = False
    ) -> list[Ending]:
        """Carry the operation out; see ``Stage.operate``. No rank may wait for ever."""
        endings = self.stage.operate(name, root, plans, alone=alone)
        for rank, ending in enumerate(endings):
            if ending.hung:
                raise LawBrokenError(f"rank {rank} waits for ever")
        return endings

    def check(self, name: str, root: Path, done: bool = False) -> bool:
        """Check what an operation left, whole or not; return whether it is done.

        Args:
            name: the scenario.
            root: its folder.
            done: whether the operation says that it has succeeded.
        """
        scenario, base = ALL[name], self.baseline(name)
        found = self._checkpoints(scenario, root)
        for folder in [folder for folder in found if not self._is_right(scenario, base, root, folder, found[folder])]:
            raise LawBrokenError(
                f"{folder} holds {_difference(found[folder], base.after.get(folder) or base.before.get(folder))}"
            )
        for folder in (*scenario.untouched, *scenario.kept):
            if folder in base.before and folder not in found:
                raise LawBrokenError(f"{folder} is no checkpoint any more")
        for folder in scenario.kept:
            if self._record(root / folder) != self._record(base.folder / folder):
                raise LawBrokenError(f"{folder} tells something else of its past than before")
        for folder in scenario.untouched:
            if tree_of(root / folder) != tree_of(base.folder / folder):
                raise LawBrokenError(f"the files of {folder} are not what they were")
        whole = self._is_whole(scenario, base, root, found)
        if done and not whole:
            raise LawBrokenError(f"{scenario.result} is not there, though nothing failed")
        _check_latest(scenario, base, root, found, whole)
        return whole

    def again(self, name: str, root: Path) -> None:
        """Simply do it again: it succeeds, and nothing is left of the time that it did not."""
        scenario, base = ALL[name], self.baseline(name)
        if scenario.makes_new and (root / scenario.result).exists():
            _remove(root / scenario.result)
        succeeded(self.operate(name, root, alone=scenario.rivals))
        self.check(name, root, done=True)
        # What the rival has made of it is not there when the first one is alone.
        own = scenario.result if scenario.rivals else ""
        names, wanted = ({name for name in of if name.startswith(own)} for of in (_names(root), base.names))
        if names != wanted:
            left, gone = names - wanted, wanted - names
            raise LawBrokenError(f"the next call left {sorted(left)} behind and lost {sorted(gone)}")

    def _undisturbed(self, scenario: Scenario) -> Baseline:
        folder, after = self.room / f"{scenario.name}-before", self.room / f"{scenario.name}-after"
        folder.mkdir()
        self.stage.prepare(scenario.name, folder)
        subprocess.run(["cp", "-a", folder, after], check=True)
        endings = self.operate(scenario.name, after, alone=scenario.rivals)
        succeeded(endings)
        before, held = self._checkpoints(scenario, folder), self._checkpoints(scenario, after)
        for kept in scenario.kept if not scenario.rivals else ():
            assert tree_of(folder / kept) != tree_of(after / kept), f"nothing is rewritten of {kept}"
        assert not any(UNREADABLE in one for one in (*before.values(), *held.values()))
        if scenario.saves:
            self._check_save(scenario, after, scenario.result)
        files = tree_of(after / scenario.result, after) if scenario.makes_new and held.keys() == before.keys() else {}
        newest = _latest(folder), _latest(after)
        if scenario.rivals:
            both = self.place(scenario.name)
            subprocess.run(["cp", "-a", folder, both], check=True)
            endings += self.operate(scenario.name, both)[1:]
            shutil.rmtree(both)
        return Baseline(folder, before, held, _names(after), files, newest, tuple(one.met.calls for one in endings))

    def _is_right(self, scenario: Scenario, base: Baseline, root: Path, folder: str, held: Holdings) -> bool:
        """Tell whether a checkpoint holds what was saved there, before or now."""
        if held in (base.before.get(folder), base.after.get(folder)):
            return True
        if folder not in scenario.saves or UNREADABLE in held:
            return False
        self._check_save(scenario, root, folder)  # what could not be carried was written instead
        return True

    def _check_save(self, scenario: Scenario, root: Path, folder: str) -> None:
        """Check by laws 1 and 3 what a save has made."""
        path, save = root / folder, scenario.saves[folder]
        loaded = self._stock.one("tests.support.world:load", MODEL, str(path))
        record = self._stock.one("tests.support.world:record", str(path))
        step = loaded["train.step"]
        if step not in save.steps:
            raise LawBrokenError(f"{folder} holds step {step}")
        # The record knows the step by the folder's name, which may be another one's that is saved again.
        own = int(folder.rpartition("-")[2])
        record["origins"] = [(of[0], step if of[1] == own else of[1], *of[2:]) for of in record["origins"]]
        try:
            check(Saved(path, step, MODEL, POLICY, [*save.ancestors, step]), loaded, record)
        except AssertionError as error:
            raise LawBrokenError(f"{folder}: {error}") from error

    def _record(self, folder: Path) -> dict[str, Any]:
        """Return what a checkpoint tells of its past, without what tells where its bytes are."""
        record = self._stock.one("tests.support.world:record", str(folder))
        return {key: value for key, value in record.items() if key not in _PLACES}

    @staticmethod
    def _is_whole(scenario: Scenario, base: Baseline, root: Path, found: Mapping[str, Holdings]) -> bool:
        if not base.files:
            result = scenario.result
            if scenario.saves:
                return result in found and found[result] != base.before.get(result)
            return found == base.after
        if not (root / scenario.result).exists():
            return False
        if tree_of(root / scenario.result, root) != base.files:
            raise LawBrokenError(f"{scenario.result} is there and is not what it should be")
        return True

    def _checkpoints(self, scenario: Scenario, root: Path) -> dict[str, Holdings]:
        """Return what every folder holds that looks like a checkpoint, as stock torch loads it."""
        folders = sorted(path.parent for path in root.rglob(".metadata") if not _growing(path.relative_to(root)))
        names = [folder.relative_to(root).as_posix() for folder in folders]
        linked = [scenario.linked and name == scenario.result for name in names]
        stock = [str(folder) for folder, ours in zip(folders, linked, strict=True) if not ours]
        held = iter(self._stock.one("tests.crash.outside:holdings", stock))
        return {
            name: _read(folder) if ours else next(held)
            for name, folder, ours in zip(names, folders, linked, strict=True)
        }


def succeeded(endings: Iterable[Ending]) -> None:
    """See that an operation which nothing disturbed has succeeded."""
    for ending in endings:
        if ending.raised is not None:
            raise LawBrokenError(f"nothing was in its way, and it failed: {ending.raised.trace}")
        if isinstance(ending.value, Said) and ending.value.code:
            raise LawBrokenError(f"nothing was in its way, and it failed: {ending.value.error}")


def _check_latest(scenario: Scenario, base: Baseline, root: Path, found: Mapping[str, Holdings], whole: bool) -> None:
    if scenario.rivals:  # it is for them to say who comes last
        return
    wanted = base.newest[whole]
    if wanted is not None and wanted not in found:
        if not scenario.stock:
            raise LawBrokenError(f"{wanted}, the latest checkpoint, is gone")
        wanted = scenario.untouched[-1]
    newest = _latest(root)
    if newest != wanted:
        raise LawBrokenError(f"the latest checkpoint should be {wanted} and is {newest}")


def _latest(root: Path) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = latest(root / "run")
    return None if found is None else found.relative_to(root).as_posix()


def _growing(path: Path) -> bool:
    """Tell whether a path lies in a folder that has not got its name yet."""
    return any(part.startswith(".") for part in path.parts[:-1])


def _read(folder: Path) -> Holdings:
    """Read what stock torch cannot."""
    checkpoint = open_checkpoint(folder)
    return {key: plain(checkpoint[key]) for key in checkpoint}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def tree_of(folder: Path, root: Path | None = None) -> Tree:
    """Return the bytes of all files below a folder, by path; what names the root, or one beside it, is made alike."""
    paths: Iterable[Path] = (folder, *folder.rglob("*")) if folder.exists() else ()
    names = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    held = {name: path.read_bytes() for name, path in names.items()}
    if root is None:
        return held
    places = re.compile(re.escape(str(root.parent).encode()) + rb"/[^/\n]+")  # a lost disk is looked at elsewhere
    return {name: places.sub(b"{}", data) for name, data in held.items()}


def _names(root: Path) -> tuple[str, ...]:
    """Return all names below a folder, those of saves made alike."""
    return tuple(sorted(_SAVE_ID.sub(r"\1_id", path.relative_to(root).as_posix()) for path in root.rglob("*")))


def _difference(held: Holdings, wanted: Holdings | None) -> str:
    if wanted is None or UNREADABLE in held:
        return f"what nobody saved: {held.get(UNREADABLE, list(held))}"
    keys = [key for key in {**wanted, **held} if held.get(key) != wanted.get(key)]
    return f"{len(keys)} keys that are wrong or missing, such as {keys[:3]}"
