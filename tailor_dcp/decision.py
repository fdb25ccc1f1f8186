"""The decision of one save: what it writes, what it carries, and from where."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from tailor_dcp import carry
from tailor_dcp.base import Base
from tailor_dcp.carry import Placement, Source
from tailor_dcp.errors import BaseError, TailorWarning
from tailor_dcp.layers import LayerMap
from tailor_dcp.location import Location
from tailor_dcp.metadata.compose import StorageData, file_sizes, rebase, shape_of
from tailor_dcp.metadata.record import CarryMode, Origin
from tailor_dcp.policies import Full, Policy, SaveRequest
from tailor_dcp.selection import Holdings, State, ask, complete, held, make_request
from tailor_dcp.units import Unit

_BROKEN = (errno.ENOENT, errno.EIO)  # the base itself is damaged; other errors are the link's


@dataclass(frozen=True)
class Rules:
    """How the user wants saves to be made.

    Attributes:
        policy: which units are due.
        mode: how earlier bytes are made part of a new checkpoint.
        full_every: every so many saves, one is full; None for never.
        layers: how keys are grouped into layers.
        explicit: the base was named by the user, so a damaged one is an error.
    """

    policy: Policy
    mode: CarryMode
    full_every: int | None
    layers: LayerMap
    explicit: bool


@dataclass(frozen=True)
class Decision:
    """What one save writes and carries.

    Attributes:
        request: what the policy was asked.
        due: the units that are written.
        origins: the saves that the carried units come from.
        entries: the carried units' blobs, as they are found from the new folder.
        paths: the files that hold them, old name to new.
        mode: how they are carried.
    """

    request: SaveRequest
    due: set[Unit]
    mode: CarryMode
    origins: Mapping[Unit, Origin] = field(default_factory=dict)
    entries: StorageData = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)


def decide(state: State, base: Base | None, target: Location, rules: Rules, present: Collection[str] = ()) -> Decision:
    """Choose the due units and make the files of all others part of the target.

    Args:
        state: what is being saved.
        base: the checkpoint to carry from; None for none.
        target: the checkpoint that is being written.
        rules: how the user wants saves to be made.
        present: files that an earlier save into the target left there; they are not removed.

    Raises:
        PolicyError: the policy returned a unit that does not exist.
        BaseError: the base was named by the user and its files are missing or too short.
    """
    mode = _mode(base, rules)
    holdings = base.holdings() if base and mode else Holdings()
    available = held(state, holdings)
    index = base.origin.nth + 1 if base else 0
    request = make_request(state, available, target.step, index, rules.layers, rules.policy, _rate(base))
    full = rules.full_every is not None and index % rules.full_every == 0
    due = ask(rules.policy, request, state, available.keys(), full)
    if base and mode and not full and base.linked:
        _warn_of_links(rules.policy, base, target)
    if not base or not mode:
        return Decision(request, due, rules.mode)
    if not full:
        _warn_of_changes(state, holdings, base, target)
    due, paths = _carry(state, base, target, due, available, mode, rules.explicit, present)
    origins = {unit: origin for unit, origin in available.items() if unit not in due}
    blobs = (blob for unit in origins for key in state.units[unit] for blob in base.blobs[key])
    return Decision(request, due, mode, origins, rebase(blobs, paths), paths)


def _rate(base: Base | None) -> float | None:
    """Return the bytes per second of the base's own save, from its planning to its commit."""
    record = base.record if base else None
    if base is None or record is None or not record.seconds:
        return None
    own = (key for held in record.units.values() if held.origin.save_id == record.save_id for key in held.keys)
    entries = base.metadata.state_dict_metadata
    return sum(shape_of(entries[key]).bytes for key in own) / record.seconds or None


def _mode(base: Base | None, rules: Rules) -> CarryMode | None:
    """Return how to carry from this base; None if nothing should be.

    A stock planner's files have names that a later stock save into that folder would write
    over, in place: they are never shared. A base that the user names is copied instead.
    """
    if base is None or base.record is not None or rules.mode == "copy":
        return rules.mode
    return "copy" if rules.explicit else None


def _carry(
    state: State,
    base: Base,
    target: Location,
    due: set[Unit],
    available: Mapping[Unit, Origin],
    mode: CarryMode,
    explicit: bool,
    present: Collection[str],
) -> tuple[set[Unit], dict[str, str]]:
    """Place the files of what is not due; what cannot be placed becomes due."""
    placed = Placement()
    while True:
        files = _files(state, base, due, available)
        new = carry.place(
            {name: source for name, source in files.items() if name not in placed.paths},
            base.location,
            target,
            mode,
        )
        placed.paths.update(new.paths)
        if not new.failures:
            break
        _report(new.failures, target, explicit)
        lost = _owners(state, base, new.failures)
        available = {unit: origin for unit, origin in available.items() if unit not in lost}
        due = complete(due | lost, state, available.keys())
    unused = {path for name, path in placed.paths.items() if name not in files}
    carry.remove(unused.difference(present), target.folder)
    return due, {name: path for name, path in placed.paths.items() if name in files}


def _files(state: State, base: Base, due: set[Unit], available: Mapping[Unit, Origin]) -> dict[str, Source]:
    """Return the files that hold what is to be carried, who wrote them, and how long they must be."""
    files: dict[str, Source] = {}
    for unit, origin in available.items():
        if unit in due:
            continue
        for name, size in file_sizes(blob for key in state.units[unit] for blob in base.blobs[key]).items():
            known = files.get(name)
            if known is None or known.size < size:
                files[name] = Source(origin.save_id, size, base.path(name))
    return files


def _owners(state: State, base: Base, files: Mapping[str, OSError]) -> set[Unit]:
    return {
        unit
        for unit, keys in state.units.items()
        if any(info.relative_path in files for key in keys for _, info in base.blobs.get(key, ()))
    }


def _report(failures: Mapping[str, OSError], target: Location, explicit: bool) -> None:
    first = next(iter(failures.values()))
    more = f" (and {len(failures) - 1} more files)" if len(failures) > 1 else ""
    if explicit and any(error.errno in _BROKEN for error in failures.values()):
        raise BaseError(f"The base is damaged: {carry.explain(first)}{more}; give another base=.")
    warnings.warn(
        f"{carry.explain(first)}{more}: it cannot be carried into {target.folder}, so its layers are "
        f"written there although they are not due.",
        TailorWarning,
        stacklevel=2,
    )


def _warn_of_links(policy: Policy, base: Base, target: Location) -> None:
    if str(policy) != str(Full()):
        warnings.warn(
            f"{base.location.folder} is linked to files that DCP's own reader cannot read, so nothing of these is "
            f"carried and {target.folder} is written as a whole; later saves carry from that.",
            TailorWarning,
            stacklevel=2,
        )


def _warn_of_changes(state: State, holdings: Holdings, base: Base, target: Location) -> None:
    changed = [
        f"{key} was {_words(holdings, key)} and is {_words(state, key)}"
        for keys in state.units.values()
        for key in keys
        if key in holdings.shapes and holdings.shapes[key] != state.shapes[key]
    ]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        warnings.warn(
            f"{changed[0]}{more}: changed since {base.location.folder}, so it is written to "
            f"{target.folder} whether due or not.",
            TailorWarning,
            stacklevel=2,
        )


def _words(owner: State | Holdings, key: str) -> str:
    shape = owner.shapes[key]
    if shape.size is None:
        return "no tensor"
    return f"{tuple(shape.size)} {str(shape.dtype).removeprefix('torch.')}"
