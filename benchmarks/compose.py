"""What planning costs beyond DCP's own: 8B shapes on simulated ranks, the base read from disk.

    python -m benchmarks.compose [--ranks 512] [--pairs 3] [--json FILE]

DCP plans on the coordinator (``create_global_plan``) and pickles the metadata. We add reading
the base, choosing what is due, linking files and composing. Both are timed in turns on the
same plans; the ratio of what we add to what DCP takes is reported.
"""

from __future__ import annotations

import gc
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from benchmarks.harness import LLAMA_8B, ratio, scratch
from benchmarks.sharded import Shapes
from benchmarks.table import publish, row
from tailor_dcp import LayerwisePlanner, forget
from tailor_dcp.coordination import RankInfo, shapes_of
from tailor_dcp.metadata.compose import file_sizes
from tailor_dcp.metadata.pickle_writer import dumps
from tailor_dcp.metadata.record import ATTRIBUTE, packed

POLICIES = ("full", "moments:every=5", "parity")
BAR = 0.15  # at 512 ranks
Paths = dict[str, tuple[str | int, ...]]


def main(
    ranks: Annotated[int, typer.Option(help="Simulated ranks.")] = 512,
    pairs: Annotated[int, typer.Option(help="Interleaved rounds.")] = 3,
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
) -> None:
    """Time planning with stock DCP and with us, in turns."""
    simulated = Simulated(LLAMA_8B, ranks)
    stock: list[float] = []
    added: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    whole: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    with scratch(".") as folder:
        simulated.write(folder / "run" / "step-1")
        for _ in range(pairs):
            stock.append(sum(simulated.time_stock()))
            for policy in POLICIES:
                ours = simulated.time_ours(policy, folder / "run")
                added[policy].append(ours.added)
                whole[policy].append(ours.whole)
    dcp = "DCP's create_global_plan + dump"
    rows = []
    for policy in POLICIES:
        bar = BAR if ranks >= 512 else None
        rows.append(row(f"{policy}: what we add, base read", dcp, "time", ratio(added[policy], stock), bar))
        rows.append(row(f"{policy}: planning and dump in all", dcp, "time", ratio(whole[policy], stock)))
    publish(f"Composing at Llama-3-8B shapes, AdamW, {ranks} simulated ranks, {pairs} rounds", rows, out, ranks=ranks)


class Ours(NamedTuple):
    """Seconds of one save with us.

    Attributes:
        added: our planning, less DCP's part in it.
        dump: writing the metadata.
        whole: all of planning, and the dump.
    """

    added: float
    dump: float
    whole: float


@dataclass(frozen=True)
class Simulated:
    """A run of FSDP2 with AdamW in fp32, of any shapes and any number of ranks, of which only the plans exist."""

    shapes: Shapes
    ranks: int

    def write(self, folder: Path) -> int:
        """Commit a full checkpoint of files without content; return the size of its ``.metadata``."""
        planner = LayerwisePlanner("full", base=None)
        paths = _paths(self.shapes)
        plans, metadata = _plan_ours(planner, _ours(self.ranks, paths, self.shapes), folder)
        _store(plans, metadata, folder)
        _add_checksums(metadata)
        folder.mkdir(parents=True)
        for name, size in file_sizes(metadata.storage_data.items()).items():
            with (folder / name).open("wb") as stream:
                stream.truncate(size)
        (folder / ".metadata").write_bytes(dumps(metadata))
        return (folder / ".metadata").stat().st_size

    def stock_metadata(self) -> Metadata:
        """Return what DCP would commit."""
        new, metadata = DefaultSavePlanner().create_global_plan(_plans(self.ranks, _paths(self.shapes), self.shapes))
        _store(_prefixed(new), metadata, Path("stock"))
        return metadata

    def time_stock(self) -> tuple[float, float]:
        """Return the seconds of DCP's planning and of its dump."""
        plans = _plans(self.ranks, _paths(self.shapes), self.shapes)
        planner = DefaultSavePlanner()
        planning, (new, metadata) = _timed(lambda: planner.create_global_plan(plans))
        _store(_prefixed(new), metadata, Path("stock"))
        dumping, _ = _timed(lambda: pickle.dumps(metadata))
        return planning, dumping

    def time_ours(self, policy: str, run: Path) -> Ours:
        """Return the seconds of a save that carries from ``run/step-1``."""
        forget()
        plans = _ours(self.ranks, _paths(self.shapes), self.shapes)
        inner: list[float] = []
        own = DefaultSavePlanner.create_global_plan

        def timed(self: DefaultSavePlanner, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
            begun = time.perf_counter()
            result = own(self, all_plans)
            inner.append(time.perf_counter() - begun)
            return result

        target = run / "step-2"
        DefaultSavePlanner.create_global_plan = timed  # type: ignore[method-assign]
        try:
            planner = LayerwisePlanner(policy, base=run / "step-1")
            total, (new, metadata) = _timed(lambda: _plan_ours(planner, plans, target))
            _store(new, metadata, target)
            _create(metadata, target)
            dumping, _ = _timed(lambda: dumps(metadata))
        finally:
            DefaultSavePlanner.create_global_plan = own  # type: ignore[method-assign]
        shutil.rmtree(target, ignore_errors=True)
        return Ours(total - inner[0], dumping, total + dumping)


def _add_checksums(metadata: Metadata) -> None:
    """Note a checksum of each blob, as ``LayerwiseWriter`` does."""
    crcs: dict[str, dict[int, int]] = {}
    for info in metadata.storage_data.values():
        crcs.setdefault(info.relative_path, {})[info.offset] = info.offset & 0xFFFFFFFF
    record: dict[str, Any] = vars(metadata)[ATTRIBUTE]
    record["crcs"] = {file: packed(blobs) for file, blobs in crcs.items()}


def _prefixed(plans: list[SavePlan]) -> list[SavePlan]:
    return [replace(plan, storage_data=_StoragePrefix(f"__{rank}_")) for rank, plan in enumerate(plans)]


def _paths(shapes: Shapes) -> Paths:
    paths: Paths = {}
    for name in shapes:
        paths[f"model.{name}"] = ("model", name)
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            paths[f"optim.state.{name}.{kind}"] = ("optim", "state", name, kind)
    return paths | {"train.step": ("train", "step")}


def _plans(ranks: int, paths: Paths, shapes: Shapes) -> list[SavePlan]:
    """Return what each rank of an FSDP2 run plans: its rows of every tensor, and every 0-d tensor."""
    return [SavePlan(_items(rank, ranks, paths, shapes), planner_data=dict(paths)) for rank in range(ranks)]


def _items(rank: int, ranks: int, paths: Paths, shapes: Shapes) -> list[WriteItem]:
    items = [WriteItem(MetadataIndex("train.step"), WriteItemType.BYTE_IO)]
    for key, path in paths.items():
        if path[0] == "train":
            continue
        shape = () if path[-1] == "step" else shapes[str(path[2] if path[0] == "optim" else path[1])]
        items.append(_item(key, shape, rank, ranks))
    return items


def _item(key: str, shape: tuple[int, ...], rank: int, ranks: int) -> WriteItem:
    kind = WriteItemType.SHARD if shape else WriteItemType.TENSOR
    rows = -(-shape[0] // ranks) if shape else 0
    first = min(rank * rows, shape[0]) if shape else 0
    offsets = torch.Size([first, *[0] * (len(shape) - 1)]) if shape else torch.Size([])
    sizes = torch.Size([min(rows, shape[0] - first), *shape[1:]]) if shape else torch.Size([])
    data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), TensorProperties(torch.float32), torch.Size(shape))
    return WriteItem(MetadataIndex(key, offsets), kind, tensor_data=data)


def _store(plans: list[SavePlan], metadata: Metadata, folder: Path) -> None:
    """Fill in what the writers would report: one file a rank, a blob after the other."""
    storage = {}
    for plan in plans:
        offset = 0
        for item in plan.items:
            size = 1024 if item.tensor_data is None else item.tensor_data.chunk.sizes.numel() * 4 + 1536
            storage[item.index] = _StorageInfo(f"{plan.storage_data.prefix}0.distcp", offset, size)
            offset += size
    metadata.storage_data = storage
    metadata.storage_meta = StorageMeta(str(folder), "0" * 32)
    metadata.version = "1.0.0"


def _create(metadata: Metadata, folder: Path) -> None:
    """Make the files that the writers would have: that they are there is checked before the commit."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in {info.relative_path for info in metadata.storage_data.values()} if metadata.storage_data else ():
        if not (folder / name).exists():
            (folder / name).touch()


def _ours(ranks: int, paths: Paths, shapes: Shapes) -> list[SavePlan]:
    plans = _plans(ranks, paths, shapes)
    # As the coordinator gets them: unpickled, so that ranks share no objects.
    return [
        replace(p, planner_data=RankInfo(p.planner_data, pickle.loads(pickle.dumps(shapes_of(p))), ())) for p in plans
    ]


def _plan_ours(planner: LayerwisePlanner, plans: list[SavePlan], folder: Path) -> tuple[list[SavePlan], Metadata]:
    planner.set_up_planner({}, StorageMeta(str(folder)), is_coordinator=True)
    return planner.create_global_plan(plans)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    typer.run(main)
