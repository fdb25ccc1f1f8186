"""A run whose checkpoints tell by their values alone at which step each of their tensors was saved.

Values come from ``world``; loading is always done by stock ``dcp.load`` into zeros. Most tests
need no ranks, so everything here works in a single process; what ranks must be told to do is
at the end.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter, StorageWriter

from tailor_dcp import LayerwisePlanner, TailorWarning
from tailor_dcp.policies import SaveRequest
from tailor_dcp.units import Unit
from tests.support.world import Model, Param, flat, full_value, keys, state, value

L0, L1, L2 = (f"model.layers.{i}" for i in range(3))
HEAD = "lm_head"
LAYERS = (L0, L1, L2, HEAD)
MODEL = Model((*(Param(f"{layer}.w", (4, 3)) for layer in (L0, L1, L2)), Param("lm_head.w", (2, 3))))


def due(*layers: str) -> Callable[[SaveRequest], list[Unit]]:
    """Return a policy that writes these layers, weights and moments, and carries all others."""

    def select(request: SaveRequest) -> list[Unit]:
        return [info.unit for info in request.units if info.layer in layers]

    return select


class Run:
    """A folder of checkpoints and the steps whose values they may hold."""

    def __init__(self, folder: Path, model: Model = MODEL) -> None:
        self.folder, self.model = folder, model
        self.steps: set[int] = set()

    def path(self, step: int | str) -> Path:
        """Return a checkpoint's folder, by its step or its name."""
        return self.folder / (f"step-{step}" if isinstance(step, int) else step)

    def state(self, step: int) -> dict[str, Any]:
        """Return the training state at a step."""
        self.steps.add(step)
        return state(self.model, step, None)

    def save(
        self,
        step: int,
        policy: Any = due(),  # noqa: B008 - a constant
        *,
        to: str | None = None,
        extra: Mapping[str, Any] | None = None,
        writer: Callable[[Path], StorageWriter] = FileSystemWriter,
        **options: Any,
    ) -> Path:
        """Save with our planner; the default policy carries all that it can."""
        folder = self.path(to or step)
        planner = LayerwisePlanner(policy, **options)
        dcp.save({**self.state(step), **(extra or {})}, storage_writer=writer(folder), planner=planner)
        return folder

    def stock(self, step: int, to: str | None = None) -> Path:
        """Save with torch alone."""
        folder = self.path(to or step)
        dcp.save(self.state(step), checkpoint_id=folder)
        return folder

    def load(self, step: int | str | Path) -> dict[str, Any]:
        """Load with torch alone; the training state then descends from there."""
        target = state(self.model, 0, None, empty=True)
        dcp.load(target, checkpoint_id=self.path(step) if isinstance(step, int | str) else step)
        return flat(target)

    def steps_of(self, step: int | str | Path) -> dict[str, int]:
        """Return the step that each tensor's value in a checkpoint was saved at, bit for bit."""
        with unheard():
            loaded = self.load(step)
        return {key: self._step(key, *known, loaded[key]) for key, known in keys(self.model).items()}

    def origins(self, step: int | str | Path) -> dict[str, int]:
        """Return the step that each layer was saved at; weights and moments must agree."""
        found: dict[str, set[int]] = {}
        for key, origin in self.steps_of(step).items():
            param, _ = keys(self.model)[key]
            found.setdefault(param.fqn.rpartition(".")[0], set()).add(origin)
        assert all(len(steps) == 1 for steps in found.values()), f"a layer is torn between steps: {found}"
        return {layer: steps.pop() for layer, steps in found.items()}

    def _step(self, key: str, param: Param, kind: str, loaded: torch.Tensor) -> int:
        for step in self.steps:
            if torch.equal(loaded, full_value(key, param, kind, step)):
                return step
        raise AssertionError(f"{key} has a value of none of the steps {sorted(self.steps)}")


@contextmanager
def unheard() -> Iterator[None]:
    """Load to look, not to train on: what the process knows of its past stays as it is."""
    from tailor_dcp import lineage

    before = lineage._branches.copy(), lineage._generation
    try:
        yield
    finally:
        lineage._branches.clear()
        lineage._branches.update(before[0])
        lineage._generation = before[1]


@contextmanager
def heard_warnings() -> Iterator[list[str]]:
    """Collect what this package warns of."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(w.message) for w in caught if issubclass(w.category, TailorWarning)]


def metadata(folder: Path) -> Any:
    """Return a checkpoint's metadata as stock pickle sees it."""
    return pickle.loads((folder / ".metadata").read_bytes())


def record(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's record as stock pickle sees it."""
    told: dict[str, Any] = metadata(folder).tailor
    return told


def parent(folder: Path) -> str | None:
    """Return the name of the checkpoint that this one says it carries from."""
    told = record(folder)["parent"]
    return told and told[2]


def files(folder: Path) -> set[str]:
    """Return all files in a folder but ``.metadata``, by relative path."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return found - {".metadata"}


def named(folder: Path) -> set[str]:
    """Return the files that a checkpoint's metadata names."""
    return {info.relative_path for info in metadata(folder).storage_data.values()}


def written(folder: Path) -> set[str]:
    """Return the keys whose bytes lie in files that this checkpoint's own save wrote."""
    return {i.fqn for i, info in metadata(folder).storage_data.items() if "/" not in info.relative_path}


# What ranks are told to do ----------------------------------------------------------------


def save_stages(group: Any, path: str, step: int, policy: str = "parity") -> None:
    """Save as in a pipeline: each rank has layers of its own, under keys that no other rank has."""
    rank = torch.distributed.get_rank(group)
    dcp.save(_stage(rank, step), checkpoint_id=path, planner=LayerwisePlanner(policy), process_group=group)


def load_stages(group: Any, path: str, step: int) -> dict[str, int]:
    """Load each rank's own layers and return the step that each was saved at: this one, or the one before."""
    rank = torch.distributed.get_rank(group)
    target = _stage(rank, 0)
    dcp.load(target, checkpoint_id=path, process_group=group)
    found = {}
    for fqn, loaded in target["model"].items():
        found[fqn] = next(s for s in (step, step - 100) if torch.equal(loaded, value(fqn, s, (4,))))
    return found


def _stage(rank: int, step: int) -> dict[str, Any]:
    return {"model": {f"layers.{2 * rank + i}.w": value(f"layers.{2 * rank + i}.w", step, (4,)) for i in range(2)}}


def save_with(group: Any, pickled: bytes, path: str, step: int) -> None:
    """Save with a planner that was made in another process."""
    dcp.save(state(MODEL, step, group), checkpoint_id=path, planner=pickle.loads(pickled), process_group=group)


def save_disagreeing(group: Any, path: str, sizes: list[int], dtypes: list[str]) -> str:
    """Save one key with another shape or dtype on each rank and return what DCP raises."""
    rank = torch.distributed.get_rank(group)
    held = {"model": {"layers.0.w": torch.zeros(sizes[rank], dtype=getattr(torch, dtypes[rank]))}}
    try:
        dcp.save(held, checkpoint_id=path, planner=LayerwisePlanner("full"), process_group=group)
    except dcp.api.CheckpointException as error:
        return "".join(str(wrapped[0]) for wrapped in error.failures.values())
    return ""


def save_with_a_stock_rank(group: Any, path: str) -> str:
    """Save with our planner on all ranks but the last and return what DCP raises."""
    last = torch.distributed.get_rank(group) == torch.distributed.get_world_size(group) - 1
    planner = dcp.DefaultSavePlanner() if last else LayerwisePlanner("full")
    try:
        dcp.save({"model": {"layers.0.w": torch.zeros(2)}}, checkpoint_id=path, planner=planner, process_group=group)
    except dcp.api.CheckpointException as error:
        return "".join(str(wrapped[0]) for wrapped in error.failures.values())
    return ""


def save_tied(group: Any, path: str, step: int, policy: str, tied: bool) -> None:
    """Save single-row weights that only the last rank has elements of; all other ranks' shards are empty."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    last = torch.distributed.get_world_size(group) - 1
    # Ranks in reverse, so that the first shard, the one with the row, is not the coordinator's.
    mesh = DeviceMesh("cpu", list(range(last, -1, -1)), _init_backend=False)
    rows = 1 if torch.distributed.get_rank(group) == last else 0

    def spread(local: torch.Tensor) -> torch.Tensor:
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(1, 6), stride=(6, 1))

    weights = {f"layers.{i}.w": value(f"layers.{i}.w", step, (1, 6))[:rows].clone() for i in range(3)}
    if tied:
        weights["layers.1.w"] = weights["layers.0.w"]
    held = {"model": {fqn: spread(local) for fqn, local in weights.items()}}
    dcp.save(held, checkpoint_id=path, planner=LayerwisePlanner(policy), process_group=group)


def load_failing_on_one_rank(group: Any, path: str) -> bool:
    """Load so that the last rank cannot read, and tell whether that raised."""
    rank = torch.distributed.get_rank(group)

    class Reader(dcp.FileSystemReader):
        def read_data(self, plan: Any, planner: Any) -> Any:
            if rank == torch.distributed.get_world_size(group) - 1:
                raise OSError("this rank's disk is gone")
            return super().read_data(plan, planner)

    target = state(MODEL, 0, group, empty=True)
    try:
        dcp.load(target, storage_reader=Reader(path), process_group=group)
    except dcp.api.CheckpointException:
        return True
    return False
