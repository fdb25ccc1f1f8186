"""``TrainState``: a model, its optimizer and everything else a training run needs, as DCP saves and loads it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from tailor_dcp import dcp_events, lineage, rank_state
from tailor_dcp.errors import TailorError, TailorWarning
from tailor_dcp.lineage import Chain, Token
from tailor_dcp.location import is_url, locate

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

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self._model)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_model_state_dict(self._model, state_dict)


class _Optim:
    """The optimizer, under ``optim.state.<fqn>.<kind>`` and ``optim.param_groups.<i>.<name>``."""

    def __init__(self, model: torch.nn.Module, optimizers: Optimizer | Iterable[Optimizer]) -> None:
        self._model, self._optimizers = model, optimizers

    def state_dict(self) -> dict[str, Any]:
        return dict(get_optimizer_state_dict(self._model, self._optimizers))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_optimizer_state_dict(self._model, self._optimizers, state_dict)


class _Train:
    """Everything else, under ``train.``: scheduler, every rank's RNG and data loader, the caller's own."""

    def __init__(
        self,
        scheduler: HasState | None,
        dataloader: HasState | None,
        extra: dict[str, Any] | HasState | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._scheduler, self._dataloader = scheduler, dataloader
        self._extra = {} if extra is None else extra
        self._group = group
        self._chain: Chain = ()
        self._generation = lineage.generation()

    def state_dict(self) -> dict[str, Any]:
        token = self._next_token()
        mine = {"rng": rank_state.rng_state(), "token": token.to_json()}
        if self._dataloader is not None:
            mine["dataloader"] = self._dataloader.state_dict()
        ranks = rank_state.gather(mine, self._group)
        # Every rank draws an id; the first rank's is the save's.
        state = {"token": ranks[0]["token"], "rng": rank_state.pack([r["rng"] for r in ranks])}
        self._remember(ranks[0]["token"])
        if self._dataloader is not None:
            state["dataloader"] = rank_state.pack([r["dataloader"] for r in ranks])
        if self._scheduler is not None:
            state["scheduler"] = self._scheduler.state_dict()
        return {**self._extra_state(), **state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rest = {key: value for key, value in state_dict.items() if key not in _RESERVED}
        if isinstance(self._extra, dict):
            self._extra.update(rest)
        else:
            self._extra.load_state_dict(rest)
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state_dict["scheduler"])
        if self._dataloader is not None:
            self._load_dataloader(rank_state.unpack(state_dict["dataloader"], "train.dataloader"))
        self._load_rng(rank_state.unpack(state_dict["rng"], "train.rng"))
        token = Token.from_json(state_dict["token"])
        self._chain = token.chain if token else ()
        self._generation = lineage.generation()

    def _extra_state(self) -> dict[str, Any]:
        extra = dict(self._extra) if isinstance(self._extra, dict) else self._extra.state_dict()
        clash = _RESERVED & extra.keys()
        if clash:
            raise TailorError(
                f"extra= holds the name {min(clash)!r}, which TrainState itself keeps under train.; rename it."
            )
        return extra

    def _next_token(self) -> Token:
        """Return the token for the save that is under way, if DCP told that there is one."""
        call = dcp_events.current_call()
        saving = call is not None and call.name != "load" and call.checkpoint_id is not None
        folder = None
        if saving and call is not None and call.checkpoint_id is not None and not is_url(call.checkpoint_id):
            folder = str(locate(call.checkpoint_id).folder)
        return Token(lineage.new_save_id(), folder, self._ancestors(folder))

    def _ancestors(self, folder: str | None) -> Chain:
        """Return what the state descends from.

        A load that did not go through this object has changed the training state, so what
        this object remembers no longer holds; what the process saw does.
        """
        if self._generation == lineage.generation():
            return self._chain
        if folder is None or not dcp_events.listening():
            return ()
        here = locate(folder)
        return lineage.snapshot().get((here.run, here.series), ())

    def _remember(self, token_json: str) -> None:
        """Let the next save descend from this one; whether it was committed is looked up then."""
        token = Token.from_json(token_json)
        if token is not None and token.folder is not None:
            self._chain, self._generation = token.chain, lineage.generation()

    def _load_rng(self, ranks: list[dict[str, Any]]) -> None:
        rank, world = rank_state.rank_of(self._group), rank_state.world_size(self._group)
        if rank < len(ranks):
            rank_state.set_rng_state(ranks[rank])
        else:
            rank_state.seed_from(ranks[rank % len(ranks)], rank)
        if world != len(ranks) and rank == 0:
            warnings.warn(
                f"The checkpoint was saved by {len(ranks)} ranks and is loaded by {world}: ranks that existed "
                f"keep their random number generators, new ranks are seeded from them.",
                TailorWarning,
                stacklevel=2,
            )

    def _load_dataloader(self, ranks: list[dict[str, Any]]) -> None:
        assert self._dataloader is not None
        rank, world = rank_state.rank_of(self._group), rank_state.world_size(self._group)
        if world == len(ranks):
            self._dataloader.load_state_dict(ranks[rank])
        elif all(state == ranks[0] for state in ranks):
            self._dataloader.load_state_dict(ranks[0])
        elif rank == 0:
            warnings.warn(
                f"The data loader's position differs from rank to rank and was saved by {len(ranks)} ranks, not "
                f"{world}: it cannot be divided, so the data loader starts where the script puts it.",
                TailorWarning,
                stacklevel=2,
            )


class TrainState(dict[str, Any]):
    """A dict of the three Statefuls ``model``, ``optim`` and ``train``, for ``dcp.save`` and ``dcp.load``.

    Works with plain, DDP, FSDP1 and FSDP2 training. The keys are those that ``{"model": msd,
    "optim": osd}`` of torch's ``get_state_dict`` flattens to, so a script that knows nothing
    of this package loads the same checkpoint.

    At another world size than the save's, ranks that existed keep their random number
    generators and new ranks are seeded from them; a data loader's position is restored when
    it was the same on all ranks, else left alone. Either is said in a warning.

    It remembers what it was loaded from and saved to, so the first save after a resume is
    selective.

    Args:
        model: the module, wrapped or not.
        optimizer: its optimizer or optimizers.
        scheduler: a learning-rate scheduler.
        dataloader: anything with a state, for example torchdata's ``StatefulDataLoader``.
        extra: a dict, updated in place by a load, or anything with a state; its entries go
            to ``train.<name>`` (``{"step": 0}``).
        process_group: the ranks that train this model; all of them by default.
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
        super().__init__(
            model=_Model(model),
            optim=_Optim(model, optimizer),
            train=_Train(scheduler, dataloader, extra, process_group),
        )
