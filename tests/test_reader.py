"""LayerwiseReader: the same values as stock's reader gives, and nothing is touched by a load that cannot succeed."""

from __future__ import annotations

import copy
import dataclasses
import io
import os
import pickle
import resource
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint._extension import ZStandard
from torch.serialization import set_crc32_options

from tailor_dcp import LayerwiseReader, LayerwiseWriter, open_checkpoint
from tailor_dcp.errors import DamagedSourceError, LoadError, NoCheckpointError
from tailor_dcp.load_planner import LayerwiseLoadPlanner
from tests.attacks.ground import archive
from tests.support import meshes
from tests.support.fleet import Fleet
from tests.support.runs import HEAD, L0, Run, due, files, metadata
from tests.support.training import Training
from tests.support.world import flat, state

pytestmark = pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
MARK = 777


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path / "run")
    made.save(100, "full")
    made.save(200, due(L0))
    made.save(300, due(HEAD), writer=LayerwiseWriter)
    return made


def _with_entry(run: Run, step: int, stored: bytes) -> None:
    """Give a checkpoint other bytes for an entry that is no tensor."""
    folder = run.path(step)
    made = metadata(folder)
    index = next(index for index in made.storage_data if index.fqn == "train.step")
    (folder / "other.distcp").write_bytes(stored)
    made.storage_data[index] = type(made.storage_data[index])("other.distcp", 0, len(stored), None)
    (folder / ".metadata").write_bytes(pickle.dumps(made))


def load(run: Run, step: int, **options: Any) -> dict[str, Any]:
    target = state(run.model, MARK, None)
    dcp.load(target, storage_reader=LayerwiseReader(run.path(step), **options))
    return flat(target)


def refused(run: Run, step: int, *words: str, planner: Any = None, **options: Any) -> None:
    """A load fails with a sentence that has these words, and leaves everything as it was."""
    target = state(run.model, MARK, None)
    with pytest.raises(dcp.api.CheckpointException) as caught:
        dcp.load(target, storage_reader=LayerwiseReader(run.path(step), **options), planner=planner)
    error = next(iter(caught.value.failures.values()))[0]
    assert isinstance(error, LoadError), error
    assert all(word in str(error) for word in words), str(error)
    assert same(flat(target), flat(state(run.model, MARK, None)))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one
    )


@pytest.mark.parametrize(
    "options", [{}, {"verify": True}, {"atomic": True}, {"threads": 1}, {"atomic": True, "verify": True}]
)
@pytest.mark.parametrize("step", [100, 200, 300])
def test_composites(run: Run, step: int, options: dict[str, Any]) -> None:
    assert same(load(run, step, **options), run.load(step))


LAYOUTS = [name for name in meshes.LAYOUTS if name not in ("one-dimensional", "expert-parallel")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(fleet: Fleet, layout: str, tmp_path: Path) -> None:
    """FSDP with TP, HSDP, ShardedTensor, pipeline stages: each loaded as it was saved, and from another layout."""
    fleet.call("tests.support.world:forget")
    for number, saved in enumerate({layout: 0, "two-dimensional": 0}):
        path = str(tmp_path / f"step-{number}")
        fleet.call("tests.support.meshes:save", saved, meshes.DENSE, number, path)
        theirs = fleet.call("tests.support.meshes:load", layout, meshes.DENSE, path)
        ours = fleet.call("tests.support.meshes:load", layout, meshes.DENSE, path, {"atomic": bool(number)})
        assert all(same(a, b) for a, b in zip(theirs, ours, strict=True))


def test_experts(fleet: Fleet, tmp_path: Path) -> None:
    fleet.call("tests.support.meshes:save", "expert-parallel", meshes.EXPERTS, 1, str(tmp_path))
    theirs = fleet.call("tests.support.meshes:load", "expert-parallel", meshes.EXPERTS, str(tmp_path))
    ours = fleet.call("tests.support.meshes:load", "expert-parallel", meshes.EXPERTS, str(tmp_path), {})
    assert all(same(a, b) for a, b in zip(theirs, ours, strict=True))


# Any part of any tensor ---------------------------------------------------------------------


class Boxes(dcp.DefaultLoadPlanner):
    """Loads one box of each tensor into a tensor of its own, however that lies in memory."""

    def __init__(
        self, boxes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]], targets: dict[str, torch.Tensor]
    ) -> None:
        super().__init__()
        self.boxes, self.targets = boxes, targets

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        items = [item for item in plan.items if item.storage_index.fqn in self.boxes]
        cut = [
            dataclasses.replace(item, storage_offsets=torch.Size(offsets), lengths=torch.Size(lengths))
            for item in items
            for offsets, lengths in [self.boxes[item.storage_index.fqn]]
        ]
        return dataclasses.replace(plan, items=cut)

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        return self.targets[read_item.storage_index.fqn]

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        pass


@st.composite
def parts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], str, torch.dtype]:
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 7, 600]), min_size=0, max_size=3)))
    offsets = tuple(draw(st.integers(0, n - 1)) for n in shape)
    lengths = tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
    way = draw(st.sampled_from(["own", "part", "transposed"]))
    return shape, offsets, lengths, way, draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("boxes")


@given(drawn=st.lists(parts(), min_size=1, max_size=4), atomic=st.booleans())
def test_any_box_into_any_memory(drawn: list[Any], atomic: bool, scratch: Path) -> None:
    tensors = {f"t{i}": torch.randn(part[0]).mul(100).to(part[4]) for i, part in enumerate(drawn)}
    path = scratch / uuid.uuid4().hex
    dcp.save(dict(tensors), checkpoint_id=path)
    targets = {f"t{i}": memory(part[2], part[3], part[4]) for i, part in enumerate(drawn)}
    boxes = {f"t{i}": (part[1], part[2]) for i, part in enumerate(drawn)}
    reader = LayerwiseReader(path, atomic=atomic, threads=2)
    dcp.load({k: torch.zeros_like(v) for k, v in tensors.items()}, storage_reader=reader, planner=Boxes(boxes, targets))
    for key, (offsets, lengths) in boxes.items():
        cut = tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))
        assert torch.equal(targets[key], tensors[key][cut])
    shutil.rmtree(path)


def memory(shape: tuple[int, ...], way: str, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of zeros that lies alone, within a larger one, or with its dimensions turned round."""
    if way == "part" and shape:
        return torch.zeros([n + 2 for n in shape], dtype=dtype)[tuple(slice(1, n + 1) for n in shape)]
    if way == "transposed" and shape:
        return torch.zeros(shape[::-1], dtype=dtype).permute(tuple(range(len(shape)))[::-1])
    return torch.zeros(shape, dtype=dtype)


# Kinds of tensors ----------------------------------------------------------------------------

PAIR = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
ROWS = torch.arange(12.0).reshape(3, 4)
KINDS = {
    "no elements": (torch.zeros(0, 3), lambda: torch.zeros(0, 3)),
    "a scalar": (torch.tensor(3.0), lambda: torch.tensor(0.0)),
    "8 bits": (ROWS.to(torch.float8_e4m3fn), lambda: torch.zeros(3, 4, dtype=torch.float8_e4m3fn)),
    "bool": (ROWS > 3, lambda: torch.zeros(3, 4, dtype=torch.bool)),
    "uint16": (ROWS.to(torch.uint16), lambda: torch.zeros(3, 4, dtype=torch.uint16)),
    "complex": (PAIR, lambda: torch.zeros_like(PAIR)),
    "saved as conjugated": (PAIR.conj(), lambda: torch.zeros_like(PAIR)),
    "saved as negated": (PAIR.conj().imag, lambda: torch.zeros(2)),
    "saved as transposed": (ROWS.t(), lambda: torch.zeros(4, 3)),
    "saved as expanded": (torch.arange(3.0).expand(4, 3), lambda: torch.zeros(4, 3)),
    "saved as a slice": (torch.arange(10.0)[2:5], lambda: torch.zeros(3)),
    "a parameter": (torch.nn.Parameter(ROWS), lambda: torch.nn.Parameter(torch.zeros(3, 4))),
    "into a conjugated one": (PAIR, lambda: torch.zeros_like(PAIR).conj()),
    "into a negated one": (torch.arange(2.0), lambda: torch.zeros_like(PAIR).conj().imag),
    "into imaginary parts": (torch.arange(2.0), lambda: torch.zeros_like(PAIR).imag),
    "into a transposed one": (ROWS, lambda: torch.zeros(4, 3).t()),
    "into every other row": (ROWS, lambda: torch.zeros(6, 4)[::2]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tensors(kind: str, tmp_path: Path) -> None:
    """The same value as stock's reader gives, whatever the bits of the tensor mean and however its memory lies."""
    value, blank = KINDS[kind]
    dcp.save({"a": value}, checkpoint_id=tmp_path)
    theirs = {"a": blank()}
    dcp.load(theirs, checkpoint_id=tmp_path)
    for options in ({}, {"atomic": True}, {"verify": True}):
        ours = {"a": blank()}
        dcp.load(ours, storage_reader=LayerwiseReader(tmp_path, **options))
        assert ours["a"].tolist() == theirs["a"].tolist() == value.tolist()


def test_a_tensor_that_is_a_view_of_another(tmp_path: Path) -> None:
    dcp.save({"a": torch.arange(10.0), "b": torch.arange(3.0, 5.0)}, checkpoint_id=tmp_path)
    whole = torch.zeros(10)
    dcp.load({"a": whole, "b": whole[3:5]}, storage_reader=LayerwiseReader(tmp_path))
    assert torch.equal(whole, torch.arange(10.0))


def test_an_expanded_tensor_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(3), "b": ROWS}, checkpoint_id=tmp_path)
    target = {"a": torch.zeros(3), "b": torch.zeros(1, 4).expand(3, 4)}
    with pytest.raises(dcp.api.CheckpointException) as caught:
        dcp.load(target, storage_reader=LayerwiseReader(tmp_path))
    assert "an expanded tensor" in str(next(iter(caught.value.failures.values()))[0])
    assert not target["a"].any()


def test_metadata_is_read_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that all ranks share, each more is a rank's worth of reading."""
    from tailor_dcp.metadata import safe_pickle

    count, real = 0, safe_pickle.loads

    def counting(*args: Any) -> Any:
        nonlocal count
        count += 1
        return real(*args)

    monkeypatch.setattr(safe_pickle, "loads", counting)
    path = run.path(300)
    dcp.load(
        state(run.model, MARK, None), storage_reader=LayerwiseReader(path, atomic=True, verify=True),
        planner=LayerwiseLoadPlanner(path),
    )  # fmt: skip
    assert count == 1


# What is no plain tensor ----------------------------------------------------------------------


def test_compressed_blobs(tmp_path: Path) -> None:
    """What DCP's extensions have transformed is read as DCP reads it; tensors without elements are not read."""
    pytest.importorskip("zstandard")
    values = {"a": torch.arange(12.0).reshape(3, 4), "c": {"d": [1, "x"]}, "empty": torch.zeros(0, 3)}
    dcp.save(dict(values), storage_writer=dcp.FileSystemWriter(tmp_path, _extensions=[ZStandard()]))
    target = {"a": torch.zeros(3, 4), "c": {"d": [0, ""]}, "empty": torch.ones(0, 3)}
    dcp.load(target, storage_reader=LayerwiseReader(tmp_path))
    assert torch.equal(target["a"], values["a"])
    assert target["c"] == values["c"]


def test_blobs_of_another_kind_of_tensor(tmp_path: Path) -> None:
    """A blob whose tensor is a view of more: only torch itself can take it apart."""
    whole = torch.arange(20.0).reshape(4, 5)
    dcp.save({"a": whole.clone()}, checkpoint_id=tmp_path)
    [(index, info)] = metadata(tmp_path).storage_data.items()
    stream = io.BytesIO()
    torch.save(whole.t().contiguous().t(), stream)
    changed = metadata(tmp_path)
    changed.storage_data[index] = dataclasses.replace(info, offset=0, length=len(stream.getvalue()))
    (tmp_path / info.relative_path).write_bytes(stream.getvalue())
    (tmp_path / ".metadata").write_bytes(pickle.dumps(changed))
    target = {"a": torch.zeros(4, 5)}
    dcp.load(target, storage_reader=LayerwiseReader(tmp_path))
    assert torch.equal(target["a"], whole)


def test_a_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Scheduler, RNG and optimizer as well: everything that is no tensor goes through the planner as always."""
    first = Training(1)
    first.steps(3)
    first.save(tmp_path / "step-3", "full")
    expected = first.steps(3)
    second = Training(2)
    dcp.load(second.state, storage_reader=LayerwiseReader(tmp_path / "step-3", verify=True, atomic=True))
    assert second.steps(3) == expected


# With the load planner, narrowed dtypes, casts -------------------------------------------------


def test_layers_of_other_steps(run: Run) -> None:
    path = run.path(300)
    planner = LayerwiseLoadPlanner(path, steps={L0: 100})
    mine, theirs = state(run.model, MARK, None), state(run.model, MARK, None)
    dcp.load(mine, storage_reader=LayerwiseReader(path), planner=planner)
    dcp.load(theirs, checkpoint_id=path, planner=LayerwiseLoadPlanner(path, steps={L0: 100}))
    assert same(flat(mine), flat(theirs))


def test_narrowed_moments_come_back_as_they_were(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1, "moments:every=1,moments=bf16")
    assert same(load(run, 1), run.load(1))


def test_a_silent_cast_is_an_error(run: Run) -> None:
    target = state(run.model, MARK, None)
    key = next(iter(target["model"]))
    target["model"][key] = target["model"][key].to(torch.bfloat16)
    with pytest.raises(dcp.api.CheckpointException) as caught:
        dcp.load(target, storage_reader=LayerwiseReader(run.path(100)))
    error = next(iter(caught.value.failures.values()))[0]
    assert isinstance(error, LoadError) and "pass cast=True" in str(error) and key in str(error)
    dcp.load(target, storage_reader=LayerwiseReader(run.path(100), cast=True))
    expected = run.load(100)[f"model.{key}"]
    assert torch.equal(target["model"][key], expected.to(torch.bfloat16))


# Trouble ---------------------------------------------------------------------------------------


def test_a_missing_file(run: Run) -> None:
    name = next(name for name in sorted(files(run.path(300))) if name.endswith(".distcp"))
    (run.path(300) / name).unlink()
    refused(run, 300, "is missing", "step")


def test_a_truncated_file(run: Run) -> None:
    name = max(
        (run.path(100) / n for n in files(run.path(100)) if n.endswith(".distcp")), key=lambda p: p.stat().st_size
    )
    os.truncate(name, name.stat().st_size - 1)
    refused(run, 100, "bytes where at least", "as of step 100")


def test_a_file_outside_of_the_run(run: Run, tmp_path: Path) -> None:
    changed = metadata(run.path(100))
    (tmp_path / "outside").write_bytes(b"x" * 100_000)
    for info in changed.storage_data.values():
        info.relative_path = "../../outside"
    (run.path(100) / ".metadata").write_bytes(pickle.dumps(changed))
    refused(run, 100, "outside of its run")


@pytest.mark.parametrize("step", [100, 300])
@pytest.mark.parametrize("options", [{"verify": True}, {"verify": True, "atomic": True}])
def test_a_flipped_bit(run: Run, step: int, options: dict[str, Any]) -> None:
    """Stock's blobs by their archives' sums, LayerwiseWriter's by those of the record."""
    info = next(i for index, i in metadata(run.path(step)).storage_data.items() if index.fqn == "model.lm_head.w")
    path = run.path(step) / info.relative_path
    raw = bytearray(path.read_bytes())
    raw[info.offset + 704 + 3] ^= 1
    path.write_bytes(raw)
    refused(run, step, "checksum differs", "lm_head", f"step {step}", **options)


def test_an_entry_of_another_shape_than_the_checkpoint_says(run: Run) -> None:
    places = {index.fqn: (index, info) for index, info in metadata(run.path(100)).storage_data.items()}
    changed = metadata(run.path(100))
    index, _ = places["model.lm_head.w"]
    _, other = places[f"model.{L0}.w"]
    changed.storage_data[index] = other
    (run.path(100) / ".metadata").write_bytes(pickle.dumps(changed))
    refused(run, 100, "shape (4, 3)", "lm_head")


def test_not_committed(tmp_path: Path) -> None:
    with pytest.raises((NoCheckpointError, dcp.api.CheckpointException)):
        dcp.load({"a": torch.zeros(1)}, storage_reader=LayerwiseReader(tmp_path))


def test_a_rank_that_fails_leaves_all_untouched(fleet: Fleet, tmp_path: Path) -> None:
    """Atomic over ranks: one of them meets damage that only it reads."""
    fleet.call("tests.support.world:forget")
    path = tmp_path / "step-1"
    fleet.call("tests.support.meshes:save", "two-dimensional", meshes.DENSE, 1, str(path))
    results = fleet.call("tests.test_reader:fails_on_one_rank", str(path))
    assert [untouched for untouched, _ in results] == [True] * 4
    assert sum("another rank" in told for _, told in results) == 3


def fails_on_one_rank(group: Any, path: str) -> tuple[bool, str]:
    """Load while one rank's reading fails; return whether the tensors are untouched, and the error on this rank."""
    from tailor_dcp import reading

    target = meshes.state(group, "two-dimensional", meshes.DENSE, MARK)
    before = copy.deepcopy(target)
    real = reading.fetch
    if group.rank() == 2:

        def failing(*_: Any) -> None:
            raise DamagedSourceError("the disk is broken")

        reading.fetch = failing  # type: ignore[assignment]
    reader = LayerwiseReader(path, atomic=True, process_group=group)
    told = ""
    real_read = reader.read_data

    def noted(*args: Any) -> Any:
        nonlocal told
        try:
            return real_read(*args)
        except LoadError as error:
            told = str(error)
            raise

    reader.read_data = noted  # type: ignore[method-assign]
    try:
        dcp.load(target, storage_reader=reader, process_group=group)
    except dcp.api.CheckpointException:
        pass
    finally:
        reading.fetch = real
    mine, theirs = flat(target), flat(before)
    return all(torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k])) for k in mine), told


@pytest.mark.parametrize("options", [{}, {"atomic": True}, {"verify": True}])
def test_a_file_that_was_put_in_the_place_of_another_is_read(tmp_path: Path, options: dict[str, bool]) -> None:
    """A folder that is removed and saved again has files of the same names; none that is gone stays open."""
    opened = None
    for value in (1.0, 2.0):
        dcp.save({"a": torch.full((4,), value), "b": torch.zeros(3)}, checkpoint_id=tmp_path / "step-1")
        target = {"a": torch.zeros(4)}
        dcp.load(target, storage_reader=LayerwiseReader(tmp_path / "step-1", **options))
        opened = opened or open_checkpoint(tmp_path / "step-1")
        assert target["a"].tolist() == opened["a"].tolist() == [value] * 4
        shutil.rmtree(tmp_path / "step-1")
    with pytest.raises(LoadError, match="missing"):
        opened["a"]


def test_a_load_leaves_no_file_open(tmp_path: Path) -> None:
    """Bytes that are removed while a file is open go on taking room on the disk."""
    dcp.save({"a": torch.ones(4)}, checkpoint_id=tmp_path)
    for _ in range(3):
        dcp.load({"a": torch.zeros(4)}, storage_reader=LayerwiseReader(tmp_path))
    held = {os.path.realpath(name) for name in Path("/proc/self/fd").iterdir()}
    assert not any(name.startswith(str(tmp_path)) for name in held)


def test_without_checksums_verify_says_so(tmp_path: Path) -> None:
    """Torch can be told to write none; that is no damage, and loading works."""
    set_crc32_options(False)
    try:
        dcp.save({"w": torch.ones(9)}, checkpoint_id=tmp_path / "step-1")
    finally:
        set_crc32_options(True)
    target = {"w": torch.zeros(9)}
    with pytest.raises(dcp.api.CheckpointException, match="has no checksum of w"):
        dcp.load(target, storage_reader=LayerwiseReader(tmp_path / "step-1", verify=True))
    assert not target["w"].any()
    dcp.load(target, storage_reader=LayerwiseReader(tmp_path / "step-1"))
    assert target["w"].all()


# --- Entries that somebody else has pickled ---


@pytest.mark.parametrize("planner", [None, "ours"])
def test_an_entry_for_another_machine_is_refused_before_anything_is_touched(run: Run, planner: str | None) -> None:
    """Stock torch would find out when the tensors are filled already."""
    tensor = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x07\x00\x00\x00cuda:99K\x0ctQ"
    _with_entry(run, 200, archive(b"\x80\x02" + tensor + b".", records={"archive/data/0": bytes(48)}))
    made = LayerwiseLoadPlanner(run.path(200)) if planner else None
    refused(run, 200, "train.step", "cannot be read", planner=made, atomic=True)


def test_an_entry_whose_pickle_takes_memory_without_end_takes_none(run: Run) -> None:
    """The index of a memo has Python's own unpickler take 32 GiB, which torch's gives to stock planners."""
    _with_entry(run, 200, archive(b"\x80\x02K\x07r\xff\xff\xff\xff."))
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (4 << 30), before[1]))
    try:
        assert load(run, 200, atomic=True)["train.step"] == 7
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_an_array_that_says_that_it_is_larger_is_refused(run: Run) -> None:
    data = pickle.dumps(np.arange(3), 2)
    assert data.count(b"K\x00\x85") == 1
    _with_entry(run, 200, archive(data.replace(b"K\x00\x85", b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85")))
    refused(run, 200, "train.step", "a numpy array is made unusually")


@pytest.mark.parametrize("value", [0.0, -0.0, 0, False, True, 1, 1.0, -1.0, float("inf"), 2**70, None, [1], (1, 1.0)])
def test_numbers_that_are_equal_stay_what_they_are(tmp_path: Path, value: Any) -> None:
    kept = {"w": torch.ones(1), "of": {"one": value, "other": 1.0, "third": True, "fourth": 1, "zero": 0.0}}
    dcp.save(kept, checkpoint_id=tmp_path / "step-1")
    found: dict[str, Any] = {"w": torch.zeros(1), "of": dict.fromkeys(kept["of"])}
    dcp.load(found, storage_reader=LayerwiseReader(tmp_path / "step-1"))
    assert repr(found["of"]) == repr(kept["of"])
