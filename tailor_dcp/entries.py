"""Reading one stored entry, running nothing that is in it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from tailor_dcp import unpickling
from tailor_dcp.errors import LoadError
from tailor_dcp.metadata.pickle_names import shown
from tailor_dcp.unpickling import Admitted


def load_entry(
    stored: io.BytesIO, key: str, source: str, device: str | None = "cpu", admitted: Sequence[Admitted] = ()
) -> Any:
    """Return a stored tensor or object.

    Args:
        stored: the entry's bytes, as ``torch.save`` made them.
        key: its key.
        source: the file or folder that they come from, for messages.
        device: where tensors go; None for where they were saved, as stock DCP has it.
        admitted: classes that the user trusts, as ``unpickling.allowed`` returns them.

    Raises:
        LoadError: it holds a class that is not admitted, or is damaged.
    """
    try:
        return unpickling.load(stored, admitted, map_location=device)
    except Exception as error:  # a damaged archive can raise almost anything
        name = unpickling.asked_for(error)
        if name is not None:
            raise LoadError(f"{shown(key)} in {source} {unpickling.refusal(name)}.") from error
        why = shown(unpickling.reason(error))
        raise LoadError(
            f"{shown(key)} in {source} cannot be read ({why}): it is damaged, or holds what no training state is known "
            f"to hold; use another checkpoint."
        ) from error


def pickled_anew(stored: io.BytesIO, key: str, source: str, admitted: Sequence[Admitted] = ()) -> bytes:
    """Return what ``torch.save`` makes of a stored object, which holds the same value and was not made by anybody else.

    Args:
        stored: see ``load_entry``.
        key: see ``load_entry``.
        source: see ``load_entry``.
        admitted: see ``load_entry``.

    Raises:
        LoadError: see ``load_entry``.
    """
    value = load_entry(stored, key, source, None, admitted)
    # Param groups have the same few numbers in thousands of entries. Zeros are alike whatever their sign.
    if type(value) in (bool, float, int) and value != 0:
        return _number(value)
    try:
        made = _pickled(value)
    except Exception as error:  # pickle raises almost anything, too
        why = shown(unpickling.reason(error))
        raise LoadError(f"{shown(key)} in {source} holds what is no value ({why}); use another checkpoint.") from error
    load_entry(io.BytesIO(made), key, source, None, admitted)  # some of what torch reads it refuses to read again
    return made


def _pickled(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@lru_cache(maxsize=256, typed=True)
def _number(value: float) -> bytes:
    return _pickled(value)
