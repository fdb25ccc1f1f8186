"""What another policy says, less what is as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies.base import Measure, Policy, SaveRequest, UnitInfo
from tailor_dcp.policies.either import Either
from tailor_dcp.policies.options import shown
from tailor_dcp.units import Unit

UNTRAINED = ".(untrained)"
"""What is appended to a layer's name for its weights without optimizer state, if it has others too."""


@dataclass(frozen=True)
class Unchanged(Policy):
    """What the inner policy finds due, less what is bit-identical to what was last saved.

    Nothing is lost by that: frozen layers, the base below LoRA adapters and idle experts are carried,
    however long ago they were written, and are not stale: their values are those of this step. So a
    unit's bound is the inner policy's bound, in saves since its value changed.

    A moment whose step counter went on counts as changed. What is not known (the first save after one
    without fingerprints, optimizer state that is no tensor) counts as changed too.

    It costs one pass over the state in every save (see ``tailor_dcp.fingerprint``).

    Attributes:
        inner: the policy that decides about what changed. Two policies are combined outside:
            ``Unchanged(a) | Unchanged(b)``.
    """

    name: ClassVar[str] = "unchanged"

    inner: Policy

    def __post_init__(self) -> None:
        if isinstance(self.inner, Unchanged):
            object.__setattr__(self, "inner", self.inner.inner)
        if isinstance(self.inner, Either):
            several = "|".join(f"unchanged+{policy}" for policy in self.inner.policies)
            raise PolicyError(f"Unchanged(inner=...) takes one policy, not several: write {several!r}.")
        if not isinstance(self.inner, Policy):
            raise PolicyError(
                f"Unchanged(inner=...) takes a policy, not {shown(self.inner)}: pass it through parse_policy first."
            )

    @property
    def needs_fingerprints(self) -> bool:
        """True: only fingerprints tell what is unchanged."""
        return True

    @property
    def needs_drift(self) -> Measure:
        """What the inner policy needs."""
        return self.inner.needs_drift

    def select(self, request: SaveRequest) -> Iterable[Unit]:
        """Return what the inner policy returns and is not known to be unchanged."""
        due = set(self.inner.select(_whole(request)))
        return [info.unit for info in request.units if info.changed is not False and _owner(info) in due]

    def cohorts(self, request: SaveRequest) -> Mapping[Unit, str]:
        """Label units as the inner policy does, but frozen ones apart: their files live longest."""
        labels = dict(self.inner.cohorts(_whole(request)))
        trained = {info.layer for info in request.units if not info.is_weight}
        found: dict[Unit, str] = {}
        for info in request.units:
            label = labels.get(_owner(info))
            if info.changed is False or (info.changed is None and _untrained(info, trained)):
                found[info.unit] = f"frozen/{label or _owner(info).layer}"
            elif label is not None:
                found[info.unit] = label
        return found

    def storage_dtype(self, unit: Unit, dtype: torch.dtype) -> torch.dtype:
        """Return what the inner policy returns."""
        return self.inner.storage_dtype(unit, dtype)

    def __str__(self) -> str:
        return f"{self.name}+{self.inner}"


def _owner(info: UnitInfo) -> Unit:
    return Unit(info.layer.removesuffix(UNTRAINED), info.kind)


def _untrained(info: UnitInfo, trained: set[str]) -> bool:
    return info.is_weight and bool(trained) and info.layer not in trained


def _whole(request: SaveRequest) -> SaveRequest:
    """Return the request as the inner policy knows it, each layer in one piece."""
    parts: dict[Unit, list[UnitInfo]] = {}
    for info in request.units:
        parts.setdefault(_owner(info), []).append(info)
    return replace(request, units=tuple(_joined(unit, infos) for unit, infos in parts.items()))


def _joined(unit: Unit, infos: list[UnitInfo]) -> UnitInfo:
    if len(infos) == 1:
        return replace(infos[0], layer=unit.layer)
    # How old a part is that never changed says nothing about how stale the layer is.
    stale = [info for info in infos if info.changed is not False] or infos
    oldest = max(stale, key=lambda info: (info.age is None, info.age or 0))
    changed = True if any(info.changed for info in infos) else oldest.changed
    return replace(oldest, layer=unit.layer, bytes=sum(info.bytes for info in infos), changed=changed)
