"""Several policies at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import quote

import torch

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies.base import Measure, Policy, SaveRequest
from tailor_dcp.policies.options import shown
from tailor_dcp.units import Unit


@dataclass(frozen=True)
class Either(Policy):
    """A unit is due if any of the policies says so; also written ``a | b``.

    So a unit's bound is the tightest of the policies' bounds.

    Attributes:
        policies: two or more; one that is itself an `Either` is taken apart.
    """

    name: ClassVar[str] = "either"

    policies: tuple[Policy, ...]

    def __post_init__(self) -> None:
        flat: list[Policy] = []
        for policy in self.policies:
            if not isinstance(policy, Policy):
                raise PolicyError(
                    f"Policies can be combined with other policies only, not with {shown(policy)}: "
                    "pass it through parse_policy first."
                )
            flat.extend(policy.policies if isinstance(policy, Either) else (policy,))
        if len(flat) < 2:
            raise PolicyError(f"Either(policies=...) needs two policies or more, not {len(flat)}.")
        object.__setattr__(self, "policies", tuple(flat))

    def select(self, request: SaveRequest) -> Iterable[Unit]:
        """Return what any of the policies returns, each unit once."""
        return list(dict.fromkeys(unit for policy in self.policies for unit in policy.select(request)))

    def cohorts(self, request: SaveRequest) -> Mapping[Unit, str]:
        """Label each unit with its labels from all the policies.

        A policy that leaves a unit out gives it a file for its layer, so the layer stands in for
        the label; a unit that all leave out stays out.
        """
        labels = [policy.cohorts(request) for policy in self.policies]
        units = [info.unit for info in request.units if any(info.unit in label for label in labels)]
        return {unit: "+".join(_label(unit, label) for label in labels) for unit in units}

    def storage_dtype(self, unit: Unit, dtype: torch.dtype) -> torch.dtype:
        """Return the widest dtype that any policy narrows to.

        A policy that returns ``dtype`` itself, or nothing narrower, has no opinion. Of two
        narrower dtypes of one size the one with the larger range wins, where nothing overflows.
        """
        asked = [policy.storage_dtype(unit, dtype) for policy in self.policies]
        narrower = [answer for answer in asked if answer.itemsize < dtype.itemsize]
        return max(narrower, key=lambda d: (d.itemsize, torch.finfo(d).max), default=dtype)

    @property
    def needs_fingerprints(self) -> bool:
        """True if any of the policies does."""
        return any(policy.needs_fingerprints for policy in self.policies)

    @property
    def needs_drift(self) -> Measure:
        """What the most exact of the policies needs."""
        needs = {policy.needs_drift for policy in self.policies}
        return "exact" if "exact" in needs else "sketch" if "sketch" in needs else ""

    def __str__(self) -> str:
        return "|".join(str(policy) for policy in self.policies)


def _label(unit: Unit, labels: Mapping[Unit, str]) -> str:
    # Quoted, so that labels that themselves hold a "+" or start with an "@" cannot run together.
    if unit in labels:
        return quote(labels[unit], safe="")
    return "@" + quote(unit.layer, safe="")
