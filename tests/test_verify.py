"""Verifying: good is what is as it was written, damaged what is not, and what nothing tells is called so."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.serialization import set_crc32_options

from tailor_dcp import LayerwiseWriter, copy, lineage, materialize, merge, verify
from tailor_dcp.errors import NoCheckpointError
from tailor_dcp.listing import Listing
from tailor_dcp.store_path import place
from tailor_dcp.verify import Verification, repair_plans
from tests.flips import WRITERS, Target, composite, flipped
from tests.support.fleet import Fleet
from tests.support.runs import L0, L1, LAYERS, MODEL, Run, due, metadata
from tests.support.stores import empty_memory, memory_run, trained
from tests.support.world import Model

pytestmark = pytest.mark.filterwarnings("ignore")
OURS = {"writer": LayerwiseWriter}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Three checkpoints by our writer, the later two with one layer of their own."""
    return saved(Run(tmp_path / "run"), **OURS)


@pytest.fixture
def stock_run(tmp_path: Path) -> Run:
    """The same by DCP's writer, which notes no checksum."""
    return saved(Run(tmp_path / "run"))


def saved(run: Run, **options: Any) -> Run:
    run.save(100, due(*LAYERS), **options)
    run.save(200, due(L0), **options)
    run.save(300, due(L1), **options)
    return run


def bad(found: Verification) -> set[str]:
    """Return the names of the checkpoints that are damaged."""
    return {one.name for one in found.checkpoints if one.state == "damaged"}


def place_of(folder: Path, key: str) -> _StorageInfo:
    return next(info for index, info in metadata(folder).storage_data.items() if index.fqn == f"model.{key}")


def rewritten(folder: Path, change: Any) -> Verification:
    """Change a checkpoint's metadata as another program could, without a record, and verify it."""
    told = metadata(folder)
    del told.tailor
    change(told)
    (folder / ".metadata").write_bytes(pickle.dumps(told))
    return verify(folder)


def has_flipped(folder: Path) -> None:
    """Change a bit of a checkpoint's own data for good."""
    (path, *_) = sorted(folder.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# What is good -----------------------------------------------------------------------------


@pytest.mark.parametrize("writer", [None, LayerwiseWriter])
def test_what_was_saved_is_good_and_shared_files_are_read_once(tmp_path: Path, writer: Any) -> None:
    run = saved(Run(tmp_path / "run"), **({"writer": writer} if writer else {}))
    told: list[tuple[int, int]] = []
    found = verify(run.folder, progress=lambda done, total: told.append((done, total)))
    assert (found.state, found.findings, found.notes) == ("good", (), ())
    assert [one.step for one in found.checkpoints] == [100, 200, 300]
    blobs: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for step in (100, 200, 300):
        for info in metadata(run.path(step)).storage_data.values():
            status = (run.path(step) / info.relative_path).stat()
            blobs.setdefault((status.st_dev, status.st_ino), set()).add((info.offset, info.length))
    assert found.files == len(blobs)
    assert found.bytes == sum(length for lot in blobs.values() for _, length in lot)
    assert told[-1] == (found.bytes, found.bytes)


def test_a_stock_checkpoint_has_good_blobs_and_metadata_that_nothing_vouches_for(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    found = verify(run.stock(100))
    assert found.state == "unverifiable"
    assert [(one.state, one.blobs) for one in found.findings] == [("unverifiable", 0)]
    assert "no digest" in found.findings[0].what
    assert found.checkpoints[0].unverifiable_bytes == 0


@pytest.mark.parametrize("writer", ["layerwise", "stock"])
def test_what_ranks_saved_is_good(fleet: Fleet, tmp_path: Path, writer: str) -> None:
    """Shards: every tensor in several chunks."""
    model = Model(tuple(replace(param, spread="shard") for param in MODEL.params))
    for step, policy in ((100, "full"), (200, "parity")):
        path = str(tmp_path / "run" / f"step-{step}")
        fleet.call("tests.support.saving:save", model, step, path, policy, writer=writer)
    found = verify(tmp_path / "run")
    assert (found.state, found.findings) == ("good", ())
    entries = metadata(tmp_path / "run/step-200").state_dict_metadata.values()
    assert any(len(getattr(entry, "chunks", ())) > 1 for entry in entries)


@pytest.mark.parametrize("make", ["merge", "materialize", "copy"])
def test_what_is_made_of_checkpoints_is_good(run: Run, tmp_path: Path, make: str) -> None:
    new = run.path(301) if make == "merge" else tmp_path / "new"
    if make == "merge":
        merge({"base": str(run.path(300)), "layers": {L0: str(run.path(100))}}, new)
    elif make == "materialize":
        materialize(run.path(300), new)
    else:
        copy(run.folder, new)
    found = verify(new)
    assert (found.state, found.findings, found.notes) == ("good", (), ())


def test_a_store(tmp_path: Path) -> None:
    """In memory, as any of fsspec's; there later checkpoints name the keys of earlier ones."""
    empty_memory()
    try:
        url = memory_run()
        trained(None, {}, url)
        found = verify(url)
        assert (found.state, found.findings) == ("good", ())
        assert verify(f"{url}/step-300").state == "good"
        object_ = place(url) / "step-300" / place_of_store(url)
        data = bytearray(object_.read_bytes())
        data[len(data) // 2] ^= 1
        object_.write_bytes(data)
        assert bad(verify(url)) == {"step-300"}
        copy(url, tmp_path / "copy")
    finally:
        empty_memory()


def place_of_store(url: str) -> str:
    told = pickle.loads((place(url) / "step-300" / ".metadata").read_bytes())
    return next(i.relative_path for i in told.storage_data.values() if "/" not in i.relative_path)


# Flips ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=WRITERS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    lineage.forget()
    yield composite(tmp_path_factory.mktemp("flips") / "run", request.param)


@settings(max_examples=100)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_data_is_reported_or_changes_nothing(target: Target, at: float, bit: int) -> None:
    """Where a record has the checksum of the whole blob there is none that is not reported."""
    outcome = target.flip_data(at, bit)
    assert outcome == "reported" or (outcome == "harmless" and target.writer != "layerwise"), target.missed


@settings(max_examples=60)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_metadata_is_reported(target: Target, at: float, bit: int) -> None:
    """One of our writer's whatever it is; of our planner's every one that changes what is read."""
    outcome = target.flip_metadata(at, bit)
    allowed = {"layerwise": {"reported"}, "stock writer": {"reported", "harmless"}}
    assert outcome in allowed.get(target.writer, {"reported", "unverifiable"}), target.missed


def test_where_torch_computed_no_checksum_nothing_is_called_good(tmp_path: Path) -> None:
    """But what can be compared is: a changed shape is seen."""
    run = Run(tmp_path / "run")
    set_crc32_options(False)
    try:
        folder = run.save(100, due(*LAYERS))
    finally:
        set_crc32_options(True)
    found = verify(folder)
    assert found.state == "unverifiable"
    assert found.checkpoints[0].unverifiable_bytes == found.checkpoints[0].bytes
    assert all("set_crc32_options" in one.what for one in found.findings)
    info = place_of(folder, f"{L0}.w")
    data = (folder / info.relative_path).read_bytes()[info.offset :][: info.length]
    shape = data.index(b"K\x04K\x03\x86")  # (4, 3)
    with flipped(folder / info.relative_path, info.offset + shape + 1, 1):
        assert verify(folder).state == "damaged"
    with flipped(folder / info.relative_path, info.offset + data.index(b"data.pklFB"), 0):
        assert verify(folder).state == "damaged"


# Files ------------------------------------------------------------------------------------


def test_a_missing_carried_file(run: Run) -> None:
    """As on a file system that has lost links; which unit it takes with it is said."""
    info = place_of(run.path(300), f"{L0}.w")
    (run.path(300) / info.relative_path).unlink()
    found = verify(run.folder)
    assert bad(found) == {"step-300"}
    (finding,) = found.damaged
    assert (finding.file, finding.layer, finding.kind) == (info.relative_path, L0, "weight")
    assert "missing" in finding.what
    assert verify(run.path(200)).state == "good"


@pytest.mark.parametrize("which", ["run", "stock_run"])
def test_a_file_that_was_cut_off(which: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(which)
    name = place_of(run.path(300), f"{L1}.w").relative_path
    path = run.path(300) / name
    os.truncate(path, path.stat().st_size - 1)
    found = verify(run.folder)
    assert bad(found) == {"step-300"}
    assert all(one.file == name and "cut off" in one.what for one in found.damaged)


def test_a_file_in_the_place_of_another_of_its_size(run: Run) -> None:
    """A sound one, of another step: the record has the checksums of the one that belongs there."""
    mine, other = run.path(300), run.save(400, due(L1), **OURS)
    path, replacement = (folder / place_of(folder, f"{L1}.w").relative_path for folder in (mine, other))
    assert path.stat().st_size == replacement.stat().st_size
    path.unlink()
    shutil.copy(replacement, path)
    assert bad(verify(run.folder)) == {"step-300"}


def test_a_stock_file_in_the_place_of_another_is_seen_beside_its_copies(stock_run: Run) -> None:
    """All of its own checksums agree; but step 200 holds other bytes under the same name of the same save."""
    name = place_of(stock_run.path(100), f"{L1}.w").relative_path
    other = stock_run.save(101, due(*LAYERS), base=None)
    replacement = other / place_of(other, f"{L1}.w").relative_path
    assert replacement.stat().st_size == (stock_run.path(100) / name).stat().st_size
    (stock_run.path(100) / name).unlink()
    shutil.copy(replacement, stock_run.path(100) / name)
    assert verify(stock_run.path(100)).state == "good"  # as far as it tells by itself
    found = verify(stock_run.folder)
    assert "step-100" in bad(found)
    assert any("other copies" in one.what and one.file == name for one in found.damaged)


def test_metadata_of_another_checkpoint(run: Run) -> None:
    shutil.copy(run.path(200) / ".metadata", run.path(300) / ".metadata")
    found = verify(run.folder)
    assert bad(found) == {"step-300"}
    assert any("step-200, step-300" in note for note in found.notes)
    assert any("step-300 was saved as step-200" in note for note in found.notes)


def test_links_that_became_copies_are_good_and_told(run: Run, tmp_path: Path) -> None:
    """As by rsync without -H, or cp -r."""
    shutil.copytree(run.folder, tmp_path / "copied")
    found = verify(tmp_path / "copied")
    assert (found.state, found.findings) == ("good", ())
    assert any("links were lost" in note for note in found.notes)
    with flipped(next((tmp_path / "copied/step-300/carried").rglob("*.distcp")), 720, 3):
        assert bad(verify(tmp_path / "copied")) == {"step-300"}


@pytest.mark.parametrize("which", ["run", "stock_run"])
def test_a_stock_save_into_an_old_folder(which: str, request: pytest.FixtureRequest) -> None:
    """What was carried from there stays; that it is no longer there is told."""
    run: Run = request.getfixturevalue(which)
    before = run.steps_of(300)
    dcp.save(run.state(400), checkpoint_id=run.path(100))
    found = verify(run.folder)
    assert not found.damaged
    assert any("step-100 was saved again since step-200 carried" in note for note in found.notes)
    assert {one.name: one.state for one in found.checkpoints} == {
        "step-100": "unverifiable",
        "step-200": "good",
        "step-300": "good",
    }
    assert run.steps_of(300) == before


def test_a_file_outside_of_the_run_is_not_opened(run: Run, tmp_path: Path) -> None:
    name = place_of(run.path(300), f"{L1}.w").relative_path
    path = run.path(300) / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    found = verify(run.path(300))
    assert found.state == "damaged"
    assert any("outside of the run" in one.what and one.file == name for one in found.damaged)


def test_what_cannot_be_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails within a file costs the blobs there, not their neighbours."""
    info = place_of(run.path(100), f"{L0}.w")
    real = os.preadv

    def failing(descriptor: int, buffers: Any, offset: int) -> int:
        inside = offset <= info.offset < offset + sum(map(len, buffers))
        if inside and Path(f"/proc/self/fd/{descriptor}").readlink().name == info.relative_path:
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    found = verify(run.path(100))
    assert {(one.layer, one.kind) for one in found.damaged} == {(L0, "weight")}
    assert "Input/output error" in found.damaged[0].what


# Other programs' files ----------------------------------------------------------------------


@pytest.mark.parametrize("summed", [True, False])
def test_a_linked_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, summed: bool) -> None:
    """It is as good as the checksums that the other program's archives have; else only samples were compared."""
    from tailor_dcp.converters import Options, convert, torch_file

    monkeypatch.setattr(torch_file, "_SMALL", 0)
    set_crc32_options(summed)
    try:
        torch.save({f"layers.{n}.weight": torch.randn(30, 40) for n in range(3)}, tmp_path / "model.pt")
    finally:
        set_crc32_options(True)
    folder = tmp_path / "run" / "step-5"
    convert(tmp_path / "model.pt", folder, "dcp", options=Options(link=True))
    found = verify(folder)
    assert found.state == ("good" if summed else "unverifiable")
    if not summed:
        assert found.checkpoints[0].unverifiable_bytes == 3 * 30 * 40 * 4
        assert all("samples of it are those of when it was linked" in one.what for one in found.findings)
    info = next(i for i in metadata(folder).storage_data.values() if i.transform_descriptors)
    with flipped(folder / info.relative_path, info.offset, 0):
        found = verify(folder)
    assert found.state == "damaged"
    assert {one.file for one in found.damaged} == {info.relative_path}


# Metadata ---------------------------------------------------------------------------------


def test_a_record_that_was_lost(stock_run: Run) -> None:
    """As ``dataclasses.replace`` loses it: the files' names tell that there was one."""
    found = rewritten(stock_run.path(300), lambda told: None)
    assert any("record is gone" in one.what for one in found.damaged)


def test_a_record_from_before_there_were_digests(run: Run) -> None:
    told = metadata(run.path(300))
    del told.tailor["digest"], told.tailor["sealed"]
    (run.path(300) / ".metadata").write_bytes(pickle.dumps(told))
    found = verify(run.path(300))
    assert (found.state, len(found.findings)) == ("unverifiable", 1)
    told.tailor["digesu"] = "1:00"
    (run.path(300) / ".metadata").write_bytes(pickle.dumps(told))
    assert verify(run.path(300)).state == "damaged"


def test_metadata_that_another_program_pickled_anew(run: Run) -> None:
    """Its content is what it was, and its digest says so; the bytes are not those that were sealed."""
    path = run.path(300) / ".metadata"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes())))
    (finding,) = verify(run.path(300)).findings
    assert "checksum at their end is gone" in finding.what


def test_unreadable_metadata_is_one_finding(run: Run) -> None:
    (run.path(200) / ".metadata").write_bytes(b"\x80\x04.")
    found = verify(run.folder)
    assert bad(found) == {"step-200"}
    assert [one.file for one in found.damaged] == [".metadata"]


KEY = f"model.{L0}.w"


def _shift(told: Any) -> None:
    (chunk,) = told.state_dict_metadata[KEY].chunks
    told.state_dict_metadata[KEY].chunks = [ChunkStorageMetadata(chunk.offsets, torch.Size([2, 3])), chunk]


def _cut(told: Any) -> None:
    told.state_dict_metadata[KEY].chunks = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([3, 3]))]


def _double(told: Any) -> None:
    index = next(index for index in told.storage_data if index.fqn == KEY)
    told.storage_data[MetadataIndex("ghost", index.offset)] = told.storage_data[index]


def _forget(told: Any) -> None:
    del told.storage_data[next(index for index in told.storage_data if index.fqn == KEY)]


def _swap(told: Any) -> None:
    """Two tensors of different shapes in each other's places."""
    other = next(index for index in told.storage_data if "lm_head.w" in index.fqn and index.fqn.startswith("model."))
    mine = next(index for index in told.storage_data if index.fqn == KEY)
    told.storage_data[mine], told.storage_data[other] = told.storage_data[other], told.storage_data[mine]


def _retype(told: Any) -> None:
    told.state_dict_metadata[KEY].properties.dtype = torch.int32


def _overlap(told: Any) -> None:
    info = told.storage_data[next(index for index in told.storage_data if index.fqn == KEY)]
    info.length += 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_shift, "has its element [0, 0] in 2 chunks"),
        (_cut, "has its element [3, 0] in no chunk"),
        (_double, "which is in no entry"),
        (_forget, "does not say where"),
        (_swap, "holds a float32 tensor of shape"),
        (_retype, "where .metadata says int32 tensor of shape [4, 3]"),
        (_overlap, "in common"),
    ],
)
def test_metadata_that_contradicts_itself_or_its_files(tmp_path: Path, change: Any, said: str) -> None:
    folder = Run(tmp_path / "run").stock(100)
    told = metadata(folder)
    change(told)
    (folder / ".metadata").write_bytes(pickle.dumps(told))
    found = verify(folder)
    assert found.state == "damaged"
    assert any(said in one.what for one in found.damaged), [one.what for one in found.damaged]


# Arguments --------------------------------------------------------------------------------


def test_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError, match="does not exist"):
        verify(tmp_path / "nothing")
    with pytest.raises(NoCheckpointError, match="no committed checkpoint"):
        verify(tmp_path)


def test_units_restrict_what_is_read(run: Run) -> None:
    from tailor_dcp.units import Unit

    info = place_of(run.path(300), f"{L1}.w")
    with flipped(run.path(300) / info.relative_path, info.offset + 720, 0):
        assert verify(run.path(300), units={Unit(L0, "weight")}).state == "good"
        assert verify(run.path(300), units={Unit(L1, "weight")}).state == "damaged"


def test_many_threads_find_the_same(run: Run) -> None:
    info = place_of(run.path(300), f"{L1}.w")
    with flipped(run.path(300) / info.relative_path, info.offset + 720, 0):
        assert verify(run.folder, threads=1).findings == verify(run.folder, threads=6).findings


def test_as_plain_data(run: Run) -> None:
    import json

    (run.path(300) / place_of(run.path(300), f"{L1}.w").relative_path).unlink()
    told = json.loads(json.dumps(verify(run.folder).to_dict()))
    assert told["state"] == "damaged"
    assert {one["state"] for one in told["checkpoints"]} == {"good", "damaged"}
    assert told["findings"][0]["checkpoint"] == "step-300"


# Several runs, and what is no checkpoint's own folder ----------------------------------------


def test_checkpoints_of_several_runs_are_told_apart(tmp_path: Path) -> None:
    """Both runs have a step 200, of which one is damaged."""
    for name in ("one", "other"):
        saved(Run(tmp_path / name), **OURS)
    has_flipped(tmp_path / "one" / "step-200")
    found = verify(tmp_path)
    assert bad(found) <= {"one/step-200", "one/step-300"}
    assert {one.name for one in found.checkpoints} == {
        f"{r}/step-{s}" for r in ("one", "other") for s in (100, 200, 300)
    }
    assert found.notes == ()
    assert {one.checkpoint for one in repair_plans(found)} == bad(found)
    assert bad(verify(tmp_path / "one")) == {name.removeprefix("one/") for name in bad(found)}


def test_a_link_to_a_step_is_not_a_second_checkpoint(run: Run, tmp_path: Path) -> None:
    """Also where the step's checkpoints are a folder deeper."""
    (run.folder / "latest").symlink_to("step-300")
    assert len(verify(run.folder).checkpoints) == 3
    deep = tmp_path / "accelerate"
    shutil.copytree(run.path(100), deep / "checkpoint-100" / "optimizer_0")
    (deep / "latest").symlink_to("checkpoint-100")
    assert [one.name for one in verify(deep).checkpoints] == ["checkpoint-100/optimizer_0"]


def test_a_tensor_of_a_dtype_that_no_frame_can_be_made_of(tmp_path: Path) -> None:
    """A quantized one has torch's checksums; that it is plain nobody can say."""
    tensor = torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 0, torch.qint8)
    dcp.save({"model": {"w": tensor}}, checkpoint_id=str(tmp_path / "run" / "step-1"))
    found = verify(tmp_path / "run")
    assert found.state == "unverifiable"
    assert any("no plain tensor" in one.what for one in found.findings)
    with flipped(tmp_path / "run" / "step-1" / "__0_0.distcp", 780, 0):  # among its 64 bytes
        assert verify(tmp_path / "run").state == "damaged"


def test_a_checkpoint_that_is_pruned_while_repair_is_looked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    has_flipped(run.path(200))
    found = verify(run.path(200))

    def listed(path: Path) -> Listing:
        names = ("step-100", "step-200", "step-300", "step-400")  # there is no last one
        return Listing([path / name for name in names], [])

    module = sys.modules["tailor_dcp.verify"]  # the package has a function of this name
    monkeypatch.setattr(module, "checkpoints_below", listed)
    (made,) = repair_plans(found)
    assert made.checkpoint == "step-200"


def test_a_checkpoint_that_is_pruned_while_it_is_read_is_not_damaged(run: Run, tmp_path: Path) -> None:
    def progress(done: int, total: int) -> None:
        if run.path(100).exists():
            run.path(100).rename(tmp_path / "gone")

    found = verify(run.folder, threads=1, progress=progress)
    assert ([one.name for one in found.checkpoints], found.state) == (["step-200", "step-300"], "good")


def test_a_checkpoint_that_is_made_anew_while_it_is_read_is_not_damaged(run: Run, tmp_path: Path) -> None:
    """As where its files get other names: the new ``.metadata`` tells of them."""
    run.save(100, due(*LAYERS), base=None, **OURS)
    shutil.copytree(run.path(100), tmp_path / "new" / "step-100")
    run.save(100, due(*LAYERS), base=None, **OURS)

    def progress(done: int, total: int) -> None:
        if (tmp_path / "new" / "step-100").exists():
            shutil.rmtree(run.path(100))
            (tmp_path / "new" / "step-100").rename(run.path(100))

    found = verify(run.path(100), threads=1, progress=progress)
    assert found.state == "good"


def test_an_empty_metadata_is_damaged(tmp_path: Path) -> None:
    """As a disk that was full may leave it."""
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / ".metadata").touch()
    found = verify(tmp_path)
    assert found.state == "damaged"
    assert "step-1" in found.findings[0].what
