"""State that each rank has for itself: gathered, restored, divided among other ranks."""

from __future__ import annotations

import random
from collections import OrderedDict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tailor_dcp import rank_state
from tailor_dcp.errors import TailorError
from tests.support.fleet import Fleet
from tests.support.training import draws


def through(value: Any) -> Any:
    """Return what comes back of a value."""
    return rank_state.unpack(rank_state.pack([value]), "train.dataloader")[0]


def test_every_rank_gets_every_ranks_value(fleet: Fleet) -> None:
    """In the order of ranks, in whatever group of processes; alone, a list of one."""
    assert fleet.call("tests.support.training:gathered", ranks=3) == [[0, 10, 20]] * 3
    assert rank_state.gather("mine") == ["mine"]
    assert (rank_state.rank_of(), rank_state.world_size()) == (0, 1)


def test_generators_go_on_where_they_were() -> None:
    """Python's, numpy's and torch's, numpy's half-used pair of normal numbers included."""
    np.random.normal()
    state = rank_state.rng_state()
    expected = [draws(), draws(), float(np.random.normal()), random.gauss()]
    draws()
    rank_state.set_rng_state(through(state))
    assert [draws(), draws(), float(np.random.normal()), random.gauss()] == expected


def test_a_new_rank_is_seeded_reproducibly_and_unlike_any_other() -> None:
    """The same rank draws the same numbers again, and no two ranks or states the same."""
    state = rank_state.rng_state()
    draws()
    other = rank_state.rng_state()
    seen = set()
    for source in (state, other):
        for rank in range(50):
            rank_state.seed_from(source, rank)
            first = draws()
            rank_state.seed_from(source, rank)
            assert draws() == first
            seen |= {*first}
    assert len(seen) == 2 * 50 * 3


@pytest.mark.parametrize(
    "value",
    [
        {"position": 3, "done": [1, 2.5, None, "x"], "nested": {"at": (1, 2)}},
        {"order": torch.arange(5), "seen": {1, 2}, "map": OrderedDict(a=1)},
        {"count": np.int64(3), "loss": np.float32(0.5), "flag": np.bool_(1)},
        {"order": np.arange(5), "names": np.array(["a", "b"]), "rng": np.random.RandomState(0).get_state()},
        {"rng": np.random.default_rng(0).bit_generator.state, "python": random.Random(1).getstate()},
    ],
    ids=["builtins", "torch", "numpy numbers", "numpy arrays", "generators"],
)
def test_states_as_data_loaders_have_them_come_back_equal(value: Any) -> None:
    """Builtins, tensors, numpy's numbers and arrays."""
    assert rank_state.same(through(value), value)


def test_an_unknown_class_is_named_in_one_sentence_with_the_way_to_admit_it() -> None:
    """Nothing of a checkpoint is run unasked; admitted, it is restored."""
    with pytest.raises(TailorError) as caught:
        through({"share": Fraction(1, 3)})
    assert str(caught.value) == (
        "train.dataloader of the checkpoint holds a fractions.Fraction, a class that is not restored unasked; "
        "if you trust it, call torch.serialization.add_safe_globals([Fraction]) before loading."
    )
    with torch.serialization.safe_globals([Fraction]):
        assert through(Fraction(1, 3)) == Fraction(1, 3)


@pytest.mark.parametrize("damage", [b"", b"not a state", rank_state.pack([1])[:-30], rank_state.pack([1])[:40]])
def test_a_damaged_state_is_said_to_be_damaged(damage: bytes) -> None:
    """One sentence, whatever torch makes of the bytes."""
    with pytest.raises(TailorError, match=r"^train\.rng of the checkpoint is damaged \(\w+ while it was read\); load"):
        rank_state.unpack(damage, "train.rng")


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ({"p": torch.arange(3)}, {"p": torch.arange(3)}, True),
        ({"p": torch.arange(3)}, {"p": torch.arange(3) + 1}, False),
        ({"p": torch.arange(3)}, {"p": torch.arange(4)}, False),
        ({"p": torch.zeros(3)}, {"p": torch.zeros(3, dtype=torch.float64)}, False),
        ([1, (2, np.arange(3))], [1, (2, np.arange(3))], True),
        ([1, (2, np.arange(3))], [1, (2, np.ones(3))], False),
        ([1], [1, 2], False),
        ({"a": 1}, {"b": 1}, False),
        (1, 1.0, False),
    ],
)
def test_states_are_compared_by_what_is_in_them(a: Any, b: Any, equal: bool) -> None:
    """Arrays and tensors included, at any depth."""
    assert rank_state.same(a, b) is equal
