"""``tailor verify``: what people and machines see, and exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tailor_dcp import LayerwiseWriter
from tailor_dcp.cli import app
from tests.flips import flipped
from tests.support.runs import L0, L1, LAYERS, Run, due, metadata
from tests.support.users import somebody_else

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.save(100, due(*LAYERS), writer=LayerwiseWriter)
    run.save(200, due(L0), writer=LayerwiseWriter)
    return run


def tailor(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, found.stdout


def damage(run: Run, step: int, layer: str):
    info = next(i for x, i in metadata(run.path(step)).storage_data.items() if x.fqn == f"model.{layer}.w")
    return flipped(run.path(step) / info.relative_path, info.offset + 712, 0)


def test_a_good_run_is_one_line(run: Run) -> None:
    code, out = tailor(run.folder)
    assert code == 0
    assert out.startswith("good: 2 checkpoints, ")
    assert out.count("\n") == 1
    for word in ("files", "blobs", "read in", "/s"):
        assert word in out


def test_what_is_damaged_is_a_table(run: Run) -> None:
    with damage(run, 200, L0):
        code, out = tailor(run.folder)
    assert code == 1
    for word in ("step-200", L0, "weight", "has changed since it was written", "DAMAGED: 1 of 2 checkpoints"):
        assert word in out


def test_what_cannot_be_checked_is_said_and_bad_if_asked(run: Run) -> None:
    run.stock(300)
    code, out = tailor(run.folder)
    assert code == 0
    assert "nothing is damaged, but not all can be checked" in out
    assert "step-300" in out
    assert tailor(run.folder, "--strict")[0] == 1
    assert tailor(run.path(200), "--strict")[0] == 0


def test_for_machines(run: Run) -> None:
    with damage(run, 200, L0):
        code, out = tailor(run.folder, "--json", "--repair-plan", run.folder.parent / "plan.yaml")
    told = json.loads(out)
    assert (code, told["state"]) == (1, "damaged")
    (finding,) = told["findings"]
    assert (finding["checkpoint"], finding["layer"], finding["kind"]) == ("step-200", L0, "weight")
    (repair,) = told["repair"]
    assert repair["file"] == str(run.folder.parent / "plan.yaml")
    assert repair["recipe"]["layers"][L0]["from"] == str(run.path(100))


def test_a_repair_plan_is_written_for_each_damaged_checkpoint(run: Run, tmp_path: Path) -> None:
    run.save(300, due(L1), writer=LayerwiseWriter)
    plan = tmp_path / "plan.yaml"
    with damage(run, 200, L0):  # step 300 has these bytes, too
        code, out = tailor(run.folder, "--repair-plan", plan)
        assert code == 1
        names = {path.name for path in tmp_path.glob("*.yaml")}
        assert names == {"plan.step-200.yaml", "plan.step-300.yaml"}
        assert f"tailor merge {tmp_path / 'plan.step-300.yaml'} OUT" in out.replace("\n", "")
        made = CliRunner().invoke(app, ["merge", str(tmp_path / "plan.step-300.yaml"), str(run.path(301))])
        assert made.exit_code == 0, made.output
        assert tailor(run.path(301))[0] == 0
    steps = run.steps_of(301)
    assert (steps[f"model.{L0}.w"], steps[f"model.{L1}.w"]) == (100, 300)


def test_nothing_to_repair(run: Run, tmp_path: Path) -> None:
    code, out = tailor(run.folder, "--repair-plan", tmp_path / "plan.yaml")
    assert (code, out.count("\n")) == (0, 1)
    assert not (tmp_path / "plan.yaml").exists()


def test_what_cannot_be_read_is_neither_good_nor_bad(shared_folder: Path) -> None:
    """A pipeline must neither go on nor follow a repair plan because a token has expired."""
    run = Run(shared_folder / "run")
    for step in (100, 200):
        run.save(step, due(*LAYERS), base=None, writer=LayerwiseWriter)
    for path in run.path(200).glob("*.distcp"):
        path.chmod(0)
    plan = shared_folder / "plan.yaml"
    with somebody_else():
        code, out = tailor(run.folder, "--repair-plan", plan)
        assert json.loads(tailor(run.folder, "--json")[1])["state"] == "unverifiable"
    assert (code, plan.exists()) == (2, False)
    assert "UNDECIDED: not all of step-200 could be read" in out
    assert "Permission denied" in out
    with damage(run, 100, L0), somebody_else():
        code, out = tailor(run.folder)
    assert code == 1
    assert "DAMAGED: 1 of 2 checkpoints" in out and "not all of step-200 could be read" in out


def test_a_plan_does_not_outlive_the_damage(run: Run, tmp_path: Path) -> None:
    """Else a pipeline would merge it the next time."""
    plan = tmp_path / "plan.yaml"
    with damage(run, 200, L0):
        tailor(run.folder, "--repair-plan", plan)
        assert {path.name for path in tmp_path.glob("*.yaml")} == {"plan.yaml"}
        tailor(run.folder, "--repair-plan", plan)  # and again
        assert plan.exists()
    code, out = tailor(run.folder, "--repair-plan", plan)
    assert (code, list(tmp_path.glob("*.yaml"))) == (0, [])
    assert f"removed {plan}, the plan of an earlier verification" in out


def test_what_is_no_plan_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("base: mine\n")
    with damage(run, 200, L0):
        assert tailor(run.folder, "--repair-plan", tmp_path / "recipe.yaml")[0] == 2
    assert (tmp_path / "recipe.yaml").read_text() == "base: mine\n"


def test_a_run_whose_name_is_no_text(tmp_path: Path) -> None:
    run = Run(tmp_path / os.fsdecode(b"r\xff\nun"))
    for step in (100, 200):
        run.save(step, due(*LAYERS), base=None, writer=LayerwiseWriter)
    with damage(run, 200, L0):
        code, out = tailor(run.folder, "--repair-plan", tmp_path / "plan.yaml")
    assert (code, "model.layers.0: weight from" in out) == (1, True)
    assert yaml.safe_load((tmp_path / "plan.yaml").read_text())["base"] == str(run.path(200))


def test_wrong_usage(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["verify", str(tmp_path / "nothing")])
    assert getattr(found.exception, "exit_code", None) == 2
    assert CliRunner().invoke(app, ["verify", str(tmp_path), "--threads", "0"]).exit_code == 2


def test_a_plan_that_could_not_be_written_is_refused_before_anything_is_read(run: Run, tmp_path: Path) -> None:
    code, _ = tailor(run.folder, "--repair-plan", tmp_path / "nowhere" / "plan.yaml")
    assert code == 2
