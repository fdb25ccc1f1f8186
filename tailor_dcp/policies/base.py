"""What a policy is asked, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from tailor_dcp.units import WEIGHT, Unit

if TYPE_CHECKING:
    from tailor_dcp.policies.either import Either

Measure = Literal["", "sketch", "exact"]


@dataclass(frozen=True)
class UnitInfo:
    """One unit of the state that is being saved, as a policy sees it.

    Attributes:
        layer: the layer's name, ``model.layers.12``.
        kind: ``weight`` or the optimizer state's name.
        bytes: size over all ranks, in the training state's own dtypes.
        saved_step: the step whose values the newest ancestor holds; None if it holds none.
        age: saves since those values were written: 1 if the previous save wrote them;
            None if no ancestor holds them.
        stack: name of the numbered stack that the layer is in (``model.layers``), else None.
        number: its number there (12), else None.
        changed: False if it is bit for bit what the newest ancestor holds; None if that is not known,
            as it is unless the policy ``needs_fingerprints``.
        stored: its size as the policy would store it; None if that is not known.
        drift: how far it moved since its own last save, |w - w_saved| / |w_saved|; None if that is not
            known, as it is unless the policy ``needs_drift``.
    """

    layer: str
    kind: str
    bytes: int
    saved_step: int | None = None
    age: int | None = None
    stack: str | None = None
    number: int | None = None
    changed: bool | None = None
    drift: float | None = None
    stored: int | None = None

    @property
    def unit(self) -> Unit:
        """The (layer, kind) pair."""
        return Unit(self.layer, self.kind)

    @property
    def cost(self) -> int:
        """The bytes that writing it takes, as far as is known."""
        return self.bytes if self.stored is None else self.stored

    @property
    def is_weight(self) -> bool:
        """True for parameters and buffers, False for optimizer state."""
        return self.kind == WEIGHT


@dataclass(frozen=True)
class SaveRequest:
    """What a policy decides upon.

    Attributes:
        step: the training step, from the checkpoint folder's name; None if it has none.
        index: 0 for the first save of a training run, counted along its ancestors.
        units: every unit that could be carried or written, in the model's order.
        rate: bytes per second that the newest ancestor was written with, planning and checksums
            included; None if that is not known.
    """

    step: int | None
    index: int
    units: tuple[UnitInfo, ...]
    rate: float | None = None


class Policy(ABC):
    """A rule that says which units are due. Subclasses are small frozen dataclasses."""

    name: ClassVar[str] = ""
    """What the policy is called in strings; set by each subclass as a plain class attribute."""

    @abstractmethod
    def select(self, request: SaveRequest) -> Iterable[Unit]:
        """Return the due units.

        What no ancestor holds is written whatever the policy returns.
        """

    def cohorts(self, request: SaveRequest) -> Mapping[Unit, str]:
        """Label each unit with the group that it is always due together with.

        ``LayerwiseWriter`` gives each group its own file, so that a carried file is live
        as a whole. Units left out get a file for their layer.
        """
        return {}

    def storage_dtype(self, unit: Unit, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which a floating-point tensor of this unit is stored."""
        return dtype

    @property
    def needs_fingerprints(self) -> bool:
        """True if the policy looks at ``UnitInfo.changed``, which costs a pass over the whole state."""
        return False

    @property
    def needs_drift(self) -> Measure:
        """How exactly the policy wants to know ``UnitInfo.drift``; empty if it does not look at it.

        ``sketch`` estimates it from one element in some thousands (``tailor_dcp.sketch``), ``exact`` keeps a
        copy of the state in memory.
        """
        return ""

    def __or__(self, other: Policy) -> Either:
        from tailor_dcp.policies.either import Either  # noqa: PLC0415 - Either is a Policy itself

        return Either((self, other))

    def __str__(self) -> str:
        options = ",".join(
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        )
        return f"{self.name}:{options}" if options else self.name
