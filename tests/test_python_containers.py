"""Deques and default dicts come back as stock pickle has them, and a pickle can do nothing else with their names."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp import LayerwiseReader, open_checkpoint
from tailor_dcp.unpickling import asked_for, load
from tests.attacks.ground import archive

FACTORIES = [None, bool, dict, float, int, list, set, str, tuple]
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.binary(max_size=3), st.just(int))
keys = st.one_of(st.text(max_size=2), st.integers(), st.tuples(st.integers()), st.sampled_from([int, float]))


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists, dicts = st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)
    return st.one_of(
        lists,
        lists.map(tuple),
        dicts,
        dicts.map(OrderedDict),
        st.builds(deque, lists, st.none() | st.integers(0, 5)),
        st.builds(defaultdict, st.sampled_from(FACTORIES), dicts),
        st.sets(keys, max_size=3),
        st.frozensets(keys, max_size=3),
        lists.map(lambda held: [held, held]),
    )


def _through(value: Any) -> Any:
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return load(stream)


def _told(value: Any) -> Any:
    """Return what two values have in common if they are equal, and made of the same classes."""
    if isinstance(value, list | tuple | deque):
        return type(value), getattr(value, "maxlen", None), [_told(held) for held in value]
    if isinstance(value, dict):
        missing = getattr(value, "default_factory", None)
        return type(value), missing, [(_told(key), _told(held)) for key, held in value.items()]
    return type(value), value


@given(st.recursive(plain, _containers, max_leaves=12))
def test_they_come_back_as_they_were(value: Any) -> None:
    assert _told(_through(value)) == _told(pickle.loads(pickle.dumps(value, 2)))


def test_what_is_shared_stays_shared() -> None:
    window = deque([1.0], maxlen=3)
    back = _through({"loss": window, "again": [window]})
    assert back["loss"] is back["again"][0]
    assert back["loss"].maxlen == 3


def test_tensors_in_them_come_back() -> None:
    back = _through(deque([{"norm": torch.arange(3.0)}]))
    assert torch.equal(back[0]["norm"], torch.arange(3.0))


def test_one_that_holds_itself_is_refused() -> None:
    held: deque[Any] = deque()
    held.append([held])
    with pytest.raises(pickle.UnpicklingError, match="holds itself"):
        _through(held)


def test_a_training_that_keeps_a_window_of_losses_is_read_and_resumed(tmp_path: Path) -> None:
    """Without any permission, by name and by a load."""
    losses = deque([0.5, 0.25, defaultdict(int, {"a": 2})], maxlen=100)
    kept = {"w": torch.ones(2), "train": {"losses": copy.copy(losses)}}
    dcp.save(kept, checkpoint_id=tmp_path / "step-1")
    assert _told(open_checkpoint(tmp_path / "step-1")["train.losses"]) == _told(losses)
    target: dict[str, Any] = {"w": torch.zeros(2), "train": {"losses": None}}
    dcp.load(target, storage_reader=LayerwiseReader(tmp_path / "step-1"))
    assert target["train"]["losses"].maxlen == 100


class _Calls:
    """Pickles as a call."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self._call = call, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize(
    "value",
    [
        _Calls(deque, range(10**12)),
        _Calls(deque, [1, 2]),
        _Calls(deque, (), -1),
        _Calls(deque, (), 10**30),
        _Calls(deque, (), "3"),
        _Calls(defaultdict, print),
        _Calls(defaultdict, list, {"a": 1}),
        _Calls(defaultdict, "list"),
        _Calls(defaultdict, _Calls(int, 3)),
        _Calls(list, range(10**12)),
        _Calls(int, "9" * 5000),
        _Calls(str, 10**5000),
        _Calls(tuple, range(10**12)),
    ],
)
def test_a_pickle_can_make_nothing_else_of_their_names(value: Any) -> None:
    with pytest.raises((pickle.UnpicklingError, OverflowError)):
        load(io.BytesIO(archive(pickle.dumps(value, 2))))


def test_functions_are_still_asked_for() -> None:
    with pytest.raises(pickle.UnpicklingError) as refused:
        _through(defaultdict(copy.copy))
    assert asked_for(refused.value) == "copy.copy"
