"""A plan of LLMTailor's, given as plain data, which is told from mergekit's by its keys and habits."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tailor_dcp.recipes.documents import Document
from tailor_dcp.recipes.llmtailor_file import is_plan, read_plan
from tests.fuzz.mutators.trees import jsons
from tests.fuzz.target import Target
from tests.fuzz.targets.native_recipe import document_of


def parse(data: bytes) -> None:
    """Read it as a plan."""
    check(document_of(data))


def check(document: Document) -> None:
    """Read a document as a plan, whatever it was recognised as."""
    is_plan(document.data)
    plan = read_plan(document)
    assert all(one.model and one.start <= one.stop for one in plan.slices), "a slice that is none"
    assert all(one.name and one.model for one in plan.weights)


def _slice(model: str, first: int, stop: int) -> dict[str, object]:
    return {"sources": [{"model": model, "layer_range": [first, stop]}]}


def seeds() -> Iterator[bytes]:
    """Plans with all that they can have."""
    for plan in (
        {
            "slices": [_slice("run/checkpoint-100", 0, 2), _slice("run/checkpoint-200", 3, 3)],
            "pre_weights": [{"name": "model.embed_tokens.weight", "model": "run/checkpoint-100"}],
            "post_weights": [{"name": "lm_head.weight", "model": "run/checkpoint-200"}],
            "merge_method": "passthrough", "base_model": "run/checkpoint-200", "dtype": "bfloat16",
            "tokenizer_source": "base",
        },
        {"slices": [_slice("checkpoint-1", 0, 1)], "merge_method": "passthrough", "llmtailor.x": 1},
        {"slices": [], "merge_method": "slerp"},
        {"slices": [_slice("s3://b/checkpoint-1", 1, 0)], "merge_method": "passthrough"},
    ):  # fmt: skip
        yield json.dumps(plan).encode()


_WORDS = (
    "slices", "sources", "model", "layer_range", "pre_weights", "post_weights", "name", "merge_method", "passthrough",
    "base_model", "dtype", "out_dtype", "tokenizer_source", "base", "llmtailor", "checkpoint-1", "models",
    "parameters",
)  # fmt: skip
TARGET = Target(parse, seeds, jsons(_WORDS), tuple(word.encode() for word in _WORDS), longest=2048)
