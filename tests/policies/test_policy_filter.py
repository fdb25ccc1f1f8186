from __future__ import annotations

import policy_runs as made
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies import Filter


def _always(layers, policy):
    """Units that have to be fresh after each save: by rank among the stack's numbers."""
    always = set()
    for layer in layers:
        numbers = {other.number for other in layers if other.stack == layer.stack}
        if layer.number is None:
            chosen = policy.aux == "always"
        else:
            below = sum(number < layer.number for number in numbers)
            above = sum(number > layer.number for number in numbers)
            chosen = below < policy.head or above < policy.tail
        if chosen:
            always |= set(layer.units)
    return always


@given(made.runs(), made.filters)
def test_ends_are_fresh_and_the_rest_within_its_bound(run, policy):
    """From the first save on, whatever was written before."""
    always = _always(run.layers, policy)
    for _ in range(2 * policy.every + 1):
        assert always <= run.save(policy)
        assert max(run.staleness().values(), default=0) <= policy.every - 1


@given(made.states(), st.integers(0, 50), made.filters)
def test_after_a_full_save_the_rest_comes_as_a_whole_once_a_window(layers, index, policy):
    run = made.Run(layers, index)
    run.save(policy)
    rest = set(run.units) - _always(layers, policy)
    written = [run.save(policy) & rest for _ in range(2 * policy.every)]
    assert all(part in (set(), rest) for part in written)
    if rest:
        assert [bool(part) for part in written].count(True) == 2


@given(made.runs(), made.filters)
def test_cohorts_are_the_two_parts(run, policy):
    cohorts = policy.cohorts(run.request())
    always = _always(run.layers, policy)
    assert cohorts == {unit: "always" if unit in always else "rest" for unit in run.units}


def test_two_stacks_have_two_pairs_of_ends():
    layers = [made.block(n, stack) for stack in ("encoder.layers", "decoder.layers") for n in range(5)]
    run = made.Run(layers)
    run.save(Filter(head=1, tail=1))
    due = {unit.layer for unit in run.save(Filter(head=1, tail=1))}
    assert due == {"encoder.layers.0", "encoder.layers.4", "decoder.layers.0", "decoder.layers.4"}


def test_a_pipeline_stage_counts_from_its_own_first_layer():
    """Numbers need not start at 0."""
    run = made.Run([made.block(n) for n in range(16, 24)])
    run.save(Filter(head=1, tail=2))
    assert {unit.layer for unit in run.save(Filter(head=1, tail=2))} == {
        "model.layers.16",
        "model.layers.22",
        "model.layers.23",
    }


def test_experts_count_with_their_block():
    experts = [made.Layer(f"model.layers.0.mlp.experts.{e}", stack="model.layers", number=0) for e in range(3)]
    run = made.Run([*experts, made.block(0), made.block(1), made.block(2)])
    run.save(Filter(head=1, tail=0))
    due = {unit.layer for unit in run.save(Filter(head=1, tail=0))}
    assert due == {"model.layers.0", *(expert.name for expert in experts)}


@pytest.mark.parametrize(("aux", "present"), [("always", True), ("rest", False)])
def test_aux(aux, present):
    run = made.Run(made.llama())
    run.save(Filter(aux=aux))
    due = {unit.layer for unit in run.save(Filter(aux=aux))}
    assert ({"model.embed_tokens", "model.norm", "lm_head"} <= due) is present
    assert "model.layers.0" in due
    assert "model.layers.2" not in due


def test_no_ends_and_nothing_else_always():
    """Then saves in between hold nothing of their own, which is what was asked for."""
    policy = Filter(head=0, tail=0, every=3, aux="rest")
    run = made.Run(made.llama())
    assert [len(run.save(policy)) > 0 for _ in range(7)] == [True, False, False] * 2 + [True]


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"head": -1}, "a whole number, 0 or more"),
        ({"tail": -2}, "a whole number, 0 or more"),
        ({"every": 0}, "a whole number, 1 or more"),
        ({"aux": "never"}, "'always' or 'rest'"),
        ({"aux": None}, "'always' or 'rest'"),
    ],
)
def test_bad_options(options, allowed):
    [(name, value)] = options.items()
    with pytest.raises(PolicyError) as caught:
        Filter(**options)
    for part in (f"{name}={value!r}", "'filter'", allowed):
        assert part in str(caught.value)
