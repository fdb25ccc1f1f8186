"""Unique file names, and the removal of what a folder held before: never too early, never what others need."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from tailor_dcp import LayerwiseWriter, forget
from tests.support.runs import (
    HEAD,
    L0,
    L1,
    L2,
    LAYERS,
    Run,
    due,
    files,
    heard_warnings,
    metadata,
    named,
    record,
)
from tests.support.users import somebody_else

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
    pytest.mark.filterwarnings("error::tailor_dcp.TailorWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]

COMPOSITE = {L0: 100, L1: 200, L2: 100, HEAD: 100}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a run of two saves, the second of which carries from the first."""
    run = Run(tmp_path / "run")
    run.save(100)
    run.save(200, due(L1))
    return run


class Unwritable:
    """A value that cannot be pickled: its save fails after other bytes are written."""

    def __reduce__(self) -> Any:
        raise OSError("no space left on device")


class Cut(FileSystemWriter):
    """A writer that is cut off just before the commit: all data is there, the metadata only as ``.tmp``."""

    def finish(self, metadata: Any, results: Any) -> None:
        metadata.storage_data = {result.index: result.storage_data for of_rank in results for result in of_rank}
        Path(self.path, ".metadata.tmp").write_bytes(pickle.dumps(metadata))
        raise OSError("cut off")


# Unique names -----------------------------------------------------------------------------


def test_files_are_named_by_rank_and_save_id(run: Run) -> None:
    """The stock writer keeps the prefix that the planner gives: no two saves share a file's name."""
    save_id = record(run.path(200))["save_id"]
    assert {name for name in files(run.path(200)) if "/" not in name} == {f"__0_{save_id[:8]}_0.distcp"}


@pytest.mark.parametrize("mode", ["link", "reference", "copy"])
@pytest.mark.parametrize("writer", [FileSystemWriter, LayerwiseWriter])
def test_a_stock_save_into_an_older_folder_changes_no_newer_one(tmp_path: Path, mode: str, writer: Any) -> None:
    """What step 200 carries from step 100 is still step 100's, whatever is put there later."""
    run = Run(tmp_path)
    run.save(100, carry=mode, writer=writer)
    run.save(200, due(L1), carry=mode, writer=writer)
    run.stock(101, to="step-100")
    run.stock(102, to="step-100")
    assert run.origins(200) == COMPOSITE
    assert run.origins(100) == dict.fromkeys(LAYERS, 102)


@pytest.mark.parametrize("mode", ["link", "reference", "copy"])
@pytest.mark.parametrize("writer", [FileSystemWriter, LayerwiseWriter])
def test_our_save_into_an_older_folder_changes_no_newer_one(tmp_path: Path, mode: str, writer: Any) -> None:
    """Also where the older folder's files are swept: not those that step 200 refers to."""
    run = Run(tmp_path)
    run.save(100, carry=mode, writer=writer)
    run.save(200, due(L1), carry=mode, writer=writer)
    forget()
    run.save(101, to="step-100", carry=mode, writer=writer)
    assert run.origins(200) == COMPOSITE
    assert run.origins(100) == dict.fromkeys(LAYERS, 101)


# A save that fails ------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["value", "cut off", "planning"])
def test_a_save_that_fails_leaves_the_old_checkpoint_of_its_folder(run: Run, fault: str) -> None:
    """Half-way, at the end, before it began: the old .metadata and every file that it names stay."""
    options: dict[str, Any] = {
        "value": {"extra": {"bad": Unwritable()}},
        "cut off": {"writer": Cut},
        "planning": {"policy": lambda request: [("no", "unit")]},
    }[fault]
    before = (run.path(200) / ".metadata").read_bytes()
    run.load(100)
    with pytest.raises(dcp.api.CheckpointException):
        run.save(201, to="step-200", **options)
    assert (run.path(200) / ".metadata").read_bytes() == before
    assert run.origins(200) == COMPOSITE
    assert run.origins(100) == dict.fromkeys(LAYERS, 100)


def test_links_that_the_old_checkpoint_needs_survive_a_save_that_does_without(run: Run) -> None:
    """A link taken over from the old checkpoint and then not needed is still the old checkpoint's.

    A counter that cannot be carried makes its moments due, whose files were linked by then.
    """
    one_file_each = {"writer": lambda path: FileSystemWriter(path, single_file_per_rank=False)}
    forget()
    run.save(300, **one_file_each)
    run.save(400, **one_file_each)
    run.load(300)
    for index, info in metadata(run.path(300)).storage_data.items():
        if index.fqn == f"optim.state.{L0}.w.step":
            (run.path(300) / info.relative_path).unlink()
    with heard_warnings(), pytest.raises(dcp.api.CheckpointException):
        run.save(401, to="step-400", extra={"bad": Unwritable()})
    assert run.origins(400) == dict.fromkeys(LAYERS, 300)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


class Silent:
    """Keep a failing thread of DCP's from printing its traceback."""

    def __enter__(self) -> None:
        self.before, threading.excepthook = threading.excepthook, lambda args: None

    def __exit__(self, *_: object) -> None:
        threading.excepthook = self.before


WRITERS = [
    FileSystemWriter,
    lambda path: FileSystemWriter(path, thread_count=2),
    LayerwiseWriter,
]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_checkpoint(small_disk: Path, writer: Callable[[Path], Any]) -> None:
    """A real one, in whatever thread it is met: nothing is committed, and the next save has room again."""
    run = Run(small_disk / "run")
    large = {"model2": {f"layers.{i}.w": torch.zeros(300_000) for i in range(8)}}
    run.save(100, writer=writer)
    with Silent(), pytest.raises(dcp.api.CheckpointException):
        run.save(101, to="step-100", writer=writer, extra=large)
    assert run.origins(100) == dict.fromkeys(LAYERS, 100)
    for path in run.path(100).glob("*.distcp"):
        if path.name not in named(run.path(100)):
            path.unlink()
    run.save(102, to="step-100", writer=writer)
    assert run.origins(100) == dict.fromkeys(LAYERS, 102)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_limit_on_file_sizes_leaves_the_old_checkpoint(run: Run, writer: Callable[[Path], Any]) -> None:
    """A quota met in the middle of a file: the same, without a mount."""
    large = {"model2": {f"layers.{i}.w": torch.zeros(300_000) for i in range(8)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with Silent(), pytest.raises(dcp.api.CheckpointException):
            run.save(201, to="step-200", writer=writer, extra=large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run.origins(200) == COMPOSITE


# Sweeping ---------------------------------------------------------------------------------


def test_old_files_are_there_until_the_new_metadata_is(run: Run) -> None:
    """Nothing is removed before the commit, and afterwards nothing is left that nobody names."""
    old = files(run.path(200))

    class Watching(FileSystemWriter):
        def finish(self, *args: Any, **kwargs: Any) -> None:
            assert old <= files(run.path(200))
            super().finish(*args, **kwargs)
            assert old <= files(run.path(200))

    forget()
    run.save(201, to="step-200", writer=Watching)
    assert files(run.path(200)) == named(run.path(200))
    assert not (run.path(200) / "carried").exists()


def test_a_relative_name_is_swept_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """DCP tells the folder as the user wrote it."""
    monkeypatch.chdir(run.folder)
    forget()
    moved = Run(Path())
    moved.save(201, to="step-200")
    assert files(run.path(200)) == named(run.path(200))


def test_what_failed_saves_left_is_swept(run: Run) -> None:
    """Their data files and links go as soon as a save into the folder succeeds."""
    run.load(200)
    for _ in range(2):
        with pytest.raises(dcp.api.CheckpointException):
            run.save(300, due(L2), writer=Cut)
    assert len(files(run.path(300))) > 3
    run.save(300, due(L2))
    assert files(run.path(300)) - {".metadata.tmp"} == named(run.path(300))
    assert run.origins(300) == {L0: 100, L1: 200, L2: 300, HEAD: 100}


def test_files_that_are_no_saves_stay(run: Run) -> None:
    """A tokenizer, a config, somebody's notes: only DCP's data files are ever removed."""
    for name in ("config.json", "tokenizer.model", "notes.distcp", "__init__.py"):
        (run.path(200) / name).write_text("mine")
    forget()
    run.save(201, to="step-200")
    assert {"config.json", "tokenizer.model", "notes.distcp", "__init__.py"} <= files(run.path(200))


@pytest.mark.parametrize("link", ["carried", "carried/x"])
def test_what_a_link_leads_to_is_not_swept(run: Run, tmp_path: Path, link: str) -> None:
    """A folder of carried files that leads out of the run: its files are somebody else's."""
    theirs = tmp_path / "outside" / "x" / "theirs.distcp"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    shutil.rmtree(run.path(200) / "carried")
    (run.path(200) / link).parent.mkdir(exist_ok=True)
    (run.path(200) / link).symlink_to(theirs.parents[1] if link == "carried" else theirs.parent)
    forget()
    run.save(201, to="step-200")
    assert theirs.read_bytes() == b"theirs"
    assert run.origins(200) == dict.fromkeys(LAYERS, 201)


def test_a_file_that_others_refer_to_stays(run: Run) -> None:
    """In reference mode step 100's old file is live as long as step 300 names it."""
    run.load(100)
    run.save(300, due(L1), carry="reference")
    forget()
    run.save(101, to="step-100")
    assert run.origins(300) == {L0: 100, L1: 300, L2: 100, HEAD: 100}
    shutil.rmtree(run.path(300))
    forget()
    run.save(102, to="step-100")
    assert files(run.path(100)) == named(run.path(100))


def test_beside_a_checkpoint_that_cannot_be_read_nothing_is_swept(run: Run) -> None:
    """It may refer to anything."""
    (run.path(200) / ".metadata").write_bytes(b"\x80\x04 damaged")
    old = files(run.path(100))
    forget()
    run.save(101, to="step-100")
    assert old < files(run.path(100))
    assert run.origins(100) == dict.fromkeys(LAYERS, 101)


def test_beside_a_folder_that_cannot_be_listed_nothing_is_swept(shared_folder: Path) -> None:
    """A checkpoint in it may refer to anything; what a disk has at its root for its administrator holds none."""
    run = Run(shared_folder / "run")
    with somebody_else():
        run.save(100, carry="reference")
        run.save(200, due(L1), carry="reference")
        old = files(run.path(100))
        run.path(200).chmod(0)
        forget()
        run.save(101, to="step-100")
        assert old < files(run.path(100))
        run.path(200).chmod(0o755)
        assert run.origins(200) == COMPOSITE
        run.path("lost+found").mkdir(0)
        shutil.rmtree(run.path(200))
        forget()
        run.save(102, to="step-100")
        assert files(run.path(100)) == named(run.path(100))


def test_a_link_that_leads_nowhere_hides_nothing(run: Run) -> None:
    """A loop, a dangling one, one below a file."""
    (run.folder / "loop").symlink_to("loop")
    (run.folder / "gone").symlink_to("step-50")
    (run.folder / "below").symlink_to("step-100/.metadata/x")
    forget()
    run.save(101, to="step-100")
    assert files(run.path(100)) == named(run.path(100))


@pytest.mark.parametrize("fault", ["value", "cut off"])
def test_after_our_failure_a_stock_save_keeps_its_files(tmp_path: Path, fault: str) -> None:
    """Stock names its files alike each time, and removes none: what was old when we failed is new when it has saved."""
    run = Run(tmp_path)
    (run.stock(100) / "__7_0.distcp").write_bytes(b"left by an eighth rank")
    options: dict[str, Any] = {"extra": {"bad": Unwritable()}} if fault == "value" else {"writer": Cut}
    with pytest.raises(dcp.api.CheckpointException):
        run.save(101, to="step-100", **options)
    before = files(run.path(100))
    run.stock(102, to="step-100")
    assert before <= files(run.path(100)) | {".metadata.tmp"}
    assert run.origins(100) == dict.fromkeys(LAYERS, 102)


def test_a_stock_checkpoint_is_replaced_by_ours(tmp_path: Path) -> None:
    """Its files go once ours is committed."""
    run = Run(tmp_path)
    run.stock(100)
    run.save(101, to="step-100")
    assert files(run.path(100)) == named(run.path(100))
    assert run.origins(100) == dict.fromkeys(LAYERS, 101)


def test_only_the_run_is_looked_through(tmp_path: Path) -> None:
    """For a folder without a step the run is its parent, somebody's home perhaps: deep trees there are left alone."""
    deep = tmp_path / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    (deep / ".metadata").write_bytes(b"some other program's")
    run = Run(tmp_path)
    for step in (1, 2):
        with heard_warnings():
            run.save(step, to="final")
    assert files(run.path("final")) == named(run.path("final"))


def test_a_sweep_that_fails_fails_no_save(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is committed by then: whatever goes wrong costs disk, not training."""
    from tailor_dcp import sweep

    def fail(*args: Any) -> None:
        raise RuntimeError("a loop of symbolic links, say")

    monkeypatch.setattr(sweep, "referring_files", fail)
    monkeypatch.setattr("logging.raiseExceptions", False)
    forget()
    run.save(201, to="step-200")
    assert run.origins(200) == dict.fromkeys(LAYERS, 201)
