"""Layer-wise checkpoints for PyTorch Distributed Checkpoint."""

from tailor_dcp.layers import LayerMap
from tailor_dcp.lineage import forget
from tailor_dcp.planner import LayerwisePlanner

__all__ = ["LayerMap", "LayerwisePlanner", "forget"]
