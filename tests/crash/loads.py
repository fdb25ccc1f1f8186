"""Loads that fail: at any call that reads, and of any file that is damaged, the caller's state stays what it was."""

from __future__ import annotations

import copy
import errno
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tailor_dcp import LayerwiseLoadPlanner, LayerwiseReader
from tests.crash.plan import Action, Calls, Plan, arm, disarm, met
from tests.crash.scenarios import MODEL, Operation, Scenario, steps
from tests.support.world import state

_STEP = "run/step-30"
_OWN = 77
"""The step whose values the caller's state has before it is loaded into."""


@dataclass
class Tried:
    """What came of loads.

    Attributes:
        loads: how many were tried.
        failed: how many of them failed.
        wrong: what should not have been, a sentence each.
    """

    loads: int = 0
    failed: int = 0
    wrong: list[str] = field(default_factory=list)


def _try(tried: Tried, what: str, folder: Path, group: Any) -> None:
    """Load once, and see that the state is as it should be; all ranks must agree whether it failed."""
    target = state(MODEL, _OWN, group)
    tensors, before = _tensors(target), copy.deepcopy(target)
    error: BaseException | None = None
    try:
        dcp.load(
            target,
            storage_reader=LayerwiseReader(folder, verify=True, atomic=True, threads=2),
            planner=LayerwiseLoadPlanner(folder),
            process_group=group,
        )
    except BaseException as raised:  # CheckpointException is no Exception
        error = raised
    finally:
        disarm()
    tried.loads += 1
    tried.failed += error is not None
    if _anywhere(error is not None, group) != (error is not None):
        tried.wrong.append(f"{what}: one rank failed and another did not")
    elif error is None and not _same(target, _saved(group)):
        tried.wrong.append(f"{what}: it succeeded, and the state is not what was saved")
    elif error is not None and not (_same(target, before) and _unmoved(target, tensors)):
        tried.wrong.append(f"{what}: it failed, and the state is not what it was")
    elif error is not None and not _is_clear(error):
        tried.wrong.append(f"{what}: {type(error).__name__} is no clear error: {error}")


def _saved(group: Any) -> dict[str, Any]:
    """Return what stock torch loads from the undamaged checkpoint, which every call finds again."""
    if group not in _GOOD:
        target = state(MODEL, 0, group, empty=True)
        dcp.load(target, checkpoint_id=_FOLDER[0], process_group=group)
        _GOOD[group] = target
    return _GOOD[group]


_GOOD: dict[Any, dict[str, Any]] = {}
_FOLDER: list[Path] = []


def _anywhere(one: bool, group: Any) -> bool:
    if group is None:
        return one
    found = [False] * dist.get_world_size(group)
    dist.all_gather_object(found, one, group=group)
    return any(found)


def _same(a: Any, b: Any) -> bool:
    """Compare two states bit for bit, entries that are no tensors too."""
    one, other = _local(a), _local(b)
    return one.keys() == other.keys() and all(
        torch.equal(value.view(torch.uint8), other[key].view(torch.uint8))
        if isinstance(value, torch.Tensor)
        else value == other[key]
        for key, value in one.items()
    )


def _local(tree: dict[str, Any]) -> dict[str, Any]:
    """Return every entry of a state by path, of tensors what this rank has of them."""
    found: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict | list):
            for name, value in node.items() if isinstance(node, dict) else enumerate(node):
                walk(value, f"{path}/{name}")
        elif isinstance(node, torch.Tensor):
            local = getattr(node, "_local_tensor", node)
            found[path] = local.detach().reshape(-1).contiguous()
        else:
            found[path] = node

    walk(tree, "")
    return found


def _tensors(tree: dict[str, Any]) -> dict[str, int]:
    return {path: tensor.data_ptr() for path, tensor in _local(tree).items() if isinstance(tensor, torch.Tensor)}


def _unmoved(tree: dict[str, Any], before: dict[str, int]) -> bool:
    """Tell whether the tensors are still the caller's own."""
    return _tensors(tree) == before


def _is_clear(error: BaseException) -> bool:
    inner = [held[0] for held in getattr(error, "failures", {}).values()] or [error]
    kinds = {cls.__name__ for one in inner for cls in type(one).__mro__}
    # What our reader says of .metadata DCP puts into an AssertionError of its own.
    clear = kinds & {"TailorError", "OSError"} or all("global metadata read failed" in str(one) for one in inner)
    return bool(clear) and all(str(one).strip() for one in inner)


# Calls ----------------------------------------------------------------------------------------------------------

_READS = Calls.READ | Calls.LOOK
FAULTS: dict[str, tuple[Action, int, bool]] = {
    "ENOENT": (Action.FAIL, errno.ENOENT, False),
    "EIO": (Action.FAIL, errno.EIO, False),
    "ESTALE": (Action.FAIL, errno.ESTALE, False),
    "EACCES": (Action.FAIL, errno.EACCES, False),
    "EMFILE": (Action.FAIL, errno.EMFILE, True),
    "EINTR": (Action.FAIL, errno.EINTR, False),
    "short reads": (Action.SHORT, 0, True),
    "end of file": (Action.END, 0, False),
    "always at its end": (Action.END, 0, True),
}


def _refused(fault: str) -> Callable[[Path, int, Any], Operation]:
    """Return loads in which a fault happens at every call in turn, of the last rank."""

    def ready(root: Path, rank: int, group: Any) -> Operation:
        action, error, lasting = FAULTS[fault]
        # No stat is ever interrupted, says POSIX.
        classes = Calls.READ if action in (Action.SHORT, Action.END) or error == errno.EINTR else _READS
        victim = group is None or rank == dist.get_world_size(group) - 1
        plan, folder = root.parent / f"{root.name}-plan{rank}", root / _STEP
        _FOLDER.append(folder)
        _saved(group)

        def operation() -> Tried:
            disarm()
            tried, at, more = Tried(), 0, True
            while more:
                if victim:
                    Plan(str(root), classes, action, at, error, lasting).write(plan)
                    arm(plan)
                _try(tried, f"{fault} at call {at}", folder, group)
                at += 1
                more = _anywhere(victim and at <= met(plan).calls + 1, group) if at > 1 else True
            return tried

        return operation

    return ready


# Damage ---------------------------------------------------------------------------------------------------------


def _damages(path: Path, draw: random.Random, count: int) -> Iterator[tuple[str, bytes | None]]:
    """Yield what may have become of a file; None if it is gone."""
    good = path.read_bytes()
    yield "gone", None
    yield "empty", b""
    for _ in range(count):
        cut, bit = draw.randrange(len(good)), draw.randrange(8 * len(good))
        yield f"cut off at {cut}", good[:cut]
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit} flipped", bytes(flipped)
        yield f"zeros from {cut}", good[:cut] + bytes(len(good) - cut)


@contextmanager
def _damaged(path: Path, data: bytes | None, first: bool, group: Any) -> Iterator[None]:
    """Let a file be so for a while; its good copy stays aside, so that other names of it are damaged as well."""
    good = path.read_bytes()
    _meet(group)
    if first:
        path.unlink() if data is None else path.write_bytes(data)
    _meet(group)
    try:
        yield
    finally:
        _meet(group)
        if first:
            path.write_bytes(good)
        _meet(group)


def _meet(group: Any) -> None:
    if group is not None:
        dist.barrier(group)


def _broken(count: int) -> Callable[[Path, int, Any], Operation]:
    """Return loads of a checkpoint of which one file after the other is damaged."""

    def ready(root: Path, rank: int, group: Any) -> Operation:
        folder, draw = root / _STEP, random.Random(count)
        _FOLDER.append(folder)
        _saved(group)

        def operation() -> Tried:
            disarm()
            tried = Tried()
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                for what, data in list(_damages(path, draw, count)):
                    with _damaged(path, data, rank == 0, group):
                        _try(tried, f"{path.name} {what}", folder, group)
            return tried

        return operation

    return ready


def _scenarios() -> Iterator[Scenario]:
    prepare = steps(10, 20, 30, writer="layerwise")
    for ranks in (1, 2):
        of = f", {ranks} ranks" if ranks > 1 else ""
        for fault in FAULTS:
            yield Scenario(f"load, {fault}{of}", prepare, _refused(fault), _STEP, (), ranks=ranks)
        for count in (3, 40):
            yield Scenario(f"load, damaged {count}{of}", prepare, _broken(count), _STEP, (), ranks=ranks)


ALL = {scenario.name: scenario for scenario in _scenarios()}
