"""What a model's training state was loaded from and saved to, as the state itself remembers it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.distributed.checkpoint.metadata import Metadata

from tailor_dcp import dcp_events, lineage
from tailor_dcp.errors import TailorError
from tailor_dcp.lineage import Ancestor, Chain, Token
from tailor_dcp.location import METADATA, locate, real, same_folder
from tailor_dcp.metadata.record import save_id_of
from tailor_dcp.metadata.safe_pickle import read
from tailor_dcp.store_path import place


def loading() -> dcp_events.Call | None:
    """Return the load of DCP's that is under way in this thread, if any."""
    call = dcp_events.current_call()
    return call if call is not None and call.name == "load" else None


class Source(NamedTuple):
    """The checkpoint that DCP is loading from.

    Attributes:
        folder: its path.
        save_id: the id of the save that wrote it, empty where a stock planner did.
        metadata: its own metadata.
    """

    folder: str
    save_id: str
    metadata: Metadata

    @property
    def train_keys(self) -> frozenset[str]:
        """Its keys under ``train.``."""
        return frozenset(key for key in self.metadata.state_dict_metadata if key.startswith("train."))


def saving_to() -> str | None:
    """Return the folder that DCP is saving to; None if it told none."""
    call = dcp_events.current_call()
    if call is None or call.name == "load" or call.checkpoint_id is None:
        return None
    return str(locate(call.checkpoint_id).folder)


def source_of_load() -> Source | None:
    """Look into the checkpoint that is being loaded; None if it cannot be done from here."""
    call = loading()
    if call is None or call.checkpoint_id is None:
        return None
    if _latest.call is not call:  # each part of a state asks
        _latest.source, _latest.call = _look_into(call.checkpoint_id), call
    return _latest.source


def _look_into(checkpoint_id: str) -> Source | None:
    try:
        here = locate(checkpoint_id)
        # A name without a step may be a link, such as `latest`, that soon leads elsewhere.
        folder = here.folder if here.step is not None else real(here.folder)
        metadata = read(folder / METADATA)
    except TailorError:  # the load itself will say what is wrong
        return None
    return Source(str(folder), save_id_of(metadata) or "", metadata)


class _Latest(threading.local):
    """The load that was last looked into. An object of DCP's own call, so that another one is never taken for it."""

    call: dcp_events.Call | None = None
    source: Source | None = None


_latest = _Latest()


class Past:
    """What one model's training state descends from.

    Kept for the model and not for a TrainState, as a script may make a new TrainState for every save.
    """

    def __init__(self) -> None:
        self._chain: Chain = ()
        self._generation = lineage.generation()

    def ancestors(self) -> Chain | None:
        """Return what the state descends from; None if something unseen may have changed it since."""
        if self._generation == lineage.generation():
            return self._chain
        return None if self._chain else ()

    def set(self, chain: Chain) -> None:
        """Let the state descend from these, from now on."""
        self._chain, self._generation = chain, lineage.generation()

    def arrive(self, source: Source | None, token: Token | None, asked: int) -> None:
        """Take over the past of what was just loaded.

        Args:
            source: where it was loaded from.
            token: what the checkpoint itself remembers.
            asked: the generation just before this load.
        """
        self.set(_descent(source, token))
        _latest.call = _latest.source = None  # a large job's metadata is large
        for other in _pasts.values():
            # One load of one TrainState leaves the states of other models as they were.
            if other._generation == asked == lineage.generation() - 1:
                other._generation += 1


def series_of(folder: str) -> tuple[Path, str]:
    """Return the run and the series that a checkpoint belongs to."""
    here = locate(folder)
    return here.run, here.series


def _descent(source: Source | None, token: Token | None) -> Chain:
    """Return the ancestors of a state that was loaded, the loaded checkpoint first.

    A token is believed only in the save that it was made for: a merged checkpoint has the
    token of one of its sources, yet descends from none of them alone.
    """
    if source is None:
        return ()
    if token is None or token.folder is None or token.save_id != source.save_id:
        return (Ancestor(source.folder, source.save_id),)
    folder = token.folder if same_folder(place(token.folder), place(source.folder)) else source.folder
    return lineage.extend(token.ancestors, Ancestor(folder, source.save_id))


_pasts: WeakKeyDictionary[torch.nn.Module, Past] = WeakKeyDictionary()


def past_of(model: torch.nn.Module) -> Past:
    """Return what is remembered of a model, however many TrainStates it is given to."""
    return _pasts.setdefault(model, Past())
