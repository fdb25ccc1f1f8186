"""The little world of ``world.py`` laid out over four ranks as large trainings are: meshes of two dimensions,
stages of a pipeline, experts that only some ranks hold, FSDP1's own sharded tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, init_from_local_shards
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from tests.support import world
from tests.support.world import Model, Param

DENSE = Model(
    (
        Param("model.embed_tokens.weight", (8, 6)),
        *(Param(f"model.layers.{i}.mlp.weight", (9, 5)) for i in range(4)),
        *(Param(f"model.layers.{i}.norm.weight", (5,)) for i in range(4)),
        Param("model.norm.weight", (6,)),
        Param("lm_head.weight", (8, 6), dtype="bfloat16"),
    )
)
EXPERTS = Model(
    (
        Param("model.embed_tokens.weight", (8, 6)),
        *(Param(f"model.layers.{i}.moe.experts.{e}.w1.weight", (4, 3)) for i in range(2) for e in range(4)),
        *(Param(f"model.layers.{i}.moe.router.weight", (4, 6)) for i in range(2)),
        Param("model.norm.weight", (6,)),
    )
)
Place = Callable[[str, torch.Tensor], Any]
"""Makes what this rank holds of a whole tensor, by its FQN; None where it holds no such key."""


@lru_cache(maxsize=8)
def _grid() -> DeviceMesh:
    return DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("outer", "inner"))


@lru_cache(maxsize=8)
def _halves() -> tuple[DeviceMesh, DeviceMesh]:
    """Return a mesh of each pair of ranks; all ranks take part in making both."""
    return DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])


def _cut(whole: torch.Tensor, mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def _two_dimensional(fqn: str, whole: torch.Tensor) -> DTensor:
    """Shard as FSDP with row-wise tensor parallelism does; what has one dimension, as with the column-wise one."""
    if whole.dim() == 2:
        return _cut(whole, _grid(), [Shard(0), Shard(1)])
    return _cut(whole, _grid(), [Shard(0), Replicate()])


def _strided(fqn: str, whole: torch.Tensor) -> DTensor:
    """Shard as FSDP over column-wise tensor parallelism does: one dimension cut twice, the inner cut first."""
    return _cut(whole, _grid(), [_StridedShard(0, split_factor=2), Shard(0)])


def _hybrid(fqn: str, whole: torch.Tensor) -> DTensor:
    return _cut(whole, _grid(), [Replicate(), Shard(0)])


def _one_dimensional(group: Any) -> Place:
    mesh = DeviceMesh.from_group(group, "cpu")
    return lambda fqn, whole: _cut(whole, mesh, [Shard(0)])


def _sharded_tensor(group: Any) -> Place:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)

    def place(fqn: str, whole: torch.Tensor) -> ShardedTensor:
        parts = whole.chunk(ranks)
        offset = sum(len(part) for part in parts[:rank])
        mine = [parts[rank].clone()] if rank < len(parts) else []
        shards = [LocalShard.from_tensor_and_offsets(p, [offset] + [0] * (p.dim() - 1), rank) for p in mine]
        return init_from_local_shards(shards, whole.shape, process_group=group)

    return place


def _pipeline(fqn: str, whole: torch.Tensor) -> DTensor | None:
    """Give each pair of ranks its stage: the other's keys are missing from its state dict."""
    late = fqn.startswith(("model.layers.2.", "model.layers.3.", "model.norm.", "lm_head."))
    mine = dist.get_rank() >= 2
    return _cut(whole, _halves()[late], [Shard(0)]) if late == mine else None


def _expert_parallel(fqn: str, whole: torch.Tensor) -> DTensor:
    """Give each pair of ranks its experts; the others have their keys as well, but no part of them."""
    if ".experts." not in fqn:
        return _cut(whole, _grid(), [Replicate(), Replicate()])
    mesh = _halves()[int(fqn.split(".experts.")[1][0]) >= 2]
    if mesh.get_coordinate() is None:
        return DTensor.from_local(
            whole[:0], mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
    return _cut(whole, mesh, [Shard(0)])


LAYOUTS: dict[str, Callable[[Any], Place]] = {
    "two-dimensional": lambda group: _two_dimensional,
    "strided": lambda group: _strided,
    "hybrid": lambda group: _hybrid,
    "one-dimensional": _one_dimensional,
    "sharded-tensor": _sharded_tensor,
    "pipeline": lambda group: _pipeline,
    "expert-parallel": lambda group: _expert_parallel,
}


def state(group: Any, layout: str, model: Model, step: int, empty: bool = False) -> dict[str, Any]:
    """Return this rank's part of the state, with the values of ``step`` or with zeros to load into."""
    whole = world.state(model, step, None, empty)
    place = LAYOUTS[layout](group)
    whole["model"] = {k: p for k, v in whole["model"].items() if (p := place(k, v)) is not None}
    whole["optim"]["state"] = {
        fqn: {kind: v if kind == "step" else place(fqn, v) for kind, v in kinds.items()}
        for fqn, kinds in whole["optim"]["state"].items()
        if fqn in whole["model"]
    }
    return whole


# What workers are told to call -----------------------------------------------------------


def save(group: Any, layout: str, model: Model, step: int, path: str) -> None:
    """Save every second layer."""
    from tailor_dcp import LayerwisePlanner

    held = state(group, layout, model, step)
    dcp.save(held, checkpoint_id=path, planner=LayerwisePlanner("parity"), process_group=group)


def load(group: Any, layout: str, model: Model, path: str) -> dict[str, Any]:
    """Load with torch alone into zeros in the same layout; return what this rank has a part of, whole."""
    target = state(group, layout, model, 0, empty=True)
    dcp.load(target, checkpoint_id=path, process_group=group)
    for held in (target["model"], *target["optim"]["state"].values()):
        for key, value in list(held.items()):
            if isinstance(value, DTensor) and value.device_mesh.get_coordinate() is None:
                del held[key]
            elif isinstance(value, ShardedTensor):
                held[key] = _whole(value, group)
    return world.flat(target)


def _whole(value: ShardedTensor, group: Any) -> torch.Tensor:
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, [shard.tensor for shard in value.local_shards()], group=group)
    return torch.cat([tensor for part in parts for tensor in part])


def save_with(group: Any, step: int, path: str, how: str) -> str:
    """Save in a way that has its own say on every rank; return the warnings and what was raised."""
    import warnings

    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    from tailor_dcp import LayerwisePlanner

    held = world.state(DENSE, step, None if how == "alone" else group)
    options: dict[str, Any] = {"planner": LayerwisePlanner("parity"), "process_group": group}
    if how == "alone":
        options = {"planner": options["planner"], "no_dist": True}
    elif how == "uncollected":
        options["use_collectives"] = False
    elif how == "hugging face":
        options["storage_writer"] = HuggingFaceStorageWriter(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            dcp.save(held, checkpoint_id=path, **options)
        except BaseException as error:  # CheckpointException is no Exception
            return f"{error!r} {getattr(error, 'failures', '')!r}"
    return " ".join(str(w.message) for w in caught if "TailorWarning" in w.category.__name__)
