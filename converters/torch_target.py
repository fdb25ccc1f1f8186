"""Writing a torch.save file: one nested state dict in the layout's keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tailor_dcp.catalog import Catalog

from . import ranks
from .filling import fill
from .options import Options
from .torch_holes import Holes, patch_checksums


def write(catalog: Catalog, place: Path, final: Path, options: Options) -> Sequence[str]:
    """Write one file that ``torch.load`` reads, ``weights_only=True`` included.

    Args:
        catalog: what to write.
        place: the file to make.
        final: the name that it will have.
        options: whom to tell of progress.

    Raises:
        ConversionError: the disk is full, or the like.
    """
    holes = Holes()
    state: dict[str, Any] = {"model": {fqn: holes.make(tensor) for fqn, tensor in catalog.weights.items()}}
    if catalog.state or catalog.groups:
        kinds = {fqn: {kind: holes.make(t) for kind, t in held.items()} for fqn, held in catalog.state.items()}
        state["optim"] = {"state": kinds, "param_groups": [dict(group) for group in catalog.groups]}
    if catalog.train:
        state["train"] = dict(catalog.train)
    filled = fill(holes.save(state, place, allow=options.allow), options.progress)
    crcs = {stretch.offset: crc for stretch, crc in filled}
    ranks.together(lambda: patch_checksums(place, crcs) if ranks.rank() == 0 else None)
    return (f"{len(catalog.files)} files beside it are not part of a torch.save file.",) if catalog.files else ()
