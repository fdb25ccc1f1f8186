"""Report: a whole run at a glance, as data and as one page that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tailor_dcp.diff import diff
from tailor_dcp.errors import NoCheckpointError, TailorError
from tailor_dcp.history import FileId, Held, History, OtherFolder, read_history
from tailor_dcp.location import METADATA
from tailor_dcp.policies.words import in_words
from tailor_dcp.report_file import check_target, write_page
from tailor_dcp.store_path import is_url, place
from tailor_dcp.units import Unit

Progress = Callable[[int, int], None]
DriftFrom = Literal["tensors", "sketches"] | None


class NoTensorsError(TailorError):
    """The tensors of a run cannot be compared where it is."""


@dataclass(frozen=True)
class SaveView:
    """One checkpoint of a run. All sizes in bytes.

    Attributes:
        name: its folder, within the run.
        step: its step.
        time: when it was saved, seconds since the epoch.
        seconds: how long the save took; None where nobody measured it.
        since: seconds since the save before.
        policy: the policy it was saved with; None for a stock planner.
        carry: how it refers to earlier bytes; None for a stock planner.
        parent: the checkpoint it carries from, None if none.
        written: bytes that its save wrote to data files.
        full: bytes that a full save would have written, in the training state's dtypes.
        alone: bytes that it reads in files that no other checkpoint of the run refers to.
        shared: bytes that it reads in files that others refer to as well.
        dead: bytes in the files that it refers to and does not read.
        frees: bytes that removing it alone would give back: the files that no other refers to.
        metadata: size of ``.metadata``.
        behind: for each kind the steps by which it lags behind: the mean over its bytes, and the most.
        left: whether the run went back behind it later on, so that it is no ancestor of the newest state.
        missing: what it needs and what is not there.
        outside: files that it names outside of the run, which were not looked at.
    """

    name: str
    step: int | None
    time: float
    seconds: float | None
    since: float | None
    policy: str | None
    carry: str | None
    parent: str | None
    written: int
    full: int
    alone: int
    shared: int
    dead: int
    frees: int
    metadata: int
    behind: dict[str, tuple[float, int]]
    left: bool
    missing: tuple[str, ...]
    outside: tuple[str, ...]


@dataclass(frozen=True)
class UnitHistory:
    """One unit over the whole run; every tuple has an entry for each checkpoint.

    Attributes:
        layer: the layer's name.
        kind: ``weight`` or the optimizer state's name.
        bytes: of its tensors, in the training state's dtypes, in the newest checkpoint that has it.
        origins: the step whose values it holds; None where it is not there, or its save told no step.
        saves: how many saves old these values are; None where it is not there.
        drift: how far it moved from what the checkpoint before held, |w - w_before| / |w_before|; None where both hold
            one save's values, where it was zero, and where nothing tells.
    """

    layer: str
    kind: str
    bytes: int
    origins: tuple[int | None, ...]
    saves: tuple[int | None, ...]
    drift: tuple[float | None, ...]


@dataclass(frozen=True)
class PolicyView:
    """Successive checkpoints that were saved with one policy.

    Attributes:
        policy: its string; None for a stock planner.
        words: what it writes.
        first: the first of them.
        last: the last of them.
        saves: how many they are.
    """

    policy: str | None
    words: str
    first: str
    last: str
    saves: int


@dataclass(frozen=True)
class Report:
    """What ``report`` finds. All sizes in bytes.

    Attributes:
        run: the run's folder.
        series: which checkpoints of each step, empty for most runs.
        drift_from: what drift was told by: ``tensors``, ``sketches``, or None where nothing tells.
        saves: the checkpoints in the order in which they were saved.
        units: every unit that any of them has, in the model's order.
        policies: the policies, one after another.
        backwards: pairs of checkpoints, the later one first, of which the earlier one has the higher step.
        unreadable: names and reasons of checkpoints that cannot be read.
        others: folders that are no such checkpoints.
        disk: the data files that the checkpoints refer to, each once.
        dead: bytes in them that no checkpoint reads.
    """

    run: str
    series: str
    drift_from: DriftFrom
    saves: tuple[SaveView, ...]
    units: tuple[UnitHistory, ...]
    policies: tuple[PolicyView, ...]
    backwards: tuple[tuple[str, str], ...]
    unreadable: tuple[tuple[str, str], ...]
    others: tuple[OtherFolder, ...]
    disk: int
    dead: int

    @property
    def written(self) -> int:
        """Bytes that all saves wrote."""
        return sum(save.written for save in self.saves)

    @property
    def full(self) -> int:
        """Bytes that as many full saves would have written."""
        return sum(save.full for save in self.saves)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its units, weights first."""
        return tuple(dict.fromkeys(unit.kind for unit in sorted(self.units, key=lambda unit: unit.kind != "weight")))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain builtins, for ``--json``."""
        return {**asdict(self), "written": self.written, "full": self.full}


def report(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    drift: bool = False,
    series: str = "",
    progress: Progress | None = None,
    allow: tuple[str, ...] = (),
) -> Report:
    """Look at all checkpoints of a run: what each wrote and holds, how stale it is, and what is where on disk.

    Only metadata is read, unless drift is asked for; nothing in it is executed, and nothing outside of the run is
    looked at. Checkpoints of stock planners count as what they are: full.

    Args:
        run: the run's folder, or its address.
        out: the page to write: HTML in one file, which loads nothing. It appears whole or not at all. None writes none.
        drift: compare the tensors of successive checkpoints; otherwise drift is told from the sketches in their
            records, where the policy asked for any.
        series: for runs that keep several checkpoints a step, which (``optimizer_0``).
        progress: is told how many of how many checkpoints are done.
        allow: classes, as ``module.Class``, that may be unpickled for drift.

    Raises:
        NoCheckpointError: the run holds no committed checkpoint.
        NoTensorsError: drift is asked for, and the run is on an object store.
        TailorError: ``out`` is a folder or another program's file, or cannot be written; tensors cannot be read.
    """
    if out is not None:
        check_target(Path(out))
    if drift and is_url(run):
        raise NoTensorsError(
            f"{os.fspath(run)} is on an object store, whose tensors are not compared; copy the run here first, or "
            f"leave drift out."
        )
    folder = place(run)
    if not folder.is_dir():
        raise NoCheckpointError(f"{folder} is no folder; name a run, whose sub-folders are its checkpoints.")
    if (folder / METADATA).exists():
        raise NoCheckpointError(f"{folder} is a checkpoint itself; name the run that it belongs to.")
    steps = 2 if drift else 1
    history = read_history(folder, series, not drift, _part(progress, 0, steps))
    if not history.held:
        raise NoCheckpointError(_nothing(folder, history))
    moved = _compared(history.held, _part(progress, 1, steps), allow) if drift else None
    found = _assembled(str(folder), series, history, moved)
    if out is not None:
        # Who only wants the data need not load what draws.
        from tailor_dcp.report_page import page  # noqa: PLC0415

        write_page(page(found), Path(out))
    return found


def _part(progress: Progress | None, part: int, parts: int) -> Progress | None:
    return (lambda done, total: progress(part * total + done, parts * total)) if progress else None


def _nothing(folder: Path, history: History) -> str:
    if history.series:
        return f"{folder} keeps several checkpoints a step; say which: --series {' or '.join(sorted(history.series))}."
    if history.unreadable:
        name, why = history.unreadable[0]
        return f"No checkpoint of {folder} can be read; of {name}: {why}"
    return f"{folder} holds no committed checkpoint: no folder such as step-100 in it has a {METADATA}."


# Drift from tensors ------------------------------------------------------------------------


def _compared(held: list[Held], progress: Progress | None, allow: tuple[str, ...]) -> list[dict[Unit, float]]:
    """Compare the tensors of each checkpoint with those of the one before."""
    found: list[dict[Unit, float]] = []
    for done, one in enumerate(held):
        before = _before(held, done)
        units = diff(before.folder, one.folder, allow=allow).units if before else ()
        found.append({Unit(u.layer, u.kind): u.relative for u in units if u.relative is not None and not u.carried})
        if progress:
            progress(done + 1, len(held))
    return found


def _before(held: list[Held], at: int) -> Held | None:
    """Return what a checkpoint carries from; or else the last one before it with a lower step."""
    one = held[at]
    parents = [h for h in held[:at] if one.parent is not None and h.origin.save_id == one.parent.save_id]
    lower = [h for h in held[:at] if (h.origin.step or 0) < (one.origin.step or 0)]
    return next(iter([*parents[-1:], *lower[-1:]]), None)


# Assembling --------------------------------------------------------------------------------


def _assembled(run: str, series: str, history: History, moved: list[dict[Unit, float]] | None) -> Report:
    held = history.held
    units = tuple(_unit(unit, held, moved) for unit in _order(held))
    drifting = any(drift is not None for unit in units for drift in unit.drift)
    sizes: dict[FileId, int] = {identity: file.size for one in held for identity, file in one.files.items()}
    return Report(
        run=run,
        series=series,
        drift_from="tensors" if moved is not None else "sketches" if drifting else None,
        saves=tuple(_saves(held)),
        units=units,
        policies=tuple(_policies(held)),
        backwards=tuple(_backwards(held)),
        unreadable=tuple(history.unreadable),
        others=tuple(history.others),
        disk=sum(sizes.values()),
        dead=sum(history.dead.values()),
    )


def _order(held: list[Held]) -> list[Unit]:
    """Return all units, those of the newest checkpoint first; each layer's together."""
    units = list(dict.fromkeys(unit for one in reversed(held) for unit in one.units))
    layers = {layer: number for number, layer in enumerate(dict.fromkeys(unit.layer for unit in units))}
    return sorted(units, key=lambda unit: layers[unit.layer])


def _unit(unit: Unit, held: list[Held], moved: list[dict[Unit, float]] | None) -> UnitHistory:
    there = [one.units.get(unit) for one in held]
    sketched = [at.drift if at else None for at in there]
    return UnitHistory(
        layer=unit.layer,
        kind=unit.kind,
        bytes=next(at.whole for at in reversed(there) if at),
        origins=tuple(at.origin.step if at else None for at in there),
        saves=tuple(_age(one, unit) for one in held),
        drift=tuple(sketched if moved is None else (one.get(unit) for one in moved)),
    )


def _age(held: Held, unit: Unit) -> int | None:
    at = held.units.get(unit)
    if at is None:
        return None
    # A merge takes from saves that are no ancestors, so their numbers say little; but it is not of this save.
    return 0 if at.origin.save_id == held.origin.save_id else max(1, held.origin.nth - at.origin.nth)


def _saves(held: list[Held]) -> Iterable[SaveView]:
    users: dict[FileId, int] = {}
    for one in held:
        for identity in one.files:
            users[identity] = users.get(identity, 0) + 1
    lowest: int | None = None  # of the steps that were saved later
    left = []
    for one in reversed(held):
        step = one.origin.step
        left.append(lowest is not None and step is not None and step >= lowest)
        lowest = step if lowest is None or (step is not None and step < lowest) else lowest
    for number, (one, behind) in enumerate(zip(held, reversed(left), strict=True)):
        own = [file for identity, file in one.files.items() if users[identity] == 1]
        others = [file for identity, file in one.files.items() if users[identity] > 1]
        yield SaveView(
            name=one.origin.folder,
            step=one.origin.step,
            time=one.time,
            seconds=one.seconds,
            since=one.time - held[number - 1].time if number else None,
            policy=one.policy,
            carry=one.carry,
            parent=one.parent.folder if one.parent else None,
            written=one.written,
            full=one.full,
            alone=sum(file.live for file in own),
            shared=sum(file.live for file in others),
            dead=sum(file.size - file.live for file in one.files.values()),
            frees=sum(file.size for file in own),
            metadata=one.metadata,
            behind=_behind(one),
            left=behind,
            missing=one.missing,
            outside=one.outside,
        )


def _behind(held: Held) -> dict[str, tuple[float, int]]:
    """Return for each kind the mean and the greatest number of steps by which it lags behind."""
    ages: dict[str, list[tuple[int, int]]] = {}
    step = held.origin.step
    for unit, at in held.units.items():
        if step is not None and at.origin.step is not None:
            ages.setdefault(unit.kind, []).append((abs(step - at.origin.step), at.whole))
    found = {}
    for kind, of_kind in ages.items():
        total = sum(weight for _, weight in of_kind)
        mean = sum(age * weight for age, weight in of_kind) / total if total else 0.0
        found[kind] = (mean, max(age for age, _ in of_kind))
    return found


def _policies(held: list[Held]) -> Iterable[PolicyView]:
    start = 0
    for number in range(1, len(held) + 1):
        if number == len(held) or held[number].policy != held[start].policy:
            policy = held[start].policy
            words = "everything in every save, by torch's own planner" if policy is None else in_words(policy)
            names = held[start].origin.folder, held[number - 1].origin.folder
            yield PolicyView(policy, words, *names, number - start)
            start = number


def _backwards(held: list[Held]) -> Iterable[tuple[str, str]]:
    for number in range(1, len(held)):
        before, one = held[number - 1].origin, held[number].origin
        if before.step is not None and one.step is not None and one.step < before.step:
            yield one.folder, before.folder
