"""Reading one stored entry, running nothing that is in it."""

from __future__ import annotations

import io
import pickle
import re
from typing import Any

import torch

from tailor_dcp.errors import LoadError

_CLASS = re.compile(r"GLOBAL (\S+)")


def load_entry(stored: io.BytesIO, key: str, source: str, device: str | None = "cpu") -> Any:
    """Return a stored tensor or object.

    Args:
        stored: the entry's bytes, as ``torch.save`` made them.
        key: its key.
        source: the file or folder that they come from, for messages.
        device: where tensors go; None for where they were saved, as stock DCP has it.

    Raises:
        LoadError: it holds a class that torch's safe loading does not admit, or is damaged.
    """
    try:
        return torch.load(stored, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        unknown = _CLASS.search(str(error))
        if unknown is None:
            raise _damaged(key, source, error) from error
        name = unknown[1].rstrip(".,")
        raise LoadError(
            f"{key} in {source} holds an object of {name}, which could run code and was not loaded; if you trust it, "
            f"admit it with torch.serialization.add_safe_globals([{name.rpartition('.')[2]}])."
        ) from error
    except Exception as error:  # a damaged archive can raise almost anything
        raise _damaged(key, source, error) from error


def _damaged(key: str, source: str, error: Exception) -> LoadError:
    first = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return LoadError(f"{key} in {source} is damaged and cannot be read ({first}); use another checkpoint.")
