from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import policy_runs as made
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies import Either, Filter, Full, Moments, Parity, Policy, parse_policy
from tailor_dcp.units import Unit

WEIGHT = Unit("model.layers.0", "weight")


@dataclass(frozen=True)
class Labelled(Policy):
    """Selects nothing, has the labels and the dtype it is given."""

    name: ClassVar[str] = "labelled"

    labels: dict = field(default_factory=dict)
    dtype: torch.dtype | None = None

    def select(self, request):
        return []

    def cohorts(self, request):
        return self.labels

    def storage_dtype(self, unit, dtype):
        return self.dtype or dtype


@given(made.runs(), made.eithers)
def test_due_is_the_union(run, either):
    request = run.request()
    union = {unit for policy in either.policies for unit in policy.select(request)}
    assert run.save(either) == union


@given(made.runs(), made.policies)
def test_units_of_one_cohort_are_due_at_the_same_saves(run, policy):
    """Once in step, for every policy we have, alone and combined."""
    for _ in range(7):  # the longest period that is drawn
        run.save(policy)
    cohorts = policy.cohorts(run.request())
    assert cohorts.keys() == set(run.units)
    members = {label: {u for u in run.units if cohorts[u] == label} for label in cohorts.values()}
    for _ in range(14):
        due = run.save(policy)
        assert policy.cohorts(run.request()) == cohorts
        for together in members.values():
            assert due & together in (set(), together)


@given(made.runs(), made.eithers)
def test_the_tightest_bound_holds(run, either):
    """Each policy's own promise, kept by the combination."""
    for _ in range(9):
        run.save(either)
        for policy in either.policies:
            assert max(run.staleness().values(), default=0) <= _bound(policy)


def _bound(policy):
    """How many saves old a unit may be, by what each policy's docstring says."""
    options = vars(policy)
    if "max_stale" in options:
        return options["max_stale"]
    return options.get("groups", options.get("every", 1)) - 1


def test_cohorts_combine_labels():
    run = made.Run([made.block(n) for n in range(6)])
    cohorts = (Filter(head=1, tail=1) | Parity()).cohorts(run.request())
    assert cohorts[Unit("model.layers.0", "weight")] == "always+0"
    assert cohorts[Unit("model.layers.3", "weight")] == "rest+1"


def test_a_policy_without_labels_splits_by_layer():
    """Whatever it selects, it is likely to select a layer's units together."""
    run = made.Run([made.block(0, kinds=("weight", "exp_avg")), made.block(1, kinds=("weight",))])
    cohorts = (Moments() | Labelled()).cohorts(run.request())
    assert cohorts == {
        Unit("model.layers.0", "weight"): "weights+@model.layers.0",
        Unit("model.layers.0", "exp_avg"): "0+@model.layers.0",
        Unit("model.layers.1", "weight"): "weights+@model.layers.1",
    }


def test_no_labels_at_all():
    assert (Labelled() | Labelled()).cohorts(made.Run(made.llama()).request()) == {}


def test_labels_cannot_run_together():
    one, two, three = (Unit(f"model.layers.{n}", "weight") for n in range(3))
    first = Labelled({one: "a+b", two: "a"})
    second = Labelled({one: "c", two: "b+c", three: "c"})
    cohorts = (first | second).cohorts(made.Run([made.block(n) for n in range(3)]).request())
    assert len({cohorts[one], cohorts[two], cohorts[three]}) == 3


def test_nested_is_flattened():
    a, b, c = Parity(), Filter(), Moments()
    assert (a | b) | c == a | (b | c) == Either((a, b, c)) == Either([a, Either((b, c))])
    assert str(a | b | c) == "parity|filter|moments"
    assert isinstance((a | b).policies, tuple)


@given(made.eithers, st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64]))
def test_dtype_does_not_depend_on_the_order(either, dtype):
    turned = Either(tuple(reversed(either.policies)))
    for kind in ("weight", "exp_avg", "step"):
        unit = Unit("model.layers.0", kind)
        stored = either.storage_dtype(unit, dtype)
        assert stored == turned.storage_dtype(unit, dtype)
        assert stored in {p.storage_dtype(unit, dtype) for p in either.policies}


@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        ((None, None), torch.float64),  # nobody has an opinion
        ((torch.float32, None), torch.float32),
        ((None, torch.bfloat16), torch.bfloat16),
        ((torch.float32, torch.bfloat16), torch.float32),  # the wider of two
        ((torch.float16, torch.bfloat16), torch.bfloat16),  # as wide, but with the larger range
        ((torch.bfloat16, torch.float8_e5m2), torch.bfloat16),
    ],
)
def test_the_wider_of_two_narrowed_dtypes(asked, stored):
    either = Either(tuple(Labelled(dtype=dtype) for dtype in asked))
    assert either.storage_dtype(WEIGHT, torch.float64) == stored


def test_a_policy_that_widens_is_not_heard():
    either = Labelled(dtype=torch.float32) | Full()
    assert either.storage_dtype(WEIGHT, torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("policies", [(), (Full(),)])
def test_too_few(policies):
    with pytest.raises(PolicyError, match="needs two policies or more"):
        Either(policies)


@pytest.mark.parametrize("other", ["full", 3, None, Full])
def test_only_policies_combine(other):
    with pytest.raises(PolicyError, match=r"only, not with .* parse_policy first"):
        Parity() | other


def test_a_function_combines_through_parse_policy():
    either = Parity() | parse_policy(lambda request: [WEIGHT])
    run = made.Run([made.block(0), made.block(1)])
    run.save(Full())
    run.save(Full())
    run.index = 3  # the turn of layer 1
    assert WEIGHT in run.save(either)
