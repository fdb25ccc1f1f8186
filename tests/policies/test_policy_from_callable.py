from __future__ import annotations

import functools
import pickle

import policy_runs as made
import pytest

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies import Policy, parse_policy
from tailor_dcp.units import Unit


def heads_only(request):
    return [info for info in request.units if info.layer == "lm_head"]


class EveryNth:
    def __call__(self, request):
        return ()


@pytest.mark.parametrize(
    "function",
    [
        heads_only,
        lambda request: [("lm_head", "weight"), ["lm_head", "exp_avg"]],
        lambda request: (Unit("lm_head", kind) for kind in ("weight", "exp_avg")),
        lambda request: {Unit("lm_head", "weight"), Unit("lm_head", "exp_avg")},
    ],
)
def test_what_a_function_may_return(function):
    policy = parse_policy(function)
    run = made.Run([made.Layer("lm_head", kinds=("weight", "exp_avg")), made.block(0)])
    due = list(policy.select(run.request()))
    assert set(due) == {Unit("lm_head", "weight"), Unit("lm_head", "exp_avg")}
    assert all(isinstance(unit, Unit) for unit in due)


@pytest.mark.parametrize("returned", [None, 3, "lm_head", b"lm_head", [1], ["lm_head"], [("lm_head",)], [(1, 2)]])
def test_what_it_may_not_return(returned):
    def selector(request):
        return returned

    with pytest.raises(PolicyError, match=r"policy selector returned .* expected\.$"):
        parse_policy(selector).select(made.Run([]).request())


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (heads_only, "heads_only"),
        (functools.partial(functools.partial(heads_only)), "heads_only"),
        (EveryNth(), "EveryNth"),
        (EveryNth().__call__, "__call__"),
        (lambda request: [], "<lambda>"),
    ],
)
def test_string_is_the_functions_name(function, name):
    assert str(parse_policy(function)) == name


def test_is_a_policy_like_others():
    policy = parse_policy(heads_only)
    assert isinstance(policy, Policy)
    assert policy == parse_policy(heads_only) != parse_policy(EveryNth())
    assert str(policy | parse_policy("full")) == "heads_only|full"
    assert policy.cohorts(made.Run(made.llama()).request()) == {}
    assert pickle.loads(pickle.dumps(policy)) == policy
