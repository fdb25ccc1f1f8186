"""Where a folder stands: its run, its step, its series."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.location import Location, is_url, is_within, locate, same_folder

steps = st.integers(0, 10**12)
prefixes = st.sampled_from(["", *(word + joint for word in ("step", "checkpoint", "global_step") for joint in "-_=")])
# What people call runs and series; no number in them that could be taken for a step's.
words = st.from_regex(r"[a-z][a-z_]{0,8}[a-z]", fullmatch=True).filter(lambda w: w not in ("step", "checkpoint"))


@given(prefixes | st.sampled_from(["step", "checkpoint", "global_step"]), steps, words)
def test_a_step_name_tells_run_and_step(prefix: str, step: int, run: str) -> None:
    """``step-N``, ``checkpoint-N``, ``global_stepN``, any of ``-_=`` or nothing between, or all digits."""
    name = f"{prefix}{step}"
    assert locate(f"/data/{run}/{name}") == Location(Path(f"/data/{run}/{name}"), Path(f"/data/{run}"), step, "")


@given(steps, words, st.lists(words, min_size=1, max_size=2))
def test_what_is_below_the_step_is_the_series(step: int, run: str, below: list[str]) -> None:
    """Accelerate's ``checkpoint-200/optimizer_0``: same run and step, another series."""
    series = "/".join(below)
    found = locate(f"/data/{run}/checkpoint-{step}/{series}")
    assert (found.run, found.step, found.series) == (Path(f"/data/{run}"), step, series)
    assert found.name == f"checkpoint-{step}/{series}"


@given(steps, steps, words)
def test_the_nearest_step_counts(outer: int, inner: int, run: str) -> None:
    """``checkpoint-100/global_step100`` is in the run ``checkpoint-100``."""
    found = locate(f"/data/{run}/checkpoint-{outer}/global_step{inner}")
    assert (found.run.name, found.step, found.series) == (f"checkpoint-{outer}", inner, "")


@given(words, words)
def test_a_name_without_a_step_is_in_its_parents_run(run: str, name: str) -> None:
    """A merge result or ``final`` has no step and no series."""
    found = locate(f"/data/{run}/{name}")
    assert (found.run, found.step, found.series, found.name) == (Path(f"/data/{run}"), None, "", name)


@pytest.mark.parametrize(
    "name", ["step-", "step-1a", "step--1", "steps-1", "mystep-1", "1.5", "best", "step-1.tmp", "-1"]
)
def test_what_only_resembles_a_step_tells_none(name: str) -> None:
    """A temporary or decorated name is no step's."""
    assert locate(f"/data/run/{name}").step is None


def test_a_number_further_up_is_no_step() -> None:
    """A job's or a user's folder three levels up says nothing about training."""
    assert locate("/jobs/4711/project/run/final").step is None


@given(prefixes, steps, words)
def test_a_trailing_slash_and_a_relative_name_change_nothing(prefix: str, step: int, run: str) -> None:
    """However the user writes it, it is one folder."""
    name = f"{run}/{prefix}{step}"
    assert locate(f"{name}/") == locate(name) == locate(Path.cwd() / name) == locate(f"./{run}/../{name}")


@given(steps, steps, words, words)
def test_a_sibling_is_the_same_checkpoint_in_a_run_that_was_moved(a: int, b: int, old: str, new: str) -> None:
    """It keeps its name and its series, and changes the run."""
    here = locate(f"/data/{new}/step-{a}/optim")
    assert here.sibling(Path(f"/elsewhere/{old}/step-{b}/optim")) == Path(f"/data/{new}/step-{b}/optim")


def test_an_address_is_no_path() -> None:
    """Object stores are told by their scheme."""
    assert is_url("s3://bucket/run/step-1") and is_url("memory://x")
    assert not is_url("/data/run/step-1") and not is_url(Path("run/step-1"))


def test_symbolic_links_are_followed_when_folders_are_compared(tmp_path: Path) -> None:
    """Two names, one folder; and a link that leads out of the run is outside."""
    (tmp_path / "run" / "step-1").mkdir(parents=True)
    (tmp_path / "run" / "latest").symlink_to("step-1")
    (tmp_path / "run" / "out").symlink_to("/etc")
    assert same_folder(tmp_path / "run" / "latest", tmp_path / "run" / "step-1")
    assert not same_folder(tmp_path / "run", tmp_path)
    assert is_within(tmp_path / "run" / "latest" / "f", tmp_path / "run")
    assert not is_within(tmp_path / "run" / "out" / "passwd", tmp_path / "run")
    assert not is_within(tmp_path / "run" / ".." / "run2", tmp_path / "run")
