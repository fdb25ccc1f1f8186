"""``unchanged+...``: what the inner policy says, less what is as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies import Either, Full, Moments, Parity, SaveRequest, Unchanged, UnitInfo, parse_policy
from tailor_dcp.policies.unchanged import UNTRAINED
from tailor_dcp.units import WEIGHT, Unit
from tests.policies.policy_runs import runs, single_policies

changes = st.sampled_from([None, False, True])


@st.composite
def requests(draw: st.DrawFn) -> SaveRequest:
    """A request in which anything may be known about any unit."""
    request = draw(runs()).request()
    return replace(request, units=tuple(replace(info, changed=draw(changes)) for info in request.units))


@given(request=requests(), inner=single_policies)
def test_it_takes_away_what_is_known_to_be_unchanged_and_nothing_else(request, inner):
    due = list(Unchanged(inner).select(request))
    same = {info.unit for info in request.units if info.changed is False}
    assert set(due) == set(inner.select(request)) - same
    assert len(due) == len(set(due))


@given(request=requests(), inner=single_policies)
def test_labels_are_the_inner_policys_but_for_what_is_frozen(request, inner):
    labels = Unchanged(inner).cohorts(request)
    for unit, label in inner.cohorts(request).items():
        assert labels[unit] in (label, f"frozen/{label}")
    assert all(labels[info.unit].startswith("frozen/") for info in request.units if info.changed is False)


@given(inner=single_policies)
def test_round_trip(inner):
    policy = Unchanged(inner)
    assert str(policy) == f"unchanged+{inner}"
    assert parse_policy(str(policy)) == policy
    assert parse_policy(f" unchanged + {inner} ") == policy
    both = policy | Moments(every=7)
    assert parse_policy(str(both)) == both
    assert hash(policy) == hash(Unchanged(inner))


def test_strings():
    assert parse_policy("unchanged+full") == Unchanged(Full())
    assert parse_policy("unchanged+moments:every=5") == Unchanged(Moments(every=5))
    assert parse_policy("unchanged+full|parity") == Either((Unchanged(Full()), Parity()))
    assert parse_policy("unchanged+unchanged+full") == Unchanged(Unchanged(Full())) == Unchanged(Full())


@pytest.mark.parametrize("text", ["unchanged", "unchanged+", " unchanged + ", "unchanged:every=2", "unchanged|full"])
def test_alone_it_says_nothing(text):
    with pytest.raises(PolicyError, match=r"unchanged\+full"):
        parse_policy(text)


@pytest.mark.parametrize(
    ("inner", "words"),
    [(Either((Full(), Parity())), "unchanged+full|unchanged+parity"), ("full", "parse_policy"), (Full, "parse_policy")],
)
def test_what_it_cannot_wrap_is_said(inner, words):
    with pytest.raises(PolicyError) as refused:
        Unchanged(inner)
    assert words in str(refused.value)


@pytest.mark.parametrize("text", ["unchanged+nosuch", "unchanged+moments:every=0", "unchangd+full"])
def test_what_is_wrong_behind_the_plus_is_said(text):
    with pytest.raises(PolicyError):
        parse_policy(text)


def test_who_needs_fingerprints():
    assert not Full().needs_fingerprints
    assert Unchanged(Full()).needs_fingerprints
    assert (Full() | Unchanged(Parity())).needs_fingerprints
    assert not (Full() | Parity()).needs_fingerprints


def test_storage_dtypes_are_the_inner_policys():
    policy = parse_policy("unchanged+moments:weights=bf16")
    assert policy.storage_dtype(Unit("a", WEIGHT), torch.float32) == torch.bfloat16
    assert policy.storage_dtype(Unit("a", "exp_avg"), torch.float32) == torch.float32


def lora(changed: bool | None = True, age: int | None = 1) -> SaveRequest:
    """Two blocks with adapters and a head that is frozen as a whole."""
    units = []
    for i in range(2):
        name, place = f"model.layers.{i}", {"stack": "model.layers", "number": i}
        old = None if age is None else 50
        same = None if changed is None else False
        units += [
            UnitInfo(name, WEIGHT, 10, 0, age, **place, changed=changed),
            UnitInfo(name + UNTRAINED, WEIGHT, 1000, 0, old, **place, changed=same),
            UnitInfo(name, "exp_avg", 10, 0, age, **place, changed=changed),
        ]
    units.append(
        UnitInfo("lm_head", WEIGHT, 500, 0, None if age is None else 50, changed=None if age is None else False)
    )
    return SaveRequest(1000, 50, tuple(units))


def test_a_split_layer_is_one_to_the_inner_policy():
    """Else parity would deal its parts apart, and a base that never changes would always look overdue."""
    seen = []

    class Spy(Full):
        def select(self, request):
            seen.extend(request.units)
            return super().select(request)

    due = Unchanged(Spy()).select(lora())
    assert [(info.layer, info.kind) for info in seen] == [
        ("model.layers.0", "weight"),
        ("model.layers.0", "exp_avg"),
        ("model.layers.1", "weight"),
        ("model.layers.1", "exp_avg"),
        ("lm_head", "weight"),
    ]
    assert seen[0].bytes == 1010
    assert seen[0].age == 1
    assert seen[0].changed is True
    assert {unit.layer for unit in due} == {"model.layers.0", "model.layers.1"}


def test_frozen_weights_have_files_of_their_own_from_the_first_save_on():
    frozen = {Unit(f"model.layers.{i}{UNTRAINED}", WEIGHT) for i in range(2)} | {Unit("lm_head", WEIGHT)}
    for request in (lora(None, None), lora()):
        labels = Unchanged(Full()).cohorts(request)
        assert {unit for unit, label in labels.items() if label == "frozen/all"} == frozen
        assert {label for unit, label in labels.items() if unit not in frozen} == {"all"}


def test_weights_alone_are_not_taken_for_frozen():
    """Without any optimizer state nothing tells which weights are trained."""
    request = SaveRequest(0, 0, tuple(UnitInfo(f"layers.{i}", WEIGHT, 10) for i in range(3)))
    assert set(Unchanged(Full()).cohorts(request).values()) == {"all"}
