"""Reading Hugging Face folders: a model's weights, an adapter's, or a checkpoint of the Trainer.

Parameters get the names that ``from_pretrained(...).state_dict()`` has, so that a live run of the model loads the
result; the files' own names come back when a folder is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tailor_dcp.catalog import Catalog
from tailor_dcp.errors import ConversionError
from tailor_dcp.location import METADATA
from tailor_dcp.tensors import Readable

from . import dcp_source, hf_trainer, peft_folder
from .hf_files import CONFIG, carried, read_json, stored_tensors, weight_file, weight_files
from .hf_model import HfModel, Named, model_of
from .options import Options

_INPUTS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_OUTPUT = "lm_head.weight"
_OPTIMIZER = "optimizer"


def recognise(path: Path) -> bool:
    """Tell a folder with weights, an adapter, or a file of them, by names."""
    try:
        return weight_file(path) is not None or peft_folder.weight_file(path) is not None
    except (ConversionError, OSError):
        return path.is_dir()  # it is one, and opening it says what is wrong


def open_source(path: Path, options: Options) -> Catalog:
    """Open a model's folder, or one file of weights or index of one in it.

    Args:
        path: the folder or the file.
        options: ``allow`` admits classes in ``.bin`` files.

    Raises:
        ConversionError: it holds no weights, or what cannot be converted.
        DamagedSourceError: a file is damaged or missing, or contradicts another.
    """
    folder = path if path.is_dir() else path.parent
    file = weight_file(path)
    if file is None:
        catalog = peft_folder.open_adapter(path, options)
        return hf_trainer.with_training(catalog, folder, None, options)
    files = carried(folder)
    stored = stored_tensors(weight_files(file), options)
    config = read_json(files[CONFIG]) if CONFIG in files else {}
    model, why = _model(config) if config else (None, "there is no config.json")
    named, notes = _named(stored, model, why, config)
    catalog = Catalog(
        source=path,
        format="hf",
        weights=named.tensors,
        buffers=frozenset(named.tensors) & model.buffers if model else frozenset(),
        files=files,
        notes=notes,
    )
    if not path.is_dir():
        return catalog
    return _with_optimizer(hf_trainer.with_training(catalog, folder, model, options), folder, options)


def _with_optimizer(catalog: Catalog, folder: Path, options: Options) -> Catalog:
    """Add the optimizer that transformers keeps as a DCP checkpoint beside the weights, if there is one."""
    if options.weights_only or not (folder / _OPTIMIZER / METADATA).is_file():
        return catalog
    held = dcp_source.open_source(folder / _OPTIMIZER, options)
    return replace(catalog, state=held.state, groups=held.groups)


def _model(config: Mapping[str, Any]) -> tuple[HfModel | None, str]:
    try:
        return model_of(config), ""
    except LookupError as error:
        return None, str(error.args[0])


def _named(
    stored: Mapping[str, Readable], model: HfModel | None, why: str, config: Mapping[str, Any]
) -> tuple[Named, tuple[str, ...]]:
    """Return the tensors by the model's names, and what the user should know of that."""
    if model is not None:
        try:
            named = model.live(stored)
            return named, _notes(stored, named, model)
        except Exception as error:  # what an unknown version of transformers, or damaged files, lead to
            why = f"transformers cannot load them ({(str(error) or type(error).__name__).splitlines()[0]})"
    tied = _tied(stored, config)
    notes = [f"Parameters have the names that are in the files, which the live model may see differently: {why}."]
    if len(tied) > len(stored):
        notes.append(f"{_OUTPUT} is taken to be tied to the input embeddings, as config.json says.")
    return Named(tied), tuple(notes)


def _notes(stored: Mapping[str, Readable], named: Named, model: HfModel) -> tuple[str, ...]:
    notes = []
    if named.joined:
        notes.append(
            f"{named.joined} tensors are laid out as {model.name} has them, joined from or cut out of those in the "
            f"files; --to hf gives these back."
        )
    kept = set(map(id, named.tensors.values())) & set(map(id, stored.values()))
    renamed = [n for n, t in stored.items() if id(t) in kept and named.tensors.get(n) is not t]
    if renamed:
        notes.append(f"{model.name} has other names than the files for {_some(renamed)}.")
    if named.unknown:
        notes.append(f"{model.name} does not know {_some(named.unknown)}; they are kept as they are.")
    if named.missing:
        notes.append(f"The files lack {_some(named.missing)} of {model.name}, which from_pretrained starts anew.")
    return tuple(notes)


def _some(names: Any) -> str:
    names = list(names)
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _tied(stored: Mapping[str, Readable], config: Mapping[str, Any]) -> dict[str, Readable]:
    """Return the tensors with the output embeddings that a configuration says are the input's."""
    text = config.get("text_config")
    says = config.get("tie_word_embeddings") or (isinstance(text, dict) and text.get("tie_word_embeddings"))
    inputs = [name for name in stored if name.endswith(_INPUTS)]
    if says is True and len(inputs) == 1 and _OUTPUT not in stored:
        return {**stored, _OUTPUT: stored[inputs[0]]}
    return dict(stored)
