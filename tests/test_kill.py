"""Law 2: a process killed at any moment leaves every earlier checkpoint, and the new one absent or complete."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tailor_dcp import latest
from tests.support.fleet import Fleet
from tests.support.world import Model, Param
from tests.test_laws import Saved, check

MODEL = Model(
    (
        Param("model.embed_tokens.weight", (6, 2)),
        Param("model.layers.0.weight", (4, 3)),
        Param("model.layers.1.weight", (5, 2)),
        Param("lm_head.weight", (6, 2)),
    )
)
POLICY = "parity"


@contextmanager
def killer(run: Path, writer: str) -> Iterator[Any]:
    """Yield a function that has one save killed at its n-th call and tells whether it was."""
    command = [sys.executable, "-m", "tests.support.killer", str(run), writer]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == "ready\n"

    def kill_at(n: int, step: int) -> bool:
        process.stdin.write(json.dumps([n, step]) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        assert answer["ok"], "the save failed otherwise than by the kill"
        return bool(answer["killed"])

    yield kill_at
    process.stdin.close()
    process.wait()


def whole(stock: Fleet, run: Path, step: int, lineage: list[int]) -> bool:
    """Tell whether a checkpoint is committed; if it is, everything in it must be as law 1 has it."""
    path = run / f"step-{step}"
    if not (path / ".metadata").exists():
        return False
    loaded = stock.one("tests.support.world:load", MODEL, str(path))
    check(Saved(path, step, MODEL, POLICY, lineage), loaded, stock.one("tests.support.world:record", str(path)))
    return True


@pytest.mark.parametrize("writer", ["stock", "layerwise"])
def test_a_save_killed_at_any_call_is_absent_or_complete(tmp_path: Path, stock_fleet: Fleet, writer: str) -> None:
    """Every file-system call of a save is tried; each next save goes into the half folder that the last left."""
    committed = 0
    with killer(tmp_path, writer) as kill_at:
        n = 1
        while kill_at(n, 30):
            assert whole(stock_fleet, tmp_path, 10, [10])
            assert whole(stock_fleet, tmp_path, 20, [10, 20])
            new = whole(stock_fleet, tmp_path, 30, [10, 20, 30])
            assert latest(tmp_path) == tmp_path / f"step-{30 if new else 20}"
            committed += new
            n += 1
    assert n > 6, "too few moments were tried"
    assert whole(stock_fleet, tmp_path, 30, [10, 20, 30])
    left = {path.name for path in (tmp_path / "step-30").glob("*.distcp")}
    record = stock_fleet.one("tests.support.world:record", str(tmp_path / "step-30"))
    assert all(record["save_id"][:8] in name for name in left), "files of killed saves were left behind"


def test_a_second_save_into_a_folder_keeps_the_first_until_it_is_there(tmp_path: Path, stock_fleet: Fleet) -> None:
    """With LayerwiseWriter a folder that is saved again holds one of the two saves at every moment."""
    with killer(tmp_path, "layerwise") as kill_at:
        n = 1
        while kill_at(n, 20):
            assert whole(stock_fleet, tmp_path, 10, [10])
            assert whole(stock_fleet, tmp_path, 20, [10, 20])
            n += 1
    assert n > 6, "too few moments were tried"
    assert whole(stock_fleet, tmp_path, 20, [10, 20])
