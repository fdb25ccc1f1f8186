"""What other tools of mergekit do and a merge here does not, each refused by name and with the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tailor_dcp.recipes.errors import RecipeError

Place = tuple[str | int, ...]
Where = Callable[[Place], str]
"""Returns the words that a sentence about a place in the document begins with."""

_EVOLUTION = (
    "is of mergekit's evolutionary search, which is not done here; search with mergekit-evolve, and merge the best "
    "plan that it prints."
)
_EXPERTS = (
    "is of a mixture of experts that mergekit-moe builds, which is not done here; build it with mergekit-moe, whose "
    "result can be merged and converted like any other model."
)
_SEVERAL = (
    "is of mergekit-multi, whose documents are merges that refer to each other; write each merge into a file of its "
    "own, and give the folder of one merge to the next."
)
_KEYS = {
    "genome": _EVOLUTION, "tasks": _EVOLUTION, "num_fewshot": _EVOLUTION,
    "experts": _EXPERTS, "gate_mode": _EXPERTS, "shared_experts": _EXPERTS, "experts_per_token": _EXPERTS,
    "merges": _SEVERAL, "name": _SEVERAL,
}  # fmt: skip
_MODELS = ("model", "base_model", "tokenizer_source", "source")
_UNION = (
    "asks for a union of vocabularies, which is not built here; name the model whose tokenizer the result shall have, "
    "after giving all models that vocabulary (mergekit-tokensurgeon does)."
)


def refuse(data: Mapping[Any, Any], where: Where) -> None:
    """Look for what is refused by name.

    Raises:
        RecipeError: something of it is there.
    """
    for key, reason in _KEYS.items():
        if key in data:
            raise RecipeError(f"{where((key,))}: {key!r} {reason}")
    modules = data.get("modules")
    if isinstance(modules, Mapping):
        others = [name for name in modules if name != "default"]
        if others:
            raise RecipeError(
                f"{where(('modules', others[0]))}: the module {others[0]!r} is one of several that a model is made "
                f"of, and only 'default' can be merged; merge the modules as models of their own."
            )
    _refuse_tokens(data, where)
    for place, value in _references(data, ()):
        _refuse_reference(place, value, where)


def _refuse_tokens(data: Mapping[Any, Any], where: Where) -> None:
    if data.get("tokenizer_source") == "union":
        raise RecipeError(f"{where(('tokenizer_source',))}: tokenizer_source {_UNION}")
    tokenizer = data.get("tokenizer")
    if not isinstance(tokenizer, Mapping):
        return
    if tokenizer.get("source", "union") == "union":
        raise RecipeError(f"{where(('tokenizer',))}: tokenizer {_UNION}")
    for key in ("tokens", "pad_to_multiple_of"):
        if tokenizer.get(key):
            raise RecipeError(
                f"{where(('tokenizer', key))}: tokenizer.{key} changes the vocabulary, which is not done here; merge "
                f"with the models' own, and resize the result's embeddings afterwards."
            )


def _references(value: object, place: Place) -> Iterator[tuple[Place, Any]]:
    """Yield what names a model, with its place."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in _MODELS:
                yield (*place, key), inner
            elif key != "parameters":
                yield from _references(inner, (*place, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _references(inner, (*place, number))


def _refuse_reference(place: Place, value: object, where: Where) -> None:
    adapter = None
    if isinstance(value, str) and "+" in value:
        adapter = value
    elif isinstance(value, Mapping) and value.get("lora"):
        adapter = f"{value.get('model')} with lora"
    if adapter:
        raise RecipeError(
            f"{where(place)}: {adapter!r} is a model with an adapter on top, which is not merged on the way; save it "
            f"with peft's merge_and_unload first, and name the folder that it is saved to."
        )
    if isinstance(value, Mapping) and value.get("override_architecture"):
        raise RecipeError(
            f"{where(place)}: override_architecture has no meaning here, as layers are found by their names; leave it "
            f"out."
        )
    path = value.get("model") if isinstance(value, Mapping) else None
    if isinstance(path, Mapping) and path.get("revision"):
        raise RecipeError(
            f"{where(place)}: a revision lies on the hub, and only local folders are merged; download that revision "
            f"and name its folder."
        )
