"""What a load costs beside stock DCP's reader and beside bare ``preadv`` of the same bytes.

    python -m benchmarks.load [--pairs 15] [--place /dev/shm] [--json FILE]

Everything is in the page cache and the tensors are there before the clock starts. Each number is a ratio of
interleaved pairs in one run. Bytes read are counted at ``preadv``, through which all our reads go.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.harness import (
    Work,
    interleave,
    llama_shapes,
    rank,
    ratio,
    scratch,
    tensor_bytes,
    training_state,
)
from benchmarks.table import Row, publish, row
from tailor_dcp import LayerwisePlanner, LayerwiseReader, LayerwiseWriter
from tailor_dcp.raw_blobs import HEAD, plain
from tailor_dcp.tensors import raw_bytes

SHAPES = llama_shapes(layers=8, hidden=768, vocab=8192)  # 88 M parameters: 1.06 GB with Adam's moments
LAYER = "model.layers.3."
STEPS = 10


def main(
    pairs: Annotated[int, typer.Option(help="Interleaved pairs.")] = 15,
    place: Annotated[Path, typer.Option(help="Where the checkpoints are.")] = Path("/dev/shm"),
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
) -> None:
    """Measure all rows; exit with 1 if a bar is missed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        _two_ranks(pairs, place)
        return
    with scratch(str(place)) as folder:
        rows = [*_one_rank(folder, pairs), *_resharded(folder, pairs)]
    publish(f"Loading {tensor_bytes(SHAPES) / 1e9:.2f} GB, {pairs} pairs", rows, out)


def _row(work: str, ours: list[float], theirs: list[float], beside: str, bar: float) -> Row:
    """Return a row: how many times as fast we are."""
    return row(work, beside, "speed", ratio(theirs, ours), bar, at_least=True)


def _read_row(work: str, read: float) -> Row:
    return row(work, "the bytes needed", "bytes read", read, 1.05)


# One rank ----------------------------------------------------------------------------------


def _one_rank(folder: Path, pairs: int) -> list[Row]:
    state = training_state(SHAPES)
    full, last = folder / "full" / "step-1", folder / "run" / f"step-{STEPS}"
    dcp.save(state, checkpoint_id=full)
    for step in range(1, STEPS + 1):
        planner = LayerwisePlanner(f"parity:groups={STEPS}")
        writer = LayerwiseWriter(folder / "run" / f"step-{step}")
        dcp.save(state, storage_writer=writer, planner=planner)
    layer = {"model": {k: v for k, v in state["model"].items() if k.startswith(LAYER)}}

    def load(into: dict[str, Any], reader: Callable[[], Any]) -> Work:
        return lambda: dcp.load(into, storage_reader=reader())

    works: dict[str, Work] = {
        "ours": load(state, lambda: LayerwiseReader(full)),
        "stock": load(state, lambda: FileSystemReader(full)),
        "preadv": _bare(state, full),
        "verify": load(state, lambda: LayerwiseReader(full, verify=True)),
        "atomic": load(state, lambda: LayerwiseReader(full, atomic=True)),
        "composite": load(state, lambda: LayerwiseReader(last)),
        "layer": load(layer, lambda: LayerwiseReader(full)),
        "layer, stock": load(layer, lambda: FileSystemReader(full)),
    }
    times = interleave(works, pairs, lambda: None)
    needed = sum(t.numel() * t.element_size() for t in layer["model"].values())
    with _counted() as count:
        works["layer"]()
    return [
        _row("same world size", times["ours"], times["stock"], "stock", 5),
        _row("same world size, bytes alone", times["ours"], times["preadv"], "preadv", 0.8),
        row("what bare preadv can do", "stock", "speed", ratio(times["stock"], times["preadv"])),
        _row("verify=True", times["verify"], times["stock"], "stock", 1),
        _row("atomic=True", times["atomic"], times["ours"], "the fast load", 0.5),
        _row(f"a composite over {STEPS} steps", times["composite"], times["ours"], "a full checkpoint", 0.95),
        _row("one layer", times["layer"], times["layer, stock"], "stock", 5),
        _read_row("one layer", count[0] / needed),
    ]


def _bare(state: dict[str, Any], folder: Path) -> Work:
    """Return a loop of ``preadv`` over the same bytes into the same tensors, in the order of the files."""
    metadata = FileSystemReader(folder).read_metadata()
    found = []
    for index, info in metadata.storage_data.items():
        tensor = _tensor(state, index.fqn)
        if tensor is None:
            continue
        path = folder / info.relative_path
        with path.open("rb") as stream:
            stream.seek(info.offset)
            blob = plain(stream.read(HEAD), info.length)
        assert blob is not None
        found.append((path, info.offset + blob.start, raw_bytes(tensor.reshape(-1))))
    found.sort(key=lambda one: (str(one[0]), one[1]))

    def work() -> None:
        files = {path: os.open(path, os.O_RDONLY) for path, _, _ in found}
        for path, offset, into in found:
            os.preadv(files[path], [into], offset)
        for file in files.values():
            os.close(file)

    return work


def _tensor(state: dict[str, Any], key: str) -> torch.Tensor | None:
    if key.startswith("model."):
        weights: dict[str, torch.Tensor] = state["model"]
        return weights.get(key.removeprefix("model."))
    if key.startswith("optim.state."):
        fqn, _, kind = key.removeprefix("optim.state.").rpartition(".")
        tensor: torch.Tensor = state["optim"]["state"][fqn][kind]
        return tensor
    return None


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Count the bytes that are read meanwhile."""
    real, count = os.preadv, [0]

    def counting(*arguments: Any) -> int:
        done = real(*arguments)
        count[0] += done
        return done

    os.preadv = counting
    try:
        yield count
    finally:
        os.preadv = real


# Two ranks ---------------------------------------------------------------------------------


def _resharded(folder: Path, pairs: int) -> list[Row]:
    """Save with two ranks and load with one, and the reverse."""
    one, two = folder / "one", folder / "two"
    state = training_state(SHAPES)
    dcp.save(state, checkpoint_id=one)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    subprocess.run([*command, f"--pairs={pairs}", f"--place={folder}"], check=True, env=environment)
    works: dict[str, Work] = {
        "ours": lambda: dcp.load(state, storage_reader=LayerwiseReader(two)),
        "stock": lambda: dcp.load(state, storage_reader=FileSystemReader(two)),
    }
    times = interleave(works, pairs, lambda: None)
    with _counted() as count:
        works["ours"]()
    found = json.loads((folder / "one-to-two.json").read_text())
    return [
        _row("1 -> 2 ranks", found["ours"], found["stock"], "stock", 5),
        _read_row("1 -> 2 ranks", found["read"]),
        _row("2 -> 1 ranks", times["ours"], times["stock"], "stock", 5),
        _read_row("2 -> 1 ranks", count[0] / tensor_bytes(SHAPES)),
    ]


def _two_ranks(pairs: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    state = training_state(SHAPES, init_device_mesh("cpu", (2,)))
    dcp.save(state, checkpoint_id=folder / "two")
    works: dict[str, Work] = {
        "ours": lambda: dcp.load(state, storage_reader=LayerwiseReader(folder / "one", threads=1)),
        "stock": lambda: dcp.load(state, storage_reader=FileSystemReader(folder / "one")),
    }
    times = interleave(works, pairs, lambda: None)
    with _counted() as count:
        works["ours"]()
    reads = [0, 0]
    dist.all_gather_object(reads, count[0])
    if rank() == 0:
        found = {**times, "read": sum(reads) / tensor_bytes(SHAPES)}
        (folder / "one-to-two.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # a thread of gloo's sometimes aborts a process that ends in the ordinary way


if __name__ == "__main__":
    typer.run(main)
