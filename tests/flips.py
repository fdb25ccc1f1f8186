"""Single-bit flips in checkpoints: what ``verify`` says of each, beside what stock torch then loads.

    python -m tests.flips [--flips 10000] [--seed 0]

Each flip is made in place, verified and taken back. One that ``verify`` does not report must be harmless: a flip in
data if stock ``dcp.load`` still loads every value bit for bit, one in ``.metadata`` if ``pickle`` reads the same of it.
The counts are printed; the exit code is 1 if a flip was missed.
"""

from __future__ import annotations

import pickle
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed.checkpoint as dcp
import typer
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from tailor_dcp import LayerwisePlanner, LayerwiseWriter, verify
from tests.support.runs import L0, L1, due

WRITERS = ("layerwise", "stock writer", "stock")
"""Who writes: our planner with our writer, our planner with DCP's own, DCP alone."""


def training_state(step: int) -> dict[str, Any]:
    """Return a state with tensors of every form: several dtypes, transposed, without dimensions or elements."""
    draw = torch.Generator().manual_seed(step)

    def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (torch.randn(shape, generator=draw) * 50).to(dtype)

    weights = {
        f"{L0}.w": values(4, 3),
        f"{L0}.b": values(5, dtype=torch.bfloat16),
        f"{L1}.w": values(3, 4).t(),
        f"{L1}.mask": values(7, dtype=torch.int64) > 0,
        "model.layers.2.w": values(0, 3),
        "lm_head.w": values(2, 3, 4).permute(2, 0, 1),
    }
    moments = {name: {"exp_avg": values(*w.shape), "step": torch.tensor(float(step))} for name, w in weights.items()}
    train = {"step": step, "rng": values(9, dtype=torch.uint8), "sampler": {"seen": [step, "é", None]}}
    return {"model": weights, "optim": {"state": moments}, "train": train}


def save(folder: Path, step: int, writer: str, policy: Any = "full") -> None:
    """Save the state of a step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if writer == "stock":
            dcp.save(training_state(step), checkpoint_id=folder)
            return
        chosen = LayerwiseWriter(folder) if writer == "layerwise" else dcp.FileSystemWriter(folder)
        dcp.save(training_state(step), storage_writer=chosen, planner=LayerwisePlanner(policy))


def load_all(folder: Path) -> dict[str, Any]:
    """Load everything with torch alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: dict[str, Any] = {}
        planner = _EmptyStateDictLoadPlanner()
        _load_state_dict(loaded, storage_reader=dcp.FileSystemReader(folder), planner=planner, no_dist=True)
        return loaded


def same(one: Any, other: Any) -> bool:
    """Tell whether two states are the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        alike = isinstance(other, torch.Tensor) and (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and torch.equal(_bits(one), _bits(other))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return type(one) is type(other) and bool(one == other)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@dataclass
class Target:
    """A checkpoint whose bits are flipped.

    Attributes:
        writer: who wrote it.
        folder: its folder.
        missed: flips that changed something and were not reported.
        counts: what became of the flips, by what they were in.
    """

    writer: str
    folder: Path
    missed: list[tuple[str, int]] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._metadata = self.folder / ".metadata"
        self._said = pickle.loads(self._metadata.read_bytes())
        self._values = load_all(self.folder)
        places = {(info.relative_path, info.offset, info.length) for info in self._said.storage_data.values()}
        self._stretches = sorted(places)
        self._live = sum(length for _, _, length in self._stretches)

    def flip_data(self, at: float, bit: int) -> str:
        """Flip a bit of what the checkpoint needs; ``at`` is where, as a share of all of it."""
        name, place = self._place(int(at * self._live))
        with flipped(self.folder / name, place, bit):
            if verify(self.folder, threads=1).state == "damaged":
                return self._count("data", "reported")
            return self._count("data", "harmless" if self._loads_the_same() else "MISSED", name, place)

    def _place(self, byte: int) -> tuple[str, int]:
        """Return the file, and where in it, of a byte of all that the checkpoint needs."""
        for name, offset, length in self._stretches:
            if byte < length:
                return name, offset + byte
            byte -= length
        raise IndexError(byte)

    def flip_metadata(self, at: float, bit: int) -> str:
        """Flip a bit of ``.metadata``."""
        byte = int(at * self._metadata.stat().st_size)
        with flipped(self._metadata, byte, bit):
            if verify(self.folder, threads=1).state == "damaged":
                return self._count(".metadata", "reported")
            if self.writer == "stock":  # there is nothing to compare it with
                return self._count(".metadata", "unverifiable")
            return self._count(".metadata", "harmless" if self._says_the_same() else "MISSED", ".metadata", byte)

    def _count(self, what: str, outcome: str, name: str = "", byte: int = 0) -> str:
        self.counts[what, outcome] += 1
        if outcome == "MISSED":
            self.missed.append((name, byte))
        return outcome

    def _loads_the_same(self) -> bool:
        try:
            return same(load_all(self.folder), self._values)
        except BaseException as error:  # CheckpointException is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            return False

    def _says_the_same(self) -> bool:
        try:
            said = pickle.loads(self._metadata.read_bytes())
        except Exception:
            return False
        hints = [[index.index for index in one.storage_data] for one in (said, self._said)]
        return bool(said == self._said and said.tailor == self._said.tailor and hints[0] == hints[1])


@contextmanager
def flipped(path: Path, byte: int, bit: int) -> Iterator[None]:
    """Flip one bit of a file for a while."""
    with path.open("r+b", buffering=0) as stream:
        stream.seek(byte)
        was = stream.read(1)
        stream.seek(byte)
        stream.write(bytes([was[0] ^ 1 << bit]))
        try:
            yield
        finally:
            stream.seek(byte)
            stream.write(was)


def composite(run: Path, writer: str) -> Target:
    """Save a few checkpoints into a run; the last one carries from the others, unless stock planners save."""
    save(run / "step-1", 1, writer)
    save(run / "step-2", 2, writer, due(L0))
    assert verify(run).state == ("unverifiable" if writer == "stock" else "good")
    return Target(writer, run / "step-2")


def main(
    flips: Annotated[int, typer.Option(help="How many, in data and in .metadata together.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the places.")] = 0,
) -> None:
    """Make flips in checkpoints of all three kinds and print what became of them."""
    draw, begun = random.Random(seed), time.perf_counter()
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        targets = [composite(Path(folder) / writer / "run", writer) for writer in WRITERS]
        for number in range(flips):
            target = targets[number % len(targets)]
            at, bit = draw.random(), draw.randrange(8)
            (target.flip_metadata if number // len(targets) % 3 == 0 else target.flip_data)(at, bit)
    for target in targets:
        for (what, outcome), count in sorted(target.counts.items()):
            typer.echo(f"{target.writer:14} {what:10} {outcome:13} {count:7,}")
        for name, byte in target.missed:
            typer.echo(f"{target.writer:14} MISSED at byte {byte} of {name}")
        missed += len(target.missed)
    typer.echo(f"{flips:,} flips, {missed} missed, {time.perf_counter() - begun:.0f} s, seed {seed}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    typer.run(main)
