"""Reading DeepSpeed ZeRO checkpoints of all three stages, without DeepSpeed, and the Trainer's folder around them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tailor_dcp.catalog import Catalog
from tailor_dcp.errors import DamagedSourceError
from tailor_dcp.tensors import Given, Readable

from .options import Options
from .streams import Part, stream
from .torch_file import in_memory
from .trainer_folder import is_trainer_folder, trainer_train
from .zero_classes import LossScaler
from .zero_contents import ZeroContents, count_in, read
from .zero_files import find, recognise  # noqa: F401 - the entry point of this module
from .zero_layout import part_of, undealt
from .zero_partial import note_of

_ENGINE = frozenset({
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps",
    "global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version",
    "num_experts", "ds_autoep_layers", "autoep_layers", "universal_checkpoint_info",
})  # fmt: skip
"""Names in a model's file that are the engine's; the others are the client's."""
TAKEN = frozenset({"step", "scheduler", "rng", "token", "dataloader", "zero", "client", "trainer_state"})
"""Names under ``train.`` that mean something; a client's entry of such a name goes under ``train.client``."""
CARRIER = "tailor"
"""The client's entry in which entries of ``train.`` that DeepSpeed has no place for go through its files."""


def open_source(path: Path, options: Options) -> Catalog:
    """Open a ZeRO checkpoint, or the folder around one; no tensor is read.

    Args:
        path: the folder.
        options: ``tag`` tells which of several, ``allow`` admits classes in the client's state.

    Raises:
        ConversionError: it is of a kind that is not read, which is named, or holds a class that is not admitted.
        DamagedSourceError: a file is missing or damaged, or not of the same save as the others.
    """
    folder = find(path, options.tag)
    contents = read(folder, options)
    train = train_of(contents)
    files: Mapping[str, Path] = {}
    if is_trainer_folder(folder.root):
        trainer, files = trainer_train(folder.root, options)
        train |= trainer
    return Catalog(
        source=path,
        format="zero",
        weights=_weights(contents),
        state=_states(contents),
        groups=tuple(groups_of(contents)),
        train=train,
        buffers=frozenset(contents.model[0].buffers),
        frozen=frozenset(frozen_of(contents)),
        files=files,
        notes=_notes(contents),
    )


# Tensors ------------------------------------------------------------------------------------------------


def _weights(contents: ZeroContents) -> dict[str, Readable]:
    """Return all weights in the order in which the module has them, tied ones under all of their names."""
    first = contents.model[0]
    weights = {fqn: _cut(contents, number, fqn, None) for number, fqn in _trained(contents)}
    weights |= frozen_of(contents)
    weights |= {name: first.stored(name) for name in first.buffers}
    for alias, name in first.shared.items():
        if name in weights:
            weights[alias] = weights[name]
    order = [name for name in first.module if name in weights]
    return {name: weights[name] for name in [*order, *(name for name in weights if name not in first.module)]}


def _trained(contents: ZeroContents) -> Iterator[tuple[int, str]]:
    shapes = contents.model[0].shapes
    numbers = contents.flats if contents.partial else range(len(shapes))
    return ((number, fqn) for number in numbers for fqn in shapes[number])


def _cut(contents: ZeroContents, number: int, fqn: str, kind: str | None) -> Readable:
    """Return a parameter's weight, or one of its states, from the ranks' parts of a stream."""
    size = contents.model[0].shapes[number][fqn]
    parts = []
    for rank, offset, _, length in contents.flats[number].held[fqn]:
        file = contents.optim[rank]
        parts.append(Part(file.state(number)[0][kind] if kind else file.weights[number], offset, length))
    dtype = parts[0].tensor.dtype if parts else torch.float32
    return _made(contents, fqn, size, dtype, parts)


def _made(contents: ZeroContents, fqn: str, size: torch.Size, dtype: torch.dtype, parts: Sequence[Part]) -> Readable:
    try:
        return stream(size, dtype, parts)
    except ValueError as error:
        raise DamagedSourceError(
            f"{contents.folder.folder} does not hold all of {fqn} ({error}); copy it anew."
        ) from error


def frozen_of(contents: ZeroContents) -> dict[str, Readable]:
    """Return the parameters that are not trained, in the model's own dtype."""
    first = contents.model[0]
    if first.frozen is None:
        trained = {fqn for _, fqn in _trained(contents)}
        others = trained | set(first.buffers) | set(first.shared)
        whole = contents.stage < 3  # where they are, if they were not left out
        return {name: first.stored(name) for name in first.module if name not in others} if whole else {}
    return {fqn: _frozen_one(contents, fqn, size) for fqn, size in first.frozen.items()}


def _frozen_one(contents: ZeroContents, fqn: str, size: torch.Size) -> Readable:
    fragments = [file.fragment(fqn) for file in contents.model]
    if contents.stage < 3:
        if fragments[0].size != size:
            raise DamagedSourceError(f"{contents.model[0].path} has {fqn} in two sizes; copy it anew.")
        return fragments[0]
    count = math.prod(size)
    part = part_of(count, contents.world)
    lengths = [max(0, min(part, count - rank * part)) for rank in range(contents.world)]
    parts = [Part(fragment, 0, length) for fragment, length in zip(fragments, lengths, strict=True)]
    return _made(contents, fqn, size, fragments[0].dtype, parts)


def _states(contents: ZeroContents) -> dict[str, dict[str, Readable]]:
    states: dict[str, dict[str, Readable]] = {}
    for number, fqn in _trained(contents):
        spread, single = contents.optim[0].state(number)
        made = {kind: Given(_number(value)) for kind, value in single.items() if _is_number(value)}
        made_spread = {kind: _cut(contents, number, fqn, kind) for kind in spread}
        if made or made_spread:
            states[fqn] = {**made, **made_spread}
    return states


def _is_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor | int | float) and not isinstance(value, bool)


def _number(value: Any) -> torch.Tensor:
    """Return a value of a whole stream as each parameter's own: steps as torch's optimizers have them."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else torch.tensor(float(value))


def groups_of(contents: ZeroContents) -> Iterator[dict[str, Any]]:
    """Yield the param groups with their parameters in the order that the optimizer was given them in."""
    shapes = contents.model[0].shapes
    dealt = contents.stage < 3 and contents.zero_config.get("round_robin_gradients") is True
    for group in contents.optim[0].groups:
        if any(not isinstance(number, int) or not 0 <= number < len(shapes) for number in group["params"]):
            raise DamagedSourceError(f"{contents.optim[0].path} has param groups of other parameters; copy it anew.")
        names = [fqn for number in group["params"] for fqn in shapes[number]]
        yield {**in_memory(group), "params": undealt(names, contents.world) if dealt else names}


# Everything else ----------------------------------------------------------------------------------------


def train_of(contents: ZeroContents) -> dict[str, Any]:
    """Return what goes under ``train.``: steps, the scheduler, DeepSpeed's own counters, the client's entries."""
    tree, path = contents.model[0].tree, contents.model[0].path
    train: dict[str, Any] = {"step": count_in(tree, "global_steps", path)}
    if tree.get("lr_scheduler") is not None:
        train["scheduler"] = in_memory(tree["lr_scheduler"])
    train["zero"] = _zero(contents)
    client = {name: value for name, value in tree.items() if name not in _ENGINE}
    carried = client.pop(CARRIER, None)
    for name, value in client.items():
        place = train.setdefault("client", {}) if name in TAKEN or not isinstance(name, str) else train
        place[name] = in_memory(value)
    return train | (in_memory(carried) if isinstance(carried, Mapping) else {})


def _zero(contents: ZeroContents) -> dict[str, Any]:
    """Return what is DeepSpeed's own, under the names that ``EngineState`` has it under, too."""
    tree, path, config = contents.model[0].tree, contents.model[0].path, contents.config
    scaler, version = contents.optim[0].zero.get("loss_scaler"), tree.get("ds_version")
    values = dict(vars(scaler)) if isinstance(scaler, LossScaler) else {}
    accumulation = config.get("gradient_accumulation_steps")
    batches = accumulation if isinstance(accumulation, int) else 1
    zero = {
        "global_samples": count_in(tree, "global_samples", path),
        "skipped_steps": count_in(tree, "skipped_steps", path),
        "micro_steps": count_in(tree, "global_steps", path) * batches,
        "loss_scale": float(values.pop("cur_scale", 1.0)),
        "stage": contents.stage,
        "world_size": contents.world,
        "dtype": _dtype(contents),
        "ds_version": version if isinstance(version, str) else "",
        "ds_config": json.dumps(in_memory(config), default=str),
        "buffers": list(contents.model[0].buffers),
        "frozen": list(frozen_of(contents)),
    }
    zero |= {name: tree[name] for name in ("data_sampler", "random_ltd") if tree.get(name) is not None}
    if values.pop("dynamic", False):
        zero |= {name: value for name, value in values.items() if isinstance(value, bool | int | float)}
    if isinstance(contents.optim[0].zero.get("clip_grad"), int | float):
        zero["clip_grad"] = contents.optim[0].zero["clip_grad"]
    size = contents.zero_config.get("sub_group_size")
    if contents.stage == 3 and isinstance(size, int | float) and 1 <= size < 1 << 60:
        zero["sub_group_size"] = int(size)
    return {name: in_memory(value) for name, value in zero.items()}


def _dtype(contents: ZeroContents) -> str:
    """Return the dtype that the module computes in."""
    for name in ("bf16", "bfloat16", "fp16"):
        section = contents.config.get(name)
        if isinstance(section, Mapping) and section.get("enabled") is True:
            return name.replace("bfloat16", "bf16")
    trained = next((fqn for _, fqn in _trained(contents) if fqn in contents.model[0].module), None)
    held = contents.model[0].module.get(trained) if trained else None
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(held.dtype, "fp32") if isinstance(held, torch.Tensor) else "fp32"


def _notes(contents: ZeroContents) -> tuple[str, ...]:
    notes = []
    if contents.partial:
        everything = [fqn for shapes in contents.model[0].shapes for fqn in shapes]
        notes.append(note_of(contents.folder.folder, (fqn for _, fqn in _trained(contents)), everything))
    if contents.model[0].frozen is None and contents.stage > 1:
        notes.append(
            "It was saved without frozen parameters (exclude_frozen_parameters), so those of the model, if it has any, "
            "are missing."
        )
    return tuple(notes)
