"""The little world of ``world.py`` laid out over four ranks as large trainings are: meshes of two dimensions,
stages of a pipeline, experts that only some ranks hold, FSDP1's own sharded tensors; and a real FSDP1 training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, init_from_local_shards
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
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


def load(group: Any, layout: str, model: Model, path: str, ours: dict[str, Any] | None = None) -> dict[str, Any]:
    """Load into zeros in the same layout; return what this rank has a part of, whole.

    With torch alone, or with options for our reader.
    """
    target = state(group, layout, model, 0, empty=True)
    if ours is None:
        dcp.load(target, checkpoint_id=path, process_group=group)
    else:
        from tailor_dcp import LayerwiseReader

        dcp.load(target, storage_reader=LayerwiseReader(path, process_group=group, **ours), process_group=group)
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


class _Blocks(nn.Module):
    """Numbered blocks between two other layers; no dimension is shorter than two ranks need to hold some of each."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Apply all layers."""
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


class Flat:
    """A model and its Adam in training, in FSDP1's flat parameters; without a group as they are."""

    def __init__(self, group: Any, seed: int) -> None:
        self.group, self.model = group, _Blocks(seed)
        if group is not None:
            wrap = ModuleWrapPolicy({nn.Linear})
            on = {"process_group": group, "device_id": torch.device("cpu"), "use_orig_params": True}
            self.model = FullyShardedDataParallel(self.model, auto_wrap_policy=wrap, **on)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)

    def train(self, step: int) -> None:
        """Make a step that its number alone decides."""
        drawn = torch.Generator().manual_seed(step)
        self.model(torch.randint(7, (16,), generator=drawn)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """Return weights and optimizer state as torch gives them."""
        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optim}

    def whole(self) -> dict[str, Any]:
        """Return the same with every tensor in one piece, gathered shard by shard."""
        state = copy.deepcopy(self.state())
        for held in (state["model"], *state["optim"]["state"].values()):
            for key, value in held.items() if self.group is not None else ():
                assert key == "step" or (isinstance(value, ShardedTensor) and value.local_shards()), key
                held[key] = value if key == "step" else _whole(value, self.group)
        return state


def save_flat(group: Any, run: str, steps: tuple[int, ...]) -> list[dict[str, Any]]:
    """Train and save every second layer after each step; return what the training then had, in one piece."""
    from tailor_dcp import LayerwisePlanner

    training, seen = Flat(group, seed=0), []
    for step in steps:
        training.train(step)
        planner = LayerwisePlanner("parity")
        dcp.save(training.state(), checkpoint_id=f"{run}/step-{step}", planner=planner, process_group=group)
        seen.append(training.whole())
    return seen


def load_flat(group: Any, path: str, wrapped: bool) -> dict[str, Any]:
    """Load with torch alone into a training that began otherwise; return what it then has, in one piece."""
    training = Flat(group if wrapped else None, seed=1)
    training.train(99)  # so that there are moments to load into
    held = training.state()
    dcp.load(held, checkpoint_id=path, process_group=group)
    set_state_dict(training.model, training.optimizer, model_state_dict=held["model"], optim_state_dict=held["optim"])
    return training.whole()


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
