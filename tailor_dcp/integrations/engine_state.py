"""``EngineState``: a DeepSpeed ZeRO engine, as DCP saves and loads it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from tailor_dcp.extra_state import HasState
from tailor_dcp.integrations import zero_engine
from tailor_dcp.integrations.zero_counters import EngineCounters
from tailor_dcp.integrations.zero_model import EngineModel
from tailor_dcp.integrations.zero_optim import EngineOptim
from tailor_dcp.past import past_of
from tailor_dcp.train_part import TrainPart


class EngineState(dict[str, Any]):
    """A dict of the three Statefuls ``model``, ``optim`` and ``train``, for ``dcp.save`` and ``dcp.load``.

    For DeepSpeed engines with ZeRO-1, 2 and 3, the optimizer offloaded to the CPU or not. Each rank
    saves its part of each parameter as it lies in ZeRO's buffers, as at most ``2 * dimensions - 1``
    ordinary chunks; nothing is gathered. The keys are those of ``TrainState``: fp32 master weights,
    moments and steps by the parameters' names, tied weights under all their names. So a checkpoint is
    loaded at another world size, by another stage, and by an FSDP2 script that knows only
    torch's ``get_state_dict``; and what such a script saved is loaded here.

    ZeRO has one step counter for many parameters: where a checkpoint's layers differ in it, the
    newest counts and a warning says so. What belongs to the engine alone (``train.step``,
    ``train.scheduler``, ``train.zero``) may be missing in a checkpoint and then stays as it is.

    Saving and loading are collective calls of all ranks of ``process_group``.

    Args:
        engine: what ``deepspeed.initialize`` returned.
        dataloader: anything with a state, for example torchdata's ``StatefulDataLoader``.
        extra: a dict, updated in place by a load, or anything with a state; its entries go
            to ``train.<name>``. One rank's values are kept for all.
        process_group: the ranks that train this model; all of them by default.

    Raises:
        TailorError: the engine keeps state where it is not found (NVMe, MiCS, ZeRO++, pipelines, tensor or expert
            parallelism), DeepSpeed is missing, an argument has no state, or ``extra`` uses a name that is taken.
    """

    def __init__(
        self,
        engine: Any,
        dataloader: HasState | None = None,
        extra: dict[str, Any] | HasState | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        zero_engine.check(engine)
        super().__init__(
            model=EngineModel(engine),
            optim=EngineOptim(engine, process_group),
            train=TrainPart(
                past_of(engine.module),
                engine.lr_scheduler,
                dataloader,
                extra,
                process_group,
                owner=type(self).__name__,
                engine=EngineCounters(engine),
            ),
        )
