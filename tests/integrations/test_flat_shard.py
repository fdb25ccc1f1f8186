"""FlatShard: a flat piece of a tensor as DCP and its stagers see it, without any engine."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from torch.distributed.checkpoint.staging import BlockingAsyncStager, DefaultStager, StagingOptions

from tailor_dcp import LayerwisePlanner, TailorError
from tailor_dcp.integrations.flat_shard import FlatShard
from tailor_dcp.ties import find_ties

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = torch.Size((3, 5, 7))


def whole(size: torch.Size = SIZE) -> FlatShard:
    """Return a tensor that is counted up, all of it in a part of a larger buffer."""
    count = size.numel()
    return FlatShard(torch.arange(count + 10).float().narrow(0, 4, count), 0, size)


def values(shard: FlatShard) -> torch.Tensor:
    """Return the elements that a shard holds, in the order of the flattened tensor, by the chunks that DCP sees."""
    parts = [shard.__get_tensor_shard__(item.index).flatten() for item in _create_write_items("a", shard)]
    return torch.cat(parts) if parts else torch.empty(0)


@given(st.data(), st.lists(st.integers(1, 5), max_size=4))
def test_chunks_are_the_slices_of_the_tensor(data: st.DataObject, size: list[int]) -> None:
    tensor = torch.arange(math.prod(size)).float().view(size)
    start = data.draw(st.integers(0, tensor.numel()))
    length = data.draw(st.integers(0, tensor.numel() - start))
    shard = FlatShard(tensor.flatten().narrow(0, start, length), start, tensor.size())
    held = 0
    for item in _create_write_items("a", shard):
        assert item.tensor_data is not None
        chunk = item.tensor_data.chunk
        place = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        assert torch.equal(shard.__get_tensor_shard__(item.index), tensor[place])
        held += chunk.sizes.numel()
    assert held == length


@pytest.mark.parametrize("size", [SIZE, torch.Size(()), torch.Size((1,))], ids=str)
def test_stock_dcp_saves_and_loads_it(tmp_path: Path, size: torch.Size) -> None:
    """Whole tensors are loaded into shards and shards into whole tensors."""
    tensor = whole(size)._flat.view(size).clone()
    dcp.save({"a": whole(size)}, checkpoint_id=tmp_path / "shards")
    dcp.save({"a": tensor}, checkpoint_id=tmp_path / "whole")
    plain = torch.zeros(size)
    dcp.load({"a": plain}, checkpoint_id=tmp_path / "shards")
    assert torch.equal(plain, tensor)
    buffer = torch.zeros(size.numel() + 2)
    dcp.load({"a": FlatShard(buffer[1:-1], 0, size)}, checkpoint_id=tmp_path / "whole")
    assert torch.equal(buffer, torch.nn.functional.pad(tensor.flatten(), (1, 1)))


def _by_planner(state: dict[str, Any]) -> Any:
    return LayerwisePlanner("full", base=None).stager("step-1").stage(state)


COPIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "DefaultStager": DefaultStager(StagingOptions(False, False, False, False)).stage,
    "BlockingAsyncStager": BlockingAsyncStager().stage,
    "planner": _by_planner,
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_are_shards_with_memory_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.chdir(tmp_path)
    part = FlatShard(torch.arange(20).float(), 13, SIZE)
    empty = FlatShard(torch.empty(0), 0, SIZE)
    state = {"model": {"layers.0.a": part, "layers.0.b": whole(), "layers.0.c": empty}}
    expected = {name: values(shard).clone() for name, shard in state["model"].items()}
    # A rank alone may not save a part, so the planner's stager is given what another rank would add.
    if way == "planner":
        state["model"].pop("layers.0.a")
    copied = COPIES[way](state)["model"]
    for shard in state["model"].values():
        shard._flat.fill_(-1)
    for name, shard in copied.items():
        assert isinstance(shard, FlatShard)
        assert shard.size() == SIZE
        assert torch.equal(values(shard), expected[name]), name
        assert shard.__create_chunk_list__() == state["model"][name].__create_chunk_list__()


def test_a_stager_that_would_lose_numbers_is_stopped() -> None:
    """BlockingAsyncStager makes a plain number of it on every rank, and one rank's would be kept: any."""
    with pytest.raises(TailorError, match=r"async_stager=planner\.stager"):
        BlockingAsyncStager().stage({"a": FlatShard(torch.ones(1), 0, torch.Size(()))})


def test_ties_are_seen_and_neighbours_are_not_tied() -> None:
    buffer = torch.zeros(200)
    first, second = (FlatShard(buffer.narrow(0, at, 100), 0, SIZE) for at in (0, 100))
    again = FlatShard(buffer.narrow(0, 0, 100), 0, SIZE)
    assert find_ties({"a": first, "b": second, "c": again, "d": FlatShard(buffer[:0], 0, SIZE)}) == [("a", "c")]


def test_nothing_can_be_computed_with_it() -> None:
    with pytest.raises(TailorError, match="compute with the engine's module instead"):
        whole() + 1
    assert repr(whole()) == "FlatShard(elements 0 to 105 of (3, 5, 7), torch.float32)"
