"""A native recipe, given as plain data: every key is checked, and its globs lead to no endless search."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from tailor_dcp.errors import TailorError
from tailor_dcp.names import alternatives
from tailor_dcp.recipes.documents import Document
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.native_file import native
from tests.fuzz.mutators.trees import jsons
from tests.fuzz.target import Target


def document_of(data: bytes) -> Document:
    """Return the document that ``merge`` makes of plain data."""
    try:
        held = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecipeError("no plain data") from error
    if not isinstance(held, Mapping):
        raise RecipeError("no mapping")
    return Document("the recipe", dict(held))


def parse(data: bytes) -> None:
    """Read it as a recipe."""
    check(document_of(data))


def check(document: Document) -> None:
    """Read a document as a recipe."""
    recipe = native(document)
    assert recipe.base
    for glob in [*recipe.drop, *(take.layers for take in recipe.takes)]:
        try:
            alternatives(glob)
        except TailorError as error:
            assert str(error)


def seeds() -> Iterator[bytes]:
    """Recipes with every key."""
    for recipe in (
        {"base": "a", "layers": {"model.layers.{8,9}": "run@300", "*": {"from": "b", "kinds": ["weight"]}}},
        {"base": "a", "rename": {"l.0": ["l.1", "l.2"]}, "drop": "lm_head", "train": "drop", "optimizer": "average"},
        {"base": "a", "max_stale_steps": 100, "layers": {"a.*": [{"from": "b"}, "c"]}},
        {"bse": "a"},
        {"base": "", "layers": {"x": []}, "drop": [1]},
        {"base": "a", "layers": {"{" + ",".join("ab") * 9 + "}": "b"}},
    ):
        yield json.dumps(recipe).encode()


_WORDS = (
    "base", "layers", "rename", "drop", "train", "optimizer", "max_stale_steps", "from", "kinds", "weight", "{1,2}",
    "a.*", "average", "keep", "exp_avg",
)  # fmt: skip
TARGET = Target(parse, seeds, jsons(_WORDS), tuple(word.encode() for word in _WORDS), longest=2048)
