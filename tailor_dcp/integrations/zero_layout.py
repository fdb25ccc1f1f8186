"""Where a ZeRO engine keeps each parameter: what both kinds of engines have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tailor_dcp.integrations.flat_shard import FlatShard


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that this rank trains.

    Attributes:
        size: the whole parameter's size.
        flat: the number of the flat buffer that it lies in.
        offset: where it begins there, in elements.
        length: how many elements it has; 0 where other ranks have them all.
        start: the place of its first element in the flattened parameter.
    """

    size: torch.Size
    flat: int
    offset: int
    length: int
    start: int

    def within(self, buffer: Tensor) -> FlatShard:
        """Return this piece of a buffer that is laid out as the flat one is: weights or a moment."""
        return FlatShard(buffer.detach().narrow(0, self.offset, self.length), self.start, self.size)


class Layout(Protocol):
    """An engine's buffers."""

    optimizer: torch.optim.Optimizer
    """What makes the steps. Its parameters are the flat buffers."""
    flats: list[Tensor]
    """The flat buffers with the master weights of what this rank trains, which the optimizer's state is kept by."""
    group_of: list[int]
    """For each flat buffer its parameter group."""
    pieces: dict[Tensor, Piece]
    """The piece of each parameter of the module that is trained."""
    groups: list[list[Tensor]]
    """The trained parameters of each parameter group, in the order of the group."""

    def frozen(self, parameter: Tensor) -> Tensor:
        """Return the place of a parameter that is not trained, or this rank's part of it."""
        ...

    def refresh(self) -> None:
        """Make the module's weights those of the master weights. All ranks must take part."""
        ...


def whole(parameter: Any) -> Tensor:
    """Return the place of a parameter that every rank has for itself."""
    return parameter.detach()  # type: ignore[no-any-return]
