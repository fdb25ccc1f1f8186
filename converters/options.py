"""What a conversion can be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tailor_dcp.errors import ConversionError

Progress = Callable[[int], None]
"""Is told how many more bytes were done, from any thread."""

DTYPES = {
    "fp32": torch.float32, "float32": torch.float32,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip
"""The names of dtypes on the command line."""

_SUFFIXES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "B": 1, "": 1}


@dataclass(frozen=True)
class Options:
    """What a conversion was told.

    Attributes:
        weights_only: leave out the optimizer and the training's progress.
        layers: a glob; only these layers are converted.
        dtype: of the weights that are written; None for the source's own.
        tag: which checkpoint of a DeepSpeed folder; None for the one that ``latest`` names.
        allow: classes, as ``module.Class``, that may be unpickled.
        world_size: ranks that a ZeRO checkpoint is written for; None for the source's, or 1.
        sub_group_size: ZeRO-3's, in elements; it must be that of the engine that will load the result. None for the
            source's, or DeepSpeed's default.
        max_shard_size: bytes after which a Hugging Face folder begins a new file.
        keys: the layout of keys that a DCP checkpoint is written in.
        link: make a DCP checkpoint that points into the source's files instead of copying their bytes.
        progress: is told of bytes that were done.
    """

    weights_only: bool = False
    layers: str | None = None
    dtype: torch.dtype | None = None
    tag: str | None = None
    allow: tuple[str, ...] = ()
    world_size: int | None = None
    sub_group_size: int | None = None
    max_shard_size: int = 5 * 10**9
    keys: str = "tailor"
    link: bool = False
    progress: Progress = field(default=lambda _: None, repr=False)


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the dtype of a name on the command line.

    Raises:
        ConversionError: there is none.
    """
    if name is None:
        return None
    if name.lower() not in DTYPES:
        raise ConversionError(f"--dtype {name} is unknown; use fp32, bf16 or fp16.")
    return DTYPES[name.lower()]


def bytes_of(text: str) -> int:
    """Return the bytes that a size such as ``5GB`` or ``500 MiB`` means.

    Raises:
        ConversionError: it is no size.
    """
    digits = text.strip().rstrip("BKMGIbkmgi ").strip()
    suffix = text.strip()[len(digits) :].strip().upper()
    try:
        size = int(float(digits) * _SUFFIXES[suffix])
    except (ValueError, KeyError) as error:
        raise ConversionError(f"{text!r} is no size; write it as 5GB or 500MB.") from error
    if size < 1:
        raise ConversionError(f"A size of {text!r} holds nothing; write it as 5GB or 500MB.")
    return size
