"""mergekit's plans are read as they are, and what is not done is refused by name and line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tailor_dcp.recipes.documents import parse as parse_document
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.mergekit_data import Plan
from tailor_dcp.recipes.mergekit_schema import parse

SLICES = """
merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
      - model: b
        layer_range: [1, 3]
        parameters: {t: 0.1}
    parameters: {t: [0, 1]}
  - sources:
      - {model: {model: {path: c}}, layer_range: [3, 3]}
    base_model: {model: d}
parameters:
  t:
    - {filter: mlp, value: 1e-3}
    - value: 0.5
dtype: bfloat16
out_dtype: torch.float32
tokenizer_source: base
chat_template: "{{ messages }}"
optimizer: drop
"""


def read(text: str) -> Plan:
    document = parse_document(text, "plan.yaml")
    return parse(document.data, document.where, name="plan.yaml", text=text)


def test_slices() -> None:
    """All of a plan's fields are there, models in any of their forms."""
    plan = read(SLICES)
    assert plan.models == ("a", "b", "c", "d")
    assert [source.layers for one in plan.slices for source in one.sources] == [(0, 2), (1, 3), (3, 3)]
    assert [one.base for one in plan.slices] == ["a", "d"]
    assert (plan.dtype, plan.out_dtype, plan.tokenizer) == (torch.bfloat16, torch.float32, "a")
    assert plan.slices[0].sources[1].where == "plan.yaml, line 7"
    assert (plan.optimizer, plan.chat_template, plan.leader) == ("drop", "{{ messages }}", "a")


def test_models_with_a_base_that_is_not_listed() -> None:
    """It becomes the last input."""
    text = "merge_method: ties\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1}}, {model: c}]"
    plan = read(text)
    assert [source.model for source in plan.slices[0].sources] == ["b", "c", "a"]
    listed = read("merge_method: ties\nbase_model: a\nmodels: [{model: a}, {model: c}]")
    assert [source.model for source in listed.slices[0].sources] == ["a", "c"]


def test_the_default_module() -> None:
    """Its parameters come between the slice's and the plan's."""
    plan = read(
        "merge_method: linear\nparameters: {weight: 1}\n"
        "modules: {default: {models: [{model: a}], parameters: {weight: 2}}}"
    )
    assert plan.parameters == ({"weight": 2}, {"weight": 1})


REFUSED = {
    "merge_method: linear\nmodel: [{model: a}]": r"line 2: the key 'model' is unknown; did you mean 'models'\?",
    "merge_method: linear\nmodels: [{model: a, weight: 1}]": r"line 2: the key 'weight' is unknown",
    "merge_method: linear\nslices:\n- sources:\n  - {model: a, layer_rnge: [0, 1]}": r"line 4: ",
    "models: [{model: a}]": r"there is no 'merge_method'",
    "merge_method: linear": r"there is none of models, slices and modules; a plan has exactly one",
    "merge_method: linear\nmodels: [{model: a}]\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]": (
        r"line 3: there are models and slices; a plan has exactly one"
    ),
    "merge_method: linear\nmodels: [{model: a}]\ntokenizer_source: union": r"line 3: tokenizer_source asks for a union",
    "merge_method: linear\nmodels: [{model: a}]\ntokenizer: {}": r"line 3: tokenizer asks for a union",
    "merge_method: linear\nmodels: [{model: a}]\ntokenizer: {source: a, tokens: {x: {source: a}}}": (
        r"line 3: tokenizer.tokens changes the vocabulary"
    ),
    "merge_method: linear\nmodels:\n- model: a+lora": r"line 3: 'a\+lora' is a model with.*merge_and_unload",
    "merge_method: linear\nmodels:\n- model: {model: a, lora: b}": r"line 3: 'a with lora' is a model with an adapter",
    "merge_method: linear\nmodels:\n- model: {model: {path: a, revision: b}}": r"line 3: a revision lies on the hub",
    "merge_method: linear\nmodels:\n- model: {model: a, override_architecture: X}": r"override_architecture has no",
    "base_model: a\ngate_mode: hidden\nexperts: [{source_model: b}]": r"'experts' is of a mixture of experts",
    "genome: {models: [a]}\ntasks: []": r"line 1: 'genome' is of mergekit's evolutionary search",
    "name: one\nmerge_method: linear\nmodels: [{model: a}]": r"'name' is of mergekit-multi",
    "merge_method: linear\nmodules: {text: {models: [{model: a}]}}": r"the module 'text' is one of several",
    "merge_method: linear\nmodels: [{model: a}]\ndtype: int8": r"line 3: dtype makes no sense: 'int8' is not among",
    "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: null}": r"parameters.weight makes no sense",
    "merge_method: linear\nslices:\n- sources:\n  - {model: a, layer_range: [2, 1]}": (
        r"line 4: the layer_range \[2, 1\] of a ends before it starts"
    ),
    "merge_method: linear\nslices:\n- sources:\n  - {model: a, layer_range: [0]}": r"line 4: .* makes no sense",
    "merge_method: linear\nslices:\n- sources: []": r"line 3: .* makes no sense",
    "merge_method: linear\nmodels: [{model: a}]\nchat_template: chatml": r"'chatml' is no Jinja template",
    "merge_method: linear\nmodels: [{model: a}]\ntokenizer_source: base": r"the tokenizer is the base model's",
    "- merge_method: linear": r"there are no keys, so it is no plan",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused(text: str) -> None:
    """One sentence that names the line, the key and the way out."""
    with pytest.raises(RecipeError, match=REFUSED[text]) as caught:
        read(text)
    assert str(caught.value).startswith("plan.yaml") and str(caught.value).endswith((".", "?"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data", [{}, {"merge_method": 3, "models": []}, {"merge_method": "x", "models": {"a": 1}}, 7, None]
)
def test_plain_data_without_lines(data: Any) -> None:
    """Data that comes from no file is refused in the same way."""
    with pytest.raises(RecipeError, match=r"^given: "):
        parse(data, lambda place: "given")
