"""A plan of mergekit's, given as plain data: what is accepted can be used."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tailor_dcp.recipes.documents import Document
from tailor_dcp.recipes.mergekit_schema import parse as parse_plan
from tests.fuzz.mutators.trees import jsons
from tests.fuzz.target import Target
from tests.fuzz.targets.native_recipe import document_of


def parse(data: bytes) -> None:
    """Read it as a plan."""
    check(document_of(data))


def check(document: Document) -> None:
    """Read a document as a plan; ask it what a merge asks first."""
    plan = parse_plan(document.data, document.where, name=document.name, text=document.text)
    assert plan.leader in plan.models
    assert plan.slices
    for one in plan.slices:
        for source in one.sources:
            assert source.layers is None or 0 <= source.layers[0] <= source.layers[1], "a range that is none"
            plan.scopes(one, source)


def seeds() -> Iterator[bytes]:
    """Plans of each form, and what is refused by name."""
    part = {"model": "b", "layer_range": [1, 3], "parameters": {"t": 0.1}}
    for plan in (
        {
            "merge_method": "slerp", "base_model": "a", "parameters": {"t": [{"filter": "mlp", "value": "1e-3"},
            {"value": 0.5}]}, "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}, part],
            "parameters": {"t": [0, 1]}}], "dtype": "bfloat16", "out_dtype": "torch.float32",
            "tokenizer_source": "base", "chat_template": "{{ x }}", "optimizer": "drop",
        },
        {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b"}]},
        {"merge_method": "ties", "base_model": {"model": {"path": "a"}},
        "modules": {"default": {"models": [{"model": "a"}]}}}, {"merge_method": "linear",
        "models": [{"model": "a+b"}], "tokenizer": {"source": "union", "tokens": {"x": {}}}},
        {"genome": {"models": ["a"]}, "merges": [], "experts": []}, {"merge_method": "passthrough",
        "slices": [{"sources": [{"model": "a", "layer_range": [3, 1]}]}]},
    ):  # fmt: skip
        yield json.dumps(plan).encode()


_WORDS = (
    "merge_method", "base_model", "slices", "sources", "model", "models", "layer_range", "parameters", "weight", "t",
    "dtype", "out_dtype", "tokenizer_source", "tokenizer", "source", "union", "base", "chat_template", "auto",
    "optimizer", "modules", "default", "filter", "value", "path", "lora", "revision", "override_architecture",
    "bfloat16", "linear",
)  # fmt: skip
TARGET = Target(parse, seeds, jsons(_WORDS), tuple(word.encode() for word in _WORDS), longest=2048)
