"""Checkpoints on object stores: the laws, over memory and over a real S3 server, also one that fails."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException

from tailor_dcp import (
    LayerwiseLoadPlanner,
    LayerwisePlanner,
    LayerwiseReader,
    LayerwiseWriter,
    TailorWarning,
    inspect,
    latest,
    lineage,
    merge,
    open_checkpoint,
    prune,
)
from tailor_dcp.base import open_base
from tailor_dcp.errors import LoadError, TailorError
from tailor_dcp.location import METADATA
from tailor_dcp.metadata.pickle_writer import dumps
from tailor_dcp.prune import PruneRefusedError
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.store_path import place
from tailor_dcp.stores import copy_object
from tests.support.fleet import Fleet
from tests.support.runs import HEAD, L0, L1, L2, LAYERS, Run, due
from tests.support.s3_proxy import Fault, kinds
from tests.support.stores import S3, empty_memory, memory_run, s3_run
from tests.support.world import flat, state

WRITERS: dict[str, Any] = {"stock": lambda path: FsspecWriter(str(path)), "ours": LayerwiseWriter}


@pytest.fixture
def there(s3: S3) -> Run:
    return Run(place(s3_run()))


@pytest.fixture
def memory() -> Iterator[Run]:
    yield Run(place(memory_run()))
    empty_memory()


@pytest.fixture(params=["memory", "s3"])
def run(request: pytest.FixtureRequest, memory: Run) -> Run:
    return memory if request.param == "memory" else request.getfixturevalue("there")


def saved(run: Run, writer: str = "ours", **options: Any) -> Path:
    """Save three steps, each with one layer more that is not of the first."""
    run.save(100, "full", writer=WRITERS[writer], **options)
    run.save(200, due(L0), writer=WRITERS[writer], **options)
    return run.save(300, due(L1), writer=WRITERS[writer], **options)


AS_SAVED = {L0: 200, L1: 300, L2: 100, HEAD: 100}


def names(checkpoint: Path) -> set[str]:
    return {info.relative_path for info in open_base(checkpoint).metadata.storage_data.values()}


def ours(run: Run, checkpoint: Path, **options: Any) -> dict[str, Any]:
    target = state(run.model, 0, None, empty=True)
    dcp.load(target, storage_reader=LayerwiseReader(str(checkpoint), **options))
    return flat(target)


# Saving and loading ------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
def test_carried_by_absolute_keys(run: Run, writer: str) -> None:
    """What is carried is referred to where it was first written, and torch's own reader loads it."""
    last = saved(run, writer)
    assert run.origins(last) == AS_SAVED
    carried = {name for name in names(last) if name.startswith("/")}
    assert {name.split("/")[-2] for name in carried} == {"step-100", "step-200"}
    assert all(name.startswith(f"/{run.folder.key}/") for name in carried)  # type: ignore[attr-defined]
    loaded = run.load(last)
    for options in ({}, {"verify": True, "atomic": True}):
        assert all(
            torch.equal(loaded[key], value)
            for key, value in ours(run, last, **options).items()
            if "train" not in key and key != "lr"
        )


@pytest.mark.parametrize("writer", WRITERS)
def test_carried_by_copies(run: Run, writer: str) -> None:
    """A copy is complete without what it was made of."""
    last = saved(run, writer, carry="copy")
    for step in (100, 200):
        for path in list(run.path(step).rglob("*")):
            path.unlink()
    assert not any(name.startswith("/") for name in names(last))
    assert run.origins(last) == AS_SAVED


@pytest.mark.parametrize("writer", WRITERS)
def test_links_are_refused(memory: Run, writer: str) -> None:
    with pytest.raises(CheckpointException, match="object stores have no links; use reference or copy"):
        memory.save(100, "full", writer=WRITERS[writer], carry="link")


STEPS = st.lists(
    st.tuples(st.sampled_from(["save", "load", "again"]), st.sets(st.sampled_from(LAYERS)), st.integers(0, 9)),
    min_size=2,
    max_size=6,
)


def hold_the_laws(run: Run, steps: list[tuple[str, set[str], int]], writer: str) -> None:
    """Save, save again into a folder and go back, at random; torch alone must find what was put there."""
    lineage.forget()
    held: dict[int, dict[str, int]] = {}
    now: dict[str, int] | None = None
    for number, (what, layers, choice) in enumerate(steps, 1):
        if what == "load" and held:
            back = sorted(held)[choice % len(held)]
            run.load(back)
            now = dict(held[back])
            continue
        step = sorted(held)[choice % len(held)] if what == "again" and held else 10 * number
        run.steps.add(step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.save(step, due(*layers), writer=WRITERS[writer])
        found = run.origins(step)
        # Law 3: of an ancestor, and no other; law 1: with the values that it had there.
        for layer, origin in found.items():
            assert origin == step or (now is not None and layer not in layers and origin == now[layer])
        held[step] = now = found
    for step, origins in held.items():
        mixed = {layer for layer in origins if run.origins(step)[layer] != origins[layer]}
        assert not mixed, f"{step} has lost {mixed}"


@settings(max_examples=12)
@given(STEPS, st.sampled_from(list(WRITERS)))
def test_laws_in_memory(steps: list[tuple[str, set[str], int]], writer: str) -> None:
    hold_the_laws(Run(place(memory_run())), steps, writer)


@settings(max_examples=3)
@given(steps=STEPS, writer=st.sampled_from(list(WRITERS)))
def test_laws_on_s3(s3: S3, steps: list[tuple[str, set[str], int]], writer: str) -> None:
    hold_the_laws(Run(place(s3_run())), steps, writer)


def test_two_ranks(s3: S3, fleet: Fleet, stock_fleet: Fleet) -> None:
    """Two processes save to S3 together; both readers find the same on both."""
    run = Run(place(s3_run()))
    run.steps |= {100, 200, 300}
    for found in fleet.call("tests.support.stores:trained", s3.options, str(run.folder), ranks=2):
        same = [
            torch.equal(found["ours"][key], value)
            for key, value in found["torch"].items()
            if key.startswith(("model.", "optim."))
        ]
        assert same and all(same)
    assert run.origins(300) == AS_SAVED


def test_going_back_takes_nothing_from_the_abandoned_branch(memory: Run) -> None:
    for step, layers in ((100, LAYERS), (200, (L0,))):
        memory.save(step, due(*layers), writer=LayerwiseWriter)
    memory.load(100)
    memory.save(150, due(L1), writer=LayerwiseWriter)
    assert memory.origins(150) == {L0: 100, L1: 150, L2: 100, HEAD: 100}


def test_what_others_refer_to_is_not_swept(memory: Run) -> None:
    """Saving again into a folder removes its old files, save those that a later checkpoint refers to."""
    saved(memory)
    before = {path.name for path in memory.path(100).rglob("*.distcp")}
    lineage.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memory.save(100, "full", writer=LayerwiseWriter)
    assert memory.origins(300) == AS_SAVED
    lost = before - {path.name for path in memory.path(100).rglob("*.distcp")}
    assert lost and not lost & {name.rpartition("/")[2] for name in names(memory.path(300))}


def test_newest_is_what_was_saved_last(run: Run) -> None:
    saved(run)
    assert latest(run.folder) == run.path(300)
    run.load(100)
    run.save(150, due(L0), writer=LayerwiseWriter)
    with pytest.warns(TailorWarning, match="went back"):
        assert latest(str(run.folder)) == run.path(150)


# Readers -----------------------------------------------------------------------------------


def test_a_moved_run_is_read_where_it_is_now(there: Run, tmp_path: Path) -> None:
    """References follow a run to another place of the store and to a disk, and never lead back."""
    last = saved(there)
    moved, disk = Run(place(s3_run())), Run(tmp_path / "run")
    moved.steps = disk.steps = there.steps
    want = ours(there, last)
    for path in list(there.folder.rglob("*")):
        copy_object(path, moved.folder / path.relative_to(there.folder))
    fsspec.filesystem("s3").get(there.folder.address, str(tmp_path), recursive=True)  # type: ignore[attr-defined]
    for path in list(there.folder.rglob("*")):
        path.unlink()
    for other in (moved, disk):
        got = ours(other, other.path(300), verify=True)
        assert all(torch.equal(got[key], value) for key, value in want.items() if isinstance(value, torch.Tensor))
        assert not inspect(other.path(300)).missing
        assert torch.equal(open_checkpoint(other.path(300))["model.lm_head.w"], want["model.lm_head.w"])
    # Going on from there, everything is referred to where it is now.
    ours(moved, moved.path(300))
    moved.save(400, due(L2), writer=LayerwiseWriter)
    assert moved.origins(400) == {**AS_SAVED, L2: 400}


def test_no_file_outside_of_the_run_is_read(memory: Run) -> None:
    last = saved(memory)
    metadata = open_base(last).metadata
    evil = place(memory_run()) / "secret"
    evil.write_bytes(bytes(1 << 16))
    for info in metadata.storage_data.values():
        info.relative_path = evil.absolute_key  # type: ignore[attr-defined]
    import pickle

    (last / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointException, match="outside of its run"):
        ours(memory, last)


def test_only_what_is_needed_is_read(s3: S3) -> None:
    """A quarter of a tensor's rows costs a quarter of its bytes, in few requests."""
    url = f"{s3_run()}/step-1"
    rows, other = torch.randn(1024, 256), torch.randn(1 << 18)
    dcp.save({"model": {"a.weight": rows, "b.weight": other}}, storage_writer=LayerwiseWriter(url))
    reader = LayerwiseReader(url)
    target = {"model": {"a.weight": torch.zeros(1024, 256)}}
    with s3.proxy.counted() as noted:
        dcp.load(target, storage_reader=reader)
    read = [request for request in noted if request.kind == "GET" and METADATA not in request.path]
    assert torch.equal(target["model"]["a.weight"], rows)
    assert rows.nbytes <= sum(request.sent for request in read) <= 1.05 * rows.nbytes
    assert len(read) == 2  # its head and its bytes


def test_neighbours_are_read_at_once(s3: S3) -> None:
    url = f"{s3_run()}/step-1"
    tensors = {f"layers.{i}.weight": torch.randn(1000) for i in range(40)}
    dcp.save({"model": dict(tensors)}, storage_writer=LayerwiseWriter(url))
    target = {"model": {name: torch.zeros(1000) for name in tensors}}
    with s3.proxy.counted() as noted:
        dcp.load(target, storage_reader=LayerwiseReader(url))
    assert all(torch.equal(target["model"][name], tensor) for name, tensor in tensors.items())
    assert len([r for r in noted if r.kind == "GET" and METADATA not in r.path]) <= 4


def test_damage_is_found_before_a_tensor_is_touched(memory: Run) -> None:
    last = saved(memory)
    file = next(path for path in memory.path(100).rglob("*.distcp") if f"/{path.key}" in names(last))  # type: ignore[attr-defined]
    raw = bytearray(file.read_bytes())
    info = next(i for i in open_base(last).metadata.storage_data.values() if i.relative_path.endswith(file.name))
    raw[info.offset + info.length // 2] ^= 1
    file.write_bytes(raw)
    target = state(memory.model, 0, None, empty=True)
    with pytest.raises(CheckpointException, match="checksum differs"):
        dcp.load(target, storage_reader=LayerwiseReader(str(last), verify=True))
    file.write_bytes(raw[:40])
    with pytest.raises(CheckpointException, match="where at least"):
        dcp.load(target, storage_reader=LayerwiseReader(str(last), atomic=True))
    assert all(not value.any() for key, value in flat(target).items() if isinstance(value, torch.Tensor))


def test_layers_of_other_steps(run: Run) -> None:
    """The load planner finds other steps of a run on a store, for both readers."""
    last = saved(run)
    for reader in (None, LayerwiseReader(str(last))):
        target = state(run.model, 0, None, empty=True)
        planner = LayerwiseLoadPlanner(str(last), layers=[L1, L0], steps={L1: 100})
        dcp.load(target, checkpoint_id=str(last), storage_reader=reader, planner=planner)
        loaded = flat(target)
        found = {layer: loaded[f"optim.state.{layer}.w.step"].item() for layer in (L0, L1, L2)}
        assert found == {L0: 200, L1: 100, L2: 0}


def test_looking_into_one(run: Run) -> None:
    last = saved(run)
    seen = inspect(str(last))
    assert (seen.carry, seen.missing, seen.step) == ("reference", (), 300)
    opened = open_checkpoint(str(last))
    assert opened.origin(L2) == 100 and opened.origin(L1) == 300
    assert opened["optim.state.model.layers.2.w.step"].item() == 100


# Merging and pruning -----------------------------------------------------------------------


def test_merging_reads_and_writes_metadata_alone(there: Run, s3: S3) -> None:
    saved(there)
    recipe = {"base": f"{there.folder}@300", "layers": {L1: str(there.path(100))}}
    with s3.proxy.counted() as noted:
        done = merge(recipe, f"{there.folder}/merged")
    assert there.origins("merged") == {**AS_SAVED, L1: 100}
    assert all(name.startswith("/") or "values" in name for name in names(there.path("merged")))
    assert "COPY" not in kinds(noted) and done.path == str(there.path("merged"))
    with pytest.raises(RecipeError, match="exists already"):
        merge(recipe, f"{there.folder}/merged")


def test_merging_into_another_run_copies_within_the_store(there: Run, s3: S3) -> None:
    saved(there)
    other = Run(place(s3_run()))
    other.steps = there.steps
    merge({"base": str(there.path(300))}, str(other.path("merged")))
    for path in list(there.folder.rglob("*")):
        path.unlink()
    assert other.origins("merged") == AS_SAVED


def test_a_merge_that_fails_leaves_nothing(there: Run, s3: S3) -> None:
    saved(there)
    with (
        s3.proxy.failing(Fault("PUT", "merged/.metadata", "503")),
        pytest.raises(TailorError, match="cannot be written"),
    ):
        merge({"base": str(there.path(300))}, f"{there.folder}/merged")
    assert not there.path("merged").exists()


def test_a_merge_of_a_run_below_keeps_what_it_needs(memory: Run) -> None:
    """The run below does not look above itself before it removes what it saves again."""
    memory.save(100, "full", writer=LayerwiseWriter)
    above = f"{memory.folder.parent}/merged"
    merge({"base": str(memory.path(100))}, above)
    held = ours(memory, place(above))
    lineage.forget()
    memory.save(100, "full", writer=LayerwiseWriter)
    got = ours(memory, place(above))
    assert all(torch.equal(got[key], value) for key, value in held.items() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    "name",
    [
        "%2e%2e/%2e%2e/key",
        "%2E./..%2fkey",
        "/other/key",
        "../../key",
        "x/../../../key",
        "/{run}/../key",
        "memory://x/../../../../../key",
    ],
)
def test_nothing_outside_of_the_run_is_reached(memory: Run, name: str) -> None:
    """Some stores take ``%2e`` for a dot; whatever a store would make of it, it is not asked."""
    folder = memory.save(100, "full", writer=LayerwiseWriter)
    base = open_base(folder)
    for info in base.metadata.storage_data.values():
        info.relative_path = name.replace("{run}", memory.folder.key)  # type: ignore[attr-defined]
    (folder / METADATA).write_bytes(dumps(base.metadata))
    with pytest.raises(CheckpointException, match="lies outside of its run"):
        ours(memory, folder)
    with pytest.raises(LoadError, match="lies outside of its run"):
        open_checkpoint(str(folder))[f"model.{L0}.w"]


def test_pruning_is_refused(memory: Run) -> None:
    with pytest.raises(PruneRefusedError, match="object store"):
        prune(str(memory.folder), keep_last=1)


# A store that fails ------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["503", "drop", "slow"])
def test_saving_goes_on_after_a_while(there: Run, s3: S3, what: Any) -> None:
    there.save(100, "full", writer=LayerwiseWriter)
    with s3.proxy.failing(Fault("PUT", "step-200", what, times=2)):
        there.save(200, due(L0), writer=LayerwiseWriter)
    assert there.origins(200) == {L0: 200, L1: 100, L2: 100, HEAD: 100}


@pytest.mark.parametrize("what", ["503", "drop", "cut", "slow"])
def test_loading_goes_on_after_a_while(there: Run, s3: S3, what: Any) -> None:
    last = saved(there)
    want = there.load(last)
    with s3.proxy.failing(Fault("GET", "step-", what, times=2)):
        got = ours(there, last)
    assert all(torch.equal(got[key], value) for key, value in want.items() if isinstance(value, torch.Tensor))


def test_a_load_that_fails_says_which_object(there: Run, s3: S3) -> None:
    last = saved(there)
    target = state(there.model, 0, None, empty=True)
    with s3.proxy.failing(Fault("GET", ".distcp", "cut")), pytest.raises(CheckpointException) as caught:
        dcp.load(target, storage_reader=LayerwiseReader(str(last), atomic=True))
    error = next(iter(caught.value.failures.values()))[0]
    assert isinstance(error, LoadError) and "s3://bucket/" in str(error) and "\n" not in str(error)
    assert all(not value.any() for value in flat(target).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("path", ["__0_", METADATA])
def test_a_save_that_fails_is_none(there: Run, s3: S3, path: str) -> None:
    """Whatever cannot be put, the checkpoint is not there, the folder's old one still is, and training goes on."""
    there.save(100, "full", writer=LayerwiseWriter)
    there.save(200, due(L0), writer=LayerwiseWriter)
    for step in (200, 300):
        failing = s3.proxy.failing(Fault("PUT", f"step-{step}/{path}", "503"))
        with failing, pytest.raises(CheckpointException) as caught:
            there.save(step, "full", writer=LayerwiseWriter)
        text = str(next(iter(caught.value.failures.values()))[0])
        assert "nothing was committed" in text and "\n" not in text
    assert not (there.path(300) / METADATA).exists()
    assert there.origins(200) == {L0: 200, L1: 100, L2: 100, HEAD: 100}
    there.save(400, due(L1), writer=LayerwiseWriter)
    assert there.origins(400) == {L0: 200, L1: 400, L2: 100, HEAD: 100}


def test_an_upload_that_is_cut_off_is_given_up(s3: S3) -> None:
    """Of a large file whose parts cannot all be uploaded nothing stays, and no checkpoint is there."""
    url = f"{s3_run()}/step-1"
    fsspec.config.conf["s3"] = {**s3.options, "default_block_size": 5 << 20}
    try:
        model = {"model": {"a.weight": torch.randn(3 << 20)}}
        with s3.proxy.failing(Fault("PART", "step-1", "503", skip=1)), pytest.raises(CheckpointException):
            dcp.save(model, storage_writer=LayerwiseWriter(url), planner=LayerwisePlanner("full"))
        assert s3.uploads() == [] and not place(url).exists()
        with s3.proxy.counted() as noted:
            dcp.save(model, storage_writer=LayerwiseWriter(url), planner=LayerwisePlanner("full"))
        assert {"CREATE": 1, "COMPLETE": 1}.items() <= kinds(noted).items() and kinds(noted)["PART"] >= 2
        target = {"model": {"a.weight": torch.zeros(3 << 20)}}
        dcp.load(target, storage_reader=LayerwiseReader(url, verify=True))
        assert torch.equal(target["model"]["a.weight"], model["model"]["a.weight"])
    finally:
        fsspec.config.conf["s3"] = s3.options


def test_the_commit_is_one_put_and_comes_last(there: Run, s3: S3) -> None:
    there.save(100, "full", writer=LayerwiseWriter)
    with s3.proxy.counted() as noted:
        there.save(200, due(L0), writer=LayerwiseWriter)
    written = [r for r in noted if r.kind not in ("GET", "HEAD", "LIST")]
    assert {r.kind for r in written} == {"PUT"} and [METADATA in r.path for r in written].count(True) == 1
    assert METADATA in written[-1].path


@pytest.mark.parametrize("staged", [False, True])
def test_asynchronous_saves(there: Run, staged: bool) -> None:
    """In a background thread, the whole state staged or only what is due; carried from the save before."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for step, layers in ((100, LAYERS), (200, (L0,))):
            path = there.path(step)
            planner = LayerwisePlanner(due(*layers))
            dcp.async_save(
                there.state(step),
                storage_writer=LayerwiseWriter(path),
                planner=planner,
                async_stager=planner.stager(path) if staged else None,
            ).result()  # type: ignore[union-attr]
    finally:
        dist.destroy_process_group()
    assert there.origins(200) == {L0: 200, L1: 100, L2: 100, HEAD: 100}
