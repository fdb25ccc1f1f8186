"""Policies: which units are due in a save."""

from tailor_dcp.policies.base import Policy, SaveRequest, UnitInfo
from tailor_dcp.policies.either import Either
from tailor_dcp.policies.filter import Filter
from tailor_dcp.policies.full import Full
from tailor_dcp.policies.moments import Moments
from tailor_dcp.policies.parity import Parity
from tailor_dcp.policies.parse import parse_policy
from tailor_dcp.policies.unchanged import Unchanged

__all__ = [
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
