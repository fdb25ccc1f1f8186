"""The training that the soak saves: values that tell when they were saved, and what worker processes do.

Every save has a moment of its own, a number that no other save has. What each tensor holds at a moment follows from
its key and the moment alone, so what a checkpoint must hold is known without asking the code that saved it. Values
drift, at a rate of each tensor's own, so that policies which look at that have something to choose from.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import DeviceMesh

from tests.support import world
from tests.support.world import Model, Param

DEFAULT = "default"
"""The policy that a planner has when it is given none."""
CHANGES = frozenset({"os.link", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.utime"})
_NO_OPTIONS = StagingOptions(False, False, False, False)  # what async_save itself takes where none is given

MODEL = Model(
    (
        Param("model.embed_tokens.weight", (24, 8), "shard"),
        Param("model.base.weight", (8, 8), "shard", trained=False),
        *(Param(f"model.layers.{i}.attn.weight", (8, 8), "shard") for i in range(3)),
        *(Param(f"model.layers.{i}.mlp.weight", (12, 8), "replicate") for i in range(3)),
        Param("model.norm.weight", (8,)),
        Param("lm_head.weight", (24, 8), "shard", dtype="bfloat16"),
    )
)


KEYS = world.keys(MODEL)
"""Every tensor's key: its parameter and its kind."""


def full_value(key: str, moment: int) -> torch.Tensor:
    """Return what a key holds at a moment."""
    param, kind = KEYS[key]
    if kind == "step":
        return torch.tensor(float(moment))
    dtype = getattr(torch, param.dtype if kind == "weight" else "float32")
    start, move = _path(key)
    return (start + moment * move).to(dtype) if param.trained else start.to(dtype)


@cache
def _path(key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where a tensor starts, and how it moves from moment to moment."""
    shape = KEYS[key][0].shape
    rate = 10.0 ** -(2 + sum(key.encode()) % 4)
    return world.value(key, 0, shape), rate * world.value(f"{key} moves", 0, shape)


def state(moment: int, group: Any, empty: bool = False) -> dict[str, Any]:
    """Return this rank's state at a moment; or zeros to load into."""
    mesh = DeviceMesh.from_group(group, "cpu") if group is not None else None

    def make(key: str) -> torch.Tensor:
        whole = full_value(key, moment)
        whole = torch.zeros_like(whole) if empty else whole
        spread = KEYS[key][0].spread
        return whole if mesh is None else world._spread(whole, spread, mesh)

    weights = {f"model.{p.fqn}": make(f"model.{p.fqn}") for p in MODEL.params}
    moments: dict[str, dict[str, Any]] = {p.fqn: {} for p in MODEL.params if p.trained}
    for key, (param, kind) in KEYS.items():
        if kind != "weight":
            moments[param.fqn][kind] = make(key)
    rest = 0 if empty else moment
    groups = [{"lr": torch.tensor(float(rest)), "params": [p.fqn for p in MODEL.params]}]
    return {
        "model": {key.removeprefix("model."): value for key, value in weights.items()},
        "optim": {"state": moments, "param_groups": groups},
        "train": {"step": rest, "rng": torch.full((16,), rest % 251, dtype=torch.uint8)},
    }


# What workers are told to do --------------------------------------------------------------


def save(group: Any, moment: int, path: str, policy: str, carry: str, writer: str, way: str) -> None:
    """Save with our planner and wait for it: ``now``, in a ``thread``, or ``staged`` by our stager."""
    from tailor_dcp import LayerwisePlanner
    from tailor_dcp.writer import LayerwiseWriter

    options: Any = {"carry": carry}
    planner = LayerwisePlanner(**options) if policy == DEFAULT else LayerwisePlanner(policy, **options)
    to = LayerwiseWriter(path) if writer == "layerwise" else dcp.FileSystemWriter(path)
    how: dict[str, Any] = {"storage_writer": to, "planner": planner, "process_group": group}
    if way == "now":
        dcp.save(state(moment, group), **how)
        return
    stager = planner.stager(path, group) if way == "staged" else DefaultStager(_NO_OPTIONS)
    how |= {"async_checkpointer_type": AsyncCheckpointerType.THREAD, "async_stager": stager}
    done: Any = dcp.async_save(state(moment, group), **how)
    getattr(done, "upload_completion", done).result()


def save_and_die(group: Any, victim: int, nth: int, root: str, *how: Any) -> None:
    """Save, and let one rank be killed at its n-th change below a folder."""
    if dist.get_rank(group) == victim:
        die_at(nth, root)
    save(group, *how)


def load(group: Any, path: str) -> dict[str, Any]:
    """Load with torch alone and return everything, whole."""
    target = state(0, group, empty=True)
    dcp.load(target, checkpoint_id=path, process_group=group)
    return world.flat(target)


def load_each(group: Any, paths: list[str]) -> list[dict[str, Any]]:
    """Load several checkpoints with torch alone."""
    return [load(group, path) for path in paths]


def load_atomically(group: Any, path: str) -> dict[str, Any]:
    """Load with our reader, all or nothing, and return everything, whole."""
    from tailor_dcp import LayerwiseReader

    target = state(0, group, empty=True)
    reader = LayerwiseReader(path, atomic=True, process_group=group)
    dcp.load(target, storage_reader=reader, process_group=group)
    return world.flat(target)


def record(path: str) -> dict[str, Any]:
    """Return a checkpoint's record as stock pickle sees it."""
    told: dict[str, Any] = pickle.loads((Path(path) / ".metadata").read_bytes()).tailor
    return told


def use(group: Any) -> tuple[int, int]:
    """Return the bytes of memory and the number of open files that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1


def die_at(nth: int, root: str) -> None:
    """Let this process be killed with SIGKILL at its n-th change below a folder, before it makes it."""
    left = nth

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if (event in CHANGES or writes) and any(_is_below(argument, root) for argument in arguments[:2]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _is_below(argument: Any, root: str) -> bool:
    return isinstance(argument, (str, os.PathLike)) and os.fspath(argument).startswith(root)
