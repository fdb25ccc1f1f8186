"""A merged model's ``config.json``: the number of layers, what is said of each of them, dtype and ties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tailor_dcp.recipes.errors import RecipeError

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_ENCODER = ("encoder_layers", "num_encoder_layers")
_DECODER = ("decoder_layers", "num_decoder_layers")
_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where a model of several parts describes the one with the layers."""
_PER_LAYER = ("layer", "block", "kv_heads", "key_value_heads", "query_heads", "multipliers", "attn_types", "pattern")
"""Parts of keys whose lists have one entry a layer, or name layers by their numbers."""
_DTYPES = ("dtype", "torch_dtype")
_TIE = "tie_word_embeddings"


def merged_config(
    config: Mapping[str, Any],
    name: str,
    layers: Mapping[str, Sequence[int]],
    dtype: torch.dtype | None = None,
    untied: bool = False,
) -> dict[str, Any]:
    """Return a configuration for a model with other layers.

    Args:
        config: the model's whose configuration it is.
        name: its file, in messages.
        layers: for each stack of layers that changed, the numbers that its layers had.
        dtype: the weights' dtype, if it changed.
        untied: the output embeddings are tied no longer.

    Raises:
        RecipeError: there is no key for the number of layers.
    """
    made = dict(config)
    for stack, numbers in layers.items():
        made = _with_layers(made, name, stack, list(numbers))
    if dtype is not None:
        made = with_dtype(made, str(dtype).removeprefix("torch."))
    if untied:
        made = {
            key: {**value, _TIE: False} if key in _PARTS and _TIE in value else value for key, value in made.items()
        }
        made[_TIE] = False
    return made


def _with_layers(config: dict[str, Any], name: str, stack: str, numbers: list[int]) -> dict[str, Any]:
    keys = [*(_DECODER if "decoder" in stack else ()), *(_ENCODER if "encoder" in stack else ()), *_COUNTS]
    for place in (None, *_PARTS):
        part = config if place is None else config.get(place)
        if not isinstance(part, dict):
            continue
        key = next((key for key in keys if isinstance(part.get(key), int)), None)
        if key is not None:
            made = _following(part, key, numbers)
            return made if place is None else {**config, place: made}
    raise RecipeError(
        f"{name} does not say how many layers the model has, by none of {', '.join(keys)}; write the number "
        f"there under one of these."
    )


def _following(part: dict[str, Any], key: str, numbers: list[int]) -> dict[str, Any]:
    """Return the part of a configuration that has the layers, with what it says of single layers following them."""
    count = part[key]
    if numbers == list(range(count)):
        return part
    made = {name: _moved(name, value, count, numbers) for name, value in part.items()}
    return {**made, key: len(numbers)}


def _moved(name: str, value: Any, count: int, numbers: list[int]) -> Any:
    if not isinstance(value, list) or not value or not any(word in name for word in _PER_LAYER):
        return value
    if len(value) == count and max(numbers, default=0) < count:
        return [value[number] for number in numbers]
    named = all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < count for item in value)
    if named and len(set(value)) == len(value) < count and name.endswith(("layers", "idxs", "indices")):
        return [place for place, number in enumerate(numbers) if number in value]
    return value


def with_dtype(config: dict[str, Any], dtype: str, inner: bool = False) -> dict[str, Any]:
    """Return a configuration that names another dtype, in the parts of it as well."""
    made = {key: with_dtype(v, dtype, inner=True) if isinstance(v, dict) else v for key, v in config.items()}
    present = [key for key in _DTYPES if key in made] or ([] if inner else [_DTYPES[0]])
    return made | dict.fromkeys(present, dtype)
