"""The formats: how each is recognised, opened and written. A new one is a module and a line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from tailor_dcp.catalog import Catalog
from tailor_dcp.errors import ConversionError

from .options import Options


@dataclass(frozen=True)
class Source:
    """A format that can be read: ``recognise(path) -> bool`` and ``open(path, options) -> Catalog`` of its module."""

    name: str
    module: str
    words: str

    def recognise(self, path: Path) -> bool:
        """Tell whether a file or folder is of this format, by names and a few bytes; it never raises."""
        recognise: Callable[[Path], bool] = self._module.recognise
        return recognise(path)

    def open(self, path: Path, options: Options) -> Catalog:
        """Return what is in there, no tensor read yet."""
        open_source: Callable[[Path, Options], Catalog] = self._module.open_source
        return open_source(path, options)

    @property
    def _module(self) -> ModuleType:
        return import_module(self.module, __package__)


@dataclass(frozen=True)
class Target:
    """A format that can be written: ``write(catalog, place, final, options) -> notes`` of its module.

    ``place`` is a new name beside the result's own: a folder or, for formats of one file, a file. Nothing is
    there yet; when ``write`` returns on all ranks it is complete and on the disk, and gets its own name.
    """

    name: str
    module: str
    words: str
    masters: bool = False
    """Whether it holds fp32 master weights, so that ``--dtype`` means what the engine computes in beside them."""
    links: bool = False
    """Whether it points into the source's files: ``check`` and ``linked`` of its module tell what can be so."""

    def write(self, catalog: Catalog, place: Path, final: Path, options: Options) -> Sequence[str]:
        """Write it; return sentences that the user should read. ``final`` is the name that it will have."""
        write: Callable[[Catalog, Path, Path, Options], Sequence[str]] = self._module.write
        return write(catalog, place, final, options)

    def check(self, catalog: Catalog, options: Options) -> None:
        """Refuse, before anything is written, what cannot be linked to."""
        if self.links:
            self._module.check(catalog, options)

    def linked(self, catalog: Catalog) -> int:
        """Return the bytes of tensors that will not be written as they are pointed to."""
        return int(self._module.linked(catalog)) if self.links else 0

    @property
    def _module(self) -> ModuleType:
        return import_module(self.module, __package__)


SOURCES = (
    Source("zero", ".zero_source", "a DeepSpeed ZeRO checkpoint"),
    Source("universal", ".universal_source", "a DeepSpeed universal checkpoint"),
    Source("dcp", ".dcp_source", "a DCP checkpoint"),
    Source("hf", ".hf_source", "a Hugging Face folder"),
    Source("torch", ".torch_source", "a torch.save file"),
)
"""In the order in which they are tried: a Trainer's folder of a ZeRO run looks like a Hugging Face folder, too."""

TARGETS = (
    Target("dcp", ".dcp_target", "a DCP checkpoint"),
    Target("hf", ".hf_target", "a Hugging Face folder"),
    Target("zero3", ".zero3_target", "a ZeRO-3 checkpoint", masters=True),
    Target("zero2", ".zero2_target", "a ZeRO-2 checkpoint", masters=True),
    Target("zero1", ".zero1_target", "a ZeRO-1 checkpoint", masters=True),
    Target("universal", ".universal_target", "a DeepSpeed universal checkpoint", masters=True),
    Target("torch", ".torch_target", "a torch.save file"),
)

LINKED = Target("dcp", ".link_target", "a linked DCP checkpoint", links=True)
"""What ``--link`` makes of ``--to dcp``."""


def source_of(path: Path, name: str | None) -> Source:
    """Return the format that a source is in.

    Args:
        path: the source.
        name: what the user says that it is; None to find out.

    Raises:
        ConversionError: there is nothing, or it is of no known format.
    """
    if not path.exists():
        raise ConversionError(f"{path} does not exist; give a checkpoint's folder or file.")
    if name is not None:
        for source in SOURCES:
            if source.name == name:
                return source
        raise ConversionError(f"{name!r} is no format; use {', '.join(source.name for source in SOURCES)}.")
    for source in SOURCES:
        if source.recognise(path):
            return source
    known = ", ".join(source.words for source in SOURCES)
    raise ConversionError(f"{path} is none of what can be read ({known}); if it is one, say which with --from.")


def target_of(name: str, link: bool = False) -> Target:
    """Return a format that can be written by its name.

    Args:
        name: the name.
        link: the result shall point into the source's files.

    Raises:
        ConversionError: there is none, or it cannot point anywhere.
    """
    if link:
        if name == LINKED.name:
            return LINKED
        raise ConversionError(f"--link makes a DCP checkpoint, not one in {name}; say --to dcp, or leave --link out.")
    for target in TARGETS:
        if target.name == name:
            return target
    raise ConversionError(f"{name!r} is no format; use {', '.join(target.name for target in TARGETS)}.")
