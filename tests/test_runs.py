"""Runs: the newest checkpoint is the one that was saved last, whatever its number."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp import forget, latest
from tailor_dcp.runs import Commit, commits, in_order
from tests.support.runs import L1, Run, due, heard_warnings

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
    pytest.mark.filterwarnings("error::tailor_dcp.TailorWarning"),
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def test_the_newest_is_the_last_that_was_saved(run: Run) -> None:
    """In a run that went straight on it has the highest number, and there is nothing to say."""
    for step in (90, 100, 110):
        run.save(step, due(L1))
    assert latest(run.folder) == run.path(110)


def test_after_going_back_the_newest_has_a_lower_number(run: Run) -> None:
    """Step 150 of the new timeline is newer than the abandoned 200, and a warning names both."""
    run.save(100)
    run.save(200, due(L1))
    run.load(100)
    run.save(150, due(L1))
    with heard_warnings() as said:
        assert latest(run.folder) == run.path(150)
    assert len(said) == 1 and "step-150" in said[0] and "step-200" in said[0]


def test_copying_a_run_changes_no_order(run: Run, tmp_path: Path) -> None:
    """The order is in the records: file times may all be new, or the wrong way round."""
    for step in (1, 2, 3):
        run.save(step, due(L1))
    shutil.copytree(run.folder, tmp_path / "copy")
    for age, step in enumerate((3, 2, 1)):
        os.utime(tmp_path / "copy" / f"step-{step}" / ".metadata", (age, age))
    assert [commit.step for commit in commits(tmp_path / "copy")] == [1, 2, 3]
    assert latest(tmp_path / "copy") == tmp_path / "copy" / "step-3"


def test_a_child_comes_after_its_parent_whatever_the_clock_says(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that moves to a machine whose clock is behind still has its order."""
    run.save(100)
    monkeypatch.setattr("time.time", lambda: 1.0)
    run.save(200, due(L1))
    assert latest(run.folder) == run.path(200)


def test_before_looks_below_a_step(run: Run) -> None:
    """For whoever wants to go back: the newest with a lower number."""
    for step in (100, 200, 300):
        run.save(step)
    assert latest(run.folder, before=300) == run.path(200)
    assert latest(run.folder, before=201) == run.path(200)
    assert latest(run.folder, before=100) is None


def test_stock_checkpoints_have_the_place_of_their_step(run: Run) -> None:
    """They have no record, and a copied file is younger than what was saved after it."""
    run.save(100)
    run.stock(200)
    forget()
    run.save(300)
    for when in (time.time(), 4e9):
        os.utime(run.path(200) / ".metadata", (when, when))
        assert [commit.step for commit in commits(run.folder)] == [100, 200, 300]
        with heard_warnings() as said:
            assert latest(run.folder) == run.path(300)
        assert len(said) == 1 and "the run was copied, or went back" in said[0]


def test_a_stock_run_that_was_copied_has_its_newest_still(run: Run) -> None:
    """``cp -r`` copies in the order of the directory; a warning says that the run may as well have gone back."""
    for age, step in enumerate((200, 300, 100)):
        os.utime(run.stock(step) / ".metadata", (age, age))
    with heard_warnings() as said:
        assert latest(run.folder) == run.path(300)
    assert len(said) == 1 and "step-100 has the younger file" in said[0]


def test_stock_checkpoints_change_nothing_of_what_records_tell(run: Run) -> None:
    """Training began with torch alone, and went back once it was ours: the newest is where it went on from there."""
    run.stock(100)
    run.stock(280)
    forget()
    run.save(300)
    run.load(100)
    run.save(250)
    assert [commit.step for commit in commits(run.folder)] == [100, 280, 300, 250]
    with heard_warnings() as said:
        assert latest(run.folder) == run.path(250)
    assert len(said) == 1 and "the run went back" in said[0]


@given(
    told=st.lists(st.booleans(), min_size=1, max_size=8),
    late=st.lists(st.floats(0, 100), min_size=8, max_size=8),
    mixed=st.randoms(use_true_random=False),
)
def test_a_run_that_went_straight_on_has_the_order_of_its_steps(
    told: list[bool], late: list[float], mixed: random.Random
) -> None:
    """Whichever checkpoints have a record, and whenever the files of the others were copied."""
    saved = [Commit(Path(), n, n + 0.5 + (0 if record else late[n]), record) for n, record in enumerate(told)]
    assert in_order(mixed.sample(saved, len(saved))) == saved


@given(
    times=st.lists(st.tuples(st.integers(0, 9), st.floats(0, 9)), min_size=1, max_size=8, unique=True),
    copied=st.lists(st.tuples(st.integers(0, 9), st.floats(0, 99)), max_size=4, unique_by=lambda pair: pair[0]),
)
def test_what_records_tell_stands(times: list[tuple[int, float]], copied: list[tuple[int, float]]) -> None:
    """Back and forth: what has a record is in the order of its time, and what has none in that of its step."""
    saved = [Commit(Path(), step, when) for step, when in times]
    found = in_order([*saved, *(Commit(Path(), step, when, told=False) for step, when in copied)])
    known = [one.time for one in found if one.told]
    assert known == sorted(known)
    for n, one in enumerate(found):
        if not one.told:
            assert all(other.time > one.time or other.step >= one.step for other in found[n:] if other.told)


def test_what_is_damaged_or_uncommitted_is_passed_over(run: Run) -> None:
    """The newest usable one is returned; a damaged one is named, an unfinished one is nobody's news."""
    for step in (100, 200, 300, 400):
        run.save(step)
    (run.path(400) / ".metadata").unlink()
    (run.path(300) / ".metadata").write_bytes(b"not a pickle")
    with heard_warnings() as said:
        assert latest(run.folder) == run.path(200)
    assert len(said) == 1 and "step-300" in said[0]


def test_names_without_a_step_are_no_candidates(run: Run) -> None:
    """``final`` and ``best`` are somebody's copies or merges."""
    run.save(100)
    shutil.copytree(run.path(100), run.path("best"))
    assert latest(run.folder) == run.path(100)


def test_a_series_is_looked_up_by_its_name(run: Run) -> None:
    """Accelerate's folders below a step belong to one series each."""
    for step in (100, 200):
        run.save(step, to=f"checkpoint-{step}/optimizer_0")
    run.save(300, to="checkpoint-300/model_0")
    assert latest(run.folder, series="optimizer_0") == run.path("checkpoint-200/optimizer_0")
    assert latest(run.folder, series="model_0") == run.path("checkpoint-300/model_0")
    assert latest(run.folder) is None


def test_a_run_that_does_not_exist_has_no_newest(tmp_path: Path) -> None:
    """The first start of a script that always asks."""
    assert latest(tmp_path / "nowhere") is None
    assert latest(str(tmp_path)) is None
