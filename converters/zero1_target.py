"""Writing ZeRO-1 checkpoints: as ZeRO-2's, but for where frozen parameters are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tailor_dcp.catalog import Catalog

from .options import Options
from .zero2_target import Stage12
from .zero_target import write_zero


def write(catalog: Catalog, place: Path, final: Path, options: Options) -> Sequence[str]:
    """Write a folder that a ZeRO-1 engine's ``load_checkpoint`` takes; see ``zero_target.write_zero``."""
    return write_zero(catalog, place, options, 1, Stage12(1))
