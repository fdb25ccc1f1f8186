"""Diff: how far each unit moved between two checkpoints, of whatever formats they are."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tailor_dcp.base import open_base
from tailor_dcp.contents import Contents
from tailor_dcp.errors import TailorError
from tailor_dcp.layers import LayerMap
from tailor_dcp.location import METADATA
from tailor_dcp.merging.sources import open_source
from tailor_dcp.tensors import Readable, close_files
from tailor_dcp.units import STEP, WEIGHT, Unit

_PIECE = 1 << 21
"""Elements of each tensor that are in memory at a time."""

Name = tuple[str, str]
"""A parameter's FQN and the kind of its tensor."""


class NothingInCommonError(TailorError, ValueError):
    """Two checkpoints have no tensor of one name and shape."""


class NoArithmeticError(TailorError, ValueError):
    """Tensors are of a dtype that torch does not compute with."""


@dataclass(frozen=True)
class UnitDiff:
    """How far one unit moved.

    Attributes:
        layer: the layer's name.
        kind: ``weight`` or the optimizer state's name.
        elements: how many elements were compared.
        relative: ‖b - a‖ / ‖a‖, Euclidean norms over all of the unit's tensors; None where ‖a‖ is 0 and ‖b‖ is not.
        cosine: the cosine of the angle between a and b; None where either is 0.
        changed: the share of elements that are not equal; two NaNs are.
        carried: whether the records say that both are the bytes of one save, so that nothing was read.
    """

    layer: str
    kind: str
    elements: int
    relative: float | None
    cosine: float | None
    changed: float
    carried: bool


@dataclass(frozen=True)
class Diff:
    """What ``diff`` finds.

    Attributes:
        a: the first checkpoint.
        b: the second one.
        steps: their training steps, None where there is none.
        units: every unit that both have, in the first one's order.
        only_a: tensors that only the first one has, as ``fqn (kind)``.
        only_b: tensors that only the second one has.
        reshaped: tensors whose shapes differ, which were not compared.
    """

    a: str
    b: str
    steps: tuple[int | None, int | None]
    units: tuple[UnitDiff, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    reshaped: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain builtins, for ``--json``."""
        return asdict(self)


@dataclass
class _Sums:
    """What is added up over a unit's elements, in float64."""

    elements: int = 0
    apart: float = 0.0
    a: float = 0.0
    b: float = 0.0
    product: float = 0.0
    changed: int = 0
    carried: list[bool] = field(default_factory=list)

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        equal = (a == b) | ((a != a) & (b != b))  # noqa: PLR0124 - NaN is what differs from itself
        self.changed += a.numel() - int(equal.sum())
        wide, other = _real(a), _real(b)
        self.apart += float((other - wide).square().sum())
        self.a += float(wide.square().sum())
        self.b += float(other.square().sum())
        self.product += float((wide * other).sum())

    def told(self, unit: Unit) -> UnitDiff:
        carried = all(self.carried)
        relative = 0.0 if not self.apart else math.sqrt(self.apart / self.a) if self.a else None
        norms = math.sqrt(self.a) * math.sqrt(self.b)
        cosine = 1.0 if carried else _finite(self.product / norms if norms else None)
        share = self.changed / self.elements if self.elements else 0.0
        if cosine is not None:
            cosine = max(-1.0, min(1.0, cosine))  # rounding can lead beyond
        return UnitDiff(unit.layer, unit.kind, self.elements, _finite(relative), cosine, share, carried)


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
    allow: tuple[str, ...] = (),
) -> Diff:
    """Compare two checkpoints, unit by unit.

    Either may be a DCP checkpoint, a run's ``run@300``, or anything that ``tailor-convert`` reads: parameters are
    compared by name. Tensors are read a stretch at a time; what a composite and its ancestor share is not read at all.
    Values of different dtypes are compared as float64.

    Args:
        a: the earlier checkpoint.
        b: the later one.
        progress: is told how many of how many elements are done.
        allow: classes, as ``module.Class``, that may be unpickled.

    Raises:
        NothingInCommonError: they have no tensor of one name and shape.
        NoArithmeticError: they have tensors that torch does not compute with, such as four bits in a byte.
        TailorError: one of them is none, is damaged, or cannot be read.
    """
    one, other = (open_source(os.fspath(path), allow, as_catalog=True) for path in (a, b))
    assert one.catalog is not None
    assert other.catalog is not None
    mine, theirs = (dict(_tensors(source.catalog)) for source in (one, other))
    both = [name for name in mine if name in theirs and mine[name].size == theirs[name].size]
    if not both:
        raise NothingInCommonError(
            f"{os.fspath(a)} and {os.fspath(b)} have no tensor of one name and shape; compare checkpoints of one model."
        )
    shared = _shared(one.path, other.path)
    layers, done, total = LayerMap(), 0, sum(mine[name].count for name in both if name not in shared)
    sums: dict[Unit, _Sums] = {}
    try:
        for name in both:
            unit = sums.setdefault(Unit(layers.layer(name[0]), name[1]), _Sums())
            unit.elements += mine[name].count
            unit.carried.append(name in shared)
            for count in () if name in shared else _compare(mine[name], theirs[name], unit):
                done += count
                if progress:
                    progress(done, total)
    finally:
        close_files()
    return Diff(
        os.fspath(a),
        os.fspath(b),
        (one.index.step, other.index.step),
        tuple(held.told(unit) for unit, held in sums.items()),
        tuple(_shown(name) for name in mine if name not in theirs),
        tuple(_shown(name) for name in theirs if name not in mine),
        tuple(_shown(name) for name in mine if name in theirs and mine[name].size != theirs[name].size),
    )


def _tensors(catalog: Any) -> Iterator[tuple[Name, Readable]]:
    """Yield weights and optimizer state; the step counter has no unit of its own."""
    state = catalog.state
    for fqn in dict.fromkeys((*catalog.weights, *state)):
        if fqn in catalog.weights:
            yield (fqn, WEIGHT), catalog.weights[fqn]
        yield from (((fqn, kind), tensor) for kind, tensor in state.get(fqn, {}).items() if kind != STEP)


def _compare(a: Readable, b: Readable, sums: _Sums) -> Iterator[int]:
    for start in range(0, a.count, _PIECE):
        stop = min(start + _PIECE, a.count)
        one, other = a.read(start, stop), b.read(start, stop)
        try:
            if one.dtype != other.dtype:
                one, other = one.double(), other.double()
            sums.add(one, other)
        except NotImplementedError as error:
            kinds = " and ".join(dict.fromkeys((str(a.dtype), str(b.dtype))))
            raise NoArithmeticError(
                f"Tensors of {kinds} cannot be compared: torch does not compute with them."
            ) from error
        yield stop - start


def _real(values: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(values).double() if values.is_complex() else values.double()


def _shared(a: Path, b: Path) -> frozenset[Name]:
    """Return what both checkpoints have from one save, as their records tell."""
    if not all((path / METADATA).is_file() for path in (a, b)):
        return frozenset()
    one, other = (_origins(Contents(open_base(path))) for path in (a, b))
    return frozenset(name for name, origin in one.items() if other.get(name) == origin)


def _origins(contents: Contents) -> dict[Name, tuple[str, str]]:
    """Return for each tensor the save that wrote it and the dtype in which; nothing of what has no record."""
    record = contents.base.record
    if record is None:
        return {}
    saves = {key: held.origin.save_id for held in record.units.values() for key in held.keys}
    stored = contents.base.metadata.state_dict_metadata
    return {
        (entry.fqn, entry.unit.kind): (saves[key], str(getattr(stored[key], "properties", None)))
        for key, entry in contents.entries.items()
        if key in saves
    }


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _shown(name: Name) -> str:
    return name[0] if name[1] == WEIGHT else f"{name[0]} ({name[1]})"
