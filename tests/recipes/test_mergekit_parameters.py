"""Parameters are looked up as mergekit does it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.methods.base import Parameter
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.mergekit_parameters import Gradient, position, setting, value_of
from tailor_dcp.recipes.mergekit_schema import parse

NAMES = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]
FILTERS = [None, "*", "mlp", "self_attn", "q_proj.weight", "nothing"]

numbers = st.one_of(st.integers(-9, 9), st.floats(-9, 9), st.sampled_from(["1e-3", "2.5E+1", "0.5"]))
gradients = st.lists(numbers, max_size=6)
switches = st.one_of(st.booleans(), st.sampled_from(["true", "False"]), st.lists(st.booleans(), max_size=4))


def settings_of(plain: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """What a plan can say: plain values, or several with filters."""
    conditions = st.fixed_dictionaries({"value": plain}, optional={"filter": st.sampled_from(FILTERS)})
    return st.one_of(plain, conditions, st.lists(conditions, min_size=1, max_size=4))


def plan_of(scopes: list[Any], kind: str) -> dict[str, Any]:
    """A plan with a value of ``p`` in up to four places: source, slice, module, top."""
    source, of_slice, module, top = ({"parameters": {"p": scope}} if scope is not None else {} for scope in scopes)
    part = {"sources": [{"model": "a", "layer_range": [0, 2], **source}, {"model": "b", "layer_range": [0, 2]}]}
    held = {"slices": [{**part, **of_slice}]}
    body = {"modules": {"default": {**held, **module}}} if kind == "module" else held
    return {"merge_method": "linear", **body, **top}


@given(
    st.lists(st.one_of(st.none(), settings_of(st.one_of(numbers, gradients))), min_size=4, max_size=4),
    st.sampled_from(["module", "slices"]),
    st.sampled_from(NAMES),
    st.floats(0, 1),
    st.booleans(),
)
def test_numbers_are_found_as_mergekit_finds_them(
    scopes: list[Any], kind: str, name: str, t: float, of_model: bool
) -> None:
    """Source goes before slice, module and top; the first filter that is met counts; gradients are interpolated."""
    assert_same(float, scopes if kind == "module" else [*scopes[:2], None, scopes[3]], kind, name, t, of_model)


@given(
    st.lists(st.one_of(st.none(), settings_of(switches)), min_size=4, max_size=4),
    st.sampled_from(NAMES),
    st.floats(0, 1),
)
def test_switches_are_picked_by_their_place(scopes: list[Any], name: str, t: float) -> None:
    """What is no number is not interpolated."""
    assert_same(bool, scopes, "module", name, t, True)


def assert_same(kind: type, scopes: list[Any], form: str, name: str, t: float, of_model: bool) -> None:
    from mergekit.common import ModelReference
    from mergekit.config import ConfigReader, MergeConfiguration
    from mergekit.merge_methods.base import ParameterScope, ParameterSpec
    from mergekit.parameter_resolver import resolve_parameter

    data = plan_of(scopes, form)
    theirs = MergeConfiguration.model_validate(data)
    module = theirs.modules["default"] if theirs.modules else None
    part = (module or theirs).slices[0]
    reader = ConfigReader(config=theirs, t=t, slice_out=part, module=module)
    model = ModelReference.parse("a") if of_model else None
    spec = ParameterSpec("p", kind, ParameterScope.INPUT if of_model else ParameterScope.SHARED, default=-77)
    if kind is bool:
        spec = ParameterSpec("p", kind, ParameterScope.INPUT, default=False)
    want = resolve_parameter(spec, reader.parameter_sources(model), tensor_name=name, t=t, model=model)

    plan = parse(data, lambda place: "plan")
    one = plan.slices[0]
    scopes_here = plan.scopes(one, one.sources[0] if of_model else None)
    parameter = Parameter("p", -77 if kind is float else False, kind)
    assert value_of(parameter, scopes_here, name, t, name) == pytest.approx(want, abs=1e-12)


def test_positions() -> None:
    """A slice runs from 0 to 1; a single layer is at its end."""
    assert [position(i, 3) for i in range(3)] == [0, 0.5, 1]
    assert position(0, 1) == 1


def test_what_must_be_given() -> None:
    """A parameter without a default is asked for by name, also where no filter is met."""
    unmet = {"weight": setting([{"filter": "mlp", "value": 1}])}
    with pytest.raises(RecipeError, match=r"norm of A has no 'weight'; give it there"):
        value_of(Parameter("weight"), [unmet, {}], "norm", 0.0, "norm of A")
    assert value_of(Parameter("weight"), [unmet, {"weight": 2}], "norm", 0.0, "norm of A") == 2


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "None is neither a number nor a switch"),
        ([[1]], "neither a number"),
        ([{"filter": "mlp"}], "has no value"),
        ([{"value": 1, "filtre": "mlp"}], "'filtre' is neither value nor filter"),
        ([{"value": 1}, 2], "2 stands among entries"),
        ({"value": 1, "filter": 3}, "no part of a tensor's name"),
    ],
)
def test_what_says_nothing(value: Any, problem: str) -> None:
    """Forms that mergekit does not have are refused."""
    with pytest.raises(ValueError, match=problem):
        setting(value)


def test_strings_that_are_numbers() -> None:
    """YAML 1.1 reads 1e-3 as a string."""
    assert setting("1e-3") == 0.001
    assert setting(["1e-3", 1]) == Gradient((0.001, 1))
