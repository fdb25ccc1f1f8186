"""Copying: the copy loads as the run did, and takes no more disk than the run does."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from typer.testing import CliRunner

from tailor_dcp.cli.copy import copy as command
from tailor_dcp.copying import CopyRefusedError, copy
from tailor_dcp.errors import NoCheckpointError, TailorError, TailorWarning
from tailor_dcp.materialize import materialize
from tailor_dcp.prune import prune
from tailor_dcp.runs import commits
from tailor_dcp.stores import place
from tailor_dcp.writer import LayerwiseWriter
from tests.support.forks import disk_use, killed_at
from tests.support.runs import L0, LAYERS, Run, due, named, record, unheard
from tests.support.world import flat, keys, state

pytestmark = pytest.mark.filterwarnings("ignore:Detected an existing checkpoint", "ignore::tailor_dcp.TailorWarning")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def fill(run: Run, carry: str, count: int = 4) -> None:
    run.save(100)
    for i in range(1, count):
        run.save(100 * (i + 1), due(LAYERS[i % 4]), carry=carry)


def held(run: Run) -> dict[str, dict[str, int]]:
    return {path.parent.name: run.steps_of(path.parent) for path in run.folder.glob("*/.metadata")}


def contents(run: Run) -> dict[Path, bytes]:
    return {p.relative_to(run.folder): p.read_bytes() for p in run.folder.rglob("*") if p.is_file()}


def moved(run: Run, folder: Path) -> Run:
    other = Run(folder)
    other.steps = run.steps
    return other


@settings(max_examples=6)
@given(
    saves=st.lists(
        st.tuples(st.sampled_from([100, 200, 300, 400]), st.sets(st.sampled_from(LAYERS)), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    pruned=st.booleans(),
    stop=st.integers(1, 30),
    verify=st.booleans(),
)
def test_the_copy_holds_the_same_and_takes_as_much(
    saves: list[tuple[int, set[str], bool]], pruned: bool, stop: int, verify: bool
) -> None:
    """Any saves, by links and by references; pruned or not; cut off anywhere and continued."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run")
        for step, layers, link in saves:
            run.save(step, due(*layers), carry="link" if link else "reference")
        if pruned:
            prune(run.folder, keep_last=2)
        before, other = held(run), moved(run, Path(folder) / "elsewhere" / "run")
        if killed_at(stop, other.folder, lambda: copy(run.folder, other.folder)):
            assert held(other).items() <= before.items()
        done = copy(run.folder, other.folder, verify=verify)
        assert disk_use(other.folder) == disk_use(run.folder) == done.bytes
        assert [c.folder.name for c in commits(other.folder)] == [c.folder.name for c in commits(run.folder)]
        shutil.rmtree(run.folder)
        assert held(other) == before
        assert not [path for path in other.folder.rglob("*") if path.name.endswith(".copying")]


def test_killed_at_any_change_it_is_continued(run: Run, tmp_path: Path) -> None:
    """Every moment, one after the other, each going on from where the last was cut off or from the start."""
    fill(run, "link", 2)
    before, n, killed = held(run), 1, True
    while killed:
        other = moved(run, tmp_path / f"copy{n}")
        killed = killed_at(n, other.folder, lambda: copy(run.folder, other.folder))  # noqa: B023 - called at once
        assert held(other).items() <= before.items()
        done = copy(run.folder, other.folder)
        assert contents(other) == contents(run)
        assert disk_use(other.folder) == disk_use(run.folder)
        shutil.rmtree(other.folder)
        n += 1
    assert n > 6, "too few moments were tried"
    assert done.copied == done.linked == 0


def test_it_tells_what_it_saved(run: Run, tmp_path: Path) -> None:
    """Bytes copied, and what copying each name for itself would have cost."""
    fill(run, "link")
    done = copy(run.folder, tmp_path / "copy")
    assert done.copied == done.bytes == disk_use(run.folder)
    assert done.naive == sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
    assert done.naive > done.copied
    again = copy(run.folder, tmp_path / "copy")
    assert (again.copied, again.linked) == (0, 0)


def test_the_times_of_stock_checkpoints_stay(run: Run, tmp_path: Path) -> None:
    """When they were saved is told by the times of their ``.metadata`` alone."""
    for step in (200, 100):
        os.utime(run.stock(step) / ".metadata", (1000 - step, 1000 - step))
    copy(run.folder, tmp_path / "copy")
    assert {one.step: one.time for one in commits(tmp_path / "copy")} == {100: 900, 200: 800}


def test_training_goes_on_in_the_copy(run: Run, tmp_path: Path) -> None:
    """A save in the copied run carries from the copied checkpoint."""
    fill(run, "reference")
    other = moved(run, tmp_path / "copy")
    copy(run.folder, other.folder)
    shutil.rmtree(run.folder)
    other.load(400)
    before = other.origins(400)
    other.save(500, due(L0), carry="reference")
    assert other.origins(500) == {**before, L0: 500}


def test_one_checkpoint(run: Run, tmp_path: Path) -> None:
    """A folder with links is complete by itself; one with references needs its run, which is said."""
    fill(run, "link")
    before = run.steps_of(400)
    copy(run.path(400), tmp_path / "one")
    assert run.steps_of(tmp_path / "one") == before
    run.save(500, carry="reference")
    with pytest.raises(CopyRefusedError, match="tailor materialize"):
        copy(run.path(500), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_symbolic_links_and_other_files(run: Run, tmp_path: Path) -> None:
    """They come along; a link into the run leads into the copy."""
    fill(run, "link", 2)
    (run.folder / "best").symlink_to("step-100")
    (run.folder / "newest").symlink_to(run.path(200).absolute())
    (run.folder / "log.txt").write_text("one")
    copy(run.folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "best").readlink() == Path("step-100")
    assert (tmp_path / "copy" / "newest").resolve() == tmp_path / "copy" / "step-200"
    (run.folder / "log.txt").write_text("one two")
    copy(run.folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "log.txt").read_text() == "one two"


def test_verify_finds_what_size_and_time_do_not_tell(run: Run, tmp_path: Path) -> None:
    """A byte that changed at the destination is set right."""
    fill(run, "link", 2)
    copy(run.folder, tmp_path / "copy")
    path = next((tmp_path / "copy" / "step-100").glob("*.distcp"))
    good, status = path.read_bytes(), path.stat()
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert copy(run.folder, tmp_path / "copy").copied == 0
    assert copy(run.folder, tmp_path / "copy", verify=True).copied == len(good)
    assert path.read_bytes() == good
    assert disk_use(tmp_path / "copy") == disk_use(run.folder)


def test_a_file_system_without_links(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the bytes are copied again, and everything loads."""
    fill(run, "link", 3)

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    done = copy(run.folder, tmp_path / "copy")
    assert done.copied == done.naive
    assert held(moved(run, tmp_path / "copy")) == held(run)


@pytest.mark.parametrize("what", ["foreign", "other run", "file", "inside", "around"])
def test_what_is_refused(run: Run, tmp_path: Path, what: str) -> None:
    """Nothing is written over that an earlier copy has not left."""
    fill(run, "link", 2)
    target = tmp_path / "copy"
    if what == "foreign":
        target.mkdir()
        (target / "thesis.tex").write_text("years")
    elif what == "other run":
        Run(target).stock(100)
    elif what == "file":
        target.write_text("")
    elif what == "inside":
        target = run.folder / "copy"
    else:
        target = tmp_path
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CopyRefusedError):
        copy(run.folder, target)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(NoCheckpointError):
        copy(tmp_path / "nothing", target)


def test_a_file_that_is_there_although_it_is_said_to_be_gone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared file system may show it late: a copy without it would look like a checkpoint."""
    fill(run, "link")
    missed, asked = next(run.path(200).glob("*.distcp")), Path.lstat

    def answer(path: Path) -> os.stat_result:
        if path == missed:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return asked(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "lstat", answer)
        with pytest.raises(TailorError, match=missed.name):
            copy(run.folder, tmp_path / "copy")
    assert not list(tmp_path.glob("copy/*/.metadata"))
    copy(run.folder, tmp_path / "copy")
    assert held(moved(run, tmp_path / "copy")) == held(run)


def test_an_unreadable_checkpoint_is_copied_as_it_is(run: Run, tmp_path: Path) -> None:
    """Nobody can tell what it needs, so a warning says so."""
    fill(run, "link", 2)
    (run.path(100) / ".metadata").write_bytes(b"garbage")
    with pytest.warns(TailorWarning, match="copied as it is"):
        copy(run.folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "step-100" / ".metadata").read_bytes() == b"garbage"


def test_what_is_no_file_is_left_out(run: Run, tmp_path: Path) -> None:
    """A pipe for a ``.metadata``, of which a warning tells, or for anything else: a reader would wait for ever."""
    fill(run, "link", 2)
    (run.path(100) / ".metadata").unlink()
    os.mkfifo(run.path(100) / ".metadata")
    os.mkfifo(run.path(200) / "log")
    with pytest.warns(TailorWarning, match="not a regular file"):
        copy(run.folder, tmp_path / "copy")
    assert not (tmp_path / "copy" / "step-100" / ".metadata").exists()
    assert not (tmp_path / "copy" / "step-200" / "log").exists()
    assert (tmp_path / "copy" / "step-200" / ".metadata").exists()


def test_holes_stay_holes(run: Run, tmp_path: Path) -> None:
    """A file that says it has a terabyte takes no longer to copy than the bytes that it has, and no more room."""
    fill(run, "link", 1)
    with (run.path(100) / "sparse").open("wb") as stream:
        stream.write(b"begin")
        stream.seek(1 << 39)
        stream.write(b"middle")
        stream.truncate(1 << 40)
    told: list[tuple[int, int]] = []
    copy(run.folder, tmp_path / "copy", progress=lambda done, total: told.append((done, total)))
    new = tmp_path / "copy" / "step-100" / "sparse"
    assert new.stat().st_size == 1 << 40
    assert new.stat().st_blocks * 512 < 1 << 20
    with new.open("rb") as stream:
        assert stream.read(6) == b"begin\0"
        stream.seek(1 << 39)
        assert stream.read(7) == b"middle\0"
    assert told[-1][0] == told[-1][1] > 1 << 40
    assert copy(run.folder, tmp_path / "copy").copied == 0


def stock_steps(run: Run, url: str) -> dict[str, int]:
    """Return what each tensor's step is as DCP's own reader for stores loads it."""
    target = state(run.model, 0, None, empty=True)
    with unheard():
        dcp.load(target, storage_reader=FsspecReader(url))
    got = flat(target)
    return {key: run._step(key, *known, got[key]) for key, known in keys(run.model).items()}


@pytest.mark.parametrize(
    ("store", "carry"), [("memory", "link"), ("memory", "reference"), ("s3", "link")], indirect=["store"]
)
def test_to_a_store_and_back(run: Run, tmp_path: Path, store: str, carry: str) -> None:
    """Stock DCP loads every checkpoint there and here, no byte is stored twice, and a second call copies nothing."""
    run.save(100, writer=LayerwiseWriter)
    for step, layer in ((200, LAYERS[1]), (300, LAYERS[2]), (400, LAYERS[3])):
        run.save(step, due(layer), carry=carry, writer=LayerwiseWriter)
    before, size = held(run), disk_use(run.folder)
    there = copy(run.folder, store)
    data = sum(path.stat().st_size for path in place(store).rglob("*.distcp"))
    assert data == sum({p.stat().st_ino: p.stat().st_size for p in run.folder.rglob("*.distcp")}.values())
    assert there.bytes == there.copied == size
    assert {name: stock_steps(run, f"{store}/{name}") for name in before} == before
    assert copy(run.folder, store).skipped == len(list(place(store).rglob("*.distcp")))
    elsewhere = store.replace("/run", "/moved/run")
    copy(store, elsewhere)
    for path in list(place(store).rglob("*")):
        path.unlink()
    assert {name: stock_steps(run, f"{elsewhere}/{name}") for name in before} == before
    shutil.rmtree(run.folder)
    copy(elsewhere, tmp_path / "back")
    back = moved(run, tmp_path / "back")
    assert held(back) == before
    assert [c.folder.name for c in commits(back.folder)] == ["step-100", "step-200", "step-300", "step-400"]
    assert sum(p.stat().st_size for p in back.folder.rglob("*.distcp")) == data
    assert record(back.path(400))["crcs"].keys() == named(back.path(400)), "checksums were lost on the way"
    made = materialize(back.path(400), tmp_path / "whole")
    assert made.checked == made.blobs
    prune(back.folder, keep_last=1)
    assert back.steps_of(400) == before["step-400"]


def test_what_is_refused_in_a_store(run: Run, tmp_path: Path, store: str) -> None:
    """Something else that is there; a checkpoint without the run that it refers to."""
    fill(run, "reference", 2)
    place(f"{store}/thesis.tex").write_bytes(b"years")
    with pytest.raises(CopyRefusedError, match=r"thesis\.tex is not of"):
        copy(run.folder, store)
    with pytest.raises(CopyRefusedError, match="tailor materialize"):
        copy(run.path(200), f"{store}/other")
    assert [path.name for path in place(store).rglob("*")] == ["thesis.tex"]
    with pytest.raises(NoCheckpointError):
        copy(f"{store}/nothing", tmp_path / "copy")


def test_the_command(run: Run, tmp_path: Path) -> None:
    """A sentence for people, JSON for machines."""
    app = typer.Typer()
    app.command()(command)
    fill(run, "link")
    shown = CliRunner().invoke(app, [str(run.folder), str(tmp_path / "copy")])
    assert shown.exit_code == 0, shown.output
    assert "would take" in shown.stdout
    told = json.loads(CliRunner().invoke(app, [str(run.folder), str(tmp_path / "copy"), "--json"]).stdout)
    assert told["copied"] == 0
    assert told["skipped"] > 0
