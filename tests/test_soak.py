"""The soak in short: saves, kills, world sizes, prunes and resumes of one run, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

from benchmarks.soak import lines, soak
from benchmarks.soak_life import Soak
from benchmarks.soak_world import KEYS
from tests.support.fleet import Fleet


def test_nothing_is_lost_and_nothing_grows(tmp_path: Path, stock_fleet: Fleet) -> None:
    """Seventy saves; the long form is `python -m benchmarks.soak --saves 2000`."""
    found = soak(70, seed=3, folder=tmp_path, stock=stock_fleet)
    assert found.lost == []
    assert found.counts["saves"] >= 70
    assert found.counts["loaded at the end"] == found.counts["verified at the end"] == found.kept > 0
    assert found.counts["saves killed"] > 0
    assert found.counts["prunes"] > 0
    assert len(found.world_sizes) > 1
    assert found.open_files[1] - found.open_files[0] <= 2, "files stay open"
    assert any(line.split() == ["lost", "0"] for line in lines(found))


def test_it_would_notice(tmp_path: Path, stock_fleet: Fleet) -> None:
    """A checkpoint that is changed, or gone, is told."""
    life = Soak(tmp_path / "run", 1, stock_fleet)
    life._save_alone()
    (held,) = life.held.values()
    life._look_at([held])
    assert life.lost == []
    key = next(iter(KEYS))
    held.origins[key] += 1
    life._look_at([held])
    assert [key in said for said in life.lost] == [True]
    path = tmp_path / "run" / f"step-{held.step}"
    (path / ".metadata").unlink()
    life._settled(path, (), held.save_id, 1)
    assert "is gone after a save into it was killed" in life.lost[-1]
