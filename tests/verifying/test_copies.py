"""Copies: where files of one save differ, the odd one is told from the others, or it is said that nothing tells."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tailor_dcp import verify
from tailor_dcp.verifying import run_check


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two stock checkpoints of twenty files, and two copies of the first; files of the second in place of the first's.

    Stock files have no name of their own, so a restore can mix them up, and checksums that all agree.
    """
    run = tmp_path / "run"
    for step in (1, 2):
        state = {"model": {f"layers.{number}.w": torch.full((64,), float(step)) for number in range(20)}}
        writer = dcp.FileSystemWriter(run / f"step-{step}", single_file_per_rank=False)
        dcp.save(state, storage_writer=writer)
    shutil.copytree(run / "step-1", run / "copy-1")
    shutil.copytree(run / "step-1", run / "copy-2")
    for file in (run / "step-2").glob("*.distcp"):
        shutil.copy(file, run / "step-1" / file.name)
    return run


def test_what_most_checkpoints_have_is_right(run: Path) -> None:
    found = verify(run)
    assert {one.checkpoint for one in found.damaged} == {"step-1"}
    assert {one.layer for one in found.damaged} == {f"layers.{number}" for number in range(20)}
    assert found.undecided == ()


def test_of_one_against_one_neither_is_called_damaged(run: Path) -> None:
    """One of them is intact; a plan that replaced it would be none."""
    shutil.rmtree(run / "copy-2")
    found = verify(run)
    assert found.damaged == ()
    assert {one.checkpoint for one in found.undecided} == {"step-1", "copy-1"}
    assert {one.layer for one in found.undecided} == {f"layers.{number}" for number in range(20)}
    assert all("nothing tells which" in one.what for one in found.undecided)


def test_metadata_is_not_read_again_for_every_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    real: Any = run_check.open_base

    def counted(folder: Path) -> Any:
        opened.append(folder)
        return real(folder)

    monkeypatch.setattr(run_check, "open_base", counted)
    assert len(verify(run).damaged) == 20
    assert opened == [run / "step-1"]
