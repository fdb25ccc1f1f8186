"""What ``inspect`` tells, against file sizes and sums done by hand."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest

from tailor_dcp import LayerwiseWriter, inspect
from tailor_dcp.errors import NoCheckpointError, UnreadableMetadataError
from tests.support.runs import HEAD, L0, L1, L2, LAYERS, Run, due, files, metadata, named, record

pytestmark = pytest.mark.filterwarnings("error::tailor_dcp.TailorWarning")

# Three layers of 4 x 3 and a head of 2 x 3 in float32, each with two moments and a 0-d counter; besides them a 0-d
# learning rate and 16 bytes of generator state.
LAYER, HEADS = 4 * 3 * 4, 2 * 3 * 4
TENSORS = 3 * (3 * LAYER + 4) + (3 * HEADS + 4) + 4 + 16


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.save(100, writer=LayerwiseWriter)
    run.save(200, due(L1), writer=LayerwiseWriter)
    run.save(300, lambda request: [(L2, "weight")], writer=LayerwiseWriter)
    return run


def sizes(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in named(folder)}


def test_a_full_save_wrote_everything(run: Run) -> None:
    """Written, live and the files' sizes are one number; nothing is stale, pinned or missing."""
    found = inspect(run.path(100))
    assert found.written == found.live == sum(sizes(run.path(100)).values())
    assert found.full == TENSORS
    assert (found.pinned, found.missing, found.parent) == (0, (), None)
    assert found.metadata == (run.path(100) / ".metadata").stat().st_size
    assert found.stalest == dict.fromkeys(("weight", "exp_avg", "exp_avg_sq", "step", "other"), 0)


def test_a_composite_wrote_its_own_files(run: Run) -> None:
    """Its own bytes lie in files of its own; what it reads is spread over all that it names."""
    for step in (200, 300):
        found = inspect(run.path(step))
        own = {name: size for name, size in sizes(run.path(step)).items() if "/" not in name}
        assert found.written == sum(own.values())
        assert found.full == TENSORS
        assert (found.save_id, found.step) == (record(run.path(step))["save_id"], step)
        assert found.carry == "link"
        blobs = metadata(run.path(step)).storage_data.values()
        assert found.live == sum(info.length for info in blobs)
        assert found.pinned == sum(sizes(run.path(step)).values()) - found.live


def test_units_tell_origin_and_staleness(run: Run) -> None:
    """Each unit with the step and the number of saves that it lies back, in the model's order."""
    units = {(unit.layer, unit.kind): unit for unit in inspect(run.path(300)).units}
    origins = {key: (unit.origin_step, unit.stale_steps, unit.stale_saves) for key, unit in units.items()}
    expected = {}
    for layer in LAYERS:
        for kind in ("weight", "exp_avg", "exp_avg_sq", "step"):
            expected[layer, kind] = (200, 100, 1) if layer == L1 else (100, 200, 2)
    expected[L2, "weight"] = (300, 0, 0)
    expected["(training state)", "other"] = (300, 0, 0)
    assert origins == expected
    assert list(dict.fromkeys(unit.layer for unit in inspect(run.path(300)).units)) == [*LAYERS, "(training state)"]
    assert inspect(run.path(300)).stalest == {"weight": 200, "exp_avg": 200, "exp_avg_sq": 200, "step": 200, "other": 0}


def test_units_tell_their_bytes_dtypes_and_files(run: Run) -> None:
    """The sum of all units is what is live; a stored dtype is the narrow one."""
    found = inspect(run.path(300))
    assert sum(unit.bytes for unit in found.units) == found.live
    by_unit = {(unit.layer, unit.kind): unit for unit in found.units}
    assert by_unit[L0, "weight"].dtypes == ("float32",)
    assert all((run.path(300) / name).exists() for unit in found.units for name in unit.files)
    narrow = Run(run.folder.parent / "narrow")
    narrow.save(100, "moments:weights=bf16")
    found = inspect(narrow.path(100))
    assert {unit.dtypes for unit in found.units if unit.kind == "weight"} == {("bfloat16",)}
    assert found.full == TENSORS


def test_dead_bytes_in_shared_files_are_pinned(tmp_path: Path) -> None:
    """With the stock writer one live unit keeps its whole file on disk: the rest of it is dead weight."""
    run = Run(tmp_path)
    run.save(100)
    run.save(200, due(L0, L1, L2))
    found = inspect(run.path(200))
    (old,) = (run.path(200) / name for name in named(run.path(200)) if "/" in name)
    head = sum(info.length for index, info in metadata(run.path(200)).storage_data.items() if HEAD in index.fqn)
    assert found.pinned == old.stat().st_size - head


def test_a_stock_checkpoint_has_units_too(tmp_path: Path) -> None:
    """They are found from the names; everything is of its own step."""
    run = Run(tmp_path)
    found = inspect(run.stock(100))
    assert {unit.layer for unit in found.units} == {*LAYERS, "(training state)"}
    assert {(unit.origin_step, unit.stale_steps) for unit in found.units} == {(100, 0)}
    assert (found.policy, found.carry, found.parent, found.full) == (None, None, None, TENSORS)
    assert found.written == found.live == (run.path(100) / "__0_0.distcp").stat().st_size


@pytest.mark.parametrize("mode", ["link", "reference"])
def test_missing_and_truncated_files_are_listed(tmp_path: Path, mode: str) -> None:
    """Each by the name that the metadata has for it."""
    run = Run(tmp_path)
    run.save(100, carry=mode)
    run.save(200, due(L1), carry=mode)
    (old,) = (name for name in named(run.path(200)) if "/" in name)
    (new,) = named(run.path(200)) - {old}
    os.truncate(run.path(200) / new, 50)
    assert inspect(run.path(200)).missing == (new,)
    (run.path(200) / old).unlink()
    assert inspect(run.path(200)).missing == tuple(sorted((old, new)))


def test_a_tensor_stored_nowhere_is_listed(run: Run) -> None:
    """As after a writer's thread failed unnoticed: the files are whole and the checkpoint is not."""
    plain = metadata(run.path(100))
    plain.storage_data = {k: v for k, v in plain.storage_data.items() if k.fqn != f"model.{L0}.w"}
    (run.path(100) / ".metadata").write_bytes(pickle.dumps(plain))
    (missing,) = inspect(run.path(100)).missing
    assert f"model.{L0}.w" in missing


def test_a_renamed_folder_keeps_its_step(run: Run) -> None:
    """The record tells it; the name may be anything."""
    run.path(300).rename(run.path("best"))
    found = inspect(run.path("best"))
    assert found.step == 300 and found.stalest["weight"] == 200


def test_a_folder_that_is_no_checkpoint_is_told_what_it_is(run: Run, tmp_path: Path) -> None:
    """A run, a save that was cut off, nothing at all: one sentence each."""
    with pytest.raises(NoCheckpointError, match=r"is a run, not a checkpoint; its newest checkpoint is .*step-300"):
        inspect(run.folder)
    (run.path(300) / ".metadata").unlink()
    with pytest.raises(NoCheckpointError, match="cut off"):
        inspect(run.path(300))
    with pytest.raises(NoCheckpointError, match="does not exist"):
        inspect(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(NoCheckpointError):
        inspect(file)


def test_a_record_that_does_not_fit_is_unreadable(run: Run) -> None:
    """It names a key that the checkpoint does not have: an error that names the file, no traceback."""
    plain = metadata(run.path(100))
    plain.tailor["units"][L0]["weight"][1].append("model.ghost")
    (run.path(100) / ".metadata").write_bytes(pickle.dumps(plain))
    with pytest.raises(UnreadableMetadataError, match=r"step-100.*model\.ghost"):
        inspect(run.path(100))


def test_a_checkpoint_that_can_only_be_read_is_inspected(run: Run) -> None:
    """Nothing is written, not even a lock."""
    folder = run.path(300)
    shutil.copytree(folder, folder.with_name("step-400"))
    before = files(folder), folder.stat().st_mtime_ns
    folder.chmod(0o500)
    inspect(folder)
    folder.chmod(0o700)
    assert (files(folder), folder.stat().st_mtime_ns) == before
