"""What planning costs beyond DCP's own: 8B shapes on 64 simulated ranks, the base read from disk.

    PYTHONPATH=. python benchmarks/compose.py [--ranks 64] [--pairs 7] [--json FILE]

DCP plans on the coordinator (``create_global_plan``) and pickles the metadata. We add reading
the base, choosing what is due, linking files and composing. Both are timed in turns on the
same plans; the ratio of what we add to what DCP takes is reported.
"""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
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

from benchmarks.harness import LLAMA_8B, machine, scratch
from tailor_dcp import LayerwisePlanner, forget
from tailor_dcp.coordination import RankInfo, shapes_of

POLICIES = ("full", "moments:every=5", "parity")


def main(
    ranks: Annotated[int, typer.Option(help="Simulated ranks.")] = 64,
    pairs: Annotated[int, typer.Option(help="Interleaved rounds.")] = 7,
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
) -> None:
    """Time planning with stock DCP and with us, in turns."""
    paths = _paths()
    stock: list[float] = []
    added: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    whole: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    with scratch(".") as folder:
        _write_base(ranks, paths, folder / "run" / "step-1")
        for _ in range(pairs):
            stock.append(_time_stock(ranks, paths))
            for policy in POLICIES:
                ours = _time_ours(ranks, paths, policy, folder / "run")
                added[policy].append(ours[0])
                whole[policy].append(ours[1])
    ratios, wholes = ({p: _median(times[p], stock) for p in POLICIES} for times in (added, whole))
    table = Table(title=f"Llama-3-8B shapes, AdamW, {ranks} ranks", title_justify="left")
    for column in (
        "policy",
        "added by us / DCP's create_global_plan + dump",
        "bar",
        "our whole planning + dump / DCP's",
    ):
        table.add_column(column)
    for policy, share in ratios.items():
        table.add_row(policy, f"{share:.3f}", "0.200", f"{wholes[policy]:.3f}")
    Console(width=130).print(table)
    if out:
        out.write_text(
            json.dumps({"machine": machine(), "ranks": ranks, "added": ratios, "whole": wholes}, indent=2) + "\n"
        )


def _median(ours: list[float], stock: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, stock, strict=True))


def _paths() -> dict[str, tuple[str | int, ...]]:
    paths: dict[str, tuple[str | int, ...]] = {}
    for name in LLAMA_8B:
        paths[f"model.{name}"] = ("model", name)
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            paths[f"optim.state.{name}.{kind}"] = ("optim", "state", name, kind)
    return paths | {"train.step": ("train", "step")}


def _plans(ranks: int, paths: dict[str, tuple[str | int, ...]]) -> list[SavePlan]:
    """Return what each rank of an FSDP2 run plans: its rows of every tensor, and every 0-d tensor."""
    return [SavePlan(_items(rank, ranks, paths), planner_data=dict(paths)) for rank in range(ranks)]


def _items(rank: int, ranks: int, paths: dict[str, tuple[str | int, ...]]) -> list[WriteItem]:
    items = [WriteItem(MetadataIndex("train.step"), WriteItemType.BYTE_IO)]
    for key, path in paths.items():
        if path[0] == "train":
            continue
        shape = () if path[-1] == "step" else LLAMA_8B[str(path[2] if path[0] == "optim" else path[1])]
        items.append(_item(key, shape, rank, ranks))
    return items


def _item(key: str, shape: tuple[int, ...], rank: int, ranks: int) -> WriteItem:
    kind = WriteItemType.SHARD if shape else WriteItemType.TENSOR
    rows = -(-shape[0] // ranks) if shape else 0
    offsets = torch.Size([rank * rows, *[0] * (len(shape) - 1)]) if shape else torch.Size([])
    sizes = torch.Size([max(0, min(rows, shape[0] - rank * rows)), *shape[1:]]) if shape else torch.Size([])
    data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), TensorProperties(torch.float32), torch.Size(shape))
    return WriteItem(MetadataIndex(key, offsets), kind, tensor_data=data)


def _write_base(ranks: int, paths: dict[str, tuple[str | int, ...]], folder: Path) -> None:
    """Make a committed full checkpoint whose data files are sparse: only their lengths matter here."""
    planner = LayerwisePlanner("full", base=None)
    plans, metadata = _plan_ours(planner, _ours(ranks, paths), folder)
    _store(plans, metadata, folder, paths)
    folder.mkdir(parents=True)
    sizes: dict[str, int] = {}
    for info in metadata.storage_data.values():
        sizes[info.relative_path] = max(sizes.get(info.relative_path, 0), info.offset + info.length)
    for name, size in sizes.items():
        with (folder / name).open("wb") as stream:
            stream.truncate(size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _store(plans: list[SavePlan], metadata: Metadata, folder: Path, paths: Any) -> None:
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


def _ours(ranks: int, paths: dict[str, tuple[str | int, ...]]) -> list[SavePlan]:
    plans = _plans(ranks, paths)
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


def _time_stock(ranks: int, paths: dict[str, tuple[str | int, ...]]) -> float:
    plans = _plans(ranks, paths)
    planner = DefaultSavePlanner()
    planning, (new, metadata) = _timed(lambda: planner.create_global_plan(plans))
    new = [replace(plan, storage_data=_StoragePrefix(f"__{rank}_")) for rank, plan in enumerate(new)]
    _store(new, metadata, Path("stock"), paths)
    dumping, _ = _timed(lambda: pickle.dumps(metadata))
    return planning + dumping


def _time_ours(ranks: int, paths: dict[str, tuple[str | int, ...]], policy: str, run: Path) -> tuple[float, float]:
    """Return the seconds that we add, which is all of our planning less DCP's part in it, and all with the dump."""
    forget()
    plans = _ours(ranks, paths)
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
        gc.collect()
        start = time.perf_counter()
        new, metadata = _plan_ours(planner, plans, target)
        total = time.perf_counter() - start
        _store(new, metadata, target, paths)
        dumping, _ = _timed(lambda: pickle.dumps(metadata))
    finally:
        DefaultSavePlanner.create_global_plan = own  # type: ignore[method-assign]
    shutil.rmtree(target, ignore_errors=True)
    return total - inner[0], total + dumping


if __name__ == "__main__":
    typer.run(main)
