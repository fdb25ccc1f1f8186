"""Compacting: the disk gives back what no kept checkpoint needs, and no checkpoint loses a byte, however it ends."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections import defaultdict
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemWriter

from tailor_dcp import LayerwiseWriter, verify
from tailor_dcp.census import census
from tailor_dcp.leftovers import COMPACTION
from tailor_dcp.prune import Pruning, prune
from tailor_dcp.repointing import repoint
from tailor_dcp.runs import commits
from tests.support.forks import killed_at
from tests.support.runs import HEAD, L0, L1, L2, LAYERS, Run, due, metadata, named, record

pytestmark = pytest.mark.filterwarnings("ignore:Detected an existing checkpoint", "ignore::tailor_dcp.TailorWarning")

WRITERS = {"stock": FileSystemWriter, "layerwise": LayerwiseWriter}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def committed(run: Run) -> list[str]:
    return sorted(path.parent.name for path in run.folder.glob("*/.metadata"))


def held(run: Run) -> dict[str, dict[str, int]]:
    """Load every checkpoint with stock torch and tell what it holds."""
    return {name: run.steps_of(name) for name in committed(run)}


def live_bytes(run: Run) -> int:
    """Return what all checkpoints need, as stock pickle sees it: each stretch of each file once."""
    live: defaultdict[int, set[tuple[int, int]]] = defaultdict(set)
    for name in committed(run):
        for info in metadata(run.path(name)).storage_data.values():
            inode = (run.path(name) / info.relative_path).stat().st_ino
            live[inode].add((info.offset, info.length))
    return sum(length for stretches in live.values() for _, length in stretches)


def data_bytes(run: Run) -> int:
    found = {path.stat().st_ino: path.stat().st_size for path in run.folder.rglob("*.distcp")}
    return sum(found.values())


def check_sums(run: Run) -> int:
    """Compare every checksum that a record has with the bytes at its place; return how many."""
    count = 0
    for name in committed(run):
        lengths = {(i.relative_path, i.offset): i.length for i in metadata(run.path(name)).storage_data.values()}
        for file, packed in record(run.path(name))["crcs"].items():
            for at in range(0, len(packed), 12):
                offset, crc = struct.unpack_from("<QI", packed, at)
                if (file, offset) in lengths:
                    with (run.path(name) / file).open("rb") as stream:
                        stream.seek(offset)
                        assert zlib.crc32(stream.read(lengths[file, offset])) == crc
                    count += 1
    return count


def told(run: Run) -> dict[str, object]:
    """Return all that checkpoints tell but where their bytes lie, and when they were committed."""
    found = {}
    for name in committed(run):
        meta = metadata(run.path(name))
        kept = {k: v for k, v in meta.tailor.items() if k not in ("crcs", "digest", "sealed")}
        lengths = {index: info.length for index, info in meta.storage_data.items()}
        when = (run.path(name) / ".metadata").stat().st_mtime_ns
        save = (str(meta.storage_meta.checkpoint_id), meta.storage_meta.save_id, meta.storage_meta.modules)
        found[name] = (meta.state_dict_metadata, save, meta.planner_data, kept, lengths, when)
    return found


def rewritten(done: Pruning) -> list[str]:
    return [one.file for one in done.rewrites if one.why_not is None]


# Properties -------------------------------------------------------------------------------

saves = st.lists(
    st.tuples(
        st.sampled_from([100, 200, 300, 400, 500]),
        st.sets(st.sampled_from(LAYERS), max_size=3),
        st.sampled_from(["link", "link", "reference", "copy"]),
        st.sampled_from(sorted(WRITERS)),
        st.one_of(st.none(), st.integers(0, 9)),  # which checkpoint training goes back to before this save
    ),
    min_size=2,
    max_size=6,
)


@settings(max_examples=12)
@given(
    saves=saves,
    last=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    threshold=st.sampled_from([0.0, 0.2, 0.5, 0.8]),
    stop=st.integers(1, 60),
)
@example(  # an emptied folder whose file another one refers to is mostly dead
    saves=[(100, set(), "reference", "stock", None), (200, {L0, L1, L2}, "reference", "stock", None)],
    last=[1],
    threshold=0.5,
    stop=3,
)
def test_no_kept_checkpoint_changes_and_the_disk_is_freed(
    saves: list[tuple[int, set[str], str, str, int | None]], last: list[int], threshold: float, stop: int
) -> None:
    """Any saves, prunes and compactions, cut off anywhere and run again: law 4, and no file is too dead."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run")
        for n, (step, layers, carry, writer, back) in enumerate(saves):
            if back is not None and (there := committed(run)):
                run.load(there[back % len(there)])
            run.save(step, due(*layers), carry=carry, writer=WRITERS[writer])
            if n == len(saves) // 2:
                compact_and_check(run, last[0], threshold, stop)
        for count in last:
            compact_and_check(run, count, threshold, stop)
        before = held(run)
        run.load(commits(run.folder)[-1].folder.name)
        run.save(600, due(L0))
        assert {L0: run.origins(600)[L0]} == {L0: 600}
        assert held(run).items() >= before.items()


def compact_and_check(run: Run, last: int, threshold: float, stop: int) -> None:
    before, things = held(run), told(run)
    foretold = prune(run.folder, last, compact=threshold, idle=True, dry_run=True)
    assert told(run) == things
    used = data_bytes(run)
    if killed_at(stop, run.folder, lambda: prune(run.folder, last, compact=threshold, idle=True)):
        left = held(run)  # what looks like a checkpoint is one
        assert left.items() <= before.items()
        assert set(left) >= set(foretold.kept)
    prune(run.folder, last, compact=threshold, idle=True)
    assert held(run) == {name: before[name] for name in foretold.kept if name in before}
    assert told(run) == {name: things[name] for name in committed(run)}
    assert used - data_bytes(run) >= sum(one.freed for one in foretold.rewrites)
    assert data_bytes(run) <= live_bytes(run) / (1 - threshold)
    check_sums(run)
    assert {one.state for one in verify(run.folder).checkpoints} <= {"good", "unverifiable"}
    again = prune(run.folder, last, compact=threshold, idle=True)
    assert (again.freed, again.rewrites) == (0, ())
    assert not list(run.folder.glob(".*"))


@pytest.mark.parametrize("carry", ["link", "reference"])
def test_killed_at_any_change(tmp_path: Path, carry: str) -> None:
    """Every moment, one after the other: all checkpoints stay loadable, and the next call finishes."""
    saved = Run(tmp_path / "saved")
    fill(saved, carry)
    prune(saved.folder, keep_last=2)
    run = Run(tmp_path / "run")
    run.steps = saved.steps
    # By links nobody need say that no save is under way: what a killed compaction has left is not taken for one.
    n, before, killed, idle = 1, held(saved), True, carry == "reference"
    while killed:
        shutil.rmtree(run.folder, ignore_errors=True)
        subprocess.run(["cp", "-a", saved.folder, run.folder], check=True)
        killed = killed_at(n, run.folder, lambda: prune(run.folder, compact=True, idle=idle))
        assert held(run) == before
        if n % 2:
            prune(run.folder, keep_last=2)  # one that does not compact comes between
        prune(run.folder, compact=True, idle=idle)
        assert held(run) == before
        assert data_bytes(run) <= 2 * live_bytes(run)
        assert not list(run.folder.glob(".*"))
        n += 1
    assert n > 15, "too few moments were tried"


def test_a_save_that_begins_after_a_killed_compaction_is_seen(tmp_path: Path) -> None:
    """Both put names into a checkpoint's folders: only what the plan and the checkpoint name is the compaction's."""
    saved, run = Run(tmp_path / "saved"), Run(tmp_path / "run")
    fill(saved, "link")
    prune(saved.folder, keep_last=2)
    run.steps = saved.steps
    n, young = 0, list[Path]()
    while not young:
        n += 1
        shutil.rmtree(run.folder, ignore_errors=True)
        subprocess.run(["cp", "-a", saved.folder, run.folder], check=True)
        assert killed_at(n, run.folder, lambda: prune(run.folder, compact=True))
        young = [folder for entry in census(run.folder) for folder, _ in entry.younger]
    carried = young[0] / "__0_ffffffff_0.distcp"
    carried.hardlink_to(next(run.path(400).glob("*.distcp")))
    assert rewritten(prune(run.folder, compact=True)) == []
    assert (run.folder / COMPACTION).exists()
    carried.unlink()
    assert held(run) == held(saved)
    prune(run.folder, compact=True)
    assert held(run) == held(saved)
    assert data_bytes(run) <= 2 * live_bytes(run)
    assert not (run.folder / COMPACTION).exists()


def fill(run: Run, carry: str) -> None:
    """Save everything into one file, of which two layers are soon dead, then one layer after the other."""
    run.save(100, writer=WRITERS["stock"])
    for step, layer in ((200, L0), (300, L1), (400, L2)):
        run.save(step, due(layer), carry=carry)


# What is rewritten and what is not --------------------------------------------------------


def test_it_frees_what_a_single_live_layer_pins(run: Run) -> None:
    """One layer of the first save is live still; its file shrinks to that, in all checkpoints that need it."""
    fill(run, "link")
    pinned = prune(run.folder, keep_last=2)
    assert pinned.rewrites == ()
    before, things, used = held(run), told(run), data_bytes(run)
    foretold = prune(run.folder, compact=True, dry_run=True)
    done = prune(run.folder, compact=True)
    assert done.rewrites == foretold.rewrites
    (one,) = [one for one in done.rewrites if one.checkpoints == 2]
    assert one.before > 2 * one.after
    assert used - data_bytes(run) == done.freed
    assert held(run) == before
    assert told(run) == things
    first = next(save_id for save_id, step, *_ in record(run.path(300))["origins"] if step == 100)
    (new,) = [name for name in named(run.path(300)) if name.startswith(f"carried/{first}/")]
    assert f"__0_{first[:8]}_0-" in new
    assert (run.path(300) / new).samefile(run.path(400) / new)
    run.save(500, due(L0))
    assert (run.path(500) / new).samefile(run.path(400) / new)
    for step in (300, 400):  # each folder has a link of its own
        shutil.rmtree(run.path(step))
    assert run.origins(500) == {L0: 500, L1: 300, L2: 400, HEAD: 100}


def test_checksums_move_with_their_blobs(run: Run) -> None:
    """Those that ``LayerwiseWriter`` has noted are at the new places."""
    for step, policy in ((100, "full"), (200, due(L0, L1)), (300, due(L2))):
        run.save(step, policy, writer=LayerwiseWriter)
    prune(run.folder, keep_last=1)
    assert rewritten(prune(run.folder, compact=0.1))
    live = {(i.relative_path, i.offset) for i in metadata(run.path(300)).storage_data.values()}
    assert check_sums(run) == len(live)


def test_a_stock_writer_with_a_stock_planner(run: Run) -> None:
    """Its file is copied into the next checkpoint, and is mostly dead there."""
    run.stock(100)
    run.save(200, due(L0, L1, L2), base=run.path(100), carry="copy")
    before = held(run)
    assert rewritten(prune(run.folder, keep_last=1, compact=True)) == ["step-200/carried/" + carried(run)]
    assert held(run) == {"step-200": before["step-200"]}


def carried(run: Run) -> str:
    (name,) = [name for name in named(run.path(200)) if name.startswith("carried/")]
    return f"{name.split('/')[1]}/__0_0.distcp"


def test_while_a_save_may_refer_to_them_files_stay(run: Run) -> None:
    """With references nothing on the disk tells what a save that has only been planned needs; unless one is told."""
    fill(run, "reference")
    before = held(run)
    (first, *_) = prune(run.folder, keep_last=2, compact=True).rewrites
    assert first.why_not == "a save under way may refer to it: --idle says that none is"
    assert (run.path(100) / Path(first.file).name).stat().st_size == first.before
    assert rewritten(prune(run.folder, compact=True, idle=True)) == [first.file]
    assert held(run) == {name: before[name] for name in ("step-300", "step-400")}
    assert not (run.path(100) / Path(first.file).name).exists()


def test_while_a_save_is_under_way_nothing_is_rewritten(run: Run) -> None:
    """It has planned to carry from the newest, and begins to write."""
    fill(run, "link")
    prune(run.folder, keep_last=2)
    run.path(500).mkdir()
    done = prune(run.folder, compact=True)
    assert rewritten(done) == []
    assert all("a save under way" in (one.why_not or "") for one in done.rewrites)


def test_a_save_that_begins_meanwhile(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be linking the old files: they stay until the next prune that sees none under way."""
    fill(run, "link")
    prune(run.folder, keep_last=2)
    before = held(run)

    def begins(*args: object) -> None:
        repoint(*args)  # type: ignore[arg-type]
        run.path(500).mkdir(exist_ok=True)

    monkeypatch.setattr("tailor_dcp.compact.repoint", begins)
    done = prune(run.folder, compact=True)
    assert done.freed == 0
    assert all("a save has begun meanwhile" in (one.why_not or "") for one in done.rewrites)
    assert prune(run.folder, keep_last=2).freed == 0
    shutil.rmtree(run.path(500))
    freed = prune(run.folder, keep_last=2).freed
    assert freed == sum(one.before for one in done.rewrites)
    assert held(run) == before
    assert data_bytes(run) <= 2 * live_bytes(run)


def test_what_has_a_name_elsewhere_is_not_rewritten(run: Run, tmp_path: Path) -> None:
    """A backup by links: the bytes would stay on the disk."""
    fill(run, "link")
    prune(run.folder, keep_last=2)
    shutil.copytree(run.folder, tmp_path / "backup", copy_function=os.link)
    done = prune(run.folder, compact=True)
    assert rewritten(done) == []
    assert done.freed == 0


def test_a_plan_that_somebody_left_there_changes_nothing(run: Run, tmp_path: Path) -> None:
    """It may only point to the same bytes, inside of the run."""
    fill(run, "link")
    before, outside = held(run), tmp_path / "outside.distcp"
    name = next(name for name in sorted(named(run.path(400))) if "carried" not in name)
    size = (run.path(400) / name).stat().st_size
    outside.write_bytes((run.path(400) / name).read_bytes())
    stage, new = run.folder / COMPACTION, "__0_aaaaaaaa_0-bbbbbbbb.distcp"
    for live, old, data in (
        ([[0, size]], [f"step-400/{name}"], bytes(size)),
        ([[0, size]], ["../outside.distcp"], outside.read_bytes()),
        ([[0, 8], [4, size - 4]], [f"step-400/{name}"], outside.read_bytes()),
        ([[-1, size]], [f"step-400/{name}"], outside.read_bytes()),
    ):
        stage.mkdir()
        (stage / new).write_bytes(data)
        plan = {"format": 1, "moves": [{"new": new, "old": old, "live": live}]}
        (stage / "plan.json").write_text(json.dumps(plan))
        prune(run.folder, keep_last=9, compact=0.99)
        assert held(run) == before
        assert outside.exists()
        assert not stage.exists()


def test_what_tells_of_changed_bytes_is_not_signed_anew(run: Run) -> None:
    """A ``.metadata`` that somebody changed keeps the digest that tells of it."""
    fill(run, "link")
    prune(run.folder, keep_last=2)
    path = run.path(300) / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"model.layers.1.w", b"model.layers.1.v"))
    data = path.read_bytes()
    done = prune(run.folder, compact=True)
    assert [one.why_not for one in done.rewrites] == [f"{path} has changed since it was written: run `tailor verify`"]
    assert path.read_bytes() == data


def test_two_at_once(run: Run) -> None:
    """The second is told of the first."""
    from tailor_dcp.compact import alone
    from tailor_dcp.errors import TailorError

    fill(run, "link")
    with alone(run.folder), pytest.raises(TailorError, match="Another call is compacting"):
        prune(run.folder, keep_last=1, compact=True)


def test_a_later_save_into_the_folder_sweeps_the_new_files(run: Run) -> None:
    """They are an earlier save's there, whatever they are called."""
    fill(run, "link")
    prune(run.folder, keep_last=2, compact=True)
    run.save(400)
    assert all("-" not in Path(name).name for name in named(run.path(400)))
    left = {path.relative_to(run.path(400)).as_posix() for path in run.path(400).rglob("*.distcp")}
    assert left == named(run.path(400))
    dcp.load(run.state(400), checkpoint_id=run.path(300))
