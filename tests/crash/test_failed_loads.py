"""Law 6: a load through our planner and reader that fails, for whatever reason, leaves the caller's state as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash import loads
from tests.crash.plan import missing
from tests.crash.stage import Stage
from tests.crash.trials import LOADS, load

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

BRIEF = {"load, EIO", "load, damaged 3, 2 ranks"}


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """The process whose children load."""
    made = Stage(LOADS)
    yield made
    made.close()


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in BRIEF else pytest.mark.long) for n in loads.ALL])
def test_a_load_that_fails_changes_nothing(stage: Stage, tmp_path: Path, name: str) -> None:
    """A fault at each call that reads, in turn; or one file after the other gone, cut off, or with a bit flipped."""
    tried = load(stage, tmp_path / "root", name)
    assert tried.wrong == []
    harmless = name.startswith(("load, short", "load, EINTR"))  # reading goes on where it was
    assert (tried.failed == 0) == harmless
    assert tried.loads > 10
