"""Reading one stored entry, running nothing that is in it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

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
