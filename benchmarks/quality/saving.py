"""Saving the states of an uninterrupted run by every policy, and resuming from what was saved."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from benchmarks.harness import disk_bytes
from benchmarks.quality.rows import Row
from benchmarks.quality.task import Regime, State, Training
from tailor_dcp import LayerwisePlanner, LayerwiseWriter
from tailor_dcp.metadata.compose import shape_of
from tailor_dcp.metadata.record import Record, record_of
from tailor_dcp.metadata.safe_pickle import read

STOCK = "stock"
"""The folder of an uninterrupted run's own checkpoints; no policy is called so."""


def replay(rows: Sequence[Row], regime: Regime, run: Path, training: Training) -> None:
    """Save the run's states, one after the other, by each row's policy.

    The states are those of the stock checkpoints in ``run/stock``; each row gets a run of its own in
    ``run/<slug>``, of which the checkpoints at the failure points are kept, with ``saves.json``: the bytes of
    each save as a share of the state's.
    """
    told: dict[str, list[dict[str, float]]] = {row.name: [] for row in rows}
    last = max(regime.points)
    for step in range(regime.interval, last + 1, regime.interval):
        state = training.state()
        dcp.load(state, checkpoint_id=run / STOCK / f"step-{step}")
        folded = _folded(state, regime, step) if any(row.fold for row in rows) else state
        for row in rows:
            told[row.name].append(_save(row, folded if row.fold else state, regime, run / slug(row), step))
    for row in rows:
        (run / slug(row) / "saves.json").write_text(json.dumps(told[row.name]))


def _save(row: Row, state: State, regime: Regime, folder: Path, step: int) -> dict[str, float]:
    here, before = folder / f"step-{step}", folder / f"step-{step - regime.interval}"
    shutil.rmtree(here, ignore_errors=True)
    planner = LayerwisePlanner(row.policy, base=before if step > regime.interval else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's about saving without a process group
        dcp.save(state, storage_writer=LayerwiseWriter(here), planner=planner)
    whole = sum(t.numel() * t.element_size() for t in _tensors(state))
    told = {"step": step, "bytes": _written(here) / whole, "disk": disk_bytes(here) / whole}
    if step - regime.interval not in regime.points:
        shutil.rmtree(before, ignore_errors=True)
    return told


def _written(folder: Path) -> int:
    """Return the bytes of the tensors that this save itself wrote, as they are stored."""
    metadata = read(folder / ".metadata")
    record = _record(folder)
    own = (key for held in record.units.values() if held.origin.save_id == record.save_id for key in held.keys)
    return sum(shape_of(metadata.state_dict_metadata[key]).bytes for key in own)


def _record(folder: Path) -> Record:
    record = record_of(read(folder / ".metadata"), str(folder))
    assert record is not None
    return record


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [t for value in tree.values() for t in _tensors(value)] if isinstance(tree, dict) else []


def _folded(state: State, regime: Regime, step: int) -> State:
    """Return the state with its momentum cashed in: the weights that steps without new gradients would end at.

    With a first moment of 0 there, the steps that follow are to first order those of the real run: x + β/(1 - β) of
    its last step is the sequence without momentum that analyses of the heavy ball follow (Yang, Lin and Li, *Unified
    convergence analysis of stochastic momentum methods*, 2016).
    """
    (first, second), rate = regime.betas, regime.rate(step + 1)
    weights, states = dict(state["model"]), {}
    for fqn, held in state["optim"]["state"].items():
        count = float(held["step"])
        mean = held["exp_avg"] / (1 - first**count)
        root = (held["exp_avg_sq"] / (1 - second**count)).sqrt_().add_(1e-8)
        weights[fqn] = weights[fqn] - rate * first / (1 - first) * mean / root
        states[fqn] = {**held, "exp_avg": torch.zeros_like(held["exp_avg"])}
    return {"model": weights, "optim": {**state["optim"], "state": states}}


def resume(row: Row, regime: Regime, run: Path, point: int, training: Training) -> None:
    """Put a training where it is after resuming from a row's checkpoint, by plain ``dcp.load``."""
    folder = run / slug(row) / f"step-{point}"
    state = training.state()
    dcp.load(state, checkpoint_id=folder)
    training.restore(state)
    if not row.on_resume:
        return
    named = dict(training.model.named_parameters())
    found = _averages(row, training, point) if row.on_resume != "zero" else {}
    for fqn in _stale_first(_record(folder)):
        held = training.optimizer.state[named[fqn]]
        # As Adam would have it: its bias correction divides by this.
        filled = 1 - regime.betas[0] ** float(held["step"])
        held["exp_avg"].copy_(found[fqn] * filled if fqn in found else torch.zeros_like(held["exp_avg"]))


def _averages(row: Row, training: Training, point: int) -> Mapping[str, Tensor]:
    """Return Adam's average of the gradients of the last texts before the failure; ``prime``: of the next one alone."""
    beta = training.regime.betas[0]
    steps = range(point + 1, point + 2) if row.on_resume == "prime" else range(point - row.rebuilt + 1, point + 1)
    found = {fqn: torch.zeros_like(p) for fqn, p in training.model.named_parameters()}
    for step in steps:
        training.gradients(step)
        for fqn, parameter in training.model.named_parameters():
            assert parameter.grad is not None
            found[fqn].lerp_(parameter.grad, 1 - beta)
    return {fqn: mean / (1 - beta ** len(steps)) for fqn, mean in found.items()}


def _stale_first(record: Record) -> list[str]:
    stale = {unit for unit, held in record.units.items() if held.origin.save_id != record.save_id}
    marks = ("optim.state.", ".exp_avg")
    keys = (key for unit in stale if unit.kind == "exp_avg" for key in record.units[unit].keys)
    return [key.removeprefix(marks[0]).removesuffix(marks[1]) for key in keys]


def slug(row: Row) -> str:
    """Return the name of a row's folder."""
    return "".join(c if c.isalnum() else "-" for c in row.name)
