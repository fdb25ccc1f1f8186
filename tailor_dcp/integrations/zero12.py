"""ZeRO-1 and ZeRO-2: each parameter group is one flat buffer, and a rank trains an equal part of that."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tailor_dcp.integrations.zero_layout import Piece, whole


class Zero12Layout:
    """The buffers of DeepSpeed's ``DeepSpeedZeroOptimizer``.

    Args:
        zero: the engine's optimizer.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self.optimizer = zero.optimizer
        self.flats: list[Tensor] = list(zero.single_partition_of_fp32_groups)
        self.group_of = list(range(len(self.flats)))
        self.pieces: dict[Tensor, Piece] = {}
        self.groups: list[list[Tensor]] = [list(group) for group in zero.bit16_groups]
        for number in self.group_of:
            first, last = self._window(number)
            # The order in the buffer is not the group's with round_robin_gradients.
            ordered = zip(zero.round_robin_bit16_groups[number], zero.round_robin_bit16_offsets[number], strict=True)
            for parameter, offset in ordered:
                begin, end = max(offset, first), min(offset + parameter.numel(), last)
                held = begin < end
                self.pieces[parameter] = Piece(
                    size=parameter.shape,
                    flat=number,
                    offset=begin - first if held else 0,
                    length=end - begin if held else 0,
                    start=begin - offset if held else 0,
                )

    def frozen(self, parameter: Tensor) -> Tensor:
        """Return the parameter: every rank has all of it."""
        return whole(parameter)

    def refresh(self) -> None:
        """Copy the master weights into the module's and gather the other ranks' parts."""
        self._zero.update_lp_params()

    def _window(self, number: int) -> tuple[int, int]:
        """Return the first element of a group's buffer that this rank trains, and the one after the last."""
        from deepspeed import comm  # noqa: PLC0415

        size = self._zero.partition_size[number]
        first = comm.get_rank(group=self._zero.real_dp_process_group[number]) * size
        return first, first + size
