"""Layer-wise checkpoints for PyTorch Distributed Checkpoint.

``dcp.save(state, checkpoint_id="run/step-200", planner=LayerwisePlanner(policy))`` writes only the units that the
policy finds due; ``dcp.load(state, checkpoint_id="run/step-200")`` reads a complete checkpoint, without this package.
"""

from typing import TYPE_CHECKING

from tailor_dcp.copying import copy
from tailor_dcp.diff import diff
from tailor_dcp.errors import TailorError, TailorWarning
from tailor_dcp.inspection import inspect
from tailor_dcp.layers import LayerMap
from tailor_dcp.lineage import forget
from tailor_dcp.load_planner import LayerwiseLoadPlanner
from tailor_dcp.materialize import materialize
from tailor_dcp.merge import merge
from tailor_dcp.open_checkpoint import open_checkpoint
from tailor_dcp.planner import LayerwisePlanner
from tailor_dcp.prune import prune
from tailor_dcp.reader import LayerwiseReader
from tailor_dcp.report import report
from tailor_dcp.runs import latest
from tailor_dcp.simulate import simulate
from tailor_dcp.state import TrainState
from tailor_dcp.verify import verify
from tailor_dcp.writer import LayerwiseWriter

if TYPE_CHECKING:
    from tailor_dcp.integrations.engine_state import EngineState

__all__ = [
    "EngineState",
    "LayerMap",
    "LayerwiseLoadPlanner",
    "LayerwisePlanner",
    "LayerwiseReader",
    "LayerwiseWriter",
    "TailorError",
    "TailorWarning",
    "TrainState",
    "copy",
    "diff",
    "forget",
    "inspect",
    "latest",
    "materialize",
    "merge",
    "open_checkpoint",
    "prune",
    "report",
    "simulate",
    "verify",
]


def __getattr__(name: str) -> object:
    # The library itself does not depend on its integrations; who never asks never imports them.
    if name == "EngineState":
        from tailor_dcp.integrations.engine_state import EngineState  # noqa: PLC0415

        return EngineState
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
