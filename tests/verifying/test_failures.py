"""Failures: what cannot be reached is not called damaged, and nobody gets a repair plan because of it."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tailor_dcp import LayerwiseWriter, verify
from tailor_dcp.errors import LoadError
from tailor_dcp.metadata.digest import digest
from tailor_dcp.metadata.safe_pickle import loads
from tailor_dcp.open_checkpoint import open_checkpoint
from tailor_dcp.store_path import place
from tailor_dcp.verify import Verification, repair_plans
from tailor_dcp.verifying.failures import is_gone, is_lost
from tests.flips import flipped
from tests.support.runs import L0, L1, LAYERS, Run, due, metadata
from tests.support.stores import empty_memory, memory_run, trained
from tests.support.users import somebody_else

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def run(shared_folder: Path) -> Run:
    """Two checkpoints, the later with one layer of its own."""
    run = Run(shared_folder / "run")
    run.save(100, due(*LAYERS), writer=LayerwiseWriter)
    run.save(200, due(L0), writer=LayerwiseWriter)
    return run


@pytest.fixture
def store() -> Iterator[str]:
    """The URL of three checkpoints in memory."""
    empty_memory()
    url = memory_run()
    trained(None, {}, url)
    yield url
    empty_memory()


def is_undecided(found: Verification, *names: str) -> bool:
    """Tell whether just these checkpoints could not be read, nothing is damaged, and nothing is to be repaired."""
    told = {one.name for one in found.checkpoints if one.state == "unverifiable"}
    assert found.damaged == () == repair_plans(found)
    assert all("nothing is said about" in one.what.lower() for one in found.undecided)
    return found.state == "unverifiable" and told == {one.checkpoint for one in found.undecided} == set(names)


def own_file(folder: Path, key: str) -> Path:
    return folder / next(i for x, i in metadata(folder).storage_data.items() if x.fqn == key).relative_path


def test_a_file_that_may_not_be_read(run: Run) -> None:
    """Which units are in it is said: of these nothing is taken by anybody's repair plan."""
    own_file(run.path(200), f"model.{L0}.w").chmod(0)
    with somebody_else():
        found = verify(run.folder)
        assert is_undecided(found, "step-200")
    assert {one.layer for one in found.undecided} == {L0}
    assert sum(one.blobs for one in found.undecided) + found.blobs == verify(run.folder).blobs


def test_a_folder_of_files_that_may_not_be_entered(run: Run) -> None:
    (run.path(200) / "carried").chmod(0)
    with somebody_else():
        assert is_undecided(verify(run.folder), "step-200")
        key = f"model.{L1}.w"
        with pytest.raises(LoadError, match=r"cannot be reached \(Permission denied\)"):
            open_checkpoint(run.path(200))[key]


def test_metadata_that_may_not_be_read(run: Run) -> None:
    (run.path(200) / ".metadata").chmod(0)
    with somebody_else():
        assert is_undecided(verify(run.folder), "step-200")


@pytest.mark.parametrize("asked", ["info", "cat_file", "cat_ranges"])
@pytest.mark.parametrize(
    "error", [TimeoutError(errno.ETIMEDOUT, "timed out"), PermissionError("the token has expired")]
)
def test_a_store_that_does_not_answer(store: str, monkeypatch: pytest.MonkeyPatch, asked: str, error: OSError) -> None:
    real = getattr(MemoryFileSystem, asked)

    def failing(self: Any, path: Any, *args: Any, **options: Any) -> Any:
        if str(path).rstrip("]'").endswith(".distcp"):
            if asked == "cat_ranges":
                return [error] * len(path)
            raise error
        return real(self, path, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, asked, failing)
    assert is_undecided(verify(store), "step-100", "step-200", "step-300")


def test_an_object_that_is_gone_is_damage(store: str) -> None:
    folder = place(store) / "step-300"
    told = pickle.loads((folder / ".metadata").read_bytes())
    (folder / next(i.relative_path for i in told.storage_data.values() if "/" not in i.relative_path)).unlink()
    found = verify(store)
    assert {one.name for one in found.checkpoints if one.state == "damaged"} == {"step-300"}
    assert all("is missing" in one.what for one in found.damaged)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_damaged_and_a_server_that_is_away_is_not(
    run: Run, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    name = own_file(run.path(200), f"model.{L0}.w").name
    real = os.preadv

    def failing(descriptor: int, buffers: Any, offset: int) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == name:
            raise OSError(number, os.strerror(number))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    found = verify(run.folder)
    if number == errno.EIO:
        assert {one.layer for one in found.damaged} == {L0}
    else:
        assert is_undecided(found, "step-200")


def test_which_errors_say_that_bytes_are_lost() -> None:
    local, remote = Path("x"), place("memory://bucket/x")
    for number in (errno.EACCES, errno.EPERM, errno.ETIMEDOUT, errno.ECONNRESET, errno.ESTALE, errno.EMFILE):
        error = OSError(number, "no")
        assert not is_gone(error)
        assert not is_lost(error, local)
    assert is_lost(OSError(errno.EIO, "no"), local)
    assert not is_lost(OSError(errno.EIO, "no"), remote)  # any error of a store's library has this number
    assert is_gone(FileNotFoundError(errno.ENOENT, "no"))


def test_nothing_is_taken_from_what_could_not_be_read(run: Run) -> None:
    """Its file may be damaged: an older one is intact for sure."""
    run.save(300, due(L0, L1), writer=LayerwiseWriter)
    file = own_file(run.path(300), f"model.{L0}.w")
    with flipped(file, 720, 1):
        (made,) = repair_plans(verify(run.folder))
        assert {one.source for one in made.taken} == {str(run.path(200))}
        own_file(run.path(200), f"model.{L0}.w").chmod(0)
        with somebody_else():
            found = verify(run.folder)
            (made,) = repair_plans(found)
    assert {one.source for one in made.taken} == {str(run.path(100))}
    assert [one.checkpoint for one in found.undecided] == ["step-200"] * len(found.undecided)


# Newer formats ------------------------------------------------------------------------------


def renumbered(run: Run, to: int, honestly: bool) -> Verification:
    """Give a record the number of another format, with or without a digest that fits."""
    path = run.path(200) / ".metadata"
    told = metadata(run.path(200))
    told.tailor |= {"format": to, "sealed": False}
    if honestly:
        told.tailor["digest"] = digest(loads(pickle.dumps(told), "it"))
    path.write_bytes(pickle.dumps(told))
    return verify(run.folder)


def test_a_record_of_a_newer_format_is_not_damaged(run: Run) -> None:
    found = renumbered(run, 3, honestly=True)
    assert is_undecided(found, "step-200")
    assert "format 3" in found.undecided[0].what


def test_a_format_that_was_damaged_is_no_newer_one(run: Run) -> None:
    assert [one.checkpoint for one in renumbered(run, 3, honestly=False).damaged] == ["step-200"]
    assert [one.checkpoint for one in renumbered(run, 0, honestly=True).damaged] == ["step-200"]


def test_no_note_is_made_of_a_save_that_cannot_be_read(run: Run) -> None:
    """Whether what step 200 carried from was saved again nobody knows."""
    (run.path(100) / ".metadata").write_bytes(b"x")
    assert verify(run.folder).notes == ()


def test_links_are_not_called_renamed(run: Run, tmp_path: Path) -> None:
    (run.folder / "latest").symlink_to("step-200")
    (tmp_path / "ckpt").symlink_to(run.path(200))
    for path in (run.folder / "latest", tmp_path / "ckpt"):
        assert (verify(path).state, verify(path).notes) == ("good", ())
    shutil.copytree(run.path(200), run.folder / "kept")
    assert any("kept was saved as step-200" in note for note in verify(run.folder).notes)
