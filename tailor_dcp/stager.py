"""Staging only what is due: the stall of an asynchronous save falls with the bytes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tailor_dcp.errors import SaveRefusedError

if TYPE_CHECKING:
    from tailor_dcp.planner import LayerwisePlanner


class LayerwiseStager(AsyncStager):
    """Decides before it copies, so that only due tensors are copied.

    Rank 0 reads the base, asks the policy, links the carried files and tells the others; the
    planner then obeys in the background. What is carried goes there as a tensor without
    data. Made by ``LayerwisePlanner.stager`` and good for one save.

    Args:
        planner: the planner that the save is given.
        checkpoint_id: the folder that the save is given.
        process_group: the ranks that save together.
    """

    def __init__(
        self,
        planner: LayerwisePlanner,
        checkpoint_id: str | os.PathLike[str],
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._planner = planner
        self._checkpoint_id = os.fspath(checkpoint_id)
        self._group = process_group

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a copy on the CPU in which carried tensors have no data.

        Raises:
            TailorError: what planning this save raises, on every rank.
        """
        coordinator = self._rank() == 0
        self._planner.set_up_planner(state_dict, StorageMeta(self._checkpoint_id), is_coordinator=coordinator)
        info = self._planner.create_local_plan().planner_data
        carried = self._agree(self._gather(info))
        flat, paths = flatten_state_dict(state_dict)
        staged: dict[str, Any] = {}
        for key, path in paths.items():
            set_element(staged, path, (_without_data if key in carried else _copy)(flat[key]))
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies from the GPU were only asked for
        return staged

    def synchronize_staging(self) -> None:
        """Do nothing: staging is complete when ``stage`` returns."""

    def close(self) -> None:
        """Do nothing: no resources are kept."""

    def _rank(self) -> int:
        return dist.get_rank(self._group) if dist.is_initialized() else 0

    def _gather(self, info: Any) -> list[Any] | None:
        if not dist.is_initialized():
            return [info]
        infos = [None] * dist.get_world_size(self._group) if self._rank() == 0 else None
        dist.gather_object(info, infos, group=self._group, group_dst=0)
        return infos

    def _agree(self, infos: list[Any] | None) -> frozenset[str]:
        """Let the coordinator decide, and return the keys that are carried."""
        answer: list[Any] = [None]
        if infos is not None:
            try:
                answer = [self._planner.plan_ahead(infos)]
            except Exception as error:  # every rank must hear of it, or the others would wait for ever
                answer = [error]
        if dist.is_initialized():
            dist.broadcast_object_list(answer, group=self._group, group_src=0)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return self._planner.accept_ahead(answer[0])


def _copy(value: Any) -> Any:
    """Return a copy on the CPU that training cannot change any more."""
    if isinstance(value, DTensor):
        return _like(value, _copy(value.to_local()))
    if _is_shard(value):
        return _rewrapped(value, _copy)
    if type(value) in _PLAIN:
        copied = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
        return copied.copy_(value.detach(), non_blocking=True)
    return copy.deepcopy(value)


def _without_data(value: Any) -> Any:
    """Return a stand-in for what is carried: everything but the bytes."""
    if isinstance(value, DTensor):
        return _like(value, _without_data(value.to_local()))
    if _is_shard(value):
        return _rewrapped(value, _without_data)
    if type(value) in _PLAIN:
        return torch.empty_like(value, device="meta", requires_grad=False)
    if isinstance(value, torch.Tensor):
        raise SaveRefusedError(
            f"A {type(value).__name__} cannot be staged without its data; save without async_stager=, which copies "
            f"everything."
        )
    return value


def _like(value: DTensor, local: torch.Tensor) -> DTensor:
    # from_local would move it back to the mesh's device.
    return DTensor(local, value._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def _is_shard(value: Any) -> bool:
    """Tell whether this is a tensor of a foreign kind that speaks DCP's protocol, and torch's for what it wraps."""
    return hasattr(value, "__create_write_items__") and is_traceable_wrapper_subclass(value)


def _rewrapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return the same kind of tensor around what ``change`` makes of those inside."""
    names, context = value.__tensor_flatten__()
    inner = {name: change(getattr(value, name)) for name in names}
    return type(value).__tensor_unflatten__(inner, context, value.size(), value.stride())


_PLAIN = (torch.Tensor, torch.nn.Parameter)
