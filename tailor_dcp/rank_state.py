"""State that every rank has for itself: random number generators, data loader positions.

DCP keeps one rank's value of such an entry and drops the others silently; numbered keys, one
a rank, fail to load at more ranks. Here all ranks' values are gathered into one entry.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tailor_dcp import unpickling
from tailor_dcp.errors import TailorError
from tailor_dcp.metadata.pickle_names import shown


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's value, on every rank; a list of one without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def rank_of(group: dist.ProcessGroup | None = None) -> int:
    """Return this process's rank in the group, 0 without torch.distributed."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of ranks, 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def pack(values: list[Any]) -> bytes:
    """Serialise all ranks' values into one entry. Bytes, because DCP would take a list apart."""
    stream = io.BytesIO()
    torch.save(values, stream)
    return stream.getvalue()


def unpack(packed: bytes, name: str) -> list[Any]:
    """Read all ranks' values back; nothing in them is run.

    Raises:
        TailorError: an unknown class is in there, or it is damaged.
    """
    try:
        values = unpickling.load(io.BytesIO(packed))
    except Exception as error:  # whatever damaged bytes lead torch.load to
        unknown = unpickling.asked_for(error)
        if unknown is None:
            raise TailorError(
                f"{name} of the checkpoint is damaged ({type(error).__name__} while it was read); "
                f"load another checkpoint."
            ) from error
        raise TailorError(
            f"{name} of the checkpoint holds a {shown(unknown)}, a class that is not restored unasked; if you trust "
            f"it, call torch.serialization.add_safe_globals([{shown(unknown.rpartition('.')[2])}]) before loading."
        ) from error
    return values if isinstance(values, list) else [values]


def same(a: Any, b: Any) -> bool:
    """Tell whether two states are equal; ``==`` alone gives no answer where arrays are in them."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def rng_state() -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators (CPU and the current GPU)."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Set all generators to a state that ``rng_state`` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_from(state: dict[str, Any], rank: int) -> None:
    """Seed all generators of a rank that did not exist at the save: reproducibly, and unlike any other's."""
    digest = hashlib.sha256(state["torch"].numpy().tobytes() + rank.to_bytes(8, "big")).digest()
    seed = int.from_bytes(digest[:4], "big")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
