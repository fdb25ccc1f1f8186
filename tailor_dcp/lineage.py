"""Which committed checkpoints this process's training state descends from.

Only an ancestor may be carried from: a run that went back to step 100 must never mix with
the abandoned step 120 that lies beside it. An ancestor is a folder *and* the id of the save
that filled it, so a folder that was saved again is no ancestor any more.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tailor_dcp import dcp_events
from tailor_dcp.errors import TailorError
from tailor_dcp.location import METADATA, Location, locate
from tailor_dcp.store_path import place

Stamp = tuple[int, int, int]
"""Inode, modification time in ns and size of a ``.metadata``: the same stamp, the same content.

Of an object, what stands for the inode changes whenever it is put anew.
"""

_LONGEST_CHAIN = 8  # a save whose eight last ancestors are all gone writes everything


@dataclass(frozen=True)
class Ancestor:
    """A checkpoint that the training state descends from.

    Known by the id of its save; where a stock ``dcp.load`` was seen, which tells none, by the
    stamp that its ``.metadata`` had at that time; where a process of its own was asked to save,
    which draws the id, by not being older than the asking.
    """

    folder: str
    save_id: str | None = None
    stamp: Stamp | None = None
    asked: float | None = None


Chain = tuple[Ancestor, ...]
"""Ancestors, newest first."""


@dataclass(frozen=True)
class _Branch:
    chain: Chain
    loaded_from: tuple[Path, int | None] | None  # run and step, if a load put it there


_Key = tuple[Path, str]  # run and series
Snapshot = dict[_Key, Chain]

TOKEN_KEY = "train.token"
"""Where ``TrainState`` and ``EngineState`` keep their token in a state dict."""


@dataclass(frozen=True)
class Token:
    """What a training state remembers about where it comes from; saved and loaded with it.

    Attributes:
        save_id: the id of the save that is being made of this state.
        folder: the checkpoint being written, None where DCP did not tell it.
        ancestors: the checkpoints that the state descends from.
    """

    save_id: str
    folder: str | None
    ancestors: Chain

    @property
    def chain(self) -> Chain:
        """The ancestors of whatever is saved after this save."""
        if self.folder is None:
            return self.ancestors
        return extend(self.ancestors, Ancestor(self.folder, self.save_id))

    def to_json(self) -> str:
        """Return the token as DCP stores it: one string, so that it stays one entry."""
        ancestors = [[a.folder, a.save_id] for a in self.ancestors if a.save_id]
        return json.dumps({"save_id": self.save_id, "folder": self.folder, "ancestors": ancestors})

    @classmethod
    def from_json(cls, text: object) -> Token | None:
        """Read a token; None if it is none, for a damaged token only costs a full save."""
        try:
            raw = json.loads(text)  # type: ignore[arg-type]
            save_id, folder = raw["save_id"], raw["folder"]
            chain = tuple(Ancestor(str(f), str(i)) for f, i in raw["ancestors"])
        except (TypeError, ValueError, KeyError, RecursionError):
            return None
        return cls(str(save_id), None if folder is None else str(folder), chain)


def new_save_id() -> str:
    """Return a random id for a save: 32 hex digits."""
    return uuid.uuid4().hex


_claimed: set[str] = set()


def claim(save_id: str | None) -> str:
    """Return the id for a save: the given one unless this process has used it, else a new one.

    A state dict that is saved twice brings the same token twice, but a save's id is its own.
    """
    with _lock:
        fresh = new_save_id() if save_id is None or save_id in _claimed else save_id
        _claimed.add(fresh)
    return fresh


_lock = threading.RLock()
_branches: dict[_Key, _Branch] = {}
_generation = 0
_reading: dict[str, Stamp | None] = {}


def stamp_of(folder: str | os.PathLike[str]) -> Stamp | None:
    """Return the stamp of a folder's ``.metadata``, None if it is not committed."""
    try:
        status = (place(folder) / METADATA).stat()
    except (OSError, TailorError):
        return None
    return (status.st_ino, status.st_mtime_ns, status.st_size)


def extend(chain: Chain, newest: Ancestor) -> Chain:
    """Return ``chain`` with one more, newest, ancestor."""
    return (newest, *(a for a in chain if a != newest))[:_LONGEST_CHAIN]


def saved(location: Location, save_id: str, chain: Chain, planned: int) -> None:
    """Remember a save and what it descends from; whether it was committed is looked up when it matters.

    Args:
        location: the checkpoint being written.
        save_id: its save's id.
        chain: the ancestors of what it holds.
        planned: the generation when its planning began. If the training state was loaded since,
            as it can be during an asynchronous save, it does not descend from this save.
    """
    newest = Ancestor(str(location.folder), save_id)
    with _lock:
        if planned != _generation:
            return
        _branches[location.run, location.series] = _Branch(extend(chain, newest), None)


def snapshot() -> Snapshot:
    """Return what each series of each run descends from, as far as this process knows."""
    with _lock:
        return {key: branch.chain for key, branch in _branches.items()}


@contextmanager
def aside() -> Iterator[None]:
    """Let what is saved and loaded meanwhile leave no trace in what this process remembers."""
    global _generation
    with _lock:
        branches, generation_before = dict(_branches), _generation
    try:
        yield
    finally:
        with _lock:
            _branches.clear()
            _branches.update(branches)
            _generation = generation_before


def forget() -> None:
    """Forget what was saved and loaded: the next save with ``base="auto"`` writes everything.

    Call it when the training state no longer descends from the last save or load, for
    example after weights were set by other means than DCP.
    """
    global _generation
    with _lock:
        _branches.clear()
        _generation += 1


def generation() -> int:
    """Return a number that grows whenever a load, or ``forget``, may have changed the training state."""
    return _generation


def _located(checkpoint_id: str | None) -> Location | None:
    """Return where a checkpoint is; None where DCP tells none, or one that only DCP can reach."""
    try:
        return None if checkpoint_id is None else locate(checkpoint_id)
    except TailorError:
        return None


def _reading_starts(checkpoint_id: str | None) -> None:
    """From here on the training state is being overwritten: what was known no longer holds."""
    global _generation
    with _lock:
        _generation += 1
        here = _located(checkpoint_id)
        if here is None or checkpoint_id is None:
            _branches.clear()
            return
        for key, branch in list(_branches.items()):
            # Accelerate loads one step's checkpoint as several series, one after another.
            if branch.loaded_from != (here.run, here.step) or key == (here.run, here.series):
                del _branches[key]
        _reading[checkpoint_id] = stamp_of(checkpoint_id)


def _reading_ends(checkpoint_id: str | None) -> None:
    here = _located(checkpoint_id)
    if here is None or checkpoint_id is None:
        return
    with _lock:
        before, after = _reading.pop(checkpoint_id, None), stamp_of(checkpoint_id)
        if after is not None and after == before:
            ancestor = Ancestor(str(here.folder), stamp=after)
            _branches[here.run, here.series] = _Branch((ancestor,), (here.run, here.step))


def _asked_to_save(checkpoint_id: str | None) -> None:
    """Note an asynchronous save in the trainer: the process that makes it may not be this one."""
    here = _located(checkpoint_id)
    if here is None:
        return
    asked = Ancestor(str(here.folder), asked=time.time())
    with _lock:
        known = _branches.get((here.run, here.series))
        _branches[here.run, here.series] = _Branch(extend(known.chain if known else (), asked), None)


def _load_failed(checkpoint_id: str | None) -> None:
    """Some rank's state may be half overwritten, even where this rank's own reading went well."""
    forget()


# `read_data` is the innermost step of every load of DCP's, the deprecated calls included.
dcp_events.subscribe("read_data", "start", _reading_starts)
dcp_events.subscribe("read_data", "end", _reading_ends)
dcp_events.subscribe("load", "exception", _load_failed)
dcp_events.subscribe("async_save", "start", _asked_to_save)
dcp_events.when_deaf(forget)  # what went unheard may have been a load
dcp_events.start_listening()
