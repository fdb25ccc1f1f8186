"""A little world whose every value can be told from its key and its step, in any process.

A model is a list of parameters; the value of each tensor at each step is drawn from a
generator that is seeded with both. So what a loaded tensor must be is known without asking
the code under test, and from what it is one can tell the step that it was saved at.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Param:
    """One parameter: its FQN and shape, how it is spread over ranks, whether it is trained."""

    fqn: str
    shape: tuple[int, ...]
    spread: str = "plain"  # plain, shard, replicate
    trained: bool = True
    dtype: str = "float32"


@dataclass(frozen=True)
class Model:
    """Parameters, and pairs of names for one storage."""

    params: tuple[Param, ...]
    ties: tuple[tuple[str, str], ...] = ()

    def without(self, fqn: str) -> Model:
        """Return the model less one parameter."""
        return replace(self, params=tuple(p for p in self.params if p.fqn != fqn))


def value(key: str, step: int, shape: tuple[int, ...], dtype: str = "float32") -> torch.Tensor:
    """Return the tensor that ``key`` holds at ``step``."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) * 1000003 + step)
    drawn = torch.randn(shape, generator=generator)
    kind = getattr(torch, dtype)
    return drawn.to(kind) if kind.is_floating_point else (drawn * 1000).to(kind)


def keys(model: Model) -> dict[str, tuple[Param, str]]:
    """Return every tensor key of the model and its optimizer: its parameter and its kind."""
    found: dict[str, tuple[Param, str]] = {}
    for p in model.params:
        found[f"model.{p.fqn}"] = (p, "weight")
        for kind in (*MOMENTS, "step") if p.trained else ():
            found[f"optim.state.{p.fqn}.{kind}"] = (p, kind)
    return found


def full_value(key: str, param: Param, kind: str, step: int) -> torch.Tensor:
    """Return what a key holds at a step; Adam's counter simply counts."""
    if kind == "step":
        return torch.tensor(float(step))
    return value(key, step, param.shape, param.dtype if kind == "weight" else "float32")


def state(model: Model, step: int, group: Any, empty: bool = False) -> dict[str, Any]:
    """Return the state dict of this rank, with the values of ``step`` or with zeros to load into."""
    mesh = DeviceMesh.from_group(group, "cpu") if group is not None else None

    def make(key: str, param: Param, kind: str) -> torch.Tensor:
        whole = full_value(key, param, kind, step)
        whole = torch.zeros_like(whole) if empty else whole
        return whole if kind == "step" or mesh is None else _spread(whole, param.spread, mesh)

    tensors = {key: make(key, p, kind) for key, (p, kind) in keys(model).items()}
    for name, twin in model.ties:
        tensors[f"model.{twin}"] = tensors[f"model.{name}"]
    weights = {k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")}
    moments: dict[str, dict[str, Any]] = {}
    for key, (p, kind) in keys(model).items():
        if kind != "weight":
            moments.setdefault(p.fqn, {})[kind] = tensors[key]
    rest = 0 if empty else step
    return {
        "model": weights,
        "optim": {
            "state": moments,
            "param_groups": [{"lr": torch.tensor(float(rest)), "params": [p.fqn for p in model.params]}],
        },
        "train": {"step": rest, "rng": torch.full((16,), rest % 251, dtype=torch.uint8)},
    }


def _spread(whole: torch.Tensor, spread: str, mesh: DeviceMesh) -> torch.Tensor:
    if spread == "plain" or whole.dim() == 0:
        return whole
    if spread == "replicate":
        return DTensor.from_local(whole, mesh, [Replicate()], run_check=False)
    parts = list(whole.chunk(mesh.size(), 0))
    rank = mesh.get_local_rank()
    local = parts[rank] if rank < len(parts) else whole[:0]
    return DTensor.from_local(
        local.clone(), mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def flat(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Flatten a state dict of this world to key -> value, tensors gathered from all ranks."""
    found: dict[str, Any] = {f"model.{k}": v for k, v in state_dict["model"].items()}
    for fqn, kinds in state_dict["optim"]["state"].items():
        found |= {f"optim.state.{fqn}.{kind}": v for kind, v in kinds.items()}
    found["lr"] = state_dict["optim"]["param_groups"][0]["lr"]
    found |= {f"train.{k}": v for k, v in state_dict["train"].items()}
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in found.items()}


# What workers are told to call -----------------------------------------------------------


def save(group: Any, model: Model, step: int, path: str, policy: Any, writer: str = "stock", **options: Any) -> None:
    """Save with our planner."""
    from tailor_dcp import LayerwisePlanner
    from tailor_dcp.writer import LayerwiseWriter

    planner = LayerwisePlanner(policy, **options)
    to = LayerwiseWriter(path) if writer == "layerwise" else dcp.FileSystemWriter(path)
    dcp.save(state(model, step, group), storage_writer=to, planner=planner, process_group=group)


def stock_save(group: Any, model: Model, step: int, path: str) -> None:
    """Save with torch alone."""
    dcp.save(state(model, step, group), checkpoint_id=path, process_group=group)


def load(group: Any, model: Model, path: str) -> dict[str, Any]:
    """Load with torch alone into zeros and return everything, whole."""
    target = state(model, 0, group, empty=True)
    dcp.load(target, checkpoint_id=path, process_group=group)
    return flat(target)


def through_torch_save(group: Any, path: str, out: str) -> dict[str, Any]:
    """Convert with torch's own converter and return everything."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(path, out)
    return flat(torch.load(out, weights_only=True))


def record(group: Any, path: str) -> Any:
    """Return the record of a checkpoint as stock pickle sees it, None if it has none."""
    import pathlib
    import pickle

    return getattr(pickle.loads((pathlib.Path(path) / ".metadata").read_bytes()), "tailor", None)


def forget(group: Any) -> None:
    """Forget what was saved and loaded."""
    from tailor_dcp import forget as forget_all

    forget_all()


def can_import_tailor(group: Any) -> bool:
    """Tell whether tailor_dcp can be imported here."""
    try:
        import tailor_dcp  # noqa: F401
    except ImportError:
        return False
    return True


def ranks(group: Any) -> int:
    """Return the size of the group."""
    return dist.get_world_size(group)
