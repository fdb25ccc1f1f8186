"""A recipe's YAML: its document is what PyYAML makes of it, and every kind of recipe can be looked for in it."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from tailor_dcp.errors import TailorError
from tailor_dcp.recipes.documents import parse as parse_document
from tailor_dcp.recipes.errors import RecipeError
from tests.fuzz.mutators.texts import texts
from tests.fuzz.target import Target
from tests.fuzz.targets import llmtailor_plan, mergekit_plan, native_recipe


def parse(data: bytes) -> None:
    """Parse what a file holds, as ``documents.load`` does; compare it with PyYAML; take it for each kind of recipe."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise RecipeError("no text") from error
    document = parse_document(text, "input.yaml")
    assert repr(document.data) == repr(yaml.safe_load(text)), "another document than PyYAML's"
    for kind in (native_recipe, mergekit_plan, llmtailor_plan):
        try:
            kind.check(document)
        except TailorError as error:
            assert str(error)


def seeds() -> Iterator[bytes]:
    """What YAML has beside plain values, and a recipe of each kind."""
    yield b"base: run/step-20\nlayers:\n  a.{8,9}: run@300\n  '*': {from: b, kinds: [weight]}\n"
    yield b"base: &a x\ntrain: *a\nlayers: {<<: {k: v}}\n"
    yield b"merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: 1}\n- model: b\n"
    yield b"merge_method: passthrough\nslices:\n- sources:\n  - {model: checkpoint-1, layer_range: [0, 1]}\n"
    yield b"pre_weights: [{name: a, model: b}]\nslices: []\nmerge_method: passthrough\n"
    for value in (
        b"!!timestamp x",
        b"!!int ''",
        b"!!float x",
        b"!!bool x",
        b"!!binary x",
        b"2001-13-45",
        b"!!python/name:os",
    ):
        yield b"base: " + value + b"\n"
    yield b"a: &a [x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n"
    yield b"&a [*a]"
    yield b"? [a, b]\n: 2001-01-01\n1: .nan\n"


_TAGS = (
    "!!timestamp ", "!!int ", "!!float ", "!!bool ", "!!binary ", "!!set ", "!!omap ", "!!pairs ", "!!null ",
    "!!python/object:", "&a ", "*a", "<<: ", "? ", "|", ">", "---\n", "%YAML 1.1\n", "0b", "0x", ".inf", "1:2",
)  # fmt: skip
_WORDS = (*_TAGS, "base", "layers", "rename", "models", "slices", "sources", "model", "merge_method", "drop", "from")
TARGET = Target(parse, seeds, texts(_WORDS), tuple(word.encode() for word in _WORDS), longest=256)
