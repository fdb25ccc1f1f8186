from __future__ import annotations

from collections import Counter

import policy_runs as made
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.policies.base import UnitInfo
from tailor_dcp.policies.groups import deal, is_due


def _infos(layers):
    return [info for layer in layers for info in layer.infos()]


def _loads(layers, dealt, groups):
    loads = Counter(dict.fromkeys(range(groups), 0))
    for layer in layers:
        loads[dealt[layer.name]] += layer.bytes
    return loads


def _spread(loads):
    return max(loads.values()) - min(loads.values())


@given(made.stacks("model.layers"), made.aux_layers(), st.integers(1, 9))
def test_groups_are_balanced_within_the_largest_layer(stack, aux, groups):
    """One stack without gaps and experts: the heaviest group is at most one layer heavier."""
    blocks = [made.block(n, kinds=b.kinds, size=stack[0].size) for n, b in enumerate(stack)]
    layers = blocks + aux
    loads = _loads(layers, deal(_infos(layers), groups), groups)
    assert _spread(loads) <= max((layer.bytes for layer in layers), default=0)


@given(made.states(), st.integers(1, 9))
def test_layers_without_a_number_never_make_the_groups_less_even(layers, groups):
    """Whatever the numbered layers weigh, dealing the others adds at most one of them."""
    numbered = [layer for layer in layers if layer.number is not None]
    aux = [layer for layer in layers if layer.number is None]
    before = _spread(_loads(numbered, deal(_infos(numbered), groups), groups))
    after = _spread(_loads(layers, deal(_infos(layers), groups), groups))
    assert after <= max([before, *(layer.bytes for layer in aux)])


@given(st.data(), made.states(), st.integers(1, 9))
def test_groups_do_not_depend_on_the_order_of_units(data, layers, groups):
    """Ranks and restarts may list units in another order."""
    shuffled = data.draw(st.permutations(_infos(layers)))
    assert deal(shuffled, groups) == deal(_infos(layers), groups)


@given(made.states(), st.integers(1, 9))
def test_numbered_layers_go_by_number(layers, groups):
    """So a block's experts and its twin in another stack share its group, and every layer has one."""
    dealt = deal(_infos(layers), groups)
    assert dealt.keys() == {layer.name for layer in layers}
    assert all(0 <= group < groups for group in dealt.values())
    assert all(dealt[layer.name] == layer.number % groups for layer in layers if layer.number is not None)


def test_largest_first_to_the_lightest_group():
    """The head evens out the embedding, and the norm fills the rest."""
    assert deal(_infos(made.llama(4)), 2) == {
        "model.layers.0": 0,
        "model.layers.1": 1,
        "model.layers.2": 0,
        "model.layers.3": 1,
        "lm_head": 0,  # as large as the embedding, and first by name
        "model.embed_tokens": 1,
        "model.norm": 0,
    }


def test_a_layer_weighs_what_its_units_weigh_together():
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    layers = [
        made.Layer("a", kinds, size=3),
        made.Layer("b", ("weight",), size=8),
        made.Layer("c", ("weight",), size=2),
    ]
    assert deal(_infos(layers), 2) == {"a": 0, "b": 1, "c": 1}


def test_far_more_groups_than_layers_cost_nothing():
    """A mistyped number of groups is no memory error."""
    dealt = deal(_infos(made.llama(2)), 10**15)
    assert sorted(dealt.values()) == [0, 1, 2, 3, 4]


def test_nothing_to_deal():
    assert deal([], 3) == {}


@pytest.mark.parametrize(
    ("age", "index", "due"),
    [
        (None, 0, True),  # never written
        (1, 4, True),  # its turn
        (1, 5, False),
        (2, 5, False),
        (3, 5, True),  # not its turn, but would be 3 saves old after this save
        (9, 5, True),
    ],
)
def test_due_in_turn_or_by_age(age, index, due):
    info = UnitInfo("model.layers.1", "weight", 8, age=age)
    assert is_due(info, index, group=1, groups=3) is due
