"""Asynchronous saves: both executors, with everything staged and with only what is due."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tailor_dcp import LayerwisePlanner, inspect
from tests.support.async_run import MODEL
from tests.support.fleet import Fleet
from tests.support.world import load, state
from tests.test_laws import Saved, check


@pytest.mark.parametrize(
    ("staging", "executor"),
    [
        pytest.param("plain", "thread", marks=pytest.mark.long),  # the staged two go through all of its parts
        ("staged", "thread"),
        pytest.param("plain", "process", marks=pytest.mark.long),
        ("staged", "process"),
    ],
)
def test_async_saves_obey_the_laws(tmp_path: Path, stock_fleet: Fleet, executor: str, staging: str) -> None:
    """Only due units are written; a save that failed and one in flight are never carried from."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.support.async_run", str(tmp_path), executor, staging]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    past = {10: [10], 20: [10, 20], 40: [10, 20, 40], 50: [10, 20, 50] if executor == "thread" else [10, 20, 40, 50]}
    for step, lineage in past.items():
        path = tmp_path / f"step-{step}"
        record = stock_fleet.one("tests.support.world:record", str(path))
        loaded = stock_fleet.one("tests.support.world:load", MODEL, str(path))
        check(Saved(path, step, MODEL, "parity", lineage), loaded, record)
        written = inspect(path).written / inspect(path).live
        assert written == 1 if step == 10 else written < 0.7


@pytest.mark.filterwarnings("ignore")
def test_the_stager_copies_only_what_is_due(tmp_path: Path) -> None:
    """What is carried goes to the background without its bytes; what is due is a copy that training cannot change."""
    dcp.save(state(MODEL, 10, None), checkpoint_id=tmp_path / "step-10", planner=LayerwisePlanner("parity"))
    planner = LayerwisePlanner("parity")
    live = state(MODEL, 20, None)
    staged = planner.stager(tmp_path / "step-20").stage(live)
    weights = staged["model"]
    copied = {name for name, tensor in weights.items() if not tensor.is_meta}
    assert 0 < len(copied) < len(weights)
    for name in copied:
        live["model"][name].zero_()
        assert weights[name].any()
    assert (tmp_path / "step-20" / "carried").is_dir()
    dcp.save(staged, checkpoint_id=tmp_path / "step-20", planner=planner)
    assert load(None, MODEL, str(tmp_path / "step-20"))["train.step"] == 20


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["another folder", "another state", "another planner", "carried file gone"])
def test_a_planner_that_cannot_obey_fails_the_save(tmp_path: Path, how: str) -> None:
    """What was decided before staging holds, or the save fails with a sentence; it never writes something else."""
    dcp.save(state(MODEL, 10, None), checkpoint_id=tmp_path / "step-10", planner=LayerwisePlanner("parity"))
    planner, target = LayerwisePlanner("parity"), tmp_path / "step-20"
    staged = planner.stager(target).stage(state(MODEL, 20, None))
    if how == "another folder":
        target = tmp_path / "step-30"
    elif how == "another state":
        staged["model"]["model.layers.9.mlp.weight"] = torch.zeros(2)
    elif how == "another planner":
        planner = LayerwisePlanner("full", base=None)
    else:
        next((target / "carried").glob("*/*")).unlink()
    with pytest.raises(BaseException, match="stage") as caught:
        dcp.save(staged, checkpoint_id=target, planner=planner)
    assert "CheckpointException" in type(caught.value).__name__
    assert not (target / ".metadata").exists()
    assert load(None, MODEL, str(tmp_path / "step-10"))["train.step"] == 10
