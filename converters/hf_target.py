"""Writing Hugging Face folders that ``from_pretrained`` loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tailor_dcp.catalog import Catalog
from tailor_dcp.merging.model_files_config import with_dtype
from tailor_dcp.tensors import Readable

from . import peft_folder, ranks
from .filling import WINDOW, Stretch, fill, make_file, whole
from .hf_files import CONFIG, read_json
from .hf_model import HfModel, model_of
from .options import Options
from .safetensors_file import layout_of, shards_of
from .trainer_folder import write_trainer_files

_METADATA = {"format": "pt"}
_INPUT = ("embed", "wte", "shared")


def write(catalog: Catalog, place: Path, final: Path, options: Options) -> Sequence[str]:
    """Write a folder of safetensors files, with the files that the catalog carries along.

    Args:
        catalog: what to write.
        place: the folder to make.
        final: the name that it will have.
        options: the size of a file, the dtype if the weights were given another one, whom to tell of progress.

    Raises:
        ConversionError: a tensor has a dtype that the format has not, the disk is full, or the like.
        DamagedSourceError: a source cannot be read.
    """
    if peft_folder.is_adapter(catalog):
        name = peft_folder.WEIGHTS
        tensors, notes = peft_folder.filed(catalog)
    else:
        name = "model.safetensors"
        tensors, notes = _filed(catalog)
    notes = [*notes, *_left_out(catalog)]
    files = _files(tensors, name, options)
    stretches = ranks.together(lambda: _prepare(place, files))
    fill(stretches, options.progress)
    ranks.together(lambda: _finish(catalog, place, files, name, options) if ranks.rank() == 0 else None)
    return notes


def _files(tensors: Mapping[str, Readable], name: str, options: Options) -> dict[str, Mapping[str, Readable]]:
    """Return the files to write, each with its tensors."""
    most = options.max_shard_size if name != peft_folder.WEIGHTS else sum(t.bytes for t in tensors.values())
    shards = shards_of(tensors, most)
    if len(shards) == 1:
        return {name: shards[0]}
    stem, end = name.split(".")
    return {f"{stem}-{n + 1:05d}-of-{len(shards):05d}.{end}": shard for n, shard in enumerate(shards)}


def _prepare(place: Path, files: Mapping[str, Mapping[str, Readable]]) -> list[Stretch]:
    """Make the files with their headers, on the first rank; return what goes into them, on all."""
    layouts = {name: layout_of(held, _METADATA) for name, held in files.items()}
    if ranks.rank() == 0:
        place.mkdir(exist_ok=True)
        for name, layout in layouts.items():
            make_file(place / name, layout.size, [(0, layout.header)])
    return [
        whole(place / name, offset, files[name][tensor])
        for name, layout in layouts.items()
        for tensor, offset in layout.places.items()
    ]


def _finish(
    catalog: Catalog, place: Path, files: Mapping[str, Mapping[str, Readable]], name: str, options: Options
) -> None:
    if len(files) > 1:
        held = [tensor for tensors in files.values() for tensor in tensors.values()]
        index = {
            "metadata": {"total_parameters": sum(t.count for t in held), "total_size": sum(t.bytes for t in held)},
            "weight_map": {tensor: file for file, tensors in files.items() for tensor in tensors},
        }
        (place / f"{name}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if options.dtype is not None and CONFIG in catalog.files:
        config = with_dtype(read_json(catalog.files[CONFIG]), str(options.dtype).removeprefix("torch."))
        (place / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_trainer_files(catalog, place)


def _left_out(catalog: Catalog) -> list[str]:
    notes = []
    if catalog.state:
        notes.append(
            f"The optimizer's state of {len(catalog.state)} parameters is not written; a Hugging Face folder has none."
        )
    if not catalog.files:
        notes.append(
            f"There is no {CONFIG} and no tokenizer to give along; put those of the model beside the weights before "
            f"from_pretrained can load them."
        )
    return notes


def _filed(catalog: Catalog) -> tuple[Mapping[str, Readable], list[str]]:
    """Return the weights as the folder's files shall have them."""
    notes: list[str] = []
    model = None
    if CONFIG in catalog.files:
        try:
            model = model_of(read_json(catalog.files[CONFIG]))
        except LookupError:
            model = None
    kept = _untied(catalog, model, notes)
    if model is not None:
        try:
            return model.filed(kept), notes
        except Exception as error:  # what an unknown version of transformers leads to
            why = (str(error) or type(error).__name__).splitlines()[0]
            notes.append(f"Parameters have the names of the live model, since transformers cannot convert them: {why}.")
    return kept, notes


def _untied(catalog: Catalog, model: HfModel | None, notes: list[str]) -> dict[str, Readable]:
    """Return the weights, tied ones under the one name that transformers expects."""
    ties = model.ties if model else {}
    groups: dict[int, list[str]] = {}
    for fqn, tensor in catalog.weights.items():
        groups.setdefault(id(tensor), []).append(fqn)
    dropped: set[str] = set()
    for names in groups.values():
        kept = _main(names, ties)
        dropped |= {name for name in names if name != kept}
    for target, source in ties.items():
        both = [catalog.weights.get(name) for name in (target, source)]
        if both[0] is None or both[1] is None or both[0] is both[1] or source in dropped:
            continue
        if _equal(both[0], both[1]):
            dropped.add(target)
        else:
            notes.append(f"{target} and {source} are tied in {CONFIG} and differ; both are written as they are.")
    return {fqn: tensor for fqn, tensor in catalog.weights.items() if fqn not in dropped}


def _main(names: Sequence[str], ties: Mapping[str, str]) -> str:
    """Return the name under which a tied weight is stored."""
    main = [name for name in names if name not in ties]
    if not ties:
        main = [name for name in names if any(part in name for part in _INPUT)]
    return (main or list(names))[0]


def _equal(one: Readable, other: Readable) -> bool:
    """Tell whether two tensors hold the same bytes, a window at a time."""
    if one.size != other.size or one.dtype != other.dtype:
        return False
    step = WINDOW // one.dtype.itemsize
    return all(
        torch.equal(*(t.read(start, min(start + step, t.count)).view(torch.uint8) for t in (one, other)))
        for start in range(0, one.count, step)
    )
