"""ZeRO-3: every parameter is cut in equal parts, one a rank."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tailor_dcp.integrations.flat_shard import FlatShard
from tailor_dcp.integrations.zero_layout import Piece, whole


class Zero3Layout:
    """The buffers of DeepSpeed's ``DeepSpeedZeroOptimizer_Stage3``.

    Args:
        zero: the engine's optimizer.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self.optimizer = zero.optimizer
        self.flats: list[Tensor] = list(zero.fp32_partitioned_groups_flat)
        self.group_of: list[int] = [zero.sub_group_to_group_id[i] for i in range(len(self.flats))]
        self.pieces: dict[Tensor, Piece] = {}
        self.groups: list[list[Tensor]] = [[] for _ in zero.optimizer.param_groups]
        for number, parameters in enumerate(zero.fp16_groups):
            self.groups[self.group_of[number]] += parameters
            offset = 0
            for parameter in parameters:
                start, length = self._interval(parameter)
                self.pieces[parameter] = Piece(parameter.ds_shape, number, offset, length, start)
                offset += parameter.partition_numel()

    def frozen(self, parameter: Any) -> Tensor:
        """Return this rank's part; it is kept outside of the flat buffers, in the model's dtype."""
        if not hasattr(parameter, "ds_id") or not parameter.ds_numel:
            return whole(parameter)
        start, length = self._interval(parameter)
        return FlatShard(parameter.ds_tensor.detach().narrow(0, 0, length), start, parameter.ds_shape)

    def refresh(self) -> None:
        """Copy the master weights into the parts that forward passes gather."""
        zero = self._zero
        zero.checkpoint_event_prologue()  # lets go of what is gathered, small parameters included
        for number in range(len(self.flats)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.checkpoint_event_epilogue()  # gathers small parameters again

    def _interval(self, parameter: Any) -> tuple[int, int]:
        """Return where this rank's part of a parameter starts and how long it is, the padding left out."""
        part = parameter.partition_numel()
        start = min(self._zero._get_param_partition_rank(parameter) * part, parameter.ds_numel)
        return start, min(part, parameter.ds_numel - start)
