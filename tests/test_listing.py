"""Listing: no checkpoint of a run is overlooked in silence, and none is found twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tailor_dcp import verify
from tailor_dcp.errors import NoCheckpointError
from tailor_dcp.listing import checkpoints_below
from tests.support.runs import Run
from tests.support.users import somebody_else


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    return folder


def names(run: Path) -> list[str]:
    return [path.relative_to(run).as_posix() for path in checkpoints_below(run).folders]


def test_checkpoints_up_to_the_deepest_series(tmp_path: Path) -> None:
    """What is being removed is none, and neither is what is carried."""
    for name in ("step-1", "step-2/a", "step-3/a/b", "step-4/a/b/c", ".pruned-step-5", "step-6/carried/x", "step-7"):
        checkpoint(tmp_path / name)
    checkpoint(tmp_path / "step-7" / "inner")
    assert names(tmp_path) == ["step-1", "step-2/a", "step-3/a/b", "step-7", "step-7/inner"]


def test_links_into_the_run_are_other_names_and_links_out_of_it_are_followed(tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    checkpoint(run / "step-1")
    checkpoint(disk / "step-2")
    checkpoint(disk / "runs" / "step-3" / "series")
    (run / "latest").symlink_to("step-1")
    (run / "best").symlink_to(disk / "step-2")  # of two names of one, its own is taken
    (run / "step-2").symlink_to(disk / "step-2")
    (run / "step-3").symlink_to(disk / "runs" / "step-3")
    (disk / "step-2" / "back").symlink_to(run)  # neither for ever round, nor back in
    (run / "up").symlink_to("..")
    (run / "self").symlink_to("self")
    assert names(run) == ["step-1", "step-2", "step-3/series"]
    assert checkpoints_below(run).unlisted == []
    assert names(tmp_path) == ["disk/step-2", "run/step-1"]  # a series of no step of this depth is not looked for


def test_links_within_a_step_lead_nowhere(tmp_path: Path) -> None:
    """Whoever made the step may have made them; a run among several has its own."""
    checkpoint(tmp_path / "disk" / "step-3")
    for folder in ("runs/a/step-1", "runs/a/step-2/series"):
        checkpoint(tmp_path / folder)
        (tmp_path / folder / "evil").symlink_to(tmp_path / "disk")
    (tmp_path / "runs" / "a" / "step-2" / "evil").symlink_to(tmp_path / "disk" / "step-3")
    assert names(tmp_path / "runs") == ["a/step-1", "a/step-2/series"]
    (tmp_path / "runs" / "a" / "step-3").symlink_to(tmp_path / "disk" / "step-3")
    assert names(tmp_path / "runs") == ["a/step-1", "a/step-2/series", "a/step-3"]


def test_a_step_whose_disk_is_not_there(tmp_path: Path) -> None:
    """A ``best`` of old that leads to nothing has no meaning; a step that does has gone with its disk."""
    checkpoint(tmp_path / "step-1")
    (tmp_path / "step-2").symlink_to("/nowhere/step-2")
    (tmp_path / "best").symlink_to("/nowhere/best")
    (lost,) = checkpoints_below(tmp_path).unlisted
    assert lost.folder == tmp_path / "step-2"
    assert "/nowhere/step-2, where nothing is" in lost.why


def test_what_cannot_be_looked_into_is_said(shared_folder: Path) -> None:
    run = shared_folder / "run"
    for step in (1, 2):
        checkpoint(run / f"step-{step}")
    (run / "lost+found").mkdir(0)
    (run / "step-2").chmod(0)
    with somebody_else():
        found = checkpoints_below(run)
    assert found.folders == [run / "step-1"]
    assert [(one.folder, one.why) for one in found.unlisted] == [
        (run / "step-2", "could not be looked into: Permission denied")
    ]
    (shared_folder / "door").mkdir()
    checkpoint(shared_folder / "door" / "step-3")
    (run / "step-3").symlink_to(shared_folder / "door" / "step-3")
    (shared_folder / "door").chmod(0)
    with somebody_else():
        assert [one.folder.name for one in checkpoints_below(run).unlisted] == ["step-2", "step-3"]


def test_a_run_with_a_checkpoint_that_cannot_be_looked_into_is_not_good(shared_folder: Path) -> None:
    run = Run(shared_folder / "run")
    for step in (100, 200):
        run.save(step, base=None)
    run.path(200).chmod(0)
    with somebody_else():
        found = verify(run.folder)
    assert (found.state, [one.state for one in found.checkpoints]) == ("unverifiable", ["good"])
    (finding,) = found.undecided
    assert (finding.checkpoint, found.damaged) == ("step-200", ())
    assert str(run.path(200)) in finding.what
    run.path(100).chmod(0)
    with somebody_else(), pytest.raises(NoCheckpointError, match="step-100 could not be looked into"):
        verify(run.folder)


def test_a_step_on_another_disk_is_verified(tmp_path: Path) -> None:
    """As it is moved there, a link left in its place. What is damaged there is found."""
    run = Run(tmp_path / "run")
    for step in (100, 200):
        run.save(step, base=None)
    moved = tmp_path / "disk" / "step-100"
    moved.parent.mkdir()
    run.path(100).rename(moved)
    run.path(100).symlink_to(moved)
    found = verify(run.folder)
    assert (found.state, [one.name for one in found.checkpoints]) == ("good", ["step-100", "step-200"])
    (file, *_) = moved.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1])
    assert {one.name: one.state for one in verify(run.folder).checkpoints} == {
        "step-100": "damaged",
        "step-200": "good",
    }
