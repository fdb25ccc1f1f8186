"""Every way to save and to load with this package: now, in a thread or in a process; as it should, or failing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _async_process_executor as process_executor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from tailor_dcp import LayerwiseLoadPlanner, LayerwisePlanner
from tailor_dcp.writer import LayerwiseWriter
from tests.support.world import Model, flat, state

LEFT = 1
"""The step whose values the state has before a load that leaves some of them; none is ever saved at it."""
_NO_OPTIONS = StagingOptions(False, False, False, False)  # what async_save itself takes where none is given


class Way(NamedTuple):
    """How to save: ``now``, or in the background by a ``thread`` or a ``process``, with our stager or torch's."""

    executor: str = "now"
    staged: bool = False


class Trouble(NamedTuple):
    """When a save fails, and on which rank; before the commit that is the coordinator, whatever is said here."""

    moment: str  # writing, written, commit
    rank: int


class _Failing:
    """Lets a writer fail before it writes, after it has written, or before it commits."""

    trouble: Trouble

    def write_data(self, plan: Any, planner: Any) -> Any:
        self._at("writing")
        written: Any = super().write_data(plan, planner)  # type: ignore[misc]
        self._at("written")
        return written

    def finish(self, metadata: Any, results: Any) -> None:
        self._at("commit")
        super().finish(metadata, results)  # type: ignore[misc]

    def _at(self, moment: str) -> None:
        if self.trouble.moment == moment and (moment == "commit" or self.trouble.rank == dist.get_rank()):
            raise OSError("failed as it was told to")


class _FailingStock(_Failing, dcp.FileSystemWriter):
    pass


class _FailingLayerwise(_Failing, LayerwiseWriter):
    pass


# What workers are told to call -----------------------------------------------------------


def save(
    group: Any,
    model: Model,
    step: int,
    path: str,
    policy: Any,
    way: Way = Way(),  # noqa: B008 - a constant
    writer: str = "stock",
    trouble: Trouble | None = None,
    **options: Any,
) -> str:
    """Save with our planner and wait until it is done; return why a save failed that was to fail."""
    planner, trained = LayerwisePlanner(policy, **options), state(model, step, group)
    how = {"storage_writer": _writer(writer, path, trouble), "planner": planner, "process_group": group}
    try:
        if way.executor == "now":
            dcp.save(trained, **how)
        else:
            stager = planner.stager(path, group) if way.staged else DefaultStager(_NO_OPTIONS)
            kind = AsyncCheckpointerType(way.executor)
            done: Any = dcp.async_save(trained, **how, async_checkpointer_type=kind, async_stager=stager)
            getattr(done, "upload_completion", done).result()
    except BaseException as error:  # CheckpointException is no Exception
        if trouble is None:
            raise
        return f"{error!r} {getattr(error, 'failures', '')!r}"
    return ""


def _writer(name: str, path: str, trouble: Trouble | None) -> dcp.StorageWriter:
    if trouble is None:
        return LayerwiseWriter(path) if name == "layerwise" else dcp.FileSystemWriter(path)
    writer: Any = (_FailingLayerwise if name == "layerwise" else _FailingStock)(path)
    writer.trouble = trouble
    return writer  # type: ignore[no-any-return]


def load(group: Any, model: Model, path: str, **options: Any) -> dict[str, Any]:
    """Load with our planner over values that were never saved; return everything, whole."""
    target = state(model, LEFT, group)
    dcp.load(target, checkpoint_id=path, planner=LayerwiseLoadPlanner(path, **options), process_group=group)
    return flat(target)


def stop_daemon(group: Any) -> None:
    """End the process that torch keeps to save in, as the interpreter would at its own end."""
    process_executor._CHECKPOINT_PROCESS = None
