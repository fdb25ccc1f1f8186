"""The base: one the user names must be whole; one found by itself never stops training."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from tailor_dcp import LayerwisePlanner
from tailor_dcp.errors import BaseError
from tests.support.runs import HEAD, L0, L1, L2, LAYERS, Run, due, heard_warnings, metadata, parent, record

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
    pytest.mark.filterwarnings("error::tailor_dcp.TailorWarning"),
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def uncommitted(folder: Path) -> None:
    (folder / ".metadata").unlink()


def corrupt(folder: Path) -> None:
    whole = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(whole[: len(whole) // 2])


def hostile(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(shutil.rmtree))


def newer(folder: Path) -> None:
    plain = metadata(folder)
    plain.tailor["format"] = 99
    (folder / ".metadata").write_bytes(pickle.dumps(plain))


def incomplete(folder: Path) -> None:
    """Let nobody know where a tensor is, as after a writer's thread failed unnoticed."""
    plain = metadata(folder)
    plain.storage_data = {k: v for k, v in plain.storage_data.items() if k.fqn != f"model.{L0}.w"}
    (folder / ".metadata").write_bytes(pickle.dumps(plain))


def missing(folder: Path) -> None:
    for path in folder.glob("*.distcp"):
        path.unlink()


def truncated(folder: Path) -> None:
    for path in folder.glob("*.distcp"):
        with path.open("r+b") as stream:
            stream.truncate(100)


DAMAGE = [uncommitted, corrupt, hostile, newer, incomplete, missing, truncated]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_explicit_base_is_an_error_with_a_way_out(run: Run, damage: Callable[[Path], None]) -> None:
    """It names the folder or its file and what to do; nothing is committed."""
    base = run.save(100)
    damage(base)
    with pytest.raises((BaseError, dcp.api.CheckpointException)) as caught:
        run.save(200, due(L1), base=base)
    error = caught.value
    if isinstance(error, dcp.api.CheckpointException):
        error = error.failures[0][0]
    assert isinstance(error, BaseError)
    assert str(base) in str(error)
    assert any(way in str(error) for way in ("another", 'base="auto"', "plain dcp.load", "Do not load this file"))
    assert not (run.path(200) / ".metadata").exists()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_base_found_by_itself_costs_bytes_and_a_warning(run: Run, damage: Callable[[Path], None]) -> None:
    """Training goes on, the checkpoint is right, and the user learns why it is full."""
    run.save(100)
    damage(run.path(100))
    with heard_warnings() as said:
        folder = run.save(200, due(L1))
    assert said and str(run.path(100)) in said[0]
    assert run.origins(folder) == dict.fromkeys(LAYERS, 200)


@pytest.mark.parametrize("damage", [uncommitted, corrupt, incomplete])
def test_behind_a_damaged_ancestor_the_one_before_is_carried_from(run: Run, damage: Callable[[Path], None]) -> None:
    """The first ancestor that is committed and whole is taken."""
    run.save(100)
    damage(run.save(200, due(L1)))
    with heard_warnings():
        folder = run.save(300, due(L2))
    assert parent(folder) == "step-100"
    assert run.origins(folder) == {L0: 100, L1: 100, L2: 300, HEAD: 100}


def test_a_missing_file_makes_only_its_own_units_due(run: Run) -> None:
    """What other files hold is carried; of the base nothing else is wrong."""
    run.save(100)
    run.save(200, due(L1))
    shutil.rmtree(run.path(200) / "carried")
    with heard_warnings() as said:
        folder = run.save(300, due(L2))
    assert len(said) == 1 and "ENOENT" in said[0]
    assert run.origins(folder) == {L0: 300, L1: 200, L2: 300, HEAD: 300}


def test_a_counter_whose_file_is_missing_takes_its_moments_along(run: Run) -> None:
    """Adam's step can lie in a file of its own; a moment without its counter is worth nothing."""
    run.save(100, writer=lambda path: FileSystemWriter(path, single_file_per_rank=False))
    for index, info in metadata(run.path(100)).storage_data.items():
        if index.fqn == f"optim.state.{L0}.w.step":
            (run.path(100) / info.relative_path).unlink()
    with heard_warnings() as said:
        steps = run.steps_of(run.save(200, due(L1)))
    assert len(said) == 1
    assert {key: step for key, step in steps.items() if L0 in key} == {
        f"model.{L0}.w": 100,
        **{f"optim.state.{L0}.w.{kind}": 200 for kind in ("exp_avg", "exp_avg_sq", "step")},
    }


def test_a_damaged_file_that_is_not_needed_does_no_harm(run: Run) -> None:
    """Only what is carried is asked for, also of an explicit base."""
    missing(run.save(100))
    folder = run.save(200, due(*LAYERS), base=run.path(100))
    assert run.origins(folder) == dict.fromkeys(LAYERS, 200)


def test_none_writes_everything(run: Run) -> None:
    """``base=None`` asks for a full save, without a warning."""
    run.save(100)
    folder = run.save(200, due(L1), base=None)
    assert run.origins(folder) == dict.fromkeys(LAYERS, 200)
    assert record(folder)["parent"] is None


def test_an_explicit_base_comes_before_what_the_process_knows(run: Run) -> None:
    """The user's word is first."""
    run.save(100)
    run.save(200, due(*LAYERS))
    folder = run.save(300, due(L1), base=run.path(100))
    assert run.origins(folder) == {L0: 100, L1: 300, L2: 100, HEAD: 100}


def test_a_token_that_was_merely_loaded_is_not_this_saves(run: Run) -> None:
    """A plain state dict that brings an earlier save's token neither takes its id nor writes over its files."""
    from tailor_dcp import lineage

    token = lineage.Token("ab" * 16, str(run.path(100)), ()).to_json()
    first = {**run.state(100)}
    first["train"] = {**first["train"], "token": token}
    dcp.save(first, checkpoint_id=run.path(100), planner=LayerwisePlanner(due(L1)))
    run.save(200, due(L1))
    lineage.forget()
    lineage._claimed.clear()  # as in a new process
    again = {**run.state(101)}
    again["train"] = {**again["train"], "token": token}
    dcp.save(again, checkpoint_id=run.path(100), planner=LayerwisePlanner(due(L1)))
    assert record(run.path(100))["save_id"] != "ab" * 16
    assert run.origins(200) == {L0: 100, L1: 200, L2: 100, HEAD: 100}


def test_a_base_that_is_the_target_writes_everything(run: Run) -> None:
    """A save into its own base cannot carry what it replaces, named or found, also through a symbolic link."""
    run.save(100)
    assert run.origins(run.save(101, due(L1), to="step-100")) == dict.fromkeys(LAYERS, 101)
    assert run.origins(run.save(102, due(L1), to="step-100", base=run.path(100))) == dict.fromkeys(LAYERS, 102)
    run.path("alias").symlink_to("step-100")
    assert run.origins(run.save(103, due(L1), to="step-100", base=run.path("alias"))) == dict.fromkeys(LAYERS, 103)


def test_a_copied_run_carries_from_its_own_copy(run: Run, tmp_path: Path) -> None:
    """Where a token names a folder of the run that this one was copied from, the copy beside it comes first."""
    from tailor_dcp import base, lineage
    from tailor_dcp.location import locate

    run.save(100)
    copied = Run(tmp_path / "copy")
    shutil.copytree(run.folder, copied.folder)
    ancestor = lineage.Ancestor(str(run.path(100)), record(run.path(100))["save_id"])
    found = base.find((ancestor,), locate(copied.path(200)))
    assert found is not None and found.location.folder == copied.path(100)
    shutil.rmtree(copied.folder)
    found = base.find((ancestor,), locate(copied.path(200)))
    assert found is not None and found.location.folder == run.path(100)
