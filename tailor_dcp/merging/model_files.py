"""The files beside a merged model's weights: configuration, tokenizer, model card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from tailor_dcp.catalog import Catalog
from tailor_dcp.merging.model_files_card import card
from tailor_dcp.merging.model_files_config import merged_config
from tailor_dcp.names import close
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.mergekit_data import Plan

CONFIG = "config.json"
CARD = "README.md"
_TEMPLATE = "chat_template.jinja"
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "*.spm", "*.bpe", "chat_template*", "additional_chat_templates/*", "processor_config.json",
    "preprocessor_config.json",
)  # fmt: skip
_TOKENIZER_CONFIG = "tokenizer_config.json"


def files_of_merge(
    files: Mapping[str, Path],
    scratch: Path,
    *,
    layers: Mapping[str, Sequence[int]],
    text: str,
    models: Sequence[str],
    method: str = "passthrough",
    dtype: torch.dtype | None = None,
    untied: bool = False,
    tokenizer: Mapping[str, Path] | None = None,
    chat_template: str | None = None,
) -> dict[str, Path]:
    """Return the files that a merged model has beside its weights, by name; no input is changed.

    Args:
        files: the files of the model that the result's configuration comes from.
        scratch: a folder for what has to be written anew; it is made if it is not there.
        layers: for each stack of layers whose layers are others now, the numbers that they had in that model.
        text: the recipe, for the model card.
        models: the models that were merged, for the model card.
        method: the merge method, for the model card.
        dtype: the weights' dtype, if the merge gave them one.
        untied: the output embeddings are tied no longer.
        tokenizer: the files whose tokenizer the result has; None for the same model's.
        chat_template: the chat template's text; None for the tokenizer's own.

    Raises:
        RecipeError: the configuration has no place for the number of layers.
        TailorError: a file cannot be read or written.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    found = dict(files)
    if tokenizer is not None:
        found = {name: path for name, path in found.items() if not _is_tokenizer(name)}
        found |= {name: path for name, path in tokenizer.items() if _is_tokenizer(name)}
    if CONFIG in files:
        config = read_json(files[CONFIG])
        changed = merged_config(config, str(files[CONFIG]), layers, dtype, untied)
        if changed != config:
            found[CONFIG] = _write(scratch / CONFIG, json.dumps(changed, indent=2, ensure_ascii=False) + "\n")
    if chat_template is not None:
        found.pop("chat_template.json", None)
        found[_TEMPLATE] = _write(scratch / _TEMPLATE, chat_template)
    if files:
        library = "transformers" if CONFIG in files else "peft"
        found[CARD] = _write(scratch / CARD, card(text, models, method, library))
    return found


def tokenizer_files(plan: Plan, sources: Mapping[str, Catalog]) -> Mapping[str, Path] | None:
    """Return the files of the model whose tokenizer a plan asks for; None if it asks for none.

    Raises:
        RecipeError: there is no such tokenizer.
    """
    if plan.tokenizer is None:
        return None
    if plan.tokenizer in sources:
        files = sources[plan.tokenizer].files
    else:
        folder = Path(plan.tokenizer)
        files = {path.name: path for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}
    found = {name: path for name, path in files.items() if _is_tokenizer(name)}
    if not found:
        near = close(plan.tokenizer, plan.models, 1)[0]
        raise RecipeError(
            f"{plan.name}: {plan.tokenizer} holds no tokenizer's files; name another model, such as {near}."
        )
    return found


def template_of(plan: Plan, sources: Mapping[str, Catalog]) -> str | None:
    """Return the chat template's text that a plan asks for; None if it asks for none, or no model has any."""
    if plan.chat_template != "auto":
        return plan.chat_template
    texts = [text for model in plan.models if (text := _template(sources[model].files))]
    return Counter(texts).most_common(1)[0][0] if texts else None


def check_vocabularies(plan: Plan, sources: Mapping[str, Catalog]) -> None:
    """See that the models number tokens as the tokenizer does that a plan asks for.

    Raises:
        RecipeError: one numbers them otherwise.
    """
    files = tokenizer_files(plan, sources)
    wanted = None if files is None else _vocabulary(files)
    if wanted is None:
        return
    for model in plan.models:
        own = _vocabulary(sources[model].files)
        if own is not None and own != wanted:
            raise RecipeError(
                f"{plan.name}: {model} numbers its tokens otherwise than {plan.tokenizer}, whose tokenizer the result "
                f"shall have; give it that vocabulary first, as mergekit-tokensurgeon does."
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read a table from a JSON file.

    Raises:
        RecipeError: it cannot be read, or is no table.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path} cannot be read as JSON; copy it anew.") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{path} is no table of names and values; copy it anew.")
    return value


def _is_tokenizer(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _TOKENIZER)


def _template(files: Mapping[str, Path]) -> str | None:
    if _TEMPLATE in files:
        return files[_TEMPLATE].read_text(encoding="utf-8")
    text = read_json(files[_TOKENIZER_CONFIG]).get("chat_template") if _TOKENIZER_CONFIG in files else None
    return text if isinstance(text, str) else None


def _vocabulary(files: Mapping[str, Path]) -> Any:
    """Return each token's number as far as the files tell; None if they do not."""
    if "tokenizer.json" in files:
        held = read_json(files["tokenizer.json"])
        model = held.get("model")
        added = held.get("added_tokens")
        tokens = [(one.get("content"), one.get("id")) for one in added] if isinstance(added, list) else []
        return model.get("vocab") if isinstance(model, dict) else None, tokens
    return read_json(files["vocab.json"]) if "vocab.json" in files else None


def _write(path: Path, text: str) -> Path:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path} cannot be written: {error.strerror}.") from error
    return path
