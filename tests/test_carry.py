"""How earlier bytes become part of a new folder: links, references, copies, and what happens where they cannot."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from tailor_dcp.carry import RemovedMeanwhileError, Source, check_there, place
from tailor_dcp.location import locate
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
    written,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
    pytest.mark.filterwarnings("error::tailor_dcp.TailorWarning"),
]

AFTER_THREE = {L0: 100, L1: 200, L2: 300, HEAD: 100}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def save_three(run: Run, **options: Any) -> None:
    """Save everything, then layer 1, then layer 2."""
    run.save(100, **options)
    run.save(200, due(L1), **options)
    run.save(300, due(L2), **options)


def own_files(folder: Path) -> set[Path]:
    """Return the data files that a save wrote itself."""
    return {path for path in folder.iterdir() if path.suffix == ".distcp"}


def contents(folder: Path) -> set[int]:
    """Return checksums of all data files below a folder."""
    return {zlib.crc32(path.read_bytes()) for path in folder.rglob("*.distcp")}


# Links ------------------------------------------------------------------------------------


def test_a_link_is_the_earlier_file_itself(run: Run) -> None:
    """Under ``carried/<save id that wrote it>/<file>`` lies the same inode, at no cost in bytes."""
    save_three(run)
    for step in (100, 200):
        (old,) = own_files(run.path(step))
        new = run.path(300) / "carried" / record(run.path(step))["save_id"] / old.name
        assert old.samefile(new)
    assert len(files(run.path(300))) == 3
    assert named(run.path(300)) == files(run.path(300))


def test_auto_is_link(run: Run) -> None:
    """Without being told, a local save links."""
    run.save(100)
    assert record(run.save(200))["carry"] == "link"


def test_a_folder_is_complete_without_the_older_ones(run: Run) -> None:
    """``rm -rf`` of every earlier step breaks nothing, and what no checkpoint needs any more is freed."""
    save_three(run)
    shutil.rmtree(run.path(100))
    shutil.rmtree(run.path(200))
    assert run.origins(300) == AFTER_THREE
    folder = run.save(400, due(*LAYERS))
    shutil.rmtree(run.path(300))
    assert all(path.stat().st_nlink == 1 for path in folder.rglob("*.distcp"))


def test_a_copy_elsewhere_just_loads(run: Run, tmp_path: Path) -> None:
    """``cp -r`` of one folder is a checkpoint."""
    save_three(run)
    subprocess.run(["cp", "-r", run.path(300), tmp_path / "elsewhere"], check=True)
    shutil.rmtree(run.folder)
    assert run.origins(tmp_path / "elsewhere") == AFTER_THREE


def test_a_name_that_is_there_must_be_the_same_file(run: Run) -> None:
    """Another file under the name that a link would get is not taken for it: the unit is written."""
    (old,) = own_files(run.save(100))
    squatter = run.path(200) / "carried" / record(run.path(100))["save_id"] / old.name
    squatter.parent.mkdir(parents=True)
    squatter.write_bytes(old.read_bytes())
    with heard_warnings() as said:
        folder = run.save(200, due(L1))
    assert len(said) == 1 and "EEXIST" in said[0]
    assert run.origins(folder) == dict.fromkeys(LAYERS, 200)


def test_the_same_file_under_that_name_is_taken(run: Run) -> None:
    """A save that is tried again finds the links of its first attempt."""

    class Failing(FileSystemWriter):
        def write_data(self, *args: Any) -> Any:
            raise OSError("not today")

    run.save(100)
    with pytest.raises(dcp.api.CheckpointException):
        run.save(200, due(L1), writer=Failing)
    assert len(list((run.path(200) / "carried").glob("*/*"))) == 1
    assert run.origins(run.save(200, due(L1))) == {L0: 100, L1: 200, L2: 100, HEAD: 100}


def test_of_a_symbolic_link_the_file_itself_is_linked(run: Run) -> None:
    """Some tools keep data files in a store and link to them; the new folder must not depend on those links."""
    (old,) = own_files(run.save(100))
    store = run.folder / "store"
    store.mkdir()
    old.rename(store / old.name)
    old.symlink_to(Path("..", "store", old.name))
    folder = run.save(200, due(L1))
    shutil.rmtree(run.path(100))
    shutil.rmtree(store)
    assert run.origins(folder) == {L0: 100, L1: 200, L2: 100, HEAD: 100}


@pytest.mark.parametrize(
    "code", ["EXDEV", "EPERM", "EMLINK", "ENOTSUP", "EACCES", "EROFS", "EDQUOT", "ENOSYS", "ESTALE", "EIO"]
)
def test_where_linking_fails_the_units_are_due_with_one_warning(
    run: Run, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """Whatever the file system says, the checkpoint is right, and one sentence says what it said."""
    run.save(100)
    run.save(200, due(L1))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(os, "link", refuse)
    with heard_warnings() as said:
        folder = run.save(300, due(L2))
    assert len(said) == 1 and f"[{errno.errorcode[getattr(errno, code)]}]" in said[0] and str(folder) in said[0]
    assert run.origins(folder) == dict.fromkeys(LAYERS, 300)
    assert not (folder / "carried").exists()


def test_only_what_cannot_be_linked_is_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with too many links costs its own units, not those of other files."""
    run.save(100)
    run.save(200, due(L1))
    full, link = record(run.path(200))["save_id"], os.link

    def refuse(source: Any, target: Any) -> None:
        if full in str(target):
            raise OSError(errno.EMLINK, "Too many links")
        link(source, target)

    monkeypatch.setattr(os, "link", refuse)
    with heard_warnings() as said:
        folder = run.save(300, due(L2))
    assert len(said) == 1
    assert run.origins(folder) == {L0: 100, L1: 300, L2: 300, HEAD: 100}


@pytest.fixture
def other_device(tmp_path: Path) -> Iterator[Path]:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def test_a_base_on_another_file_system_is_written(run: Run, other_device: Path) -> None:
    """A real EXDEV: a link cannot cross devices, so everything is written with one warning."""
    base = Run(other_device).save(100)
    with heard_warnings() as said:
        folder = run.save(200, due(L1), base=base)
    assert len(said) == 1 and "EXDEV" in said[0]
    assert run.origins(folder) == dict.fromkeys(LAYERS, 200)


def test_a_base_on_another_file_system_can_be_copied(run: Run, other_device: Path) -> None:
    """Copying crosses devices."""
    run.steps.add(100)
    folder = run.save(200, due(L1), base=Run(other_device).save(100), carry="copy")
    assert run.origins(folder) == {L0: 100, L1: 200, L2: 100, HEAD: 100}


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a disk that the test can fill before it calls ``remount``; also root cannot write to it then."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_base_that_can_only_be_read_serves(run: Run, read_only_disk: Path) -> None:
    """Carrying changes nothing in the base: a copy needs no right to write there, and a link is tried in vain."""
    base = Run(read_only_disk).save(100)
    subprocess.run(["mount", "-o", "remount,ro", read_only_disk], check=True)
    run.steps.add(100)
    folder = run.save(200, due(L1), base=base, carry="copy")
    assert run.origins(folder) == {L0: 100, L1: 200, L2: 100, HEAD: 100}
    with heard_warnings() as said:
        folder = run.save(300, due(L1), base=base)
    assert len(said) == 1 and run.origins(folder) == dict.fromkeys(LAYERS, 300)


def test_a_folder_that_can_only_be_read_fails_the_save_and_nothing_else(run: Run, read_only_disk: Path) -> None:
    """The checkpoint there stays, and the next save elsewhere carries as if nothing had been tried."""
    full = Run(read_only_disk)
    full.save(100)
    subprocess.run(["mount", "-o", "remount,ro", read_only_disk], check=True)
    run.save(100)
    with pytest.raises(dcp.api.CheckpointException, match="Read-only file system"):
        full.save(101, to="step-100")
    assert run.origins(run.save(200, due(L1))) == {L0: 100, L1: 200, L2: 100, HEAD: 100}
    assert full.origins(100) == dict.fromkeys(LAYERS, 100)


# References -------------------------------------------------------------------------------


def test_a_reference_is_a_relative_path_and_no_file(run: Run) -> None:
    """Nothing is linked: ``../step-100/...`` names the bytes, which stock dcp.load follows."""
    (old,) = own_files(run.save(100, carry="reference"))
    folder = run.save(200, due(L1), carry="reference")
    (new,) = own_files(folder)
    assert named(folder) == {f"../step-100/{old.name}", new.name}
    assert files(folder) == {new.name}
    assert run.origins(folder) == {L0: 100, L1: 200, L2: 100, HEAD: 100}


def test_references_never_form_a_chain(run: Run) -> None:
    """Step 300 refers to step 100 itself, so the step in between may go if it holds nothing live."""
    run.save(100, carry="reference")
    run.save(200, due(L1), carry="reference")
    run.save(300, due(L1), carry="reference")
    assert {Path(name).parent.as_posix() for name in named(run.path(300))} == {"../step-100", "."}
    shutil.rmtree(run.path(200))
    assert run.origins(300) == {L0: 100, L1: 300, L2: 100, HEAD: 100}


def test_without_its_base_a_reference_cannot_be_loaded(run: Run) -> None:
    """As documented: whoever refers needs retention that knows of it."""
    run.save(100, carry="reference")
    run.save(200, due(L1), carry="reference")
    shutil.rmtree(run.path(100))
    with pytest.raises(dcp.api.CheckpointException):
        run.load(200)


def test_what_is_referred_to_must_still_be_there_at_the_commit(run: Run) -> None:
    """What other ranks have written may lie on disks of their own, out of sight, and is no reason to refuse."""
    (old,) = own_files(run.save(100, carry="reference"))
    folder = run.save(200, due(L1), carry="reference")
    (new,) = own_files(folder)
    told = metadata(folder)
    (folder / ".metadata").rename(folder / "kept")
    new.rename(folder / "elsewhere")
    check_there(told, folder)
    (folder / "kept").rename(folder / ".metadata")
    with pytest.raises(RemovedMeanwhileError, match="another save into"):  # which is committed, and has swept
        check_there(told, folder)
    (folder / "elsewhere").rename(new)
    check_there(told, folder)
    old.unlink()
    with pytest.raises(RemovedMeanwhileError, match="such as a prune"):
        check_there(told, folder)


def test_a_series_is_referred_to_over_two_levels(run: Run) -> None:
    """Accelerate's checkpoint-200/optimizer_0 refers to ../../checkpoint-100/optimizer_0."""
    run.save(100, to="checkpoint-100/optimizer_0", carry="reference")
    folder = run.save(200, due(L1), to="checkpoint-200/optimizer_0", carry="reference")
    assert {Path(name).parent.as_posix() for name in named(folder)} == {"../../checkpoint-100/optimizer_0", "."}
    assert run.origins(folder) == {L0: 100, L1: 200, L2: 100, HEAD: 100}


def test_references_stay_inside_the_run(tmp_path: Path) -> None:
    """A base of another run is not referred to, though the user names it: its units are written."""
    base = Run(tmp_path / "one").save(100)
    other = Run(tmp_path / "two")
    with heard_warnings() as said:
        folder = other.save(200, due(L1), base=base, carry="reference")
    assert len(said) == 1 and "inside the run" in said[0]
    assert other.origins(folder) == dict.fromkeys(LAYERS, 200)


def test_a_base_of_a_run_below_is_not_referred_to(tmp_path: Path) -> None:
    """That run does not look above itself before it removes what it saves again."""
    base = Run(tmp_path / "one" / "below").save(100)
    other = Run(tmp_path / "one")
    with heard_warnings() as said:
        folder = other.save(200, due(L1), base=base, carry="reference")
    assert len(said) == 1 and "inside the run" in said[0]
    assert other.origins(folder) == dict.fromkeys(LAYERS, 200)


def test_a_base_of_another_run_can_be_linked(tmp_path: Path) -> None:
    """A link needs nothing of the other run later, so fine-tuning may start from it."""
    base = Run(tmp_path / "one").save(100)
    other = Run(tmp_path / "two")
    other.steps.add(100)
    folder = other.save(200, due(L1), base=base)
    shutil.rmtree(tmp_path / "one")
    assert other.origins(folder) == {L0: 100, L1: 200, L2: 100, HEAD: 100}


def test_what_is_linked_can_be_referred_to_and_the_reverse(run: Run) -> None:
    """Modes may change from save to save: every path names a file that is there."""
    run.save(100)
    run.save(200, due(L1))
    run.save(300, due(L2), carry="reference")
    assert all((run.path(300) / name).exists() for name in named(run.path(300)))
    run.save(400, due(L2))
    for step in (100, 200, 300):
        shutil.rmtree(run.path(step))
    assert run.origins(400) == {L0: 100, L1: 200, L2: 400, HEAD: 100}


def test_a_reference_does_not_go_through_a_symbolic_link(run: Run) -> None:
    """Resumed from ``latest``, a save refers to step 100: tomorrow ``latest`` points elsewhere."""
    run.save(100)
    run.path("latest").symlink_to("step-100")
    run.load("latest")
    folder = run.save(200, due(L1), carry="reference")
    run.path("latest").unlink()
    assert run.origins(folder) == {L0: 100, L1: 200, L2: 100, HEAD: 100}


def test_a_folder_that_is_a_symbolic_link_refers_from_where_it_leads(run: Run, tmp_path: Path) -> None:
    """The kernel resolves ``..`` from the real folder, on another disk perhaps."""
    run.save(100)
    (tmp_path / "far" / "away").mkdir(parents=True)
    run.path(200).symlink_to(tmp_path / "far" / "away")
    folder = run.save(200, due(L1), carry="reference")
    assert run.origins(folder) == {L0: 100, L1: 200, L2: 100, HEAD: 100}


# Copies -----------------------------------------------------------------------------------


def test_a_copy_is_a_file_of_its_own(run: Run) -> None:
    """Another inode, the same bytes, loadable after the base is gone."""
    save_three(run, carry="copy")
    assert all(path.stat().st_nlink == 1 for path in run.folder.rglob("*.distcp"))
    assert contents(run.path(100)) | contents(run.path(200)) < contents(run.path(300))
    shutil.rmtree(run.path(100))
    shutil.rmtree(run.path(200))
    assert run.origins(300) == AFTER_THREE


def test_a_copy_that_is_cut_off_leaves_no_part(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while copying: the unit is due, and no half file keeps its name."""
    run.save(100)

    def refuse(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    with heard_warnings() as said:
        folder = run.save(200, due(L1), carry="copy")
    assert len(said) == 1 and "ENOSPC" in said[0]
    assert run.origins(folder) == dict.fromkeys(LAYERS, 200)
    assert not (folder / "carried").exists()


def test_where_the_kernel_cannot_copy_bytes_are_copied(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy_file_range between these file systems: reading and writing gives the same file."""
    run.save(100)

    def refuse(*args: Any) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    folder = run.save(200, due(L1), carry="copy")
    assert contents(run.path(100)) < contents(folder)


def test_a_stock_checkpoint_is_copied_when_named_as_base(run: Run) -> None:
    """A later stock save into that folder would write over its files in place: they are never shared."""
    base = run.stock(100)
    for mode in ("link", "reference", "copy"):
        folder = run.save(200, due(L1), to=f"{mode}/200", base=base, carry=mode)
        assert all(path.stat().st_nlink == 1 for path in folder.rglob("*.distcp"))
        assert not any(".." in name for name in named(folder))
    run.stock(101, to="step-100")
    for mode in ("link", "reference", "copy"):
        assert run.origins(run.path(f"{mode}/200")) == {L0: 100, L1: 200, L2: 100, HEAD: 100}


def test_a_stock_checkpoint_is_not_carried_from_unasked(run: Run) -> None:
    """After a stock load of a stock checkpoint the first save writes everything, the next one carries."""
    run.stock(100)
    run.load(100)
    assert run.origins(run.save(200, due(L1))) == dict.fromkeys(LAYERS, 200)
    assert run.origins(run.save(300, due(L1))) == {L0: 200, L1: 300, L2: 200, HEAD: 200}


# Untrusted names --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["link", "reference", "copy"])
@pytest.mark.parametrize("name", ["/etc/hostname", "../../../../../../../../etc/hostname", "out/hostname"])
def test_no_file_outside_the_bases_run_is_carried(tmp_path: Path, mode: Any, name: str) -> None:
    """A hostile path, a ``..`` too many, a symbolic link that leads out: none gets a name in the new folder."""
    base, target = tmp_path / "run" / "step-1", tmp_path / "run" / "step-2"
    base.mkdir(parents=True)
    target.mkdir()
    (base / "out").symlink_to("/etc")
    placed = place({name: Source("a" * 32, 1)}, locate(base), locate(target), mode)
    assert placed.paths == {} and placed.failures[name].errno == errno.EPERM
    assert files(target) == set()


@pytest.mark.parametrize("mode", ["link", "copy"])
@pytest.mark.parametrize("link", ["carried", f"carried/{'a' * 32}"])
def test_nothing_is_carried_through_a_link(tmp_path: Path, mode: Any, link: str) -> None:
    """Into a folder of the target's that leads out of it."""
    base, target, outside = tmp_path / "run" / "step-1", tmp_path / "run" / "step-2", tmp_path / "outside"
    for folder in (base, target, outside):
        folder.mkdir(parents=True)
    (base / "a.distcp").write_bytes(b"a")
    (target / link).parent.mkdir(exist_ok=True)
    (target / link).symlink_to(outside)
    placed = place({"a.distcp": Source("a" * 32, 1)}, locate(base), locate(target), mode)
    assert placed.paths == {} and "symbolic link" in str(placed.failures["a.distcp"])
    assert not list(outside.iterdir())


def test_a_save_id_that_is_a_path_is_not_used_as_one(tmp_path: Path) -> None:
    """The save id becomes a folder's name, whoever wrote it."""
    base, target = tmp_path / "run" / "step-1", tmp_path / "run" / "step-2"
    base.mkdir(parents=True)
    target.mkdir()
    (base / "data").write_bytes(b"x")
    placed = place({"data": Source("../../../evil", 1)}, locate(base), locate(target), "link")
    assert placed.paths == {} and set(tmp_path.rglob("evil")) == set()


def test_what_is_carried_is_not_written(run: Run) -> None:
    """The point of it all: the bytes of a carried unit are not in the new save's own file."""
    run.save(100)
    folder = run.save(200, due(L1))
    assert {key for key in written(folder) if "layers" in key or "lm_head" in key} == {
        f"model.{L1}.w",
        *(f"optim.state.{L1}.w.{kind}" for kind in ("exp_avg", "exp_avg_sq", "step")),
    }
