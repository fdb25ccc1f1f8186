"""Reading ``.metadata``: as stock does for honest files, and never more than that for any other."""

from __future__ import annotations

import gc
import os
import pickle
import pickletools
import random
import resource
import signal
import sys
import time
import traceback
from itertools import product
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldProperties
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tailor_dcp.errors import NoCheckpointError, UnreadableMetadataError
from tailor_dcp.metadata import pickle_machine, pickle_writer, safe_pickle
from tailor_dcp.metadata.safe_pickle import loads, read
from tests.metadata.hostile import (
    ATTACKS,
    ENCODING,
    Attack,
    called,
    metadata,
    name,
    properties,
    tensor,
    text,
    with_tensor,
)

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


# --- Honest files, as they are written ---


def sharded(ranks: int, tensors: int, dims: tuple[int, ...] = (64, 3)) -> Metadata:
    """What stock leaves after a save by some ranks, whose results each arrive as a pickle of their own."""
    state: dict[str, Any] = {"train.step": BytesStorageMetadata()}
    results: list[dict[MetadataIndex, _StorageInfo]] = [{} for _ in range(ranks)]
    results[0][MetadataIndex("train.step")] = _StorageInfo("__0_0.distcp", 0, 1300)
    for number in range(tensors):
        fqn, rows, chunks = f"model.layers.{number}.weight", dims[0] // ranks, []
        for rank in range(ranks):
            offset, size = torch.Size((rows * rank, *[0] * (len(dims) - 1))), torch.Size((rows, *dims[1:]))
            chunks.append(ChunkStorageMetadata(offset, size))
            place = _StorageInfo(f"__{rank}_0.distcp", number << 33, 1577)
            results[rank][MetadataIndex(fqn, offset, rank)] = place
        state[fqn] = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size(dims), chunks)
    places: dict[MetadataIndex, _StorageInfo] = {}
    for result in results:
        places.update(pickle.loads(pickle.dumps(result)))
    paths = {fqn: tuple(fqn.split(".")) for fqn in state}
    return Metadata(state, paths, places, StorageMeta("run/step-1", "id", None, []), "1.0.0")


def same(ours: Metadata, stock: Metadata) -> bool:
    """Equal, but for the path that stock keeps as one, and the list without which its StorageMeta is not whole."""
    if (meta := stock.storage_meta) is not None:
        meta.checkpoint_id = None if meta.checkpoint_id is None else str(meta.checkpoint_id)
        vars(meta).setdefault("modules", [])
    return ours == stock and getattr(ours, "tailor", None) == getattr(stock, "tailor", None)


@pytest.mark.parametrize("flat", [True, False])
def test_reads_what_dcp_saves(tmp_path: Path, flat: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 3, "scalar": torch.tensor(1.0)}
    dcp.save(state, checkpoint_id=tmp_path, planner=DefaultSavePlanner(flatten_state_dict=flat))
    ours = read(tmp_path / ".metadata")
    stock = FileSystemReader(tmp_path).read_metadata()
    stock.storage_meta.load_id = None
    assert (ours.planner_data is None) == (not flat)
    assert ours.storage_meta.checkpoint_id == str(tmp_path)
    assert same(ours, stock)


def test_reads_what_dcp_saves_of_a_dtensor(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        state = {f"w{i}": distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]) for i in range(3)}
        dcp.save(state, checkpoint_id=tmp_path)
    finally:
        dist.destroy_process_group()
    data = (tmp_path / ".metadata").read_bytes()
    assert same(loads(data, "it"), pickle.loads(data))


@pytest.mark.parametrize(
    ("ranks", "tensors", "dims"), [(1, 300, (4, 3)), (16, 90, (64, 3)), (2, 3, (4,) * 6), (1, 9, ())]
)
def test_reads_large_files(ranks: int, tensors: int, dims: tuple[int, ...]) -> None:
    stock = sharded(ranks, tensors, dims) if dims else sharded(1, tensors, (1,))
    for protocol in PROTOCOLS:
        data = pickle.dumps(stock, protocol)
        once = loads(data, "it")
        assert once == stock
        # A composite is written from what was read, and shares what reading shared.
        assert loads(pickle.dumps(once, protocol), "it") == stock
        assert loads(pickletools.optimize(data), "it") == stock


@pytest.mark.parametrize("how", ["as stock writes it", "as read and written again", "as we write it"])
def test_most_of_a_large_file_is_read_whole_entries_at_a_time(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    data = pickle.dumps(sharded(64, 40))
    data = pickle.dumps(loads(data, "it")) if "again" in how else data
    data = pickle_writer.dumps(sharded(64, 40)) if "we" in how else data
    counts: list[int] = []

    def counted(step: Any) -> Any:
        def count(machine: Any) -> None:
            counts[-1] += 1
            step(machine)

        return count

    monkeypatch.setattr(pickle_machine, "STEPS", [counted(step) for step in pickle_machine.STEPS])
    for shortcuts in (safe_pickle.SHORTCUTS, {}):
        monkeypatch.setattr(safe_pickle, "SHORTCUTS", shortcuts)
        counts.append(0)
        loads(data, "it")
    assert counts[0] * 15 < counts[1]


def test_reads_what_other_versions_write() -> None:
    by_name = called(name("builtins", "getattr"), ENCODING, text("TORCH_CHANNELS_LAST"))
    data = with_tensor(tensor(about=properties(memory_format=by_name)))
    assert same(loads(data, "it"), pickle.loads(data))
    assert loads(data, "it").state_dict_metadata["w"].properties.memory_format is torch.channels_last

    old = sharded(2, 2)
    for entry in old.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.properties = OldProperties(torch.bfloat16)
    assert loads(pickle.dumps(old), "it") == sharded(2, 2)

    early = sharded(2, 2)
    del early.storage_meta, early.version
    assert same(loads(pickle.dumps(early), "it"), pickle.loads(pickle.dumps(early)))
    early.storage_meta = StorageMeta("run/step-1")
    del early.storage_meta.modules
    assert loads(pickle.dumps(early), "it").storage_meta == StorageMeta("run/step-1")


def test_reads_every_dtype_layout_and_memory_format() -> None:
    stock = sharded(1, 0)
    layouts = [value for value in vars(torch).values() if isinstance(value, torch.layout)]
    dtypes = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
    formats = [torch.contiguous_format, torch.channels_last, torch.preserve_format]
    for number, about in enumerate(product(dtypes, layouts[:2], [True], formats, [False, True])):
        stock.state_dict_metadata[f"{number}"] = TensorStorageMetadata(TensorProperties(*about), torch.Size(()), [])
    for number, layout in enumerate(layouts):
        about = TensorProperties(torch.float32, layout)
        stock.state_dict_metadata[f"layout {number}"] = TensorStorageMetadata(about, torch.Size(()), [])
    assert loads(pickle.dumps(stock), "it") == stock


@pytest.mark.parametrize("module", [b"pathlib", b"pathlib._local"])
@pytest.mark.parametrize("path", [PurePosixPath("/a/b"), PureWindowsPath("c:\\a\\b"), Path("a"), PurePosixPath()])
def test_paths_become_text(module: bytes, path: Path) -> None:
    stock = sharded(1, 1)
    stock.storage_meta = StorageMeta(path)
    data = pickle.dumps(stock, 2).replace(b"cpathlib\n", b"c" + module + b"\n")
    assert loads(data, "it").storage_meta == StorageMeta(str(path))


class Composite(Metadata):
    """What the planner makes: it pickles itself as a plain ``Metadata``."""

    def __reduce__(self) -> tuple[Any, ...]:
        rest = dict(vars(self))
        return Metadata, (rest.pop("state_dict_metadata"),), rest


def test_reads_what_the_planner_writes() -> None:
    stock = sharded(2, 3)
    composite = Composite(**vars(stock))
    composite.tailor = {"units": [("model.layers.0", "weight"), 3, None, 1.5, b"x", True]}
    for protocol in PROTOCOLS[1:]:  # protocol 2 has no bytes
        data = pickle.dumps(composite, protocol)
        ours = loads(data, "it")
        assert type(ours) is Metadata
        assert ours == stock
        assert ours.tailor == composite.tailor


@pytest.mark.parametrize("record", [-1, 1 << 70, None, "x", (), [], {}, {(1, "a"): -1}])
def test_reads_any_plain_record(record: object) -> None:
    stock = sharded(1, 1)
    stock.tailor = stock.planner_data = record
    for protocol in PROTOCOLS:
        ours = loads(pickle.dumps(stock, protocol), "it")
        assert ours.tailor == ours.planner_data == record
        assert type(ours.tailor) is type(record)


def test_drops_what_it_does_not_know() -> None:
    stock = sharded(1, 1)
    stock.mcore_data = {"a": [1]}
    ours = loads(pickle.dumps(stock), "it")
    assert ours == stock
    assert set(vars(ours)) == {"state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"}


# --- Honest files, as they might be written ---

sizes = st.integers(0, 1 << 40)
fqns = st.text(max_size=300) | st.text("abc.0123", max_size=20)


@st.composite
def tensors(draw: st.DrawFn) -> TensorStorageMetadata:
    dims = draw(st.lists(sizes, max_size=5))
    chunks = []
    for _ in range(draw(st.integers(0, 4))):
        ends = [draw(st.integers(0, dim)) for dim in dims]
        starts = [draw(st.integers(0, end)) for end in ends]
        extents = torch.Size([end - start for start, end in zip(starts, ends, strict=True)])
        chunks.append(ChunkStorageMetadata(torch.Size(starts), extents))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.float8_e4m3fn]))
    memory = draw(st.sampled_from([torch.contiguous_format, torch.channels_last, torch.preserve_format]))
    about = TensorProperties(dtype, torch.strided, draw(st.booleans()), memory, draw(st.booleans()))
    return TensorStorageMetadata(about, torch.Size(dims), chunks)


indexes = st.builds(MetadataIndex, fqns, st.none() | st.lists(sizes, max_size=4), st.none() | st.integers(0, 1 << 33))
transforms = st.none() | st.lists(st.text(max_size=5), max_size=3) | st.tuples(st.text(max_size=5))
infos = st.builds(_StorageInfo, st.text("ab/._é", max_size=9), sizes, sizes, transforms)
atoms = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9)
keys = atoms | st.lists(atoms, max_size=3).map(tuple)
plain = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def metadatas(draw: st.DrawFn) -> Metadata:
    stock = Metadata(
        draw(st.dictionaries(fqns, tensors() | st.builds(BytesStorageMetadata), max_size=5)),
        draw(st.none() | st.dictionaries(fqns, st.lists(fqns | st.integers(0, 9), max_size=4).map(tuple), max_size=4)),
        draw(st.dictionaries(indexes, infos, max_size=5)),
        draw(st.none() | st.builds(StorageMeta, st.none() | fqns | st.just(Path("/run")), st.none() | st.text())),
        draw(st.none() | st.just("1.0.0")),
    )
    if draw(st.booleans()):
        stock.tailor = draw(plain)
    return stock


@settings(max_examples=150)
@given(metadatas(), st.sampled_from(PROTOCOLS), st.booleans(), st.booleans())
def test_equals_stock(stock: Metadata, protocol: int, again: bool, optimized: bool) -> None:
    data = pickle.dumps(stock, protocol)
    data = pickle.dumps(pickle.loads(data), protocol) if again else data
    data = pickletools.optimize(data) if optimized else data
    assert same(loads(data, "it"), pickle.loads(data))
    assert same(loads(pickle.dumps(loads(data, "it"), protocol), "it"), pickle.loads(data))


# --- Damaged files ---


def outcome(data: bytes) -> Metadata | str:
    try:
        return loads(data, "run/.metadata")
    except UnreadableMetadataError as error:
        assert str(error).startswith("run/.metadata ")
        return str(error)


def assert_sound(made: Metadata) -> None:
    """Exactly the types that the rest of the package counts on."""
    assert type(made) is Metadata
    for fqn, entry in made.state_dict_metadata.items():
        assert type(fqn) is str
        if type(entry) is not BytesStorageMetadata:
            assert type(entry) is TensorStorageMetadata
            assert type(entry.properties) is TensorProperties
            assert type(entry.properties.dtype) is torch.dtype
            for chunk in entry.chunks:
                assert all(
                    0 <= start <= start + extent <= dim
                    for start, extent, dim in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
                )
    for index, info in made.storage_data.items():
        assert type(index.fqn) is type(info.relative_path) is str
        assert index.offset is None or type(index.offset) is torch.Size
        assert min(info.offset, info.length, index.index or 0) >= 0
        assert "\0" not in info.relative_path


SAMPLES = [
    pickle.dumps(sharded(8, 2)),
    pickle.dumps(sharded(1, 5)),
    pickle.dumps(sharded(2, 2), 2),
    pickle_writer.dumps(sharded(8, 2)),
    pickle_writer.dumps(sharded(1, 9)),
    metadata(),
]


@settings(max_examples=400)
@given(st.sampled_from(SAMPLES), st.data())
def test_damage_is_refused_or_harmless(data: bytes, draw: st.DataObject) -> None:
    """Interpreted by whole entries or by single instructions, all the same."""
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        at = draw.draw(st.integers(0, len(data) - 1))
        damaged[at] = draw.draw(st.integers(0, 255) | st.sampled_from(data))
    cut = draw.draw(st.just(len(data)) | st.integers(0, len(data)))
    made = outcome(bytes(damaged[:cut]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safe_pickle, "SHORTCUTS", {})
        plainly = outcome(bytes(damaged[:cut]))
    assert isinstance(made, str) == isinstance(plainly, str)
    if isinstance(made, Metadata):
        assert_sound(made)
        assert made == plainly
        assert same(made, pickle.loads(bytes(damaged[:cut])))


def test_every_truncation_and_many_flips_are_quick_and_import_nothing() -> None:
    chance, data = random.Random(0), SAMPLES[0]
    modules, start = set(sys.modules), time.process_time()
    for cut in range(0, len(data), 3):
        assert isinstance(outcome(data[:cut]), str)
    for _ in range(3000):
        at, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
        outcome(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
    assert set(sys.modules) == modules
    assert time.process_time() - start < 20


def test_restores_the_collector() -> None:
    assert gc.isenabled()
    outcome(b"")
    assert gc.isenabled()
    gc.disable()
    try:
        loads(SAMPLES[1], "it")
        assert not gc.isenabled()
    finally:
        gc.enable()


# --- Hostile files ---


class Seen(NamedTuple):
    """What a process saw that read a file."""

    error: str
    seconds: float
    modules: set[str]


def apart(task: Any, megabytes: int = 1024) -> Seen | None:
    """Run in a process of its own, that may take so much more memory; None if it died."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20),) * 2)
            signal.alarm(30)
            modules, start, error = set(sys.modules), time.process_time(), "nothing was raised"
            try:
                task()
            except BaseException as raised:  # also what is not an Exception
                error = f"{type(raised).__name__}: {raised}"
            seen = Seen(error, time.process_time() - start, set(sys.modules) - modules)
            os.write(writing, pickle.dumps(tuple(seen)))
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return Seen(*pickle.loads(told)) if told else None


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is limited by its /proc")


@needs_linux
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attacks_are_refused(attack: Attack, tmp_path: Path) -> None:
    sentinel = tmp_path / "it-ran"
    data = attack.build(sentinel)
    seen = apart(lambda: loads(data, "run/step-3/.metadata"))
    assert seen is not None, "the reader died"
    assert seen.error.startswith("UnreadableMetadataError: run/step-3/.metadata ")
    assert attack.says in seen.error
    assert len(seen.error) < 500
    assert not sentinel.exists()
    assert not seen.modules
    assert seen.seconds < 3


@needs_linux
@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack.runs], ids=lambda attack: attack.name)
def test_the_attacks_are_real(attack: Attack, tmp_path: Path) -> None:
    sentinel = tmp_path / "it-ran"
    data = attack.build(sentinel)
    apart(lambda: pickle.loads(data))
    assert sentinel.exists()


def test_says_what_was_asked_for() -> None:
    with pytest.raises(UnreadableMetadataError) as caught:
        loads(metadata(version=called(name("os", "system"), text("true"))), "run/step-3/.metadata")
    assert str(caught.value) == (
        "run/step-3/.metadata asks for os.system, which no DCP metadata needs; it was not run. Do not load this file."
    )


# --- Files ---


def test_a_missing_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for missing in (tmp_path / "step-1" / ".metadata", tmp_path / "file" / ".metadata"):
        with pytest.raises(NoCheckpointError, match="does not exist"):
            read(missing)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UnreadableMetadataError, match="is not a regular file"):
            read(other)


def test_the_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n.")
    with pytest.raises(UnreadableMetadataError, match=rf"^{tmp_path}/.metadata asks for os.system, "):
        read(tmp_path / ".metadata")
