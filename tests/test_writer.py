"""``LayerwiseWriter``: files by lifetime, checksums, durability, and a commit that is one rename."""

from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from tailor_dcp import LayerwisePlanner, LayerwiseWriter
from tailor_dcp.metadata.record import Sums
from tests.support.fleet import Fleet
from tests.support.runs import HEAD, L0, L1, L2, LAYERS, MODEL, Run, due, files, metadata, named, record
from tests.support.world import Model, Param

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
    pytest.mark.filterwarnings("error::tailor_dcp.TailorWarning"),
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def keys_by_file(folder: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for index, info in metadata(folder).storage_data.items():
        found.setdefault(info.relative_path, set()).add(index.fqn)
    return found


def checked(folder: Path) -> int:
    """Compare every blob's checksum on record with zlib's of its bytes on disk, and count them."""
    crcs, places = record(folder)["crcs"], metadata(folder).storage_data.values()
    for info in places:
        blob = (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        assert Sums(crcs[info.relative_path])[info.offset] == zlib.crc32(blob), info
    return len(places)


def test_weights_moments_and_the_rest_lie_apart(run: Run) -> None:
    """One lifetime a file: under moments:every=2 all weights, each group's moments, and what is always written."""
    folder = run.save(100, "moments:every=2", writer=LayerwiseWriter)
    kinds = ("exp_avg", "exp_avg_sq", "step")
    moments = {layer: {f"optim.state.{layer}.w.{kind}" for kind in kinds} for layer in LAYERS}
    found = list(keys_by_file(folder).values())
    assert {f"model.{layer}.w" for layer in LAYERS} in found
    # Layers 0 and 2 take turns with layer 1, which the small head joins.
    assert moments[L0] | moments[L2] in found
    assert moments[L1] | moments[HEAD] in found
    assert {"optim.param_groups.0.lr", "optim.param_groups.0.params", "train.step", "train.rng"} in found
    assert len(found) == 4


def test_a_carried_file_is_live_as_a_whole(run: Run) -> None:
    """After any number of saves no file holds a dead byte, so one kept checkpoint needs no more than a full save."""
    for step in range(1, 8):
        folder = run.save(step, "moments:every=3", writer=LayerwiseWriter)
        sizes = dict.fromkeys(named(folder), 0)
        for info in metadata(folder).storage_data.values():
            sizes[info.relative_path] += info.length
        assert sizes == {name: (folder / name).stat().st_size for name in sizes}


def test_no_empty_file_is_written(fleet: Fleet, tmp_path: Path) -> None:
    """A rank with nothing to write leaves nothing, where the stock writer leaves a file of 0 bytes."""
    fleet.call("tests.support.world:forget")
    for step in (1, 2):
        path = str(tmp_path / f"step-{step}")
        fleet.call("tests.support.world:save", MODEL, step, path, "parity", writer="layerwise", ranks=4)
    assert all((tmp_path / "step-2" / name).stat().st_size for name in files(tmp_path / "step-2"))
    assert files(tmp_path / "step-2") == named(tmp_path / "step-2")


def test_every_blob_has_the_checksum_of_its_bytes(tmp_path: Path) -> None:
    """Small and large, tensor and not, carried and written."""
    run = Run(tmp_path, Model((Param(f"{L0}.w", (300, 100)), Param(f"{L1}.w", (3,)))))
    run.save(100, writer=LayerwiseWriter)
    run.save(200, due(L1), writer=LayerwiseWriter)
    # Two weights with two moments and a counter each; learning rate, its parameters, step, rng.
    assert checked(run.path(100)) == checked(run.path(200)) == 2 * 4 + 4


def test_checksums_come_from_every_rank(fleet: Fleet, tmp_path: Path) -> None:
    """They travel to the coordinator with the results; carried blobs keep theirs."""
    model = Model(tuple(Param(p.fqn, (40, 10), "shard") for p in MODEL.params))
    fleet.call("tests.support.world:forget")
    for step, ranks in ((1, 2), (2, 3)):
        path = str(tmp_path / f"step-{step}")
        fleet.call("tests.support.world:save", model, step, path, "parity", writer="layerwise", ranks=ranks)
    checked(tmp_path / "step-1")
    checked(tmp_path / "step-2")


def test_large_groups_are_split_among_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single lifetime of many bytes keeps all threads busy; every tensor is in one file, whole."""
    monkeypatch.setattr("tailor_dcp.writer._SMALLEST_PART", 1 << 16)
    weights = {"model": {f"layers.{i}.w": torch.full((3 << 10,), float(i)) for i in range(12)}}
    folder = tmp_path / "step-1"
    dcp.save(weights, storage_writer=LayerwiseWriter(folder), planner=LayerwisePlanner("full"))
    assert sorted(len(keys) for keys in keys_by_file(folder).values()) == [6, 6]
    checked(folder)


def test_the_old_metadata_is_there_until_the_new_one_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit is one ``os.replace``; at no time is the folder without a checkpoint."""
    run.save(100, writer=LayerwiseWriter)
    seen: list[str] = []

    def watch(event: str) -> Any:
        original = getattr(Path, event)

        def watched(self: Path, *args: Any, **kwargs: Any) -> Any:
            if ".metadata" in self.name:
                seen.append(event)
                assert record(run.path(100))["save_id"] == before
            return original(self, *args, **kwargs)

        return watched

    before = record(run.path(100))["save_id"]
    for event in ("replace", "rename", "unlink"):
        monkeypatch.setattr(Path, event, watch(event))
    run.save(101, to="step-100", writer=LayerwiseWriter)
    assert seen == ["replace"]
    assert record(run.path(100))["save_id"] != before
    assert run.origins(100) == dict.fromkeys(LAYERS, 101)


@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_written_through_a_link(run: Run, tmp_path: Path, there: bool) -> None:
    """Of the name that the metadata have until they are complete; the folder may be of somebody else's making."""
    theirs = tmp_path / "theirs"
    if there:
        theirs.write_text("theirs")
    folder = run.path(100)
    folder.mkdir(parents=True)
    (folder / ".metadata.tmp").symlink_to(theirs)
    run.save(100, writer=LayerwiseWriter)
    assert theirs.exists() == there
    assert not there or theirs.read_text() == "theirs"
    assert not (folder / ".metadata").is_symlink()
    assert run.origins(100) == dict.fromkeys(LAYERS, 100)


@pytest.mark.parametrize("sync", [True, False])
def test_files_and_folders_are_synced_if_wanted(run: Run, monkeypatch: pytest.MonkeyPatch, sync: bool) -> None:
    """Before the rename: data, their folder, the metadata; after it the folder and the run."""
    synced: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def rename(*args: Any, **kwargs: Any) -> None:
        synced.append("renamed")
        replace(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", rename)
    folder = run.save(100, writer=lambda path: LayerwiseWriter(path, sync_files=sync))
    if not sync:
        assert synced == ["renamed"]
        return
    at = synced.index("renamed")
    assert {str(folder / name) for name in files(folder)} < set(synced[:at])
    assert {str(folder), str(folder / ".metadata.tmp")} <= set(synced[:at])
    assert synced[at + 1 :] == [str(folder), str(run.folder)]


def test_a_commit_that_the_disk_does_not_confirm_is_told_as_such(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there, and whole; whether it stays if power fails nobody knows."""
    fsync, folder = os.fsync, run.path(100)

    def fail(descriptor: int) -> None:
        if (folder / ".metadata").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointException, match=r"step-100 was written whole, but the disk does not confirm"):
        run.save(100, writer=LayerwiseWriter)
    monkeypatch.undo()
    assert run.origins(100) == dict.fromkeys(LAYERS, 100)


def test_it_writes_what_the_stock_planner_asks_for(run: Run) -> None:
    """With another planner it is a FileSystemWriter: stock names, no record, the same values."""
    folder = run.path(100)
    dcp.save(run.state(100), storage_writer=LayerwiseWriter(folder))
    assert files(folder) == {"__0_0.distcp"}
    assert not hasattr(metadata(folder), "tailor")
    assert run.origins(100) == dict.fromkeys(LAYERS, 100)


def test_without_collectives_every_rank_has_its_own_metadata(run: Run) -> None:
    """A stock planner may save so; one rank's metadata must not pass for the whole checkpoint's."""
    folder = run.path(100)
    dcp.save(run.state(100), storage_writer=LayerwiseWriter(folder), use_collectives=False)
    assert files(folder) == {"__0_0.distcp", "__0.metadata"}
    assert not (folder / ".metadata").exists()
    assert run.origins(100) == dict.fromkeys(LAYERS, 100)


def test_overwriting_can_be_forbidden(run: Run) -> None:
    """As with the stock writer."""
    run.save(100, writer=LayerwiseWriter)
    with pytest.raises(dcp.api.CheckpointException, match="already exists"):
        run.save(101, to="step-100", writer=lambda path: LayerwiseWriter(path, overwrite=False))
    assert run.origins(100) == dict.fromkeys(LAYERS, 100)


def test_stock_and_layerwise_writers_take_turns(run: Run) -> None:
    """What one wrote the other's saves carry."""
    run.save(100)
    run.save(200, due(L1), writer=LayerwiseWriter)
    run.save(300, due(L2))
    assert run.origins(300) == {L0: 100, L1: 200, L2: 300, HEAD: 100}
    assert record(run.path(300))["crcs"].keys() < named(run.path(300))
