"""``drift:threshold=...``: what moved far, and nothing older than its bound."""

from __future__ import annotations

from dataclasses import replace

import policy_runs as made
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies import Drift, Full, Unchanged, UnitInfo, parse_policy
from tailor_dcp.policies.base import SaveRequest
from tailor_dcp.testing import check_policy
from tailor_dcp.units import WEIGHT, Unit

drifts_seen = st.one_of(st.none(), st.floats(0, 20), st.just(float("inf")))


@given(data=st.data(), run=made.runs(), policy=made.drifts)
def test_what_is_due_moved_too_far_or_is_too_old_or_is_unknown(data, run, policy):
    request = run.request()
    units = tuple(replace(info, drift=data.draw(drifts_seen)) for info in request.units)
    due = set(policy.select(replace(request, units=units)))
    for info in units:
        limit = policy.threshold if info.kind == "weight" or policy.states is None else policy.states
        if policy.half_life:
            limit *= 2 ** -(request.index / policy.half_life)
        must = info.age is None or info.drift is None or info.age > policy.max_stale
        assert (info.unit in due) == (must or info.drift > limit)


@pytest.mark.parametrize(
    "policy", [Drift(), Drift(threshold=0.3, max_stale=2), Drift(states=5.0, half_life=3, exact=True)]
)
def test_it_is_a_policy_by_all_rules(policy):
    check_policy(policy, bound=policy.max_stale)


def test_strings():
    text = "drift:threshold=0.05,states=0.6,max_stale=3,half_life=10,exact=True,weights=bf16"
    policy = Drift(0.05, 0.6, 3, 10, exact=True, weights="bf16")
    assert parse_policy(text) == policy
    assert str(policy) == text
    assert parse_policy("drift:exact=true") == Drift(exact=True)
    assert str(Drift()) == "drift"
    assert parse_policy("drift:threshold=0.05|filter:every=5").policies[0] == Drift(0.05)


def test_needs():
    """The most exact of several policies decides; Unchanged asks for what its inner policy asks for."""
    assert Drift().needs_drift == "sketch"
    assert Drift(exact=True).needs_drift == "exact"
    assert (Full() | Drift()).needs_drift == "sketch"
    assert (Drift() | Drift(exact=True)).needs_drift == "exact"
    assert Unchanged(Drift()).needs_drift == "sketch"
    assert Full().needs_drift == Unchanged(Full()).needs_drift == (Full() | Full()).needs_drift == ""


def test_storage_dtype():
    policy = Drift(weights="bf16")
    assert policy.storage_dtype(Unit("a", WEIGHT), torch.float32) == torch.bfloat16
    assert policy.storage_dtype(Unit("a", "exp_avg"), torch.float32) == torch.float32
    assert policy.storage_dtype(Unit("a", "step"), torch.float32) == torch.float32


def test_a_split_layer_moves_as_far_as_its_trained_part():
    """A frozen base that stands still must not hide that its adapters moved."""
    trained = UnitInfo("layers.0", WEIGHT, 10, 0, 1, changed=True, drift=0.5)
    frozen = UnitInfo("layers.0.(untrained)", WEIGHT, 1000, 0, 1, changed=False, drift=0.0)
    request = SaveRequest(1, 1, (trained, frozen))
    assert set(Unchanged(Drift(0.1)).select(request)) == {trained.unit}
    still = replace(request, units=(replace(trained, drift=0.05), frozen))
    assert set(Unchanged(Drift(0.1)).select(still)) == set()


@pytest.mark.parametrize("options", [{"threshold": 0}, {"threshold": -1.0}, {"states": 0.0}, {"max_stale": 0}])
def test_bad_options(options):
    with pytest.raises(PolicyError, match="'drift' is not allowed"):
        Drift(**options)
