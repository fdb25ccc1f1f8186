"""The native recipe's YAML: everything in it is checked, and what is wrong is named with its line."""

from __future__ import annotations

import textwrap

import pytest

from tailor_dcp.recipes.documents import Document, parse
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.native import Recipe, Take
from tailor_dcp.recipes.native_file import native


def read(text: str) -> Recipe:
    return native(parse(textwrap.dedent(text), "r.yaml"))


def test_every_key_of_a_recipe_is_taken_over() -> None:
    text = """\
    base: run/step-400
    layers:
      "model.layers.[0-3]": run/step-300
      "model.layers.{8,9}":  {from: run/step-300, kinds: [weight]}
      model.norm:
        - {from: run/step-200, kinds: weight}
        - {from: run/step-100, kinds: [exp_avg, exp_avg_sq]}
      lm_head: run/step-200
    rename: {"model.layers.5": "model.layers.9", "model.layers.6": [a, b]}
    drop: model.layers.3
    train: run/step-500
    optimizer: keep
    max_stale_steps: 200
    """
    assert read(text) == Recipe(
        base="run/step-400",
        takes=(
            Take("model.layers.[0-3]", "run/step-300"),
            Take("model.layers.{8,9}", "run/step-300", ("weight",)),
            Take("model.norm", "run/step-200", ("weight",)),
            Take("model.norm", "run/step-100", ("exp_avg", "exp_avg_sq")),
            Take("lm_head", "run/step-200"),
        ),
        rename={"model.layers.5": ("model.layers.9",), "model.layers.6": ("a", "b")},
        drop=("model.layers.3",),
        train="run/step-500",
        optimizer="keep",
        max_stale_steps=200,
        name="r.yaml",
        text=textwrap.dedent(text),
    )


def test_what_is_not_said_has_its_default() -> None:
    assert read("base: a") == Recipe(base="a", name="r.yaml", text="base: a")
    assert native(Document("the recipe", {"base": "a"})) == Recipe(base="a", name="the recipe")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bse: a\n", "r.yaml, line 1: the key 'bse' is unknown; did you mean 'base'?"),
        ("base: a\nlayer: {x: b}\n", "r.yaml, line 2: the key 'layer' is unknown; did you mean 'layers'?"),
        (
            "base: a\nlayers:\n  x:\n    from: b\n    kind: weight\n",
            "r.yaml, line 5: the key 'kind' is unknown; did you mean 'kinds'? There are from or kinds.",
        ),
        ("base: a\nlayers:\n  x:\n    - from: b\n    - fom: b\n", "r.yaml, line 5: "),
        ("base: a\nlayers:\n  x: {kinds: [weight]}\n", "r.yaml, line 3: there is no 'from', the checkpoint that these"),
        ("layers: {x: b}\n", "r.yaml, line 1: there is no 'base', the checkpoint that the rest comes from."),
        ("base: 3\n", "r.yaml, line 1: base makes no sense: input should be a valid string."),
        ("base: ''\n", "r.yaml, line 1: base makes no sense: "),
        ("base: a\nlayers: [x]\n", "r.yaml, line 2: layers makes no sense: "),
        ("base: a\nlayers:\n  x: 3\n", "r.yaml, line 3: layers: x makes no sense: "),
        ("base: a\nlayers:\n  y: b\n  x: []\n", "r.yaml, line 4: layers: x makes no sense: "),
        ("base: a\nlayers:\n  x: {from: b, kinds: []}\n", "r.yaml, line 3: layers: x: kinds makes no sense: "),
        ("base: a\nrename:\n  5: 9\n", "r.yaml, line 3: rename: 5 makes no sense: input should be a valid string."),
        ("base: a\nrename:\n  x: []\n", "r.yaml, line 3: rename: x makes no sense: "),
        ("base: a\nmax_stale_steps: -1\n", "r.yaml, line 2: max_stale_steps makes no sense: "),
        ("base: a\nmax_stale_steps: '3'\n", "r.yaml, line 2: max_stale_steps makes no sense: "),
        ("base: a\nmax_stale_steps: yes\n", "r.yaml, line 2: max_stale_steps makes no sense: "),
        ("base: a\ndrop: [1]\n", "r.yaml, line 2: drop: 0 makes no sense: "),
        ("base: a\noptimizer: [a]\n", "r.yaml, line 2: optimizer makes no sense: "),
        ("- base: a\n", "r.yaml holds no keys, so it is no recipe; write at least a base."),
        ("base\n", "r.yaml holds no keys, so it is no recipe; write at least a base."),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        read(text)
    assert str(refused.value).startswith(said)
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)
    assert "pydantic" not in str(refused.value)
