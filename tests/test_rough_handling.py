"""Rough handling: what people and their tools do to checkpoints, what happens then, and who notices it.

The table in ``docs/format.md`` says the same in words.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from tailor_dcp import LayerwisePlanner, LayerwiseReader, LayerwiseWriter, inspect, verify
from tailor_dcp.errors import LoadError
from tests.golden import write
from tests.support.forks import disk_use

pytestmark = pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")  # that is what is tried
STEPS = (10, 20, 30)
Values = dict[str, Any]
Expected = dict[Path, Values]


@pytest.fixture(params=["layerwise", "stock"])
def writer(request: pytest.FixtureRequest) -> str:
    """Our writer, or torch's own, under our planner."""
    return str(request.param)


@pytest.fixture
def saved(tmp_path: Path, writer: str) -> Expected:
    """What each checkpoint of a run holds, whose layers were written in turn and linked."""
    return save_run(tmp_path / "run", "link", writer)


@pytest.fixture
def referring(tmp_path: Path, writer: str) -> Expected:
    """The same, but the later checkpoints refer to files of the earlier ones."""
    return save_run(tmp_path / "run", "reference", writer)


def save_run(run: Path, carry: Any, writer: str) -> Expected:
    """Save three times; return what stock torch loads, which is right now, before anything happens."""
    for step in STEPS:
        folder = run / f"step-{step}"
        to = LayerwiseWriter(folder) if writer == "layerwise" else dcp.FileSystemWriter(folder)
        dcp.save(
            write.train_state(step), storage_writer=to, planner=LayerwisePlanner("parity", carry=carry), no_dist=True
        )
    expected = {run / f"step-{step}": stock(run / f"step-{step}") for step in STEPS}
    assert all(verify(folder).state == "good" for folder in expected)
    return expected


def stock(folder: Path) -> Values:
    """Load with torch alone."""
    state = write.blank(write.flat(write.train_state(1)))
    write.stock_load(state, folder)
    return state


def ours(folder: Path, **options: Any) -> Values:
    """Load with our reader. A load that fails must not have touched a tensor."""
    state = write.blank(write.flat(write.train_state(1)))
    try:
        dcp.load(state, storage_reader=LayerwiseReader(folder, **options), no_dist=True)
    except CheckpointException as error:
        before = write.blank(state)
        assert all(write.same(state[key], before[key]) for key in state if isinstance(state[key], torch.Tensor))
        raise next(iter(error.failures.values()))[0] from None
    return state


def equal(found: Values, expected: Values) -> bool:
    """Tell whether all values are the same, bit for bit."""
    return found.keys() == expected.keys() and all(write.same(found[key], expected[key]) for key in expected)


def carried_file(folder: Path) -> Path:
    """Return the largest file that a checkpoint has from an earlier one."""
    return max((path for path in (folder / "carried").rglob("*.distcp")), key=lambda path: path.stat().st_size)


# Stock code saves into an old folder ---------------------------------------------------------


@pytest.mark.parametrize("carry", ["link", "reference"])
def test_stock_code_saves_into_an_old_folder(tmp_path: Path, writer: str, carry: str) -> None:
    """That folder becomes the new checkpoint, and all others load what they did."""
    saved = save_run(tmp_path / "run", carry, writer)
    oldest, *others = saved
    dcp.save(write.train_state(99), checkpoint_id=oldest, no_dist=True)
    assert equal(stock(oldest), write.flat(write.train_state(99)))
    assert equal(ours(oldest), write.flat(write.train_state(99)))
    assert inspect(oldest).policy is None
    for folder in others:
        assert equal(stock(folder), saved[folder])
        assert equal(ours(folder, verify=True), saved[folder])
    found = verify(tmp_path / "run")
    assert {verdict.name: verdict.state for verdict in found.checkpoints} == {
        "step-10": "unverifiable",  # stock metadata has no checksum
        "step-20": "good",
        "step-30": "good",
    }
    assert any("step-10 was saved again since step-20 carried from it" in note for note in found.notes)


def test_stock_code_saves_twice_over_what_stock_code_saved(tmp_path: Path) -> None:
    """Its files have the same names each time, so nothing of them may be linked to: what is carried is a copy."""
    run = tmp_path / "run"
    dcp.save(write.train_state(10), checkpoint_id=run / "step-10", no_dist=True)
    planner = LayerwisePlanner(lambda request: (), base=run / "step-10")
    dcp.save(write.train_state(20), checkpoint_id=run / "step-20", planner=planner, no_dist=True)
    before = stock(run / "step-20")
    assert write.same(before["model.embed.weight"], write.train_state(10)["model"]["embed.weight"])
    dcp.save(write.train_state(99), checkpoint_id=run / "step-10", no_dist=True)
    assert equal(stock(run / "step-20"), before)
    assert verify(run / "step-20").state == "good"


def test_stock_code_saves_into_the_newest_folder(saved: Expected) -> None:
    """The next save of the training that made that checkpoint finds another one there, and carries nothing from it."""
    newest = list(saved)[-1]
    dcp.save(write.train_state(99), checkpoint_id=newest, no_dist=True)
    for folder in list(saved)[:-1]:
        assert equal(stock(folder), saved[folder])
    assert equal(stock(newest), write.flat(write.train_state(99)))
    left = {path.name for path in newest.rglob("*.distcp")}
    assert {"__0_0.distcp"} < left  # what was there before stays until somebody removes it
    assert verify(newest.parent).damaged == ()


# Copies that lose links -----------------------------------------------------------------------


def rsync(source: Path, target: Path) -> None:
    """Copy as ``rsync -a``, which does not keep hard links."""
    if shutil.which("rsync") is None:
        pytest.skip("rsync is not installed; cp --no-preserve=links does the same and is tried in any case")
    subprocess.run(["rsync", "-a", f"{source}/", f"{target}/"], check=True)


def rsync_links(source: Path, target: Path) -> None:
    """Copy as ``rsync -aH``, which keeps them."""
    if shutil.which("rsync") is None:
        pytest.skip("rsync is not installed; cp -a does the same and is tried in any case")
    subprocess.run(["rsync", "-aH", f"{source}/", f"{target}/"], check=True)


def cp(*options: str) -> Callable[[Path, Path], None]:
    """Copy as ``cp`` does with some options."""
    return lambda source, target: void(subprocess.run(["cp", *options, source, target], check=True))


def void(_: object) -> None:
    """Return nothing."""


LOSING = {"cp -r": cp("-r"), "cp -a --no-preserve=links": cp("-a", "--no-preserve=links"), "rsync -a": rsync}
KEEPING = {"cp -a": cp("-a"), "rsync -aH": rsync_links}


@pytest.mark.parametrize("how", LOSING)
def test_a_run_is_copied_without_its_links(saved: Expected, tmp_path: Path, how: str) -> None:
    """Every checkpoint loads what it did; the copy is larger by what was shared, and verify says so."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    LOSING[how](run, copy)
    for folder, values in saved.items():
        assert equal(stock(copy / folder.name), values)
        assert equal(ours(copy / folder.name, verify=True), values)
    shared = sum(path.stat().st_size for path in run.rglob("carried/*/*"))
    assert shared
    assert disk_use(copy) == disk_use(run) + shared
    found = verify(copy)
    assert found.state == "good"
    assert found.notes
    assert verify(run).notes == ()


@pytest.mark.parametrize("how", KEEPING)
def test_a_run_is_copied_with_its_links(saved: Expected, tmp_path: Path, how: str) -> None:
    """Nothing is larger, and there is nothing to say."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    KEEPING[how](run, copy)
    assert disk_use(copy) == disk_use(run)
    assert all(equal(stock(copy / folder.name), values) for folder, values in saved.items())
    assert verify(copy).notes == ()


@pytest.mark.parametrize("how", [*LOSING, *KEEPING])
def test_one_checkpoint_is_copied(saved: Expected, tmp_path: Path, how: str) -> None:
    """It has all that it needs, and is as large as it was."""
    (tmp_path / "elsewhere").mkdir()
    for folder, values in saved.items():
        copy = tmp_path / "elsewhere" / folder.name
        {**LOSING, **KEEPING}[how](folder, copy)
        assert equal(stock(copy), values)
        assert equal(ours(copy, verify=True), values)
        assert disk_use(copy) == disk_use(folder)
        assert verify(copy).state == "good"


# A file system that loses links ---------------------------------------------------------------


def gone(path: Path) -> None:
    """Lose a file."""
    path.unlink()


def emptied(path: Path) -> None:
    """Leave its name, but nothing in it; by another inode, as the other names keep theirs."""
    path.unlink()
    path.touch()


def cut(path: Path) -> None:
    """Leave half of it."""
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.unlink()
    path.write_bytes(half)


@pytest.mark.parametrize("harm", [gone, emptied, cut])
def test_a_carried_file_is_lost(saved: Expected, harm: Callable[[Path], None]) -> None:
    """Loads fail, ours with a sentence before any tensor is touched; verify names the file; all others are well."""
    newest = list(saved)[-1]
    lost = carried_file(newest)
    name = lost.relative_to(newest).as_posix()
    harm(lost)
    with pytest.raises(CheckpointException):
        stock(newest)
    with pytest.raises(LoadError, match=re.escape(lost.name)) as told:
        ours(newest)
    assert re.search(r"layers\.\d|embed|lm_head", str(told.value))
    assert any(name in missing for missing in inspect(newest).missing)
    found = verify(newest)
    assert found.state == "damaged"
    assert {finding.file for finding in found.damaged} == {name}
    for folder in list(saved)[:-1]:
        assert equal(stock(folder), saved[folder])
    states = {verdict.name: verdict.state for verdict in verify(newest.parent).checkpoints}
    assert states == {"step-10": "good", "step-20": "good", "step-30": "damaged"}


def other_values(path: Path) -> None:
    """Put another file in its place, as long as it was, whose tensors have other values."""
    data = bytearray(path.read_bytes())
    name = data.find(b"/data/0")
    header = data.rfind(b"PK\x03\x04", 0, name)
    extra = int.from_bytes(data[header + 28 : header + 30], "little")
    data[name + len(b"/data/0") + extra + 3] ^= 0x02  # in the exponent of the first number
    path.unlink()
    path.write_bytes(data)


def test_a_carried_file_is_replaced_by_another(saved: Expected) -> None:
    """Torch loads it without a word; verify and a load that verifies tell."""
    newest = list(saved)[-1]
    lost = carried_file(newest)
    other_values(lost)
    assert not equal(stock(newest), saved[newest])
    with pytest.raises(LoadError, match=re.escape(lost.name)):
        ours(newest, verify=True)
    found = verify(newest)
    assert found.state == "damaged"
    assert {finding.file for finding in found.damaged} == {lost.relative_to(newest).as_posix()}
    for folder in list(saved)[:-1]:
        assert equal(stock(folder), saved[folder])


def test_a_carried_file_is_another_inode_of_the_same_bytes(saved: Expected) -> None:
    """As backups restore it: it takes room of its own, and is right."""
    newest = list(saved)[-1]
    again = carried_file(newest)
    data = again.read_bytes()
    again.unlink()
    again.write_bytes(data)
    assert equal(stock(newest), saved[newest])
    found = verify(newest.parent)
    assert found.state == "good"
    assert found.notes


def test_the_metadata_is_lost(saved: Expected) -> None:
    """Then it is no checkpoint; those that carry from it are."""
    oldest, *others = saved
    (oldest / ".metadata").unlink()
    with pytest.raises(CheckpointException):
        stock(oldest)
    for folder in others:
        assert equal(stock(folder), saved[folder])
    assert {verdict.name for verdict in verify(oldest.parent).checkpoints} == {"step-20", "step-30"}


# Folders that are moved or renamed --------------------------------------------------------------


@pytest.mark.parametrize("name", ["best", "step-30", "step-7"])
def test_a_linked_checkpoint_is_moved_alone(saved: Expected, tmp_path: Path, name: str) -> None:
    """It has all that it needs, whatever it is called."""
    newest = list(saved)[-1]
    moved = tmp_path / "elsewhere" / name
    moved.parent.mkdir()
    newest.rename(moved)
    assert equal(stock(moved), saved[newest])
    assert equal(ours(moved, verify=True), saved[newest])
    assert inspect(moved).step == 30  # the record tells, not the name
    found = verify(moved)
    assert found.state == "good"
    assert any("renamed" in note for note in found.notes) is (name != newest.name)


def test_a_referring_checkpoint_is_moved_alone(referring: Expected, tmp_path: Path) -> None:
    """It lacks what it refers to: torch fails, ours says which file it wants, verify calls it damaged."""
    newest = list(referring)[-1]
    moved = tmp_path / "elsewhere" / newest.name
    moved.parent.mkdir()
    newest.rename(moved)
    with pytest.raises(CheckpointException):
        stock(moved)
    with pytest.raises(LoadError, match=r"step-[12]0.*\.distcp"):
        ours(moved)
    assert inspect(moved).missing
    assert verify(moved).state == "damaged"


def test_what_is_referred_to_is_renamed(referring: Expected) -> None:
    """The checkpoints that refer to it fail, and verify names what they want; itself it is well."""
    oldest, *_ = referring
    renamed = oldest.rename(oldest.with_name("first"))
    assert equal(stock(renamed), referring[oldest])
    states = {verdict.name: verdict.state for verdict in verify(renamed.parent).checkpoints}
    assert states["first"] == "good"
    assert states["step-20"] == "damaged"
    with pytest.raises(LoadError, match=r"step-10.*\.distcp"):
        ours(renamed.with_name("step-20"))


def test_a_run_that_refers_is_moved_or_copied_as_a_whole(referring: Expected, tmp_path: Path) -> None:
    """Its paths are relative, so nothing is lost."""
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "run").rename(tmp_path / "moved")
    for root in (tmp_path / "copy", tmp_path / "moved"):
        assert all(equal(stock(root / folder.name), values) for folder, values in referring.items())
        assert verify(root).state == "good"


# File systems that have other ideas of names ------------------------------------------------------


@pytest.mark.parametrize("carry", ["link", "copy", "reference"])
def test_names_survive_every_file_system(tmp_path: Path, writer: str, carry: Any) -> None:
    """Keys may be any text; our names are ASCII, in lower case, and stay apart where case or accents do not count."""
    run = tmp_path / "run"
    for step in STEPS:
        state = write.train_state(step)
        state["model"] = {f"é.{name}.Ä": value for name, value in state["model"].items()}
        folder = run / f"step-{step}"
        to = LayerwiseWriter(folder) if writer == "layerwise" else dcp.FileSystemWriter(folder)
        dcp.save(state, storage_writer=to, planner=LayerwisePlanner("parity", carry=carry), no_dist=True)
    for folder, _, files in os.walk(run):
        for name in files:
            assert re.fullmatch(r"\.metadata|__0_[0-9a-f]{8}_\d+\.distcp", name), name
        assert re.fullmatch(r"run|step-\d+|carried|[0-9a-f]{32}", Path(folder).name)
        assert len({unicodedata.normalize("NFD", name).casefold() for name in files}) == len(files)
