"""``LayerwisePlanner``: a DCP save planner that writes what is due and carries the rest."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from tailor_dcp import base as bases
from tailor_dcp import carry as carrying
from tailor_dcp import changes, dcp_events, drifts, lineage, sweep
from tailor_dcp.base import Base
from tailor_dcp.collector import collector_off
from tailor_dcp.coordination import (
    Ahead,
    Assignment,
    Prepared,
    RankInfo,
    assign,
    gather,
    keep_due,
    make_record,
    narrow,
    shapes_of,
)
from tailor_dcp.decision import Decision, Rules, decide
from tailor_dcp.errors import ConflictingStateError, SaveRefusedError, TailorWarning
from tailor_dcp.layers import LayerMap
from tailor_dcp.lineage import TOKEN_KEY, Chain, Token
from tailor_dcp.location import is_url, locate
from tailor_dcp.metadata.compose import CompositeMetadata, uncovered
from tailor_dcp.metadata.record import CarryMode, Record
from tailor_dcp.policies import DEFAULT, Policy, parse_policy
from tailor_dcp.selection import State, cohorts
from tailor_dcp.stager import LayerwiseStager
from tailor_dcp.store_path import place
from tailor_dcp.ties import find_ties

Carry = Literal["auto", "link", "reference", "copy"]
REST = "rest"
"""The cohort of what is written in every save."""


class LayerwisePlanner(DefaultSavePlanner):
    """Writes the (layer, kind) units that a policy finds due; the checkpoint is complete all the same.

    The folder's ``.metadata`` maps everything else to bytes of earlier steps, so plain
    ``dcp.load`` reads it, at any world size, without this package.

    Args:
        policy: a policy, the string it is written as (``"moments:every=5,weights=bf16"``), or
            any callable that takes a ``SaveRequest`` and returns the due units. Without one it is
            ``moments:every=5,weights=bf16,moments=bf16``, for which ``docs/policies.md`` gives the numbers.
        base: ``"auto"`` carries from what this training state was last saved to or loaded
            from, and never stops training; a folder is carried from and must be a committed
            checkpoint; None writes everything.
        carry: ``link`` hard-links earlier files into the new folder, which makes it
            self-contained; ``reference`` only points at them; ``copy`` copies them.
            ``auto`` is ``link``, and ``reference`` on object stores, which have no links.
        full_every: every so many saves, write everything; None for never.
        layers: how keys are grouped into layers.
        dedup_save_to_lowest_rank: as in DCP's ``DefaultSavePlanner``.
        enable_plan_caching: must stay False. DCP would write the first save's selection again.

    Raises:
        PolicyError: the policy's string is wrong.
        BaseError: an explicit ``base`` is not a committed checkpoint.
        SaveRefusedError: plan caching was asked for.
    """

    def __init__(
        self,
        policy: Policy | str | Any = DEFAULT,
        base: str | os.PathLike[str] | None = "auto",
        carry: Carry = "auto",
        full_every: int | None = None,
        *,
        layers: LayerMap | None = None,
        dedup_save_to_lowest_rank: bool = False,
        enable_plan_caching: bool = False,
    ) -> None:
        if enable_plan_caching:
            raise SaveRefusedError(
                "enable_plan_caching=True is refused: DCP would write the first save's selection in every "
                "later save. Leave it off; planning a layer-wise save costs less than a stock one anyway."
            )
        if carry not in ("auto", "link", "reference", "copy"):
            raise SaveRefusedError(f"carry={carry!r} is unknown; use auto, link, reference or copy.")
        if full_every is not None and full_every < 1:
            raise SaveRefusedError(f"full_every={full_every} makes no sense; use 1 or more, or None for never.")
        super().__init__(dedup_save_to_lowest_rank=dedup_save_to_lowest_rank)
        self._base: Path | str | None = "auto" if base == "auto" else None
        if base is not None and base != "auto":
            bases.check_explicit(base)
            self._base = place(base)
        self._rules = Rules(
            policy=parse_policy(policy),
            mode="link",  # until it is known where to
            full_every=full_every,
            layers=layers or LayerMap(),
            explicit=isinstance(base, str | os.PathLike) and base != "auto",
        )
        self._carry = carry
        self._pid = os.getpid()
        self._snapshot = lineage.snapshot()
        self._generation = lineage.generation()
        self._target = locate(".")
        self._unnamed = True
        self._assignment: Assignment | None = None
        self._present: set[str] | None = None
        self._prepared: Prepared | None = None

    @property
    def policy(self) -> Policy:
        """The policy that decides what is due."""
        return self._rules.policy

    def __getstate__(self) -> dict[str, Any]:
        """Take along what this process knows: another process's own memory is never consulted."""
        self._refresh()
        return self.__dict__.copy()

    # Every rank ------------------------------------------------------------------------

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Flatten the state and note which folder is being written. Nothing on disk is touched."""
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        checkpoint_id = storage_meta.checkpoint_id if storage_meta else None
        self._unnamed = checkpoint_id is None
        self._target = locate("." if checkpoint_id is None else str(checkpoint_id))
        self._rules = replace(self._rules, mode=self._mode())
        self._assignment = None
        self._present = None
        self._refresh()

    def _mode(self) -> CarryMode:
        if not is_url(self._target.folder):
            return "link" if self._carry == "auto" else self._carry
        if self._carry == "link":
            raise SaveRefusedError(
                f"carry='link' cannot be had for {self._target.folder}: object stores have no links; use reference or "
                f"copy."
            )
        return "reference" if self._carry == "auto" else self._carry

    def create_local_plan(self) -> SavePlan:
        """Plan this rank's items as DCP does, and find the tied parameters among them."""
        plan = super().create_local_plan()
        parts = changes.measure(plan, self._plain) if self.policy.needs_fingerprints else {}
        moved = drifts.measure(plan, self._plain, self.policy, self._series)
        info = RankInfo(self.mappings, shapes_of(plan), tuple(find_ties(self.state_dict)), parts, moved)
        return replace(plan, planner_data=info)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Take over what the coordinator decided.

        Raises:
            SaveRefusedError: the writer does not keep the file names that make carrying safe.
        """
        if not isinstance(new_plan.storage_data, _StoragePrefix):
            self._withdraw()
            raise SaveRefusedError(
                "LayerwisePlanner saves through FileSystemWriter or LayerwiseWriter; this writer would write "
                "the due layers alone as if they were everything. Save with one of those two."
            )
        assignment = new_plan.planner_data
        if not isinstance(assignment, Assignment):
            raise SaveRefusedError("The coordinator saves with another planner than this rank; use one on all.")
        if not self._unnamed:
            lineage.saved(self._target, assignment.save_id, assignment.chain, self._generation)
        self._assignment = assignment
        drifts.keep(new_plan, self._plain, self.policy, self._series, assignment.save_id)
        return super().finish_plan(replace(new_plan, planner_data=self.mappings))

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Narrow a tensor that is stored in another dtype than the training state's."""
        if write_item.type != WriteItemType.BYTE_IO and write_item.tensor_data is not None:
            if object.is_meta:
                raise SaveRefusedError(
                    f"{write_item.index.fqn} is due but has no data: it was staged for another save. Give the save "
                    f"the planner that made its stager."
                )
            return object.to(write_item.tensor_data.properties.dtype)
        return super().transform_object(write_item, object)

    def cohort(self, key: str) -> str:
        """Return the label of the keys that live and die together on disk with this one."""
        return self._assignment.cohorts.get(key, REST) if self._assignment else REST

    @property
    def _series(self) -> drifts.Series:
        return str(self._target.run), self._target.series

    def _plain(self, index: MetadataIndex) -> object:
        """Return an item's tensor; None for a subclass, whose bits are not those of the tensor it looks like."""
        found = self.lookup_object(index)
        return found if type(found) in (torch.Tensor, torch.nn.Parameter) else None

    # The coordinator -------------------------------------------------------------------

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Decide what is due, carry the rest, and compose the metadata of both.

        Raises:
            ConflictingStateError: ranks disagree about a tensor, or do not cover it.
            SaveRefusedError: DCP was told to save without collectives.
            PolicyError: the policy returned a unit that does not exist.
            BaseError: an explicit base is unusable.
        """
        if any(plan.storage_data is not None for plan in all_plans):
            raise SaveRefusedError(
                "use_collectives=False is refused: every rank would decide alone what is due and their "
                "choices could differ. Leave use_collectives on; the choice itself costs no collective."
            )
        for rank, plan in enumerate(all_plans):
            if not isinstance(plan.planner_data, RankInfo):
                raise SaveRefusedError(f"Rank {rank} saves with another planner than the coordinator; use one on all.")
        try:
            with collector_off():
                return self._plan_all(all_plans)
        except BaseException:
            self._withdraw()
            raise

    def _plan_all(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        infos: list[RankInfo] = [plan.planner_data for plan in all_plans]
        ready = self._staged_for(infos) if self._prepared else self._prepare(infos)
        plans = [replace(p, planner_data=i.paths) for p, i in zip(all_plans, infos, strict=True)]
        state, decision, base = ready.state, ready.decision, ready.base
        narrowed = narrow(plans, decision, state, self.policy)
        due_plans, metadata = super().create_global_plan(keep_due(plans, ready.carried))
        problems = uncovered(metadata)
        if problems:
            raise ConflictingStateError(f"{problems[0]}; save from all the ranks that hold the rest.")
        record = make_record(decision, state, base, self._target, narrowed, self.policy, ready.save_id)
        self.metadata = self._compose(metadata, base, decision, state, record)
        sweep.after_commit(self._target, set(ready.present), ready.save_id)
        labels = cohorts(self.policy, decision.request, state)
        return assign(due_plans, ready.save_id, _after(ready.chain, base), labels), self.metadata

    def _prepare(self, infos: list[RankInfo]) -> Prepared:
        """Decide what is due, and make the files of the rest part of the target."""
        present = set() if self._unnamed else sweep.leftovers(self._target.folder)
        self._present = present
        token = self._token()
        save_id = _claim(token, present)
        chain = self._ancestors(token)
        base = self._find_base(chain)
        state = gather(infos, self._rules.layers, base)
        state = changes.compare(state, (info.fingerprints for info in infos), base, self.policy)
        state = drifts.compare(state, [info.drifts for info in infos], base, self.policy)
        self._warn_if_nothing_can_be_carried(state)
        decision = decide(state, base, self._target, self._rules, present)
        return Prepared(self._target, save_id, chain, base, state, decision, frozenset(present))

    # Deciding before staging -------------------------------------------------------------

    def stager(
        self, checkpoint_id: str | os.PathLike[str], process_group: dist.ProcessGroup | None = None
    ) -> LayerwiseStager:
        """Return an ``async_stager=`` for ``dcp.async_save`` that copies only what is due.

        It decides before anything is copied, so the stall falls with the bytes; the save must
        then be given this planner and this folder. Make a new one for every save.

        Args:
            checkpoint_id: the folder that the save is given.
            process_group: the group that the save is given.
        """
        return LayerwiseStager(self, checkpoint_id, process_group)

    def plan_ahead(self, infos: list[RankInfo]) -> Ahead:
        """Decide on the coordinator before staging; ``create_global_plan`` will obey."""
        try:
            with collector_off():
                self._prepared = self._prepare(infos)
        except BaseException:
            self._withdraw()
            raise
        ready = self._prepared
        return Ahead(ready.save_id, _after(ready.chain, ready.base), frozenset(ready.carried))

    def accept_ahead(self, ahead: Ahead) -> frozenset[str]:
        """Take over, on every rank, what was decided; return the keys that are carried."""
        if not self._unnamed:
            # The save may run in another process: what this one descends from is noted here.
            lineage.saved(self._target, ahead.save_id, ahead.chain, self._generation)
        return ahead.carried

    def _staged_for(self, infos: list[RankInfo]) -> Prepared:
        """Return what was decided before staging, once it is sure that it still holds.

        Raises:
            SaveRefusedError: another folder, another state, or carried files that are gone.
        """
        ready, self._prepared = self._prepared, None
        assert ready is not None
        why = None
        if ready.target.folder != self._target.folder:
            why = f"it was staged for {ready.target.folder} and is saved to {self._target.folder}"
        elif any(ready.state.shapes.get(k) != shape for info in infos for k, shape in info.shapes.items()):
            why = "the state has changed since it was staged"
        else:
            gone = [p for p in ready.decision.paths.values() if not (self._target.folder / p).exists()]
            why = f"{self._target.folder / gone[0]}, which it carries, is gone" if gone else None
        if why:
            raise SaveRefusedError(f"This save cannot be made: {why}. Make a new stager for every save.")
        self._present = set(ready.present)
        return ready

    def _compose(
        self, metadata: Metadata, base: Base | None, decision: Decision, state: State, record: Record
    ) -> CompositeMetadata:
        """Put carried and written keys together, in the order of the state dict."""
        keys = dict(metadata.state_dict_metadata)
        if base is not None:
            for unit in decision.origins:
                keys.update({key: base.metadata.state_dict_metadata[key] for key in state.units[unit]})
        metadata.state_dict_metadata = {key: keys[key] for key in state.shapes}
        check = partial(carrying.check_there, folder=None if self._unnamed else self._target.folder)
        return CompositeMetadata(metadata, decision.entries, record.to_builtins(), check)

    def _withdraw(self) -> None:
        """Take back what was carried for a save that is refused."""
        if self._present is not None and not self._unnamed:
            carrying.remove(sweep.leftovers(self._target.folder) - self._present, self._target.folder)

    def _token(self) -> Token | None:
        """Return the token that was made for this save; one that was merely loaded tells of an earlier one."""
        token = Token.from_json(self.state_dict.get(TOKEN_KEY))
        if token is None or token.folder not in (None, str(self._target.folder)):
            return None
        return token

    def _ancestors(self, token: Token | None) -> Chain:
        """Return what this state descends from, by its own token or by what the process saw."""
        if token is not None:
            return token.ancestors
        if not dcp_events.listening():
            if self._base == "auto" and not self._unnamed:
                self._warn("Logging is switched off, so a load through DCP would go unseen")
            return ()
        return self._snapshot.get((self._target.run, self._target.series), ())

    def _find_base(self, chain: Chain) -> Base | None:
        if self._base is None or self._unnamed:
            return None
        if not isinstance(self._base, str):
            return bases.open_explicit(self._base, self._target)
        if self._target.step is None:
            self._warn("The folder's name tells no step (step-200, checkpoint-200 or 200 would)")
            return None
        return bases.find(chain, self._target)

    def _warn_if_nothing_can_be_carried(self, state: State) -> None:
        if self._unnamed:
            self._warn("The writer does not tell where it saves")
        elif not state.units:
            self._warn("No parameter was recognised in the state dict")

    def _warn(self, reason: str) -> None:
        what = "the checkpoint" if self._unnamed else self._target.folder
        warnings.warn(f"{reason}; {what} is written as a whole.", TailorWarning, stacklevel=3)

    def _refresh(self) -> None:
        """Look again at what this process saved and loaded; a pickled planner brings its own view."""
        if self._pid == os.getpid():
            self._snapshot = lineage.snapshot()
        self._generation = lineage.generation()


def _claim(token: Token | None, present: set[str]) -> str:
    """Return the save's id, which becomes part of its files' names: none of those there may have it."""
    save_id = lineage.claim(token.save_id if token else None)
    taken = any(f"_{save_id[:8]}_" in name for name in present)
    return lineage.claim(None) if taken else save_id


def _after(chain: Chain, base: Base | None) -> Chain:
    """Return the ancestors with the base among them under its save's id."""
    if base is None:
        return chain
    mine = base.ancestor
    kept = tuple(mine if ancestor.folder == mine.folder else ancestor for ancestor in chain)
    return kept if mine in kept else (*kept, mine)
