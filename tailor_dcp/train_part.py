"""Everything of a training state that is neither weights nor optimizer, under ``train.``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from tailor_dcp import lineage, rank_state
from tailor_dcp.errors import TailorError, TailorWarning
from tailor_dcp.extra_state import RESERVED, ExtraState, HasState, restore_keys
from tailor_dcp.lineage import Token
from tailor_dcp.past import Past, Source, loading, saving_to, series_of, source_of_load


class TrainPart:
    """Scheduler, every rank's RNG and data loader, the caller's own entries.

    Args:
        past: what the training state descends from.
        scheduler: a learning-rate scheduler.
        dataloader: anything with a state.
        extra: the caller's own entries.
        group: the ranks that train together.
        owner: what the user calls the whole state, for messages.
        engine: what an engine keeps here under names of its own. It and an engine's scheduler are restored as far as
            a checkpoint has them, which may come from a script that knows no engine.
    """

    def __init__(
        self,
        past: Past,
        scheduler: HasState | None,
        dataloader: HasState | None,
        extra: dict[str, Any] | HasState | None,
        group: dist.ProcessGroup | None,
        *,
        owner: str = "TrainState",
        engine: HasState | None = None,
    ) -> None:
        _check_has_state("scheduler", scheduler)
        _check_has_state("dataloader", dataloader)
        self._past = past
        self._scheduler, self._dataloader = scheduler, dataloader
        self._engine, self._owner = engine, owner
        self._engine_names = frozenset(engine.state_dict() if engine is not None else ())
        self._extra = ExtraState(extra, RESERVED | self._engine_names, owner)
        self._group = group
        self._source: Source | None = None
        self._asked = -1
        self._notes: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """Return what DCP saves, or loads into."""
        state = self._extra.state_dict()
        ours = self._engine.state_dict() if self._engine is not None else {}
        if self._scheduler is not None:
            ours["scheduler"] = self._scheduler.state_dict()
        return self._places(state, ours) if loading() else {**state, **ours, **self._values()}

    def _values(self) -> dict[str, Any]:
        """Return the entries that are gathered from all ranks, for a save."""
        mine = {
            "folder": saving_to(),
            "save_id": lineage.new_save_id(),
            "ancestors": self._past.ancestors(),
            "rng": rank_state.rng_state(),
        }
        if self._dataloader is not None:
            mine["dataloader"] = self._dataloader.state_dict()
        ranks = rank_state.gather(mine, self._group)
        token = self._token(ranks)
        if token is not None:
            # Whether the save was committed is looked up when the next one is planned.
            self._past.set(token.chain)
        values: dict[str, Any] = {"token": token.to_json() if token else ""}
        for name in mine.keys() & {"rng", "dataloader"}:
            values[name] = rank_state.pack([r[name] for r in ranks])
        return values

    def _token(self, ranks: list[dict[str, Any]]) -> Token | None:
        """Return the token for the save that is under way, the same on all ranks.

        None where DCP did not tell of one, so that this state could not know later that it was
        saved, and where each rank saves to a folder of its own: the planner then goes by what
        the process saw.
        """
        folder, ancestors = ranks[0]["folder"], ranks[0]["ancestors"]
        if folder is None or any(r["folder"] != folder for r in ranks):
            return None
        if any(r["ancestors"] is None for r in ranks) and rank_state.rank_of(self._group) == 0:
            _warn(
                f"forget() was called, or DCP has loaded something other than this {self._owner}, which may have "
                f"changed the training state: {folder} is written as a whole, and the next save carries from it again."
            )
        if ancestors is None or any(r["ancestors"] != ancestors for r in ranks):
            ancestors = ()
        # The run itself comes first: a copy of its best checkpoint elsewhere is an ancestor too.
        nearest = sorted(ancestors, key=lambda ancestor: series_of(ancestor.folder) != series_of(folder))
        return Token(ranks[0]["save_id"], folder, tuple(nearest))

    def _places(self, state: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
        """Add what all ranks' entries are loaded into; see what the checkpoint has and the script does not."""
        self._source, self._asked, self._notes = source_of_load(), lineage.generation(), []
        own = {"token": "", "rng": b""}
        if self._source is not None:
            # Converters and other tools need not know of these two.
            own = {name: value for name, value in own.items() if f"train.{name}" in self._source.train_keys}
            if "rng" not in own:
                self._notes.append("it holds no random number generators, so they go on as the script seeded them")
        state |= own | (self._held(ours) if self._engine is not None else ours)
        if self._dataloader is not None:
            state["dataloader"] = b""
        if self._source is not None:
            homeless = self._source.train_keys - flatten_state_dict({"train": state})[0].keys()
            # What an engine that was built otherwise has of its own, or a converter tells of it, is no loss.
            homeless = frozenset(key for key in homeless if key.split(".")[1] not in self._engine_names)
            if homeless:
                self._notes.append(f"{_listed(homeless)} in it is not restored, as the script has no place for it")
        return state

    def _held(self, ours: dict[str, Any]) -> dict[str, Any]:
        """Return what the checkpoint has of an engine's entries. A scheduler is of use only as a whole."""
        if self._source is None:
            return ours
        keys = self._source.train_keys

        def has(entry: dict[str, Any]) -> bool:
            return flatten_state_dict({"train": entry})[0].keys() <= keys

        held = {name: value for name, value in ours.items() if has({name: value})}
        lacking = [f"train.{name}" for name in ours if name not in held]
        for name in self._engine_names - held.keys():
            if isinstance(ours[name], dict):
                held[name] = {part: value for part, value in ours[name].items() if has({name: {part: value}})}
        if lacking:
            self._notes.append(
                f"it does not hold all of {' and '.join(lacking)}, so what is missing stays as the script has it"
            )
        return held

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what DCP loaded."""
        restore_keys(state_dict)
        named = RESERVED | self._engine_names
        self._extra.load_state_dict({key: value for key, value in state_dict.items() if key not in named})
        if self._engine is not None:
            self._engine.load_state_dict({key: state_dict[key] for key in self._engine_names & state_dict.keys()})
        if self._scheduler is not None and "scheduler" in state_dict:
            self._scheduler.load_state_dict(state_dict["scheduler"])
        # A load of some layers only leaves these as they are: the empty bytes that they would be loaded into.
        if self._dataloader is not None and state_dict["dataloader"]:
            self._load_dataloader(rank_state.unpack(state_dict["dataloader"], "train.dataloader"))
        if state_dict.get("rng"):
            self._load_rng(rank_state.unpack(state_dict["rng"], "train.rng"))
        self._past.arrive(self._source, Token.from_json(state_dict.get("token")), self._asked)
        if self._notes and rank_state.rank_of(self._group) == 0:
            place = self._source.folder if self._source else "the checkpoint"
            _warn(f"Loading {place}: {'; '.join(self._notes)}.")
        self._source, self._notes = None, []

    def _load_rng(self, ranks: list[dict[str, Any]]) -> None:
        rank, world = rank_state.rank_of(self._group), rank_state.world_size(self._group)
        if rank < len(ranks):
            rank_state.set_rng_state(ranks[rank])
        else:
            rank_state.seed_from(ranks[rank % len(ranks)], rank)
        if world != len(ranks):
            self._notes.append(
                f"saved by {len(ranks)} ranks and loaded by {world}, so ranks that existed keep their random "
                f"number generators and new ranks are seeded from them"
            )

    def _load_dataloader(self, ranks: list[dict[str, Any]]) -> None:
        assert self._dataloader is not None
        rank, world = rank_state.rank_of(self._group), rank_state.world_size(self._group)
        if world == len(ranks):
            self._dataloader.load_state_dict(ranks[rank])
        elif all(rank_state.same(state, ranks[0]) for state in ranks):
            self._dataloader.load_state_dict(ranks[0])
        else:
            self._notes.append(
                f"the data loader's position differs between its {len(ranks)} ranks and cannot be divided among "
                f"{world}, so the data loader starts where the script puts it"
            )


def _check_has_state(name: str, value: object) -> None:
    if value is not None and not isinstance(value, HasState):
        raise TailorError(
            f"{name}= is a {type(value).__name__}, which has no state_dict() and load_state_dict(); "
            f"give one that has, or leave it out."
        )


def _listed(keys: Iterable[str]) -> str:
    first, *others = sorted(keys)
    return f"{first} (and {len(others)} more)" if others else first


def _warn(text: str) -> None:
    warnings.warn(text, TailorWarning, stacklevel=2)
