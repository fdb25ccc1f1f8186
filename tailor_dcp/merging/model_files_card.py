"""The model card of a merged model: what it was made of, and the recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

import yaml

_MOST_PARTS = 2
"""A name on the hub has an owner and a name; a folder's path is cut to its end."""


def card(text: str, models: Sequence[str], method: str, library: str = "transformers") -> str:
    """Return a README.md with front matter as the hub reads it.

    Args:
        text: the recipe.
        models: the models that were merged.
        method: the merge method.
        library: what loads the result: ``transformers`` or ``peft``.
    """
    names = list(dict.fromkeys(_short(model) for model in models))
    head = yaml.safe_dump(
        {"base_model": names, "library_name": library, "tags": ["merge", "tailor_dcp"]}, sort_keys=False
    )
    items = "\n".join(f"- `{name}`" for name in names)
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    recipe = f"\n## Recipe\n\n{fence}yaml\n{text.rstrip()}\n{fence}\n" if text.strip() else ""
    return f"---\n{head}---\n\n# Merged model\n\nMade by tailor_dcp with the method `{method}` of:\n\n{items}\n{recipe}"


def _short(model: str) -> str:
    path = PurePath(model)
    parts = [part for part in path.parts if part not in (path.anchor, ".", "..")]
    return model if not path.is_absolute() and len(path.parts) <= _MOST_PARTS else "/".join(parts[-1:])
