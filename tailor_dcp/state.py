"""``TrainState``: a model, its optimizer and everything else a training run needs, as DCP saves and loads it."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict import (
    _init_optim_state,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from tailor_dcp import dcp_events, lineage, rank_state
from tailor_dcp.errors import TailorError, TailorWarning
from tailor_dcp.lineage import Ancestor, Chain, Token
from tailor_dcp.location import METADATA, is_url, locate, same_folder
from tailor_dcp.metadata.record import save_id_of
from tailor_dcp.metadata.safe_pickle import read

_RESERVED = frozenset({"scheduler", "dataloader", "rng", "token"})


@runtime_checkable
class HasState(Protocol):
    """Anything with ``state_dict`` and ``load_state_dict``: schedulers, data loaders, samplers."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take the state over."""
        ...


class _Model:
    """The weights and buffers, under ``model.<fqn>``."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._elsewhere: list[_Elsewhere] = []

    def state_dict(self) -> dict[str, Any]:
        state = get_model_state_dict(self._model)
        self._elsewhere = _set_aside([state]) if _loading() else []
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        _put_back(self._elsewhere)
        set_model_state_dict(self._model, state_dict)


class _Optim:
    """The optimizer, under ``optim.state.<fqn>.<kind>`` and ``optim.param_groups.<i>.<name>``."""

    def __init__(self, model: torch.nn.Module, optimizers: Optimizer | Iterable[Optimizer]) -> None:
        self._model = model
        self._optimizers = (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)
        self._elsewhere: list[_Elsewhere] = []

    def state_dict(self) -> dict[str, Any]:
        loading = _loading() is not None
        with _complete(self._optimizers, keep=loading):
            state: dict[str, Any] = dict(get_optimizer_state_dict(self._model, self._optimizers))
        self._elsewhere = _set_aside(state["state"].values()) if loading else []
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        _put_back(self._elsewhere)
        set_optimizer_state_dict(self._model, self._optimizers, state_dict)


_Elsewhere = tuple[dict[str, Any], str, ShardedTensor]
"""A dict, a key, and the tensor that belongs there, of which other ranks hold all elements."""


def _set_aside(dicts: Iterable[dict[str, Any]]) -> list[_Elsewhere]:
    """Take out the tensors of which this rank holds nothing, as FSDP1 has them.

    DCP drops them from the plan of a load, then finds that the checkpoint has more keys than the
    plan, takes it for one of an old version of torch, and fails.
    """
    found = [
        (holder, key, value)
        for holder in dicts
        for key, value in holder.items()
        if isinstance(value, ShardedTensor) and not value.local_shards()
    ]
    for holder, key, _ in found:
        del holder[key]
    return found


def _put_back(found: list[_Elsewhere]) -> None:
    for holder, key, value in found:
        holder[key] = value
    found.clear()


@contextmanager
def _complete(optimizers: Sequence[Optimizer], keep: bool) -> Iterator[None]:
    """Give parameters that were never stepped the state they have before a first step, to be saved or loaded into.

    A fresh optimizer asks a checkpoint for the state of all parameters. torch leaves out
    those that never had a gradient, as idle experts have none, so that the checkpoint could
    not be loaded; and where no parameter has state it makes an empty step to get some, but
    leaves the counters at 1, which changes all that is trained after the save.
    """
    lent = [(optimizer, p) for optimizer in optimizers for p in _add_blank_state(optimizer)]
    try:
        yield
    finally:
        for optimizer, parameter in () if keep else lent:
            del optimizer.state[parameter]


def _add_blank_state(optimizer: Optimizer) -> list[torch.Tensor]:
    """Add the missing states and return the parameters that got one. No hook runs, no learning rate moves."""
    idle = [
        {**group, "params": [p for p in group["params"] if not optimizer.state.get(p)]}
        for group in optimizer.param_groups
    ]
    blank: defaultdict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
    twin = object.__new__(type(optimizer))
    twin.__dict__ = {**vars(optimizer), "state": blank, "param_groups": idle}
    # A scheduler wraps `step` in one that is bound to the original.
    twin.__dict__.pop("step", None)
    twin.__dict__ |= {"_optimizer_step_pre_hooks": OrderedDict(), "_optimizer_step_post_hooks": OrderedDict()}
    _init_optim_state(twin)
    for parameter, state in blank.items():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].zero_()
        optimizer.state[parameter] = state
    return list(blank)


class _Source(NamedTuple):
    """The checkpoint that DCP is loading from, as its own metadata tells."""

    folder: str
    save_id: str
    train_keys: frozenset[str]


def _loading() -> dcp_events.Call | None:
    call = dcp_events.current_call()
    return call if call is not None and call.name == "load" else None


def _saving_to() -> str | None:
    """Return the local folder that DCP is saving to; None if it told none."""
    call = dcp_events.current_call()
    if call is None or call.name == "load" or call.checkpoint_id is None or is_url(call.checkpoint_id):
        return None
    return str(locate(call.checkpoint_id).folder)


def _source() -> _Source | None:
    """Look into the checkpoint that is being loaded; None if it cannot be done from here."""
    call = _loading()
    if call is None or call.checkpoint_id is None or is_url(call.checkpoint_id):
        return None
    here = locate(call.checkpoint_id)
    # A name without a step may be a link, such as `latest`, that soon leads elsewhere.
    folder = str(here.folder) if here.step is not None else os.path.realpath(here.folder)
    try:
        metadata = read(Path(folder) / METADATA)
    except TailorError:  # the load itself will say what is wrong
        return None
    keys = frozenset(key for key in metadata.state_dict_metadata if key.startswith("train."))
    return _Source(folder, save_id_of(metadata) or "", keys)


class _Past:
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

    def arrive(self, source: _Source | None, token: Token | None, asked: int) -> None:
        """Take over the past of what was just loaded.

        Args:
            source: where it was loaded from.
            token: what the checkpoint itself remembers.
            asked: the generation just before this load.
        """
        self.set(_descent(source, token))
        for other in _pasts.values():
            # One load of one TrainState leaves the states of other models as they were.
            if other._generation == asked == lineage.generation() - 1:
                other._generation += 1


def _series(folder: str) -> tuple[Path, str]:
    here = locate(folder)
    return here.run, here.series


def _descent(source: _Source | None, token: Token | None) -> Chain:
    """Return the ancestors of a state that was loaded, the loaded checkpoint first.

    A token is believed only in the save that it was made for: a merged checkpoint has the
    token of one of its sources, yet descends from none of them alone.
    """
    if source is None:
        return ()
    if token is None or token.folder is None or token.save_id != source.save_id:
        return (Ancestor(source.folder, source.save_id),)
    folder = token.folder if same_folder(Path(token.folder), Path(source.folder)) else source.folder
    return lineage.extend(token.ancestors, Ancestor(folder, source.save_id))


_pasts: WeakKeyDictionary[torch.nn.Module, _Past] = WeakKeyDictionary()


class _Extra:
    """The caller's own entries: a dict of values and of things with a state, or one thing with a state."""

    def __init__(self, extra: dict[str, Any] | HasState | None) -> None:
        self._extra = {} if extra is None else extra
        if isinstance(self._extra, dict):
            _check_names(self._extra)
        elif not isinstance(self._extra, HasState):
            raise TailorError(
                f"extra= is a {type(extra).__name__}, which has no state_dict() and load_state_dict(); "
                f"give a dict or something with a state."
            )

    def state_dict(self) -> dict[str, Any]:
        if not isinstance(self._extra, dict):
            state = dict(self._extra.state_dict())
        else:
            state = {k: v.state_dict() if isinstance(v, HasState) else v for k, v in self._extra.items()}
        _check_names(state)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not isinstance(self._extra, dict):
            self._extra.load_state_dict(state)
            return
        for name, value in state.items():
            owner = self._extra.get(name)
            if isinstance(owner, HasState):
                owner.load_state_dict(value)
            else:
                self._extra[name] = value


def _check_names(extra: Mapping[str, Any]) -> None:
    clash = _RESERVED & extra.keys()
    if clash:
        raise TailorError(
            f"extra= holds the name {min(clash)!r}, which TrainState itself keeps under train.; rename it."
        )


def _restore_keys(value: Any) -> None:
    """Put what DCP loaded under the name of a number, beside the number itself, in its place."""
    if isinstance(value, dict):
        for key in [key for key in value if not isinstance(key, str) and str(key) in value]:
            value[key] = _onto(value[key], value.pop(str(key)))
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _restore_keys(inner)


def _onto(old: Any, loaded: Any) -> Any:
    """Return what was loaded, with the keys that it had when it was saved."""
    if isinstance(old, dict) and isinstance(loaded, dict):
        names = {str(key): key for key in old}
        for name, value in loaded.items():
            key = names.get(name, name)
            old[key] = _onto(old.get(key), value)
        return old
    if isinstance(old, list) and isinstance(loaded, list) and len(old) == len(loaded):
        return [_onto(a, b) for a, b in zip(old, loaded, strict=True)]
    return loaded


class _Train:
    """Everything else, under ``train.``: scheduler, every rank's RNG and data loader, the caller's own."""

    def __init__(
        self,
        past: _Past,
        scheduler: HasState | None,
        dataloader: HasState | None,
        extra: dict[str, Any] | HasState | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        _check_has_state("scheduler", scheduler)
        _check_has_state("dataloader", dataloader)
        self._past = past
        self._scheduler, self._dataloader = scheduler, dataloader
        self._extra = _Extra(extra)
        self._group = group
        self._source: _Source | None = None
        self._asked = -1
        self._notes: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        state = self._extra.state_dict()
        if self._scheduler is not None:
            state["scheduler"] = self._scheduler.state_dict()
        return self._places(state) if _loading() else {**state, **self._values()}

    def _values(self) -> dict[str, Any]:
        """Return the entries that are gathered from all ranks, for a save."""
        mine = {
            "folder": _saving_to(),
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
                f"forget() was called, or DCP has loaded something other than this TrainState, which may have changed "
                f"the training state: {folder} is written as a whole, and the next save carries from it again."
            )
        if ancestors is None or any(r["ancestors"] != ancestors for r in ranks):
            ancestors = ()
        # The run itself comes first: a copy of its best checkpoint elsewhere is an ancestor too.
        nearest = sorted(ancestors, key=lambda ancestor: _series(ancestor.folder) != _series(folder))
        return Token(ranks[0]["save_id"], folder, tuple(nearest))

    def _places(self, state: dict[str, Any]) -> dict[str, Any]:
        """Add what all ranks' entries are loaded into; see what the checkpoint has and the script does not."""
        self._source, self._asked, self._notes = _source(), lineage.generation(), []
        own = {"token": "", "rng": b""}
        if self._source is not None:
            # Converters and other tools need not know of these two.
            own = {name: value for name, value in own.items() if f"train.{name}" in self._source.train_keys}
            if "rng" not in own:
                self._notes.append("it holds no random number generators, so they go on as the script seeded them")
        state |= own
        if self._dataloader is not None:
            state["dataloader"] = b""
        if self._source is not None:
            homeless = self._source.train_keys - flatten_state_dict({"train": state})[0].keys()
            if homeless:
                self._notes.append(f"{_listed(homeless)} in it is not restored, as the script has no place for it")
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        _restore_keys(state_dict)
        self._extra.load_state_dict({key: value for key, value in state_dict.items() if key not in _RESERVED})
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state_dict["scheduler"])
        if self._dataloader is not None:
            self._load_dataloader(rank_state.unpack(state_dict["dataloader"], "train.dataloader"))
        if "rng" in state_dict:
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


class TrainState(dict[str, Any]):
    """A dict of the three Statefuls ``model``, ``optim`` and ``train``, for ``dcp.save`` and ``dcp.load``.

    Works with plain, DDP, FSDP1 and FSDP2 training. The keys are those that ``{"model": msd,
    "optim": osd}`` of torch's ``get_state_dict`` flattens to, so a script that knows nothing
    of this package loads the same checkpoint.

    At another world size than the save's, ranks that existed keep their random number
    generators and new ranks are seeded from them; a data loader's position is restored when
    it was the same on all ranks, else left alone. That, and whatever else of the checkpoint
    could not be restored, is said in one warning.

    It remembers what the model was loaded from and saved to, so the first save after a
    resume is selective; a new TrainState of the same model knows it too.

    Saving is a collective call of all ranks of ``process_group``, as ``dcp.save`` is.

    Args:
        model: the module, wrapped or not.
        optimizer: its optimizer or optimizers.
        scheduler: a learning-rate scheduler.
        dataloader: anything with a state, for example torchdata's ``StatefulDataLoader``.
        extra: a dict, updated in place by a load, or anything with a state; its entries go
            to ``train.<name>`` (``{"step": 0}``). Values with a state of their own, such as a
            gradient scaler, are restored through it. DCP fills only the keys that are there
            when a load starts: give what grows as a list, not as a dict. One rank's values
            are kept for all.
        process_group: the ranks that train this model; all of them by default.

    Raises:
        TailorError: an argument has no state, or ``extra`` uses a name that is taken.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        scheduler: HasState | None = None,
        dataloader: HasState | None = None,
        extra: dict[str, Any] | HasState | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        past = _pasts.setdefault(model, _Past())
        super().__init__(
            model=_Model(model),
            optim=_Optim(model, optimizer),
            train=_Train(past, scheduler, dataloader, extra, process_group),
        )
