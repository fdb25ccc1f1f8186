"""What the converters offer to the library: see ``tailor_dcp.formats``, where they enter themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from tailor_dcp.catalog import Catalog, weights_only
from tailor_dcp.formats import Formats

from .convert import write_catalog
from .formats import SOURCES, TARGETS, source_of
from .options import Options


class _Converters:
    sources = tuple(source.name for source in SOURCES)
    targets = tuple(target.name for target in TARGETS)

    def recognised(self, path: Path) -> str | None:
        return next((source.name for source in SOURCES if source.recognise(path)), None) if path.exists() else None

    def open(self, path: Path, weights_only: bool = False, allow: tuple[str, ...] = ()) -> Catalog:
        options = Options(weights_only=weights_only, allow=allow)
        catalog = source_of(path, None).open(path, options)
        return _without_training(catalog) if weights_only else catalog

    def write(
        self,
        catalog: Catalog,
        out: Path,
        to: str,
        *,
        world_size: int | None = None,
        dtype: torch.dtype | None = None,
        max_shard_size: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[str, ...]:
        options = Options(world_size=world_size, dtype=dtype)
        if max_shard_size is not None:
            options = replace(options, max_shard_size=max_shard_size)
        if progress is not None:
            options = replace(options, progress=progress)
        return write_catalog(catalog, out, to, options)


_without_training = weights_only


CONVERTERS: Formats = _Converters()
