"""Simulating: what a policy would write and keep, before any training. Arithmetic on shapes alone."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tailor_dcp.errors import TailorError
from tailor_dcp.layers import LayerMap
from tailor_dcp.metadata.record import Origin
from tailor_dcp.model_states import state_of
from tailor_dcp.policies import Policy, parse_policy
from tailor_dcp.selection import State, ask, cohorts, make_request, narrower
from tailor_dcp.units import Unit

FRAME = 1568
"""Bytes that ``torch.save`` puts around the tensor of one chunk: 1,545 to 1,609, measured with torch 2.13."""


class SimulationError(TailorError, ValueError):
    """What is to be simulated makes no sense."""


@dataclass(frozen=True)
class Simulation:
    """What a run would write. All sizes in bytes.

    Attributes:
        policy: the policy, as a string.
        parameters: elements of all weights, tied ones counted once.
        full: bytes of a full save.
        saves: bytes that each save writes.
        stale: the steps by which each kind lags behind at the end of a save: the mean over all bytes and saves, and
            the most.
        disk: bytes in use at the end, written by ``LayerwiseWriter``.
        disk_stock: the same, written by DCP's own writer, whose files live as long as any byte in them.
        disk_full: the same for full saves.
    """

    policy: str
    parameters: int
    full: int
    saves: tuple[int, ...]
    stale: Mapping[str, tuple[float, int]]
    disk: int
    disk_stock: int
    disk_full: int

    @property
    def later(self) -> float:
        """The mean bytes of all saves but the first, which is always full."""
        return sum(self.saves[1:]) / len(self.saves[1:]) if len(self.saves) > 1 else float(self.full)

    @property
    def fraction(self) -> float:
        """A save's bytes, but for the first one's, as a part of a full one's."""
        return self.later / self.full if self.full else 1.0

    @property
    def total(self) -> int:
        """Bytes that the whole run writes."""
        return sum(self.saves)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain builtins, for ``--json``."""
        return {**asdict(self), "later": self.later, "fraction": self.fraction, "total": self.total}


def simulate(
    model: str | os.PathLike[str] | State,
    policy: Policy | str,
    every: int = 1,
    steps: int = 100,
    *,
    optimizer: str = "adamw",
    dtype: torch.dtype = torch.float32,
    ranks: int = 1,
    frozen: Iterable[str] = (),
    full_every: int | None = None,
    keep_last: int | None = None,
) -> Simulation:
    """Return what a run would write and keep.

    The policy itself is asked, save after save, as the planner asks it. The few kilobytes that are no tensors of the
    model or its optimizer (step, schedule, generators) are left out.

    Args:
        model: a ``config.json`` of Hugging Face or its folder, a checkpoint of any format, or a state.
        policy: the policy or its string.
        every: steps from one save to the next.
        steps: of the run; ``steps // every`` saves are made.
        optimizer: ``adamw``, ``adam``, ``lion``, ``momentum`` or ``sgd``, where the model has none.
        dtype: of weights and optimizer state in training.
        ranks: that shard every tensor by rows, as FSDP2 does.
        frozen: globs of layers or parameters that do not change.
        full_every: as the planner has it.
        keep_last: checkpoints that are kept; None for all.

    Raises:
        SimulationError: a number makes no sense, or the policy looks at values that only training has.
        PolicyError: the policy's string is wrong.
        TailorError: the model cannot be read.
    """
    if min(every, steps // max(1, every), ranks, full_every or 1, keep_last or 1) < 1:
        raise SimulationError(
            "every, steps, ranks, full_every and keep_last must be 1 or more, and steps at least every."
        )
    state = model if isinstance(model, State) else state_of(model, optimizer, dtype, frozen)
    rule = parse_policy(policy)
    if rule.needs_drift:
        raise SimulationError(
            f"{rule} looks at how far weights have moved, which only training tells; see `make quality`."
        )
    run = _Run(state, rule, every, full_every, ranks)
    for _ in range(steps // every):
        run.save()
    kept = run.kept(keep_last or len(run.written))
    whole = run.bytes_of(state.units, set())
    return Simulation(
        policy=str(rule),
        parameters=_parameters(state),
        full=whole,
        saves=tuple(run.written),
        stale=run.stale(),
        disk=sum(kept.values()),
        disk_stock=sum(run.written[save] for save in {save for save, _ in kept}),
        disk_full=whole * min(len(run.written), keep_last or len(run.written)),
    )


class _Run:
    """A run whose saves are only counted."""

    def __init__(self, state: State, policy: Policy, every: int, full_every: int | None, ranks: int) -> None:
        self._state, self._policy, self._every, self._full_every = state, policy, every, full_every
        self._ranks = ranks
        self._layers = LayerMap()
        self._origins: dict[Unit, Origin] = {}
        self._files: dict[tuple[int, str], int] = {}
        self._holds: list[set[tuple[int, str]]] = []
        self._file_of: dict[Unit, set[tuple[int, str]]] = {}
        self._ages: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.written: list[int] = []

    def save(self) -> None:
        """Ask the policy, and note what it finds due."""
        state, index = self._state, len(self.written)
        step = (index + 1) * self._every
        request = make_request(state, self._origins, step, index, self._layers)
        full = self._full_every is not None and index % self._full_every == 0
        due = ask(self._policy, request, state, self._origins.keys(), full)
        narrow = set(narrower(due, state, self._policy))
        labels = cohorts(self._policy, request, state)
        for unit in due:
            self._origins[unit] = Origin(f"{index:032x}", step, f"step-{step}", index)
            self._file_of[unit] = {(index, labels[key]) for key in state.units[unit]}
            for key in state.units[unit]:
                place = (index, labels[key])
                self._files[place] = self._files.get(place, 0) + self._bytes(key, unit, key in narrow)
        self.written.append(sum(size for (save, _), size in self._files.items() if save == index))
        self._holds.append({place for places in self._file_of.values() for place in places})
        for unit, keys in state.units.items():
            size = sum(state.shapes[key].bytes for key in keys)
            self._ages[unit.kind].append((step - (self._origins[unit].step or 0), size))

    def bytes_of(self, units: Iterable[Unit], narrow: set[str]) -> int:
        """Return the bytes that units take on disk in the dtypes of training."""
        return sum(self._bytes(key, unit, key in narrow) for unit in units for key in self._state.units[unit])

    def kept(self, last: int) -> dict[tuple[int, str], int]:
        """Return the files that the last checkpoints have, each once."""
        return {place: self._files[place] for held in self._holds[-last:] for place in held}

    def stale(self) -> dict[str, tuple[float, int]]:
        """Return the mean and the greatest age of each kind, in steps."""
        found = {}
        for kind, ages in self._ages.items():
            weight = sum(size for _, size in ages)
            mean = sum(age * size for age, size in ages) / weight if weight else 0.0
            found[kind] = (mean, max(age for age, _ in ages))
        return found

    def _bytes(self, key: str, unit: Unit, narrow: bool) -> int:
        shape = self._state.shapes[key]
        if shape.size is None or shape.dtype is None:
            return FRAME
        dtype = self._policy.storage_dtype(unit, shape.dtype) if narrow else shape.dtype
        chunks = min(self._ranks, shape.size[0]) if shape.size else 1
        return shape.size.numel() * dtype.itemsize + FRAME * max(1, chunks)


def _parameters(state: State) -> int:
    twins = {key for tie in state.ties for key in tie[1:]}
    weights = (key for unit, keys in state.units.items() if unit.kind == "weight" for key in keys if key not in twins)
    return sum(size.numel() for key in weights if (size := state.shapes[key].size) is not None)
