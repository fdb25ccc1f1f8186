"""The table: what each policy writes, and what resuming from it loses."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.curve import Curve, interval
from benchmarks.quality.grid import Plan
from benchmarks.quality.rows import Row
from benchmarks.quality.saving import slug
from benchmarks.quality.task import Regime

_WIDTH = 5  # evaluations on each side of a step that the smooth curve is fitted to


@dataclass(frozen=True)
class Cell:
    """One policy at one failure point of one seed and regime."""

    policy: str
    regime: str
    seed: int
    point: int
    gap: float
    error: float
    lost: float
    noise: float


class Measured:
    """What a grid's folder tells of one seed and regime."""

    def __init__(self, plan: Plan, regime: Regime, seed: int, work: Path) -> None:
        self.plan, self.regime, self.seed = plan, regime, seed
        self.run = work / f"seed-{seed}" / regime.name
        losses = {step: rows.mean().item() for step, rows in torch.load(self.run / "curve.pt").items()}
        self.curve = Curve(losses, _WIDTH * plan.every)
        self.reach = _WIDTH * plan.every
        self.losses = losses

    def cells(self) -> list[Cell]:
        """Return the measured cells, each gap turned into steps."""
        lines = (self.run / "cells.jsonl").read_text().splitlines()
        told = [json.loads(line) for line in lines]
        return [self._cell(cell) for cell in told if cell["point"] in self.regime.points]

    def _cell(self, told: dict[str, Any]) -> Cell:
        stop = told["point"] + self.plan.further
        slope = max(self.curve.slope(stop, self.reach), 1e-9)
        return Cell(
            policy=told["policy"],
            regime=self.regime.name,
            seed=self.seed,
            point=told["point"],
            gap=told["gap"],
            error=told["error"],
            lost=self.curve.lost(stop, told["gap"], self.reach),
            noise=told["error"] / slope,
        )

    def behind(self, point: int, steps: int) -> float:
        """Return how far behind a run is found that really is ``steps`` behind: how well all this measures."""
        stop = point + self.plan.further
        return self.curve.lost(stop, self.curve.at(stop - steps) - self.curve.at(stop), self.reach)

    def saves(self, row: str) -> list[dict[str, float]]:
        """Return the bytes of a policy's saves, without the first, which is always full; none if it was stopped."""
        path = self.run / row / "saves.json"
        told: list[dict[str, float]] = json.loads(path.read_text()) if path.exists() else []
        return told[1:]


def table(
    plan: Plan, rows: Sequence[Row], chosen: Sequence[int], reported: Sequence[int], work: Path
) -> dict[str, Any]:
    """Return the outcome of a grid.

    Args:
        plan: what was measured.
        rows: the policies.
        chosen: the seeds that policies may be chosen by.
        reported: the seeds that the table is of.
        work: where the grid is.
    """
    grid = [Measured(plan, regime, seed, work) for seed in (*chosen, *reported) for regime in plan.regimes]
    cells = [cell for measured in grid for cell in measured.cells()]
    told = [_row(row, plan, grid, cells, chosen, reported) for row in rows]
    told += [_seldom(name, share, every, plan) for name, share, every in _SELDOM]
    return {"policies": sorted(told, key=lambda t: -float(t["bytes"])), "setup": _setup(plan, chosen, reported)}


_SELDOM = [(f"full, every {n} saves", 1.0, n) for n in (2, 3, 4, 5)]
_SELDOM += [(f"all in bf16, every {n} saves", 0.5, n) for n in (2, 3)]


def _seldom(name: str, share: float, every: int, plan: Plan) -> dict[str, Any]:
    """Return the row of full saves less often: by arithmetic, for a resumed full save loses nothing, bit for bit.

    A failure is as likely after any of the saves, so it finds the last one 0 to ``every - 1`` intervals back.
    """
    back = range(every)
    lost = statistics.mean(back)
    length = plan.regimes[0].interval
    told = {"lost_steps": lost * length, "lost_intervals": lost, "spread": statistics.pstdev(back) * length}
    regimes = {regime.name: {"lost_intervals": lost} for regime in plan.regimes}
    return {"policy": name, "bytes": share / every, "disk": share, **told, "regimes": regimes, "note": "by arithmetic"}


def _row(
    row: Row,
    plan: Plan,
    grid: Sequence[Measured],
    cells: Iterable[Cell],
    chosen: Sequence[int],
    reported: Sequence[int],
) -> dict[str, Any]:
    cells = [cell for cell in cells if cell.policy == row.name]
    mine = [cell for cell in cells if cell.seed in reported]
    saves = [save for measured in grid if measured.seed in reported for save in measured.saves(slug(row))]
    length = {regime.name: regime.interval for regime in plan.regimes}
    lost = [cell.lost + row.rebuilt for cell in mine]
    shares = [steps / length[cell.regime] for steps, cell in zip(lost, mine, strict=True)]
    first = [(cell.lost + row.rebuilt) / length[cell.regime] for cell in cells if cell.seed in chosen]
    low, high = interval(shares)
    by_point: dict[str, dict[str, float]] = {}
    for regime in plan.regimes:
        there = [(cell, steps) for cell, steps in zip(mine, shares, strict=True) if cell.regime == regime.name]
        points = {str(p): round(statistics.mean(s for c, s in there if c.point == p), 3) for p in regime.points}
        by_point[regime.name] = {"lost_intervals": round(statistics.mean(s for _, s in there), 3), **points}
    return {
        "policy": row.name,
        "bytes": round(statistics.mean(save["bytes"] for save in saves), 4),
        "disk": round(statistics.mean(save["disk"] for save in saves), 3),
        "lost_steps": round(statistics.mean(lost), 2),
        "lost_intervals": round(statistics.mean(shares), 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "spread": round(statistics.stdev(lost), 2) if len(lost) > 1 else 0.0,
        "median_intervals": round(statistics.median(shares), 3),
        "worst_intervals": round(max(shares), 3),
        "noise": round(statistics.mean(cell.noise for cell in mine), 2),
        "gap": round(statistics.mean(cell.gap for cell in mine), 5),
        "cells": len(mine),
        "chosen_on": round(statistics.mean(first), 3) if first else None,
        "regimes": by_point,
        "note": row.note,
    }


def _setup(plan: Plan, chosen: Sequence[int], reported: Sequence[int]) -> dict[str, Any]:
    return {
        "width": plan.size.width,
        "layers": plan.size.layers,
        "tokens_per_step": plan.size.rows * plan.size.length,
        "further_steps": plan.further,
        "evaluation_tokens": plan.tokens,
        "seeds_chosen_on": list(chosen),
        "seeds_reported": list(reported),
        "regimes": {
            r.name: {"steps": r.steps, "interval": r.interval, "points": r.points, "peak": r.peak, "betas": r.betas}
            for r in plan.regimes
        },
    }
