"""Plan files: no stale plan is left for the next merge, and nothing else is overwritten or removed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.errors import TailorError
from tailor_dcp.verifying.plan_files import check_target, remove_earlier, write
from tailor_dcp.verifying.repair import RepairPlan


def plan(path: Path, name: str | None = None) -> RepairPlan:
    return RepairPlan(name or path.name, str(path), str(path), (), (), {"base": str(path)})


def test_an_earlier_plan_goes(tmp_path: Path) -> None:
    """Of several those for this run go, not those for another."""
    file, run = tmp_path / "plan.yaml", tmp_path / "run"
    write([plan(run / "step-1")], file)
    write([plan(run / "step-1"), plan(run / "step-2")], file)
    write([plan(tmp_path / "run2" / "step-3"), plan(tmp_path / "run2" / "step-4")], file)
    (tmp_path / "plan.mine.yaml").write_text("base: mine\n")
    (tmp_path / "plan.binary.yaml").write_bytes(b"\xff\n")
    check_target(file)
    gone = remove_earlier(file, run)
    assert {path.name for path in gone} == {"plan.yaml", "plan.step-1.yaml", "plan.step-2.yaml"}
    assert {path.name for path in tmp_path.glob("plan*")} == {
        "plan.step-3.yaml",
        "plan.step-4.yaml",
        "plan.mine.yaml",
        "plan.binary.yaml",
    }


def test_what_is_no_plan_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("base: mine\n")
    with pytest.raises(TailorError, match="is no repair plan"):
        check_target(file)
    assert remove_earlier(file, tmp_path) == []
    assert file.read_text() == "base: mine\n"
    with pytest.raises(TailorError, match="is a folder"):
        check_target(tmp_path)
    with pytest.raises(TailorError, match="is no folder"):
        check_target(tmp_path / "nowhere" / "plan.yaml")
    (tmp_path / "empty").touch()
    check_target(tmp_path / "empty")  # as mktemp makes it


@given(st.sets(st.from_regex(r"[ab%2F-]{1,3}(/[ab%2F-]{1,3})?", fullmatch=True), min_size=2))
def test_no_two_checkpoints_have_one_file(tmp_path_factory: pytest.TempPathFactory, names: set[str]) -> None:
    """``a/b-1`` and ``a-b/1`` are two."""
    folder = tmp_path_factory.mktemp("plans")
    plans = [plan(folder / name, name) for name in sorted(names)]
    files = write(plans, folder / "plan.yaml")
    assert len({*files}) == len(names)
    assert [file.read_text() for file in files if file] == [made.yaml() for made in plans]


def test_a_run_whose_name_is_no_text(tmp_path: Path) -> None:
    r"""Its bytes are written out in what people read, and come back from what programs read."""
    run = tmp_path / "r\udcff\nun"
    file = tmp_path / "plan.yaml"
    write([plan(run / "step-1")], file)
    assert remove_earlier(file, run) == [file]
