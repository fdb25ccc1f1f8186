"""The rows of the table: policies, their rivals at equal bytes, and what is done at resuming beyond loading."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from tailor_dcp.policies import Policy, SaveRequest, parse_policy
from tailor_dcp.policies.base import Measure
from tailor_dcp.policies.groups import deal, is_due
from tailor_dcp.policies.options import DTYPES
from tailor_dcp.units import STEP, WEIGHT, Unit

OnResume = Literal["", "zero", "prime", "rebuild"]


@dataclass(frozen=True)
class Row:
    """One way to save and resume.

    Attributes:
        name: what the table calls it.
        policy: what the planner is given.
        fold: save the weights where the momentum would carry them, and a first moment of zero.
        on_resume: what becomes of first moments that are older than the checkpoint: ``zero`` sets them
            to 0, ``prime`` to the first gradient, ``rebuild`` to the average of ``rebuilt`` gradients.
        rebuilt: gradients computed for that; each costs about a step, and is counted as one that is lost.
        note: what it is, for the table.
    """

    name: str
    policy: Policy
    fold: bool = False
    on_resume: OnResume = ""
    rebuilt: int = 0
    note: str = ""


@dataclass(frozen=True)
class RandomUnits(Policy):
    """Units at random, as many bytes as asked for: the least that any choice has to beat."""

    share: float = 0.3

    def select(self, request: SaveRequest) -> Iterable[Unit]:
        """Return units drawn anew in each save."""
        infos = list(request.units)
        random.Random(request.index).shuffle(infos)
        left = self.share * sum(info.bytes for info in infos)
        due = []
        for info in infos:
            if info.bytes <= left:
                due.append(info.unit)
                left -= info.bytes
        return due

    def __str__(self) -> str:
        return f"random units:{self.share:g}"


@dataclass(frozen=True)
class LayerDrift(Policy):
    """Whole layers, weights and moments together, whose weights drifted; none older than four saves."""

    threshold: float

    @property
    def needs_drift(self) -> Measure:
        """An estimate."""
        return "sketch"

    def select(self, request: SaveRequest) -> Iterable[Unit]:
        """Return all units of the layers that moved too far."""
        far = {info.layer for info in request.units if info.is_weight and (info.drift or 0.0) > self.threshold}
        return [info.unit for info in request.units if info.layer in far or (info.age or 0) > 4]

    def __str__(self) -> str:
        return f"layers by drift:{self.threshold:g}"


@dataclass(frozen=True)
class Cadence(Policy):
    """Each kind at a cadence and in a dtype of its own; 0 stands for never after the first save."""

    weight: int = 1
    exp_avg: int = 1
    exp_avg_sq: int = 1
    weights: str = "bf16"
    moments: str = "bf16"

    def select(self, request: SaveRequest) -> Iterable[Unit]:
        """Return the units whose kind has its turn, layer by layer."""
        groups = {every: deal(request.units, every) for every in self._every.values() if every}
        return [
            info.unit
            for info in request.units
            if (every := self._every.get(info.kind, 1))
            and is_due(info, request.index, groups[every][info.layer], every)
        ]

    def storage_dtype(self, unit: Unit, dtype: torch.dtype) -> torch.dtype:
        """Return the kind's dtype."""
        if unit.kind == STEP or not dtype.is_floating_point:
            return dtype
        return DTYPES[self.weights if unit.kind == WEIGHT else self.moments]

    @property
    def _every(self) -> dict[str, int]:
        return {WEIGHT: self.weight, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def __str__(self) -> str:
        return f"cadence:{self.weight}/{self.exp_avg}/{self.exp_avg_sq},{self.weights}/{self.moments}"


def _plain(policy: str, note: str = "") -> Row:
    return Row(policy, parse_policy(policy), note=note)


def _cadence(name: str, first: int, second: int, note: str = "", **more: object) -> Row:
    return Row(name, Cadence(exp_avg=first, exp_avg_sq=second), note=note, **more)  # type: ignore[arg-type]


_BF16 = "weights=bf16,moments=bf16"

ROWS = [
    _plain("full", "must lose nothing, bit for bit"),
    _plain(f"moments:every=1,{_BF16}", "nothing stale, all rounded"),
    _plain(f"moments:every=2,{_BF16}"),
    _plain("moments:every=5"),
    _plain("moments:every=5,weights=bf16"),
    _plain(f"moments:every=5,{_BF16}"),
    _plain(f"moments:every=10,{_BF16}"),
    _plain("parity"),
    _plain("filter:head=1,tail=1,every=5"),
    Row("random units, 30 %", RandomUnits(0.3), note="drawn anew in each save"),
    Row("layers by drift", LayerDrift(0.1), note="a layer with its moments, by its weights' drift"),
    _plain(f"drift:threshold=0.05,states=0.6,max_stale=5,{_BF16}"),
    _plain(f"drift:threshold=1e-09,states=0.6,max_stale=5,{_BF16}", "weights each save, moments by drift"),
    _plain(f"budget:fraction=0.25,max_stale=8,{_BF16}"),
    _plain(f"budget:fraction=0.25,max_stale=8,first=weights,{_BF16}", "weights each save, moments by drift"),
    _cadence("first moment never and 0, second each save", 0, 1, "0 at resuming", on_resume="zero"),
    _cadence("first moment each save, second every 5th", 1, 5, "each kind its own cadence"),
]
RESTING_ROWS = [
    _plain("full"),
    _plain("unchanged+full", "lossless"),
    _plain("drift:threshold=0.001,states=0.001,max_stale=1000"),
    _plain("drift:threshold=0.02,states=0.6,max_stale=1000"),
    _plain("parity"),
    _plain(f"moments:every=5,{_BF16}"),
    _plain(f"unchanged+moments:every=5,{_BF16}"),
]
"""For a run in which most layers rest."""
EXPLORED = [
    _plain("moments:every=2"),
    _plain("moments:every=5,moments=bf16"),
    _plain("moments:every=10"),
    _cadence("first moment never, second each save", 0, 1, "stale since the first save"),
    _plain("moments:every=1,weights=bf16"),
    _plain("moments:every=10,weights=bf16"),
    _plain("parity:groups=3"),
    _cadence("stale first moments 0, all moments every 5th", 5, 5, "0 at resuming", on_resume="zero"),
    _cadence("stale first moments primed, all every 5th", 5, 5, "first gradient at resuming", on_resume="prime"),
    _cadence("no moments, rebuilt in 5 steps, second every 5th", 0, 5, "5 steps count", on_resume="rebuild", rebuilt=5),
    _cadence("momentum folded into weights, second every 10th", 0, 10, "first moment is 0", fold=True),
]
"""What was tried besides; measured with one seed, or in the long form."""
