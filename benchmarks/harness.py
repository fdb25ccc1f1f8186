"""What the benchmarks share: a state of a given size, interleaved timing, ratios with their spread."""

from __future__ import annotations

import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

Work = Callable[[], None]


@dataclass(frozen=True)
class Ratio:
    """A ratio of two times, from interleaved pairs.

    Attributes:
        median: the middle of all pairs' ratios.
        low: below it lie 2.5 % of the medians of resampled pairs.
        high: above it lie 2.5 %.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f}  [{self.low:.3f}, {self.high:.3f}]"


def ratio(ours: list[float], theirs: list[float]) -> Ratio:
    """Return the median ratio of paired times and its 95 % bootstrap interval."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(pairs, k=len(pairs))) for _ in range(2000))
    return Ratio(statistics.median(pairs), medians[50], medians[-51])


def interleave(works: Mapping[str, Work], rounds: int, reset: Work, warm_up: int = 1) -> dict[str, list[float]]:
    """Time each piece of work once a round, in an order that is turned round from round to round.

    Slow drifts of the machine then hit all of them alike. All ranks start together, and the
    slowest rank's time counts.

    Args:
        works: what to time, by name.
        rounds: how often.
        reset: what to do after each piece of work, untimed.
        warm_up: rounds that are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in range(-warm_up, rounds):
        for name in names if turn % 2 else reversed(names):
            barrier()
            start = time.perf_counter()
            works[name]()
            barrier()
            seconds = time.perf_counter() - start
            if turn >= 0:
                times[name].append(seconds)
            reset()
    return times


def barrier() -> None:
    """Wait for all ranks, if there are several."""
    if dist.is_initialized():
        dist.barrier()


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def llama_shapes(
    layers: int, hidden: int, vocab: int, heads_kv: int | None = None, wide: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the parameters of a Llama of the given dimensions, FQN to shape."""
    wide = wide or 4 * hidden
    kv = heads_kv or hidden
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        block = f"model.layers.{i}."
        shapes |= {
            f"{block}self_attn.q_proj.weight": (hidden, hidden),
            f"{block}self_attn.k_proj.weight": (kv, hidden),
            f"{block}self_attn.v_proj.weight": (kv, hidden),
            f"{block}self_attn.o_proj.weight": (hidden, hidden),
            f"{block}mlp.gate_proj.weight": (wide, hidden),
            f"{block}mlp.up_proj.weight": (wide, hidden),
            f"{block}mlp.down_proj.weight": (hidden, wide),
            f"{block}input_layernorm.weight": (hidden,),
            f"{block}post_attention_layernorm.weight": (hidden,),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


LLAMA_8B = llama_shapes(32, 4096, 128256, heads_kv=1024, wide=14336)


def training_state(shapes: Mapping[str, tuple[int, ...]], mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Return weights and Adam's moments in fp32 as ``get_state_dict`` gives them, sharded over ``mesh``."""

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        if mesh is None:
            return torch.randn(shape)
        part = len(torch.empty(shape[0]).chunk(mesh.size())[mesh.get_local_rank()])
        return DTensor.from_local(torch.randn(part, *shape[1:]), mesh, [Shard(0)], run_check=False)

    state = {
        name: {"step": torch.tensor(1000.0), "exp_avg": tensor(shape), "exp_avg_sq": tensor(shape)}
        for name, shape in shapes.items()
    }
    groups = [{"lr": 1e-3, "betas": (0.9, 0.95), "params": list(shapes)}]
    weights = {name: tensor(shape) for name, shape in shapes.items()}
    return {"model": weights, "optim": {"state": state, "param_groups": groups}, "train": {"step": 1000}}


def tensor_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the bytes of weights and both moments in fp32."""
    return sum(12 * int(torch.Size(shape).numel()) for shape in shapes.values())


def disk_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder; a file with several names counts once."""
    seen = {}
    for path in folder.rglob("*"):
        if path.is_file():
            status = path.stat()
            seen[status.st_dev, status.st_ino] = status.st_size
    return sum(seen.values())


@contextmanager
def scratch(place: str) -> Iterator[Path]:
    """Return an empty folder on ``place``, shared by all ranks and removed at the end."""
    names = [tempfile.mkdtemp(prefix="tailor-bench-", dir=place) if rank() == 0 else ""]
    if dist.is_initialized():
        dist.broadcast_object_list(names, 0)
    try:
        yield Path(names[0])
    finally:
        barrier()
        if rank() == 0:
            shutil.rmtree(names[0], ignore_errors=True)


def machine() -> dict[str, Any]:
    """Describe the machine that a result was measured on."""
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = found[0] if found else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def as_dict(value: Ratio) -> dict[str, float]:
    """Return a ratio for JSON."""
    return {name: round(number, 4) for name, number in asdict(value).items()}
