"""The grid: uninterrupted runs, and what resuming from each policy's checkpoints at each failure point becomes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.quality.rows import Row
from benchmarks.quality.saving import STOCK, replay, resume, slug
from benchmarks.quality.task import SMALL, Regime, Size, Training, evaluation


@dataclass(frozen=True)
class Plan:
    """How large the grid is.

    Attributes:
        regimes: the ways to train.
        further: steps that a resumed run trains before the two are compared (K).
        every: steps from one evaluation of the uninterrupted run to the next.
        tokens: bytes of held-out text that an evaluation reads.
        size: the model.
        device: where it is trained.
    """

    regimes: tuple[Regime, ...]
    further: int
    every: int
    tokens: int
    size: Size = SMALL
    device: str = "cpu"

    def evaluated(self, regime: Regime) -> set[int]:
        """Return the steps at which the uninterrupted run is evaluated."""
        regular = range(self.every, regime.steps + self.further + 1, self.every)
        return {*regular, *(point + self.further for point in regime.points)}


class Cells:
    """What is known of one seed and regime, on disk: a killed grid goes on where it was."""

    def __init__(self, plan: Plan, regime: Regime, seed: int, work: Path) -> None:
        self.plan, self.regime, self.seed = plan, regime, seed
        self.run = work / f"seed-{seed}" / regime.name
        self.start = work / f"seed-{seed}" / plan.regimes[0].name / "final.pt"
        self.rows = evaluation(regime, plan.size, plan.tokens)
        self.file = self.run / "cells.jsonl"

    def training(self) -> Training:
        """Return a training at step 0."""
        training = Training(self.regime, self.seed, self.plan.size, self.plan.device)
        if self.regime.tuned:
            training.model.load_state_dict(torch.load(self.start, map_location=self.plan.device))
        return training

    def train(self) -> None:
        """Train without interruption: full checkpoints, by stock DCP, and evaluations."""
        if (self.run / "curve.pt").exists() and (self.run / STOCK).exists():
            return
        shutil.rmtree(self.run, ignore_errors=True)
        self.run.mkdir(parents=True)
        training, losses = self.training(), {}
        evaluated, last = self.plan.evaluated(self.regime), max(self.regime.points)
        for step in training.run(0, max(evaluated)):
            if step % self.regime.interval == 0 and step <= last:
                dcp.save(training.state(), checkpoint_id=self.run / STOCK / f"step-{step}")
            if step in evaluated:
                losses[step] = training.losses(self.rows)
            if step == self.regime.steps:
                torch.save(training.model.state_dict(), self.run / "final.pt")
        torch.save(losses, self.run / "curve.tmp")
        (self.run / "curve.tmp").rename(self.run / "curve.pt")

    def known(self) -> list[dict[str, Any]]:
        """Return the cells that are measured."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def measure(self, rows: Sequence[Row]) -> Iterable[str]:
        """Measure the cells that are missing; yield a line for each."""
        self.train()
        done = {(cell["policy"], cell["point"]) for cell in self.known()}
        missing = [row for row in rows if any((row.name, point) not in done for point in self.regime.points)]
        training = self.training()
        new = [row for row in missing if not self._saved(row)]
        if new:
            began = time.perf_counter()
            replay(new, self.regime, self.run, training)
            yield f"replayed {len(new)} policies in {time.perf_counter() - began:.0f} s"
        curve = torch.load(self.run / "curve.pt")
        for point in self.regime.points:
            for row in missing:
                if (row.name, point) not in done:
                    yield self._measure(row, point, training, curve)
        for row in missing:
            for folder in (self.run / slug(row)).glob("step-*"):
                shutil.rmtree(folder)

    def _saved(self, row: Row) -> bool:
        folder = self.run / slug(row)
        points = (folder / f"step-{point}" / ".metadata" for point in self.regime.points)
        return (folder / "saves.json").exists() and all(point.exists() for point in points)

    def _measure(self, row: Row, point: int, training: Training, curve: dict[int, torch.Tensor]) -> str:
        began = time.perf_counter()
        resume(row, self.regime, self.run, point, training)
        stop = point + self.plan.further
        for _ in training.run(point, stop):
            pass
        # Row by row, so that what both find hard cancels out.
        apart = training.losses(self.rows) - curve[stop]
        cell = {
            "policy": row.name,
            "point": point,
            "gap": apart.mean().item(),
            "error": (apart.std() / len(apart) ** 0.5).item(),
        }
        with self.file.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        return (
            f"{row.name} at {point}: gap {cell['gap']:+.5f} ± {cell['error']:.5f} ({time.perf_counter() - began:.1f} s)"
        )
