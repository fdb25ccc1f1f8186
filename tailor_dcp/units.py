"""The unit: the smallest thing that a policy decides about."""

from __future__ import annotations

from typing import NamedTuple

WEIGHT = "weight"
"""The kind of parameters and buffers; every other kind is the name of an optimizer state."""

STEP = "step"
"""Adam's step counter: it has no unit of its own to decide about, it goes with the moments."""


class Unit(NamedTuple):
    """A (layer, kind) pair, for example ``("model.layers.12", "exp_avg")``."""

    layer: str
    kind: str

    def __str__(self) -> str:
        return f"{self.layer}/{self.kind}"
