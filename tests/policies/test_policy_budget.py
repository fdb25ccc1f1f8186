"""``budget:fraction=...``: as much as fits, and nothing older than its bound."""

from __future__ import annotations

from dataclasses import replace

import policy_runs as made
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies import Budget, SaveRequest, UnitInfo, parse_policy
from tailor_dcp.testing import check_policy

paces = st.sampled_from([None, 0.0, 0.01, 0.3, 1.4])


def moving(request: SaveRequest, data: st.DataObject) -> SaveRequest:
    units = tuple(replace(info, drift=data.draw(paces), stored=info.bytes // 2) for info in request.units)
    return replace(request, units=units, rate=data.draw(st.sampled_from([None, 10.0, 1e6])))


@given(data=st.data(), run=made.runs(), policy=made.budgets)
def test_what_is_due_fits_or_is_old(data, run, policy):
    """What exceeds the budget is there for the bound's sake: it is new, always written, or the oldest."""
    request = moving(run.request(), data)
    due = [info for info in request.units if info.unit in set(policy.select(request))]
    free = [i for i in due if i.age is not None and not (policy.first == "weights" and i.kind == "weight")]
    always = [i for i in due if i.age is not None and i not in free]
    if policy.fraction is not None:
        budget = policy.fraction * sum(info.bytes for info in request.units)
    else:
        budget = policy.bytes or (policy.seconds * request.rate if request.rate else float("inf"))
    rest = [i for i in request.units if i.age is not None and i not in always]
    if sum(i.cost for i in free) > budget - sum(i.cost for i in always):
        youngest = min(info.age for info in free) if free else 0
        assert all(info in free for info in rest if info.age > youngest)
    if policy.first == "weights":
        assert all(info in due for info in request.units if info.kind == "weight")


@pytest.mark.parametrize(
    "policy",
    [
        Budget(fraction=0.25),
        Budget(bytes=500, max_stale=5, first="weights"),
    ],
)
def test_it_is_a_policy_by_all_rules(policy):
    check_policy(policy, bound=policy.max_stale)


@given(blocks=st.integers(12, 30), fraction=st.floats(0.3, 1), max_stale=st.integers(4, 9))
def test_no_save_has_to_exceed_a_budget_that_is_enough(blocks, fraction, max_stale):
    """Turns are spread: after the first save nothing piles up until all is overdue at once."""
    layers = [made.block(number) for number in range(blocks)]
    whole = sum(layer.bytes for layer in layers)
    run, policy = made.Run(layers), Budget(fraction=fraction, max_stale=max_stale)
    run.save(policy)
    for _ in range(3 * max_stale):
        request = run.request()
        units = tuple(replace(info, drift=0.1) for info in request.units)
        due = set(policy.select(replace(request, units=units)))
        assert sum(info.bytes for info in units if info.unit in due) <= 1.1 * fraction * whole
        run.write(due)
        assert max(run.staleness().values()) <= max_stale


def test_the_most_drift_per_byte_comes_first():
    units = tuple(UnitInfo(name, "weight", size, 0, 1, drift=drift) for name, size, drift in UNITS)
    assert [u.layer for u in Budget(bytes=110, max_stale=99).select(SaveRequest(1, 1, units))] == ["small", "far"]
    assert [u.layer for u in Budget(bytes=1110, max_stale=99).select(SaveRequest(1, 1, units))] == [
        "small",
        "far",
        "large",
    ]


UNITS = [("small", 10, 0.1), ("far", 100, 0.9), ("near", 100, 0.01), ("large", 1000, 1.0)]


def test_seconds_go_by_the_rate_of_the_save_before():
    policy = Budget(seconds=2.0, max_stale=99)
    units = tuple(UnitInfo(f"layers.{i}", "weight", 100, 0, 1, drift=0.1) for i in range(10))
    due = [len(list(policy.select(SaveRequest(1, 1, units, rate)))) for rate in (None, 50.0, 150.0, 1e9)]
    assert due == [10, 1, 3, 10]


def test_strings():
    text = "budget:fraction=0.25,max_stale=5,first=weights,moments=bf16"
    policy = Budget(fraction=0.25, max_stale=5, first="weights", moments="bf16")
    assert parse_policy(text) == policy
    assert str(policy) == text
    assert parse_policy("budget:bytes=1000") == Budget(bytes=1000)
    assert parse_policy("budget:seconds=2.5") == Budget(seconds=2.5)


@pytest.mark.parametrize("text", ["budget", "budget:fraction=0.5,bytes=10", "budget:seconds=1,fraction=0.1"])
def test_one_measure_must_be_given(text):
    with pytest.raises(PolicyError, match="needs one of fraction, bytes and seconds"):
        parse_policy(text)


@pytest.mark.parametrize("text", ["budget:fraction=0", "budget:fraction=1.5", "budget:bytes=0", "budget:seconds=0"])
def test_bad_options(text):
    with pytest.raises(PolicyError, match="'budget' is not allowed"):
        parse_policy(text)
