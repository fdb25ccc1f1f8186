"""Materializing: a copy that needs no other folder, equals the original, and is there as a whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tailor_dcp import input_files, layout, new_folder
from tailor_dcp.cli.materialize import materialize as command
from tailor_dcp.errors import NoCheckpointError, UnreadableMetadataError
from tailor_dcp.inspection import inspect
from tailor_dcp.materialize import DamagedCheckpointError, MaterializeError, materialize
from tailor_dcp.metadata.safe_pickle import read
from tailor_dcp.stores import place
from tailor_dcp.writer import LayerwiseWriter
from tests.support.forks import killed_at
from tests.support.runs import HEAD, L0, L1, L2, LAYERS, Run, due, files, metadata, named, record, unheard
from tests.support.world import flat

pytestmark = pytest.mark.filterwarnings("ignore:Detected an existing checkpoint", "ignore::tailor_dcp.TailorWarning")

WRITERS: dict[str, Any] = {
    "layerwise": partial(LayerwiseWriter, thread_count=1),
    "stock": partial(torch.distributed.checkpoint.FileSystemWriter, thread_count=1),
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def composite(run: Run, carry: str = "link", writer: str = "layerwise") -> Path:
    """Save everything, then layer 1, then layer 2."""
    run.save(100, carry=carry, writer=WRITERS[writer])
    run.save(200, due(L1), carry=carry, writer=WRITERS[writer])
    return run.save(300, due(L2), carry=carry, writer=WRITERS[writer])


def loaded(run: Run, folder: Path) -> dict[str, Any]:
    with unheard():
        return run.load(folder)


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(x, b[key]) if isinstance(x, torch.Tensor) else x == b[key] for key, x in a.items()
    )


@settings(max_examples=6)
@given(
    saves=st.lists(st.sets(st.sampled_from(LAYERS)), min_size=1, max_size=4),
    carry=st.sampled_from(["link", "reference", "copy"]),
    writer=st.sampled_from(sorted(WRITERS)),
    verify=st.booleans(),
    largest=st.sampled_from([1, 4000, 1 << 30]),
)
def test_it_equals_the_original_when_the_run_is_gone(
    tmp_path_factory: pytest.TempPathFactory,
    saves: list[set[str]],
    carry: str,
    writer: str,
    verify: bool,
    largest: int,
) -> None:
    """Any composite, any way of carrying, any size of files; loaded with stock torch."""
    folder = tmp_path_factory.mktemp("property")
    run = Run(folder / "run")
    for n, layers in enumerate(saves):
        last = run.save(n, due(*layers), carry=carry, writer=WRITERS[writer])
    before, live = loaded(run, last), inspect(last).live
    listed = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    made = materialize(last, folder / "out", verify=verify, largest_file=largest)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == listed
    shutil.rmtree(run.folder)
    assert equal(loaded(run, folder / "out"), before)
    assert named(folder / "out") == files(folder / "out")
    assert made.bytes == live == sum((folder / "out" / name).stat().st_size for name in files(folder / "out"))
    assert made.files == len(files(folder / "out"))
    if largest > 1:
        assert all((folder / "out" / name).stat().st_size <= max(largest, 4000) for name in files(folder / "out"))


def test_it_is_a_save_of_its_own_that_remembers(run: Run, tmp_path: Path) -> None:
    """A plain ``Metadata`` with a new save id, the origins, the step and the training state."""
    source = composite(run)
    out = tmp_path / "out"
    materialize(source, out)
    old, new = record(source), record(out)
    assert type(metadata(out)).__name__ == "Metadata"
    assert new["save_id"] != old["save_id"]
    assert (new["step"], new["index"], new["time"]) == (old["step"], old["index"], old["time"])
    assert (new["origins"], new["units"], new["policy"]) == (old["origins"], old["units"], old["policy"])
    assert (new["ties"], new["narrowed"], new["fingerprints"]) == (old["ties"], old["narrowed"], old["fingerprints"])
    assert (new["carry"], new["parent"][0]) == ("copy", old["save_id"])
    assert metadata(out).planner_data == metadata(source).planner_data
    assert list(metadata(out).state_dict_metadata) == list(metadata(source).state_dict_metadata)
    assert all(name.startswith(f"__0_{new['save_id'][:8]}_") for name in files(out))
    assert loaded(run, out)["train.step"] == 300


def test_stock_loads_it_without_this_package(run: Run, tmp_path: Path, stock_fleet: Any) -> None:
    """In a process where importing tailor_dcp fails, on two ranks."""
    source = composite(run, "reference")
    before = loaded(run, source)
    materialize(source, tmp_path / "out")
    shutil.rmtree(run.folder)
    for got in stock_fleet.call("tests.support.world:load", run.model, str(tmp_path / "out")):
        assert equal(got, before)


def test_it_can_be_carried_from(run: Run, tmp_path: Path) -> None:
    """In a run of its own it is a base as any other."""
    source = composite(run)
    other = Run(tmp_path / "other")
    other.steps = run.steps
    materialize(source, other.path(300))
    other.load(300)
    folder = other.save(400, due(L0))
    shutil.rmtree(run.folder)
    shutil.rmtree(other.path(300))
    assert other.origins(folder) == {L0: 400, L1: 200, L2: 300, HEAD: 100}


def test_a_stock_checkpoint(run: Run, tmp_path: Path) -> None:
    """What torch alone saved gets checksums and a record."""
    source = run.stock(100)
    before = loaded(run, source)
    made = materialize(source, tmp_path / "out")
    assert made.checked == made.blobs > 0, "torch's own checksums were not compared"
    assert equal(loaded(run, tmp_path / "out"), before)
    checked = materialize(tmp_path / "out", tmp_path / "again")
    assert checked.checked == checked.blobs > 0


def test_checksums_travel(run: Run, tmp_path: Path) -> None:
    """A copy of a copy, without looking, has the checksums that its bytes really have."""
    source = composite(run)
    made = materialize(source, tmp_path / "a", verify=False)
    assert made.checked == 0
    again = materialize(tmp_path / "a", tmp_path / "b")
    assert again.checked == again.blobs == made.blobs


# Damage -----------------------------------------------------------------------------------


def test_a_changed_byte_is_found(run: Run, tmp_path: Path) -> None:
    """The sentence names the file, the key and a way out; nothing stays."""
    source = composite(run)
    info = next(info for index, info in metadata(source).storage_data.items() if index.fqn == "model.lm_head.w")
    path = source / info.relative_path
    with path.open("r+b") as stream:
        stream.seek(info.offset + info.length // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DamagedCheckpointError, match=r"model\.lm_head\.w.*merge that layer") as error:
        materialize(source, tmp_path / "out")
    assert error.value.exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_missing_and_a_short_file(run: Run, tmp_path: Path) -> None:
    """Both are named."""
    source = composite(run)
    (own,) = (
        path
        for path in source.glob("*.distcp")
        if path.stat().st_size == max(p.stat().st_size for p in source.glob("*.distcp"))
    )
    content = own.read_bytes()
    own.write_bytes(content[:-1])
    for verify in (True, False):
        with pytest.raises(DamagedCheckpointError, match="it ends at byte"):
            materialize(source, tmp_path / "out", verify=verify)
    own.unlink()
    with pytest.raises(DamagedCheckpointError, match="missing"):
        materialize(source, tmp_path / "out")


def rewrite(folder: Path, change: Any) -> None:
    held = metadata(folder)
    change(list(held.storage_data.values()))
    (folder / ".metadata").write_bytes(pickle.dumps(held))


def test_hostile_metadata(run: Run, tmp_path: Path) -> None:
    """Files outside of the run, and one stretch of bytes used many times over, are refused."""
    (tmp_path / "secret").write_bytes(b"s" * 100000)
    source = run.save(100)

    def outside(infos: list[Any]) -> None:
        infos[0].relative_path = "../../secret"

    def bomb(infos: list[Any]) -> None:
        for n, info in enumerate(infos):
            info.offset, info.length = n, 4000

    original = (source / ".metadata").read_bytes()
    for change, words in ((outside, "outside of the run"), (bomb, "same bytes")):
        (source / ".metadata").write_bytes(original)
        rewrite(source, change)
        with pytest.raises(UnreadableMetadataError, match=words):
            materialize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_refused(run: Run, tmp_path: Path) -> None:
    """An ``out`` that exists, even empty or a dangling link; what is no checkpoint; what cannot be written."""
    source = run.save(100)
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for out in ("out", "link"):
        with pytest.raises(MaterializeError, match="exists already"):
            materialize(source, tmp_path / out)
    with pytest.raises(NoCheckpointError):
        materialize(run.folder, tmp_path / "new")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MaterializeError, match="cannot be written"):
        materialize(source, tmp_path / "file" / "out")


# Killed -----------------------------------------------------------------------------------


def test_killed_at_any_change_it_is_absent_or_whole(run: Run, tmp_path: Path) -> None:
    """What is left under the name is complete; the same call again then succeeds."""
    source = composite(run)
    before, out = loaded(run, source), tmp_path / "out"
    n = 1
    while killed_at(n, tmp_path, lambda: materialize(source, out, largest_file=3000)):
        for path in tmp_path.glob("*out*/.metadata"):
            assert equal(loaded(run, path.parent), before)
        if out.exists():  # all that was left to do was to remove the lock
            break
        n += 1
    assert n > 6, "too few moments were tried"
    assert equal(loaded(run, out), before)
    left = {path.name for path in tmp_path.iterdir()} - {"out", "run"}
    assert left <= {".out.materialize.lock"}
    shutil.rmtree(out)
    materialize(source, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


# Several ranks ----------------------------------------------------------------------------


def materialize_with(group: Any, source: str, out: str, failing: int | None = None) -> Any:
    """Copy with a group's ranks, of which one cannot read; return what came of it, or was raised."""
    from tailor_dcp import blob_copier

    real = blob_copier.in_kernel

    def broken(*_: Any) -> int:
        raise blob_copier.SourceError(5, "this rank's cable is cut")

    if failing == torch.distributed.get_rank(group):
        blob_copier.in_kernel = broken  # type: ignore[assignment]
    try:
        return materialize(source, out, process_group=group, largest_file=3000)
    except (MaterializeError, DamagedCheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        blob_copier.in_kernel = real


def test_ranks_share_the_work(run: Run, tmp_path: Path, fleet: Any) -> None:
    """Each has written about as much; all return the same; the copy is one checkpoint."""
    source = composite(run, "reference")
    before = loaded(run, source)
    made = fleet.call("tests.test_materialize:materialize_with", str(source), str(tmp_path / "out"), ranks=3)
    assert made[0] == made[1] == made[2]
    assert made[0].checked == made[0].blobs
    shutil.rmtree(run.folder)
    assert equal(loaded(run, tmp_path / "out"), before)
    shares = [sum(path.stat().st_size for path in (tmp_path / "out").glob(f"__{rank}_*")) for rank in range(3)]
    assert sum(shares) == made[0].bytes
    assert max(shares) - min(shares) < 4000, f"{shares} are not alike"
    again = materialize(tmp_path / "out", tmp_path / "again")
    assert again.checked == again.blobs, "some rank's checksums were lost"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_makes_all_fail(run: Run, tmp_path: Path, fleet: Any, failing: int) -> None:
    """With its own sentence on every rank, and nothing left; the same call then succeeds."""
    source = composite(run)
    call = ("tests.test_materialize:materialize_with", str(source), str(tmp_path / "out"))
    said = fleet.call(*call, failing, ranks=2)
    assert said[0] == said[1]
    assert "cable" in said[0]
    assert said[0].startswith("DamagedCheckpointError")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert fleet.call(*call, ranks=2)[1].files > 1
    said = fleet.call(*call, ranks=2)
    assert said[0] == said[1]
    assert "exists already" in said[0]


def torchrun(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command += [str(Path(sys.executable).with_name("tailor")), "materialize", str(source), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)


def test_torchrun(run: Run, tmp_path: Path) -> None:
    """The command as torchrun starts it: one line for all ranks, and one sentence if one fails."""
    source = composite(run)
    before = loaded(run, source)
    ran = torchrun(source, tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("checksums compared") == 1
    assert {path.name[:4] for path in (tmp_path / "out").glob("__*")} == {"__0_", "__1_"}
    assert equal(loaded(run, tmp_path / "out"), before)


@pytest.mark.long
def test_torchrun_says_once_what_went_wrong(run: Run, tmp_path: Path) -> None:
    """However many ranks have failed for it."""
    (tmp_path / "out").mkdir()
    ran = torchrun(run.save(100), tmp_path / "out")
    assert ran.returncode != 0
    assert ran.stderr.count("tailor: ") == 1
    assert "exists already" in ran.stderr


_LOST = """
import os, sys
from tailor_dcp import blob_copier
from tailor_dcp.cli import main
if os.environ["RANK"] == "1":
    blob_copier.in_kernel = lambda *_: os._exit(9)
sys.argv = ["tailor", "materialize", *sys.argv[1:]]
main()
"""


@pytest.mark.long
def test_a_rank_that_is_lost(run: Run, tmp_path: Path) -> None:
    """The other says so instead of waiting, and leaves nothing."""
    source = composite(run)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", _LOST, str(source), str(tmp_path / "out")]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 9]
    assert "tailor: Another of the 2 ranks was lost" in said[0]
    assert "Traceback" not in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


# Blocks that are shared --------------------------------------------------------------------


def test_whole_files_are_shared_where_the_file_system_can(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is live as a whole keeps its file; the rest, and what cannot be shared after all, is copied."""
    source = composite(run)
    before = loaded(run, source)
    shared: list[int] = []

    def share(old: int, new: int) -> bool:
        if len(shared) > 3:
            return False
        shared.append(os.fstat(old).st_size)
        os.sendfile(new, old, 0, shared[-1])
        return True

    monkeypatch.setattr(new_folder, "share_blocks", share)
    monkeypatch.setattr(layout, "SMALLEST_WHOLE", 1)
    for verify in (True, False):
        shared.clear()
        made = materialize(source, tmp_path / f"out-{verify}", verify=verify)
        assert len(shared) == 4
        assert made.checked == (made.blobs if verify else 0)
        assert equal(loaded(run, tmp_path / f"out-{verify}"), before)
        again = materialize(tmp_path / f"out-{verify}", tmp_path / f"again-{verify}")
        assert again.checked == again.blobs


# Object stores -----------------------------------------------------------------------------


def test_across_stores(run: Run, tmp_path: Path, store: str) -> None:
    """From the disk to a store, within it, and back; every checksum that is known is compared each time."""
    source = composite(run)
    before = loaded(run, source)
    made = materialize(source, f"{store}/step-300", largest_file=9000)
    assert made.path == f"{store}/step-300"
    stored = {path.name for path in place(made.path).rglob("*")}
    assert len(stored) == made.files + 1, "something else than data and metadata is there"
    within = materialize(made.path, f"{store}/copy")
    back = materialize(within.path, tmp_path / "back")
    assert within.checked == back.checked == made.blobs
    assert equal(loaded(run, tmp_path / "back"), before)
    with pytest.raises(MaterializeError, match="exists already"):
        materialize(source, f"{store}/copy")


def test_the_store_copies_by_itself(run: Run, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without looking, no byte of an object that is live as a whole comes here."""
    monkeypatch.setattr(layout, "SMALLEST_WHOLE", 1)
    made = materialize(composite(run), f"{store}/step-300", largest_file=9000)
    monkeypatch.setattr(input_files, "read_ranges", None)
    within = materialize(made.path, f"{store}/copy", verify=False, largest_file=9000)
    assert (within.bytes, within.files) == (made.bytes, made.files)


def test_what_fails_in_a_store_leaves_nothing(run: Run, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither objects nor uploads; nor does what a killed call has left stand in the way of the next."""
    source = composite(run)

    def full(*_: Any) -> None:
        raise OSError(28, "no more room")

    with monkeypatch.context() as broken:
        broken.setattr(new_folder, "commit", full)
        with pytest.raises(MaterializeError, match="no more room"):
            materialize(source, f"{store}/out")
    assert not place(f"{store}/out").exists()
    place(f"{store}/out/.materialize").write_bytes(b"of a killed call")
    place(f"{store}/out/__0_00000000_0.distcp").write_bytes(b"half")
    made = materialize(source, f"{store}/out")
    assert len(list(place(f"{store}/out").rglob("*"))) == made.files + 1
    place(f"{store}/mine/thesis.tex").write_bytes(b"years")
    with pytest.raises(MaterializeError, match="exists already"):
        materialize(source, f"{store}/mine")


# The command ------------------------------------------------------------------------------


def test_the_command(run: Run, tmp_path: Path) -> None:
    """A sentence for people, JSON for machines."""
    app = typer.Typer()
    app.command()(command)
    source = composite(run)
    shown = CliRunner().invoke(app, [str(source), str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    assert "checksums compared" in shown.stdout
    told = json.loads(CliRunner().invoke(app, [str(source), str(tmp_path / "out2"), "--json"]).stdout)
    assert told["checked"] == told["blobs"]
    assert read(tmp_path / "out2" / ".metadata").storage_data.keys() == metadata(source).storage_data.keys()


def test_the_state_of_the_world_is_whole() -> None:
    """What is compared above is every tensor and the training state."""
    held = flat(Run(Path()).state(3))
    assert {"train.step", "train.rng", "lr"} < held.keys()
