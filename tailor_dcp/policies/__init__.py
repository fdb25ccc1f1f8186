"""Policies: which units are due in a save."""

from tailor_dcp.policies.base import Policy, SaveRequest, UnitInfo
from tailor_dcp.policies.budget import Budget
from tailor_dcp.policies.drift import Drift
from tailor_dcp.policies.either import Either
from tailor_dcp.policies.filter import Filter
from tailor_dcp.policies.full import Full
from tailor_dcp.policies.moments import Moments
from tailor_dcp.policies.parity import Parity
from tailor_dcp.policies.parse import parse_policy
from tailor_dcp.policies.unchanged import Unchanged

DEFAULT = Moments(every=5, weights="bf16", moments="bf16")
"""What a planner without a policy uses: the fewest bytes at no measurable loss (``docs/policies.md``)."""

__all__ = [
    "DEFAULT",
    "Budget",
    "Drift",
    "Either",
    "Filter",
    "Full",
    "Moments",
    "Parity",
    "Policy",
    "SaveRequest",
    "Unchanged",
    "UnitInfo",
    "parse_policy",
]
