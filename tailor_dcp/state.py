"""``TrainState``: a model, its optimizer and everything else a training run needs, as DCP saves and loads it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from tailor_dcp.extra_state import HasState
from tailor_dcp.model_state import ModelState, OptimState
from tailor_dcp.past import past_of
from tailor_dcp.train_part import TrainPart


class TrainState(dict[str, Any]):
    """A dict of the three Statefuls ``model``, ``optim`` and ``train``, for ``dcp.save`` and ``dcp.load``.

    Works with plain, DDP, FSDP1 and FSDP2 training. The keys are those that ``{"model": msd,
    "optim": osd}`` of torch's ``get_state_dict`` flattens to, so a script that knows nothing
    of this package loads the same checkpoint.

    At another world size than the save's, ranks that existed keep their random number
    generators and new ranks are seeded from them; a data loader's position is restored when
    it was the same on all ranks, else left alone. That, and whatever else of the checkpoint
    could not be restored, is said in one warning.

    It remembers what the model was loaded from and saved to, so the first save after a
    resume is selective; a new TrainState of the same model knows it too.

    Saving is a collective call of all ranks of ``process_group``, as ``dcp.save`` is.

    Args:
        model: the module, wrapped or not.
        optimizer: its optimizer or optimizers.
        scheduler: a learning-rate scheduler.
        dataloader: anything with a state, for example torchdata's ``StatefulDataLoader``.
        extra: a dict, updated in place by a load, or anything with a state; its entries go
            to ``train.<name>`` (``{"step": 0}``). Values with a state of their own, such as a
            gradient scaler, are restored through it. DCP fills only the keys that are there
            when a load starts: give what grows as a list, not as a dict. One rank's values
            are kept for all.
        process_group: the ranks that train this model; all of them by default.

    Raises:
        TailorError: an argument has no state, or ``extra`` uses a name that is taken.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        scheduler: HasState | None = None,
        dataloader: HasState | None = None,
        extra: dict[str, Any] | HasState | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            model=ModelState(model),
            optim=OptimState(model, optimizer),
            train=TrainPart(past_of(model), scheduler, dataloader, extra, process_group),
        )
