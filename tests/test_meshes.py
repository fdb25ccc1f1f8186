"""Layer-wise saves of states that are laid out as large trainings lay them out, loaded by torch alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.fleet import Fleet
from tests.support.meshes import DENSE, EXPERTS
from tests.support.world import Model
from tests.test_laws import Saved, check, origin
from tests.support.world import keys

STEPS = (10, 20, 30)


def verify(run: Path, model: Model, loads: Any, stock_fleet: Fleet) -> None:
    """Hold each checkpoint to the law, and make sure that it was not simply written as a whole."""
    for number, step in enumerate(STEPS):
        saved = Saved(run / f"step-{step}", step, model, "parity", list(STEPS[: number + 1]))
        record = stock_fleet.one("tests.support.world:record", str(saved.path))
        plain = stock_fleet.call("tests.support.world:load", model, str(saved.path), ranks=1 + number % 2)
        merged: dict[str, Any] = {}
        for part in loads(str(saved.path)):
            merged |= part
        for loaded in (*plain, merged):
            check(saved, loaded, record)
        origins = {origin(key, plain[0][key], p, kind, saved) for key, (p, kind) in keys(model).items()}
        assert origins == set(STEPS[max(0, number - 1) : number + 1])


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ("two-dimensional", DENSE),
        ("strided", DENSE),
        ("hybrid", DENSE),
        ("sharded-tensor", DENSE),
        ("pipeline", DENSE),
        ("expert-parallel", EXPERTS),
    ],
)
def test_layouts(layout: str, model: Model, fleet: Fleet, stock_fleet: Fleet, tmp_path: Path) -> None:
    """However ranks share the tensors, every unit comes back bit for bit as it was at one save, half of them new."""
    fleet.call("tests.support.world:forget")
    for step in STEPS:
        fleet.call("tests.support.meshes:save", layout, model, step, str(tmp_path / f"step-{step}"))
    verify(tmp_path, model, lambda path: fleet.call("tests.support.meshes:load", layout, model, path), stock_fleet)


def test_the_mesh_may_change_between_saves(fleet: Fleet, stock_fleet: Fleet, tmp_path: Path) -> None:
    """What was saved on four ranks in two dimensions is carried into saves on another mesh and on fewer ranks."""
    fleet.call("tests.support.world:forget")
    for step, (layout, ranks) in zip(
        STEPS, [("two-dimensional", 4), ("one-dimensional", 2), ("strided", 4)], strict=True
    ):
        fleet.call("tests.support.meshes:save", layout, DENSE, step, str(tmp_path / f"step-{step}"), ranks=ranks)
    verify(tmp_path, DENSE, lambda path: fleet.call("tests.support.meshes:load", "hybrid", DENSE, path), stock_fleet)
