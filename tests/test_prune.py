"""Pruning: no kept checkpoint ever loses a byte, whatever is removed and however it ends."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
import typer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from typer.testing import CliRunner

from tailor_dcp import LayerwisePlanner, forget
from tailor_dcp.census import STRIPPED, census
from tailor_dcp.cli.prune import prune as prune_command
from tailor_dcp.errors import NoCheckpointError, TailorError, UnreadableMetadataError
from tailor_dcp.leftovers import COMPACTION
from tailor_dcp.leftovers import find as find_leftovers
from tailor_dcp.locks import Lock
from tailor_dcp.prune import PruneRefusedError, Pruning, prune
from tailor_dcp.removal import withdraw
from tailor_dcp.runs import commits
from tests.support.forks import disk_use, killed_at
from tests.support.runs import HEAD, L0, L1, L2, LAYERS, Run, due, named
from tests.support.users import somebody_else

pytestmark = pytest.mark.filterwarnings("ignore:Detected an existing checkpoint", "ignore::tailor_dcp.TailorWarning")

MODES = ("link", "reference")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def fill(run: Run, carry: str, count: int = 5) -> None:
    """Save everything, then one layer after the other."""
    run.save(100)
    for i in range(1, count):
        run.save(100 * (i + 1), due(LAYERS[i % 4]), carry=carry)


def whys(done: Pruning) -> dict[str, str]:
    return {verdict.name: "; ".join(verdict.why) for verdict in done.verdicts}


def committed(run: Run) -> list[str]:
    return sorted(path.parent.name for path in run.folder.glob("*/.metadata"))


def held(run: Run) -> dict[str, dict[str, int]]:
    """Load every checkpoint with stock torch and tell what it holds."""
    return {name: run.steps_of(name) for name in committed(run)}


# Properties -------------------------------------------------------------------------------

saves = st.lists(
    st.tuples(
        st.sampled_from([100, 200, 300, 400, 500]),
        st.sets(st.sampled_from(LAYERS), max_size=3),
        st.sampled_from(MODES),
        st.one_of(st.none(), st.integers(0, 9)),  # which checkpoint training goes back to before this save
    ),
    min_size=2,
    max_size=7,
)
rules = st.one_of(
    st.tuples(st.integers(1, 3), st.none()), st.tuples(st.one_of(st.none(), st.just(1)), st.sampled_from([200, 300]))
)


@settings(max_examples=8)
@given(saves=saves, rules=st.lists(rules, min_size=1, max_size=2), stop=st.integers(1, 40))
@example(  # a file that was kept for the sake of a reference is left when that is gone
    saves=[
        (200, set(), "link", None),
        (300, set(), "reference", None),
        (100, set(), "link", None),
        (500, set(), "link", None),
        (200, set(), "link", None),
    ],
    rules=[(3, None), (1, None)],
    stop=40,
)
@example(  # a folder is emptied, saved into again and emptied again
    saves=[(step, set(), "reference" if step == 400 else "link", None) for step in (300, 400, 100, 100, 300, 100)],
    rules=[(None, 200)],
    stop=1,
)
def test_every_kept_checkpoint_holds_what_it_held(
    saves: list[tuple[int, set[str], str, int | None]], rules: list[tuple[int | None, int | None]], stop: int
) -> None:
    """Any saves, by links and by references, back and forth; any rules; cut off anywhere and run again."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run")
        for n, (step, layers, carry, back) in enumerate(saves):
            if back is not None and (there := committed(run)):
                run.load(there[back % len(there)])
            run.steps.add(step)
            run.save(step, due(*layers), carry=carry)
            if n == len(saves) // 2:
                prune_and_check(run, *rules[0], stop)
        for last, every in rules:
            prune_and_check(run, last, every, stop)
        before = held(run)
        newest = commits(run.folder)[-1].folder
        run.load(newest.name)
        run.save(600, due(L0), carry="link")
        assert run.origins(600)[L0] == 600
        assert held(run).items() >= before.items()


def prune_and_check(run: Run, last: int | None, every: int | None, stop: int) -> None:
    before, order = held(run), commits(run.folder)
    foretold = prune(run.folder, last, every, dry_run=True)
    assert held(run) == before
    used = disk_use(run.folder)
    if killed_at(stop, run.folder, lambda: prune(run.folder, last, every)):
        left = held(run)  # what looks like a checkpoint is one
        assert left.items() <= before.items()
        assert set(left) >= set(foretold.kept)
        prune(run.folder, last, every)
    assert held(run) == {name: before[name] for name in foretold.kept if name in before}
    assert used - disk_use(run.folder) == foretold.freed
    kept = {commit.folder.name for commit in order[-(last or 1) :]}
    kept |= {commit.folder.name for commit in order if every and commit.step % every == 0}
    assert set(committed(run)) == kept
    again = prune(run.folder, last, every)
    assert again.freed == 0
    assert {verdict.action for verdict in again.verdicts} <= {"keep", "strip"}


@pytest.mark.parametrize("carry", MODES)
def test_a_prune_killed_at_any_change_is_finished_by_the_next(tmp_path: Path, carry: str) -> None:
    """Every moment, one after the other: nothing looks whole that is not, nothing is left behind."""
    saved = Run(tmp_path / "saved")
    fill(saved, carry, 4 if carry == "link" else 7)
    last_two = sorted(commit.folder.name for commit in commits(saved.folder))[-2:]
    run = Run(tmp_path / "run")
    run.steps = saved.steps
    n, held_before = 1, held(saved)
    while True:
        shutil.rmtree(run.folder, ignore_errors=True)
        subprocess.run(["cp", "-a", saved.folder, run.folder], check=True)
        killed = killed_at(n, run.folder, lambda: prune(run.folder, keep_last=2))
        assert held(run).items() <= held_before.items()
        done = prune(run.folder, keep_last=2)
        assert held(run) == {name: held_before[name] for name in last_two}
        emptied = [] if carry == "link" else ["step-300", "step-400", "step-500"]
        assert sorted(path.name for path in run.folder.iterdir()) == sorted([*emptied, *last_two])
        if not killed:
            break
        n += 1
    assert n > 6, "too few moments were tried"
    assert done.freed == 0


def test_series_killed_at_any_change(run: Run, tmp_path: Path) -> None:
    """A step of which one series is no checkpoint any more is not taken for one of the last."""
    for step in (100, 200, 300):
        for series in ("model_0", "optimizer_0"):
            run.save(step, to=f"checkpoint-{step}/{series}")
    work, n, killed = tmp_path / "work", 1, True
    while killed:
        subprocess.run(["cp", "-a", run.folder, work], check=True)
        killed = killed_at(n, work, lambda: prune(work, keep_last=2))
        half = {path.parent.name for path in work.glob("checkpoint-100/*/.metadata")}
        done = prune(work, keep_last=3 if len(half) < 2 else 2)
        assert set(done.kept) == {"checkpoint-200", "checkpoint-300"}
        assert sorted(path.name for path in work.iterdir()) == ["checkpoint-200", "checkpoint-300"]
        shutil.rmtree(work)
        n += 1
    assert n > 6, "too few moments were tried"


# What is kept and why ---------------------------------------------------------------------


def test_what_a_link_leads_to_is_never_removed(run: Run, tmp_path: Path) -> None:
    """Not even by the name that a folder has while it is removed."""
    theirs = tmp_path / "theirs" / "deep" / "file"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    fill(run, "link", 2)
    for name in (".pruned-step-100", ".pruned-step-7"):
        (run.folder / name).symlink_to(tmp_path / "theirs")
    prune(run.folder, keep_last=1)
    assert committed(run) == ["step-200"]
    assert theirs.read_text() == "theirs"


def test_it_says_why(run: Run) -> None:
    """Each verdict has its reasons, and a dry run the same ones."""
    fill(run, "link")
    run.save(7, base=run.path(500), to="best-so-far")
    foretold = prune(run.folder, keep_last=2, keep_every=200, dry_run=True)
    done = prune(run.folder, keep_last=2, keep_every=200)
    assert done.verdicts == foretold.verdicts
    assert whys(done) == {
        "step-100": "no rule keeps it",
        "step-200": "every 200 steps",
        "step-300": "no rule keeps it",
        "step-400": "one of the last 2; every 200 steps",
        "step-500": "one of the last 2; the newest: a save may be carrying from it",
        "best-so-far": "no step in its name",
    }
    assert done.removed == ("step-100", "step-300")
    assert foretold.to_dict()["verdicts"][0]["action"] == "remove"


def test_last_goes_by_the_order_of_saving(run: Run) -> None:
    """A run that went back: the abandoned step with the highest number is not the newest."""
    fill(run, "link", 3)
    run.load(100)
    run.save(150, due(L0))
    assert prune(run.folder, keep_last=1).kept == ("step-150",)
    assert run.origins(150) == {**dict.fromkeys(LAYERS, 100), L0: 150}


def test_a_stock_run_that_was_copied(run: Run) -> None:
    """Its files' times are in the order of copying: the last ones by their steps stay, and what may be the newest."""
    for step in (100, 200, 300, 400, 500):
        run.stock(step)
    for age, step in enumerate((300, 500, 200, 400, 100)):
        os.utime(run.path(step) / ".metadata", (1e9 + age, 1e9 + age))
    done = prune(run.folder, keep_last=2)
    assert done.removed == ("step-200", "step-300")
    assert whys(done)["step-100"] == "the one with the youngest file: a save may be carrying from it"
    assert whys(done)["step-500"] == "one of the last 2; the newest: a save may be carrying from it"


def test_a_run_that_went_back_to_stock_checkpoints(run: Run) -> None:
    """Where not all tell when they were saved, that of the highest step stays as well."""
    run.stock(100)
    forget()
    for step in (300, 400):
        run.save(step)
    run.load(100)
    run.save(150)
    run.save(160)
    done = prune(run.folder, keep_last=1)
    assert done.removed == ("step-100", "step-150", "step-300")
    assert whys(done)["step-400"] == "the one of the highest step: a save may be carrying from it"


def test_with_references_a_folder_is_emptied_of_what_nobody_needs(run: Run) -> None:
    """It is no checkpoint any more, holds the files that others refer to, and goes when they do."""
    run.save(100, carry="reference")
    run.save(200, due(L1, L2), carry="reference")
    run.save(300, due(L2), carry="reference")
    before = run.steps_of(300)
    done = prune(run.folder, keep_last=1)
    assert [v.action for v in done.verdicts] == ["strip", "strip", "keep"]
    assert "step-300 refers to 1 of its files" in whys(done)["step-200"]
    assert committed(run) == ["step-300"]
    assert {p.name for p in run.path(100).iterdir()} >= {STRIPPED}
    assert run.steps_of(300) == before
    run.save(400, due(L0, L1, HEAD), carry="reference")
    again = prune(run.folder, keep_last=1)
    assert [v.action for v in again.verdicts] == ["remove", "remove", "strip", "keep"]
    assert sorted(p.name for p in run.folder.iterdir()) == ["step-300", "step-400"]
    assert run.origins(400) == {**dict.fromkeys(LAYERS, 400), L2: 300}


def test_a_save_into_a_folder_that_was_emptied(run: Run) -> None:
    """It is a checkpoint again, and what others need in it stays."""
    fill(run, "reference", 3)
    prune(run.folder, keep_last=1)
    run.load(300)
    before = run.origins(300)
    run.save(100, due(*LAYERS), carry="reference")
    assert prune(run.folder, keep_last=2).kept == ("step-100", "step-300")
    assert run.origins(300) == before
    assert run.origins(100) == dict.fromkeys(LAYERS, 100)


@pytest.mark.parametrize("carry", MODES)
def test_a_save_that_has_begun_is_left_alone_with_what_it_carries_from(run: Run, carry: str) -> None:
    """The run went back to step 100 and is writing step 150, while 300 is the newest that is committed."""
    fill(run, carry, 3)
    run.path(150).mkdir()
    (run.path(150) / "__0_deadbeef_0.distcp").write_bytes(b"half")
    done = prune(run.folder, keep_last=1)
    assert whys(done)["step-150"] == "not committed: a save may be writing it"
    assert whys(done)["step-100"] == "the save into step-150 may be carrying from it"
    assert "step-200" in done.removed
    assert (run.path(150) / "__0_deadbeef_0.distcp").exists()
    assert prune(run.folder, keep_last=1, incomplete=True).kept == ("step-100", "step-150", "step-300")


def test_incomplete_removes_what_is_older_than_the_newest(run: Run) -> None:
    """What a save that failed has left goes only on request."""
    run.path(50).mkdir(parents=True)
    (run.path(50) / "__0_deadbeef_0.distcp").write_bytes(b"half")
    os.utime(run.path(50) / "__0_deadbeef_0.distcp", (1, 1))
    os.utime(run.path(50), (1, 1))
    fill(run, "link", 2)
    assert "step-50" in prune(run.folder, keep_last=2).kept
    done = prune(run.folder, incomplete=True)
    assert done.removed == ("step-50",)
    assert done.freed == 4
    assert whys(done)["step-50"] == "not committed, and older than the newest checkpoint"


def test_series_of_one_step_stay_together(run: Run) -> None:
    """Accelerate's two checkpoints a step: both go or none; half a newest step keeps the one before."""
    for step in (100, 200, 300):
        for series in ("model_0", "optimizer_0"):
            run.save(step, to=f"checkpoint-{step}/{series}")
        (run.path(f"checkpoint-{step}") / "scheduler.bin").write_bytes(b"s")
    run.save(400, to="checkpoint-400/model_0")
    (run.path("checkpoint-400") / "optimizer_0").mkdir()
    (run.path("checkpoint-400") / "optimizer_0" / "__0_deadbeef_0.distcp").write_bytes(b"half")
    done = prune(run.folder, keep_last=1)
    assert done.kept == ("checkpoint-300", "checkpoint-400")
    assert sorted(path.name for path in run.folder.iterdir()) == ["checkpoint-300", "checkpoint-400"]


def test_what_a_symbolic_link_leads_to_is_kept(run: Run) -> None:
    """``best -> step-100`` keeps step 100."""
    fill(run, "link", 3)
    (run.folder / "best").symlink_to("step-100")
    assert whys(prune(run.folder, keep_last=1))["step-100"] == "best leads to it"


def test_what_a_symbolic_link_leads_into_is_kept(run: Run) -> None:
    """One of several series, or a file; what only begins like it is another folder."""
    for step in (1, 10, 100, 200):
        for series in ("model_0", "optimizer_0"):
            run.save(step, to=f"checkpoint-{step}/{series}")
    (run.folder / "best").symlink_to("checkpoint-10/model_0")
    (run.folder / "weights").symlink_to(next(run.path("checkpoint-100/model_0").glob("*.distcp")))
    done = prune(run.folder, keep_last=1)
    assert done.removed == ("checkpoint-1",)
    assert whys(done)["checkpoint-10"] == "best leads to something in it"
    assert whys(done)["checkpoint-100"] == "weights leads to something in it"


def test_a_folder_elsewhere_that_a_symbolic_link_leads_to_needs_what_it_refers_to(run: Run, tmp_path: Path) -> None:
    """Step 200 lies on another disk, and refers to step 100 in the run."""
    run.save(100)
    (tmp_path / "disk" / "step-200").mkdir(parents=True)
    run.path(200).symlink_to(tmp_path / "disk" / "step-200")
    run.save(200, due(L0), carry="reference")
    run.save(300)
    before = run.steps_of(200)
    assert prune(run.folder, keep_last=1).removed == ("step-100",)
    assert run.steps_of(200) == before


def test_a_step_on_a_disk_that_is_not_there_may_need_anything(run: Run, tmp_path: Path) -> None:
    """Its link leads nowhere until somebody mounts the disk again; what ``best`` led to once is nobody's need."""
    fill(run, "reference", 3)
    run.path(200).rename(tmp_path / "step-200")
    run.path(200).symlink_to(tmp_path / "disk" / "step-200")
    (run.folder / "best").symlink_to("step-50")
    with pytest.raises(TailorError, match=r"step-200 leads to .*, where nothing is.*move it out of the run"):
        prune(run.folder, keep_last=1)
    assert run.path(100).exists()


def test_a_run_in_a_folder_of_a_number_is_no_step(run: Run, tmp_path: Path) -> None:
    """A scheduler's job numbers look like steps: runs are not removed as if they were checkpoints."""
    for job in (101, 102):
        fill(Run(tmp_path / "runs" / str(job)), "link", 2)
    with pytest.raises(NoCheckpointError, match="name the folder that holds step-100"):
        prune(tmp_path / "runs", keep_last=1)
    fill(Run(tmp_path / "runs"), "link", 2)
    done = prune(tmp_path / "runs", keep_last=1, incomplete=True)
    assert done.removed == ("step-100",)
    assert whys(done)["101"] == "a run of its own"


def test_a_save_is_under_way_whatever_the_clock_says(run: Run) -> None:
    """The clock was put back after the newest commit, which lies in the future since then."""
    fill(run, "link", 2)
    os.utime(run.path(200) / ".metadata", (time.time() + 86400,) * 2)
    run.path(300).mkdir()
    (run.path(300) / "__0_deadbeef_0.distcp").write_bytes(b"half")
    assert "step-300" in prune(run.folder, keep_last=1, incomplete=True).kept
    long_ago = time.time() - 7200
    for path in (run.path(300) / "__0_deadbeef_0.distcp", run.path(300)):
        os.utime(path, (long_ago, long_ago))
    assert "step-300" in prune(run.folder, keep_last=1, incomplete=True).removed


def test_other_folders_are_none_of_its_business(run: Run) -> None:
    """Logs, and steps saved in other formats, stay."""
    fill(run, "link", 2)
    for name in ("logs", "checkpoint-50"):
        (run.folder / name).mkdir()
        (run.folder / name / "model.safetensors").write_bytes(b"x")
    assert prune(run.folder, keep_last=1, incomplete=True).removed == ("step-100",)
    assert (run.folder / "checkpoint-50" / "model.safetensors").exists()


def test_metadata_of_each_rank_is_a_checkpoint_too(run: Run) -> None:
    """What stock torch saved without collectives is not taken for a save that failed."""
    dcp.save(run.state(50), checkpoint_id=run.path(50), use_collectives=False)
    assert not (run.path(50) / ".metadata").exists()
    fill(run, "link", 2)
    assert prune(run.folder, keep_last=1, incomplete=True).removed == ("step-100",)
    assert run.path(50).exists()


def test_a_run_below_a_folder_of_an_unlucky_name(tmp_path: Path) -> None:
    """Only what lies in a checkpoint's own ``carried`` was carried."""
    run = Run(tmp_path / "carried" / "run")
    fill(run, "reference", 3)
    before = run.origins(300)
    (run.path(100) / "notes.txt").write_text("mine")
    assert prune(run.folder, keep_last=1).kept == ("step-300",)
    assert (run.path(100) / "notes.txt").exists()
    assert run.origins(300) == before


def test_what_was_kept_for_a_reference_goes_with_it(run: Run) -> None:
    """A folder that was saved again holds a file of its first save, until nothing refers to it any more."""
    run.save(100)
    run.save(200, carry="reference")
    run.load(200)
    run.save(100, due(*LAYERS))
    (left,) = {path.name for path in run.path(100).glob("*.distcp")} - named(run.path(100))
    assert prune(run.folder, keep_last=2).freed == 0
    size = (run.path(100) / left).stat().st_size
    done = prune(run.folder, keep_last=1)
    assert whys(done)["step-100"].endswith("; 1 file in it that no checkpoint needs any more")
    assert next(verdict for verdict in done.verdicts if verdict.name == "step-100").freed == size
    assert {path.name for path in run.path(100).glob("*.distcp")} == named(run.path(100))


@pytest.mark.parametrize("carry", MODES)
def test_files_of_a_save_into_the_folder_again_are_no_leftovers(run: Run, carry: str) -> None:
    """What is carried and what is written, while the checkpoint of the earlier save is there still."""
    fill(run, carry, 3)
    run.load(200)
    before = {path for path in run.folder.rglob("*") if path.is_file()}
    (run.path(300) / "__0_deadbeef_0.distcp").write_bytes(b"half")
    done = prune(run.folder, keep_last=1)
    assert "a save may be writing into it again" in whys(done)["step-300"]
    assert whys(done)["step-200"] == "the save into step-300 may be carrying from it"
    assert (run.path(300) / "__0_deadbeef_0.distcp").exists()
    assert {path for path in before if "step-100" not in path.parts} <= set(run.folder.rglob("*"))


def test_a_save_that_carries_by_links_that_are_there_already(run: Run) -> None:
    """It has begun: it found the links that an earlier save into its folder had made, and has written nothing yet."""
    fill(run, "link", 3)
    run.load(200)
    planner = LayerwisePlanner(due(L0))
    planner.set_up_planner(run.state(300), StorageMeta(run.path(300)), is_coordinator=True)
    planner.create_global_plan([planner.create_local_plan()])
    done = prune(run.folder, keep_last=1, compact=0.0)
    assert done.kept == ("step-200", "step-300")
    assert "a save may be writing into it again" in whys(done)["step-300"]
    assert all(one.why_not for one in done.rewrites)


def test_the_best_by_a_metric(run: Run, tmp_path: Path) -> None:
    """And whatever another rule keeps; all reasons are told."""
    fill(run, "link")
    log = tmp_path / "eval.jsonl"
    losses = {100: 3.0, 200: 1.25, 300: 2.0, 400: float("nan"), 500: 4.0}
    log.write_text("".join(json.dumps({"step": step, "eval_loss": loss}) + "\n" for step, loss in losses.items()))
    done = prune(run.folder, keep_last=1, keep_best=2, metrics=log)
    assert whys(done) == {
        "step-100": "no rule keeps it",
        "step-200": "number 1 of the best 2 by eval_loss (1.25)",
        "step-300": "number 2 of the best 2 by eval_loss (2)",
        "step-400": "no rule keeps it",
        "step-500": "the last one; the newest: a save may be carrying from it",
    }
    assert prune(run.folder, keep_best=1, metrics=losses, mode="max").kept == ("step-500",)


def test_what_was_not_evaluated_yet_may_be_the_best(run: Run) -> None:
    """The evaluation lags behind: what it has not come to stays, what it has passed over does not."""
    fill(run, "link")
    done = prune(run.folder, keep_best=1, metrics={100: 1.0, 150: 7.0, 300: 2.0})
    assert done.removed == ("step-200", "step-300")
    assert whys(done)["step-400"] == "not evaluated yet: eval_loss ends at step 300"


def test_what_was_saved_not_long_ago(run: Run) -> None:
    """By the time in the record, which copying the files does not change."""
    fill(run, "link", 3)
    assert prune(run.folder, keep_within="7d", dry_run=True).removed == ()
    assert whys(prune(run.folder, keep_within=timedelta(hours=1)))["step-100"] == "saved within 60.0 min"
    os.utime(run.path(100) / ".metadata")
    time.sleep(0.3)
    assert prune(run.folder, keep_within=timedelta(seconds=0.2)).kept == ("step-300",)


def test_what_killed_calls_have_left(run: Run) -> None:
    """It is named, with its size and age, and goes only on request, and only if nobody is at work on it."""
    fill(run, "link", 2)
    for name in (".out.materialize", ".merged.merge", ".converted.convert"):
        (run.folder / name).mkdir()
        (run.folder / name / "__0_deadbeef_0.distcp").write_bytes(b"half")
        (run.folder / f"{name}.lock").touch()
    (run.folder / ".pruned-step-50").mkdir()
    lock = Lock(run.folder / ".merged.merge.lock", TailorError("busy"))
    lock.take()
    done = prune(run.folder, keep_last=2)
    assert whys(done) | {"step-100": "", "step-200": ""} == {
        "step-100": "",
        "step-200": "",
        ".pruned-step-50": "an earlier prune was cut off in it",
        ".out.materialize": "left by `tailor materialize` of out, which was cut off: --incomplete removes it",
        ".merged.merge": "`tailor merge` of merged is at work on it",
        ".converted.convert": "left by `tailor-convert` of converted, which was cut off: --incomplete removes it",
    }
    assert {v.name: v.bytes for v in done.verdicts if v.written}[".out.materialize"] == 4
    assert prune(run.folder, incomplete=True).freed == 8
    assert sorted(path.name for path in run.folder.glob(".*")) == [".merged.merge", ".merged.merge.lock"]
    lock.release()


def test_links_of_a_killed_merge_free_nothing(run: Run) -> None:
    """Its files are those of its sources, which have them still."""
    fill(run, "link", 2)
    (run.folder / ".out.merge").mkdir()
    for path in run.path(100).glob("*.distcp"):
        (run.folder / ".out.merge" / path.name).hardlink_to(path)
    (run.folder / ".out.merge.lock").touch()
    used = disk_use(run.folder)
    foretold = prune(run.folder, incomplete=True, dry_run=True)
    done = prune(run.folder, incomplete=True)
    assert foretold.freed == done.freed == used - disk_use(run.folder) == 0
    assert done.removed == (".out.merge",)


def test_what_is_begun_again_while_it_is_to_be_removed_stays(run: Run) -> None:
    fill(run, "link", 1)
    partial = run.folder / ".out.merge"
    partial.mkdir()
    (run.folder / ".out.merge.lock").touch()
    (found,) = find_leftovers(run.folder)
    lock = Lock(run.folder / ".out.merge.lock", TailorError("busy"))
    lock.take()
    with pytest.raises(TailorError, match="is being worked on again"):
        found.remove()
    assert partial.is_dir()
    lock.release()


def test_what_is_saved_again_while_it_is_to_be_removed_stays(run: Run) -> None:
    """A run that went back has committed into the folder between the look and the removal."""
    fill(run, "link", 3)
    entries = census(run.folder)
    run.save(150, due(*LAYERS), to="step-100")
    with pytest.raises(TailorError, match="step-100 was saved again meanwhile"):
        for entry in entries[:2]:
            withdraw(entry)
    assert set(run.steps_of(100).values()) == {150}


# What others own --------------------------------------------------------------------------


def test_what_is_read_only_is_kept_and_stops_nothing(shared_folder: Path) -> None:
    """It needs what it refers to; nothing loses its ``.metadata`` in vain."""
    run = Run(shared_folder / "run")
    with somebody_else():
        run.save(50)
        fill(run, "reference", 3)
        run.path(200).chmod(0o555)
        before, foretold = held(run), prune(run.folder, keep_last=1, dry_run=True)
        done = prune(run.folder, keep_last=1)
        assert done.verdicts == foretold.verdicts
        assert done.removed == ("step-50", "step-100")
        assert whys(done)["step-200"] == "no rule keeps it, but its folder is read-only"
        assert held(run) == {name: before[name] for name in ("step-200", "step-300")}
        run.path(200).chmod(0o755)
        (run.path(200) / "logs").mkdir(0o555)
        assert whys(prune(run.folder, keep_last=1))["step-200"] == "no rule keeps it, but logs in it is read-only"
        run.folder.chmod(0o555)
        assert "the run's folder is read-only" in whys(prune(run.folder, keep_last=1))["step-200"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_what_turns_out_to_be_another_users_stops_nothing_else(shared_folder: Path) -> None:
    """A sticky folder: nobody may take somebody else's file out of it. What stays a checkpoint keeps what it needs."""
    run = Run(shared_folder / "run")
    fill(run, "reference", 4)
    for path in (run.folder, *(run.path(step) for step in (100, 200, 300, 400))):
        path.chmod(0o1777 if path == run.path(200) else 0o777)
    before = held(run)
    for _ in range(2):
        with somebody_else(), pytest.raises(TailorError, match=r"step-200/\.metadata cannot be changed"):
            prune(run.folder, keep_last=1, compact=True, idle=True)
        assert held(run) == {name: before[name] for name in ("step-200", "step-400")}
    assert not (run.folder / COMPACTION).exists()
    prune(run.folder, keep_last=1)
    assert held(run) == {"step-400": before["step-400"]}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_what_only_the_owner_of_a_folder_may_do_is_not_begun(shared_folder: Path) -> None:
    """Its old time cannot be given back to it by others: it would look for ever as if a save had begun in it."""
    run = Run(shared_folder / "run")
    run.save(100)
    run.save(200, carry="reference")
    run.load(200)
    run.save(100, due(L0))  # its first file is left there for the sake of step 200
    run.save(300, due(L1, L2, HEAD))
    subprocess.run(["chmod", "-R", "a+rwX", run.folder], check=True)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    with somebody_else():
        done = prune(run.folder, keep_last=2, compact=0.0)
    assert done.removed == ("step-200",)
    assert done.rewrites and all("another user's" in (one.why_not or "") for one in done.rewrites)
    assert not (run.folder / COMPACTION).exists()
    left = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    assert left == {path: when for path, when in before.items() if path in left}
    files = sum(path.name.endswith(".distcp") for path in left)
    prune(run.folder, keep_last=2)
    assert sum(path.name.endswith(".distcp") for path in run.folder.rglob("*")) < files


def test_a_compaction_that_cannot_be_finished_yet_is_not_told_as_finished(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save has begun since it was cut off, and may refer to the old files; by links, that is seen."""
    run.save(100)
    for step, layer in ((200, L0), (300, L1), (400, L2)):
        run.save(step, due(layer))

    def cut_off(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tailor_dcp.compact._apply", cut_off)
        prune(run.folder, keep_last=1, compact=True)
    run.path(500).mkdir()
    before = held(run)
    for idle, action in ((False, "keep"), (True, "remove")):
        foretold = prune(run.folder, compact=True, idle=idle, dry_run=True)
        done = prune(run.folder, compact=True, idle=idle)
        (verdict,) = [one for one in done.verdicts if one.name == COMPACTION]
        assert verdict in foretold.verdicts
        assert verdict.action == action
        assert ("a save under way may refer to its files" in verdict.why[0]) == (action == "keep")
        assert (run.folder / COMPACTION).exists() == (action == "keep")
    assert held(run) == before


# What is refused --------------------------------------------------------------------------


def test_an_unreadable_metadata_stops_it(run: Run) -> None:
    """It may need any file."""
    fill(run, "link", 3)
    (run.path(200) / ".metadata").write_bytes(b"garbage")
    with pytest.raises(UnreadableMetadataError, match=r"step-200.*It may need any file.*--repair-plan.*move") as caught:
        prune(run.folder, keep_last=1)
    assert "use another" not in str(caught.value)
    assert run.path(100).exists()


def test_a_folder_that_cannot_be_listed_stops_it(shared_folder: Path) -> None:
    """A checkpoint in it may need any file; but not in what mkfs makes at a disk's root for its administrator."""
    run = Run(shared_folder / "run")
    with somebody_else():
        fill(run, "link", 3)
        for name in ("lost+found", "mine"):
            run.path(name).mkdir(0)
        with pytest.raises(
            TailorError, match=r"mine could not be looked into: Permission denied.*move it out of the run"
        ):
            prune(run.folder, keep_last=1)
        run.path("mine").rmdir()
        assert prune(run.folder, keep_last=1).removed == ("step-100", "step-200")


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"keep_last": 0}, "keep_last=0"),
        ({"keep_every": -1}, "keep_every=-1"),
        ({"keep_best": 0, "metrics": {100: 1.0}}, "keep_best=0"),
        ({"keep_best": 1}, "give metrics"),
        ({"metrics": {100: 1.0}}, "give keep_best"),
        ({"keep_last": 1, "metric": "accuracy"}, "give keep_best"),
        ({"keep_last": 1, "mode": "max"}, "give keep_best"),
        ({"keep_last": 1, "idle": True}, "give compact"),
        ({"keep_best": 1, "metrics": {7: 1.0}}, "none of the 1 checkpoints' steps, such as 100"),
        ({"keep_best": 1, "metrics": {100: 1.0}, "mode": "best"}, "mode='best' is unknown"),
        ({"keep_within": "soon"}, "keep_within='soon' is no length of time"),
        ({"keep_within": timedelta(0)}, "keeps nothing"),
        ({"compact": 1.0}, "compact=1 is no share"),
        ({}, "No rule"),
    ],
)
def test_rules_that_make_no_sense(run: Run, rule: dict[str, Any], words: str) -> None:
    """They are refused before anything is read."""
    run.save(100)
    with pytest.raises(PruneRefusedError, match=words):
        prune(run.folder, **rule)


def test_what_is_no_run(run: Run, tmp_path: Path) -> None:
    """A checkpoint, an empty folder, nothing at all, an object store."""
    run.save(100)
    with pytest.raises(PruneRefusedError, match="a checkpoint itself"):
        prune(run.path(100), keep_last=1)
    with pytest.raises(NoCheckpointError, match="no committed checkpoint"):
        prune(tmp_path, keep_last=1)
    with pytest.raises(NoCheckpointError, match="no folder"):
        prune(tmp_path / "nothing", keep_last=1)
    with pytest.raises(PruneRefusedError, match="object store"):
        prune("s3://bucket/run", keep_last=1)


# The command ------------------------------------------------------------------------------


def test_the_command(run: Run, tmp_path: Path) -> None:
    """A table for people, JSON for machines; the same verdicts."""
    app = typer.Typer()
    app.command()(prune_command)
    run.save(50, writer=FileSystemWriter)
    fill(run, "link", 4)
    log = tmp_path / "trainer_state.json"
    log.write_text(json.dumps({"log_history": [{"step": 100, "eval_loss": 1.5}, {"step": 400, "eval_loss": 2.0}]}))
    best = [str(run.folder), "--keep-last", "1", "--keep-best", "1", "--metrics", str(log), "--threshold", "0.3"]
    shown = CliRunner().invoke(app, [*best, "--dry-run"])
    assert shown.exit_code == 0
    for words in ("the last one", "the best by eval_loss (1.5)", "would free", "step-400"):
        assert words in shown.stdout
    told = json.loads(CliRunner().invoke(app, [*best, "--json"]).stdout)
    assert told["removed"] == ["step-50", "step-200", "step-300"]
    assert committed(run) == ["step-100", "step-400"]
    assert told["freed"] == sum(v["freed"] for v in told["verdicts"]) + sum(r["freed"] for r in told["rewrites"])


@pytest.mark.parametrize(("call", "name"), [("lstat", "step-300"), ("stat", "step-300/.metadata")])
def test_what_is_there_although_it_is_said_to_be_gone(
    run: Run, monkeypatch: pytest.MonkeyPatch, call: str, name: str
) -> None:
    """A shared file system may show a checkpoint late; what it refers to does not go as if nobody needed it."""
    fill(run, "reference", 4)
    before, asked, told = held(run), getattr(Path, call), list[Path]()

    def answer(path: Path, **options: Any) -> os.stat_result:
        if path == run.folder / name and not told:
            told.append(path)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return asked(path, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(Path, call, answer)
    with suppress(OSError, TailorError):
        prune(run.folder, keep_last=1)
    assert told
    assert held(run).items() <= before.items()
    prune(run.folder, keep_last=1)
    assert held(run) == {"step-400": before["step-400"]}
