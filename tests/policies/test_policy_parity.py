from __future__ import annotations

import policy_runs as made
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies import Parity


@given(made.runs(), made.parities)
def test_no_unit_is_staler_than_the_bound(run, policy):
    """From the first save on, whatever was written before."""
    for _ in range(2 * policy.groups + 1):
        run.save(policy)
        assert max(run.staleness().values(), default=0) <= policy.groups - 1


@given(made.states(), st.integers(0, 50), made.parities)
def test_after_a_full_save_each_window_writes_every_layer_once(layers, index, policy):
    run = made.Run(layers, index)
    assert run.save(policy) == set(run.units), "nothing was saved before, so all is due"
    saves = [run.save(policy) for _ in range(3 * policy.groups)]
    for start in range(len(saves) - policy.groups + 1):
        window = saves[start : start + policy.groups]
        assert sorted(unit for due in window for unit in due) == sorted(run.units)


@given(made.runs(), made.parities)
def test_a_layers_units_are_due_together_once_in_step(run, policy):
    for _ in range(policy.groups):
        run.save(policy)
    for _ in range(policy.groups):
        due = run.save(policy)
        for layer in run.layers:
            assert len(due.intersection(layer.units)) in (0, len(layer.units))


def test_odd_and_even_layers_alternate():
    """The default, spelled out."""
    run = made.Run(made.llama(4))
    run.save(Parity())
    odd, even = run.save(Parity()), run.save(Parity())
    assert {u.layer for u in odd} == {"model.layers.1", "model.layers.3", "model.embed_tokens"}
    assert {u.layer for u in even} == {"model.layers.0", "model.layers.2", "lm_head", "model.norm"}


def test_cohorts_are_the_groups():
    cohorts = Parity(groups=3).cohorts(made.Run([made.block(4)]).request())
    assert set(cohorts.values()) == {"1"}


@pytest.mark.parametrize("groups", [0, -1, 2.0, "2", None, True])
def test_bad_groups(groups):
    with pytest.raises(PolicyError, match=r"groups=.* of the policy 'parity' .* a whole number, 1 or more\.$"):
        Parity(groups=groups)
