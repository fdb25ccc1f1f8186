"""Policies in words, for people who read about a run and do not know the strings."""

from __future__ import annotations

from functools import singledispatch

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies.base import Policy
from tailor_dcp.policies.budget import Budget
from tailor_dcp.policies.drift import Drift
from tailor_dcp.policies.either import Either
from tailor_dcp.policies.filter import Filter
from tailor_dcp.policies.full import Full
from tailor_dcp.policies.moments import Moments
from tailor_dcp.policies.parity import Parity
from tailor_dcp.policies.parse import parse_policy
from tailor_dcp.policies.unchanged import Unchanged

_OURS = {policy.name for policy in (Full, Parity, Filter, Moments, Drift, Budget)}
_FULL = "fp32"
_ORDINALS = ("second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
MERGE = "merge"
"""What the record of a merge has in a policy's place."""


def in_words(policy: str) -> str:
    """Say in a sentence without a full stop what a policy writes.

    Only our own policies are parsed: a record may come from anybody, and must not choose what is imported.

    Args:
        policy: the policy's string, as a record has it.
    """
    if policy == MERGE:
        return "put together by a merge"
    names = {part.strip().removeprefix(f"{Unchanged.name}+").partition(":")[0].strip() for part in policy.split("|")}
    if not names <= _OURS:
        return f"a policy of its own, {policy}"
    try:
        return _words(parse_policy(policy))
    except PolicyError:
        return f"a policy that this version does not know, {policy}"


@singledispatch
def _words(policy: Policy) -> str:
    return f"a policy of its own, {policy}"


@_words.register
def _(policy: Full) -> str:
    return "everything in every save"


@_words.register
def _(policy: Parity) -> str:
    if policy.groups == 1:
        return "everything in every save"
    return (
        f"layers in {policy.groups} groups, one group a save, weights and optimizer state together; "
        f"nothing is more than {_saves(policy.groups - 1)} old"
    )


@_words.register
def _(policy: Filter) -> str:
    ends = [f"the {name} {_layers(count)}" for name, count in (("first", policy.head), ("last", policy.tail)) if count]
    aux = "embeddings, final norm and head"
    always = [*ends, *([aux] if policy.aux == "always" else [])]
    often = f"{', '.join(always)} in every save, " if always else ""
    rest = f"; {aux} go with the rest" if policy.aux == "rest" else ""
    return f"{often}the rest in {_nth(policy.every)}{rest}"


@_words.register
def _(policy: Moments) -> str:
    turns = (
        "and the optimizer state, all in every save"
        if policy.every == 1
        else f"in every save; the optimizer state of one group of layers in turn, so that each layer's is written in "
        f"{_nth(policy.every)}"
    )
    return f"all weights {turns}{_stored(policy)}"


@_words.register
def _(policy: Drift) -> str:
    states = f" ({100 * policy.states:g} % for the optimizer state)" if policy.states is not None else ""
    decay = f"; that limit halves every {_saves(policy.half_life)}" if policy.half_life else ""
    how = "compared exactly" if policy.exact else "estimated from a few elements"
    return (
        f"what moved by more than {100 * policy.threshold:g} %{states} since its own last save, {how}{decay}; and what "
        f"would become more than {_saves(policy.max_stale)} old{_stored(policy)}"
    )


@_words.register
def _(policy: Budget) -> str:
    if policy.fraction is not None:
        limit = f"{100 * policy.fraction:g} % of a full save"
    elif policy.bytes is not None:
        limit = f"{policy.bytes:,} bytes"
    else:
        limit = f"{policy.seconds:g} seconds of writing"
    first = "all weights, then " if policy.first == "weights" else ""
    return (
        f"{first}what moved most for its bytes, as much as fits into {limit}; and what would become more than "
        f"{_saves(policy.max_stale)} old{_stored(policy)}"
    )


@_words.register
def _(policy: Unchanged) -> str:
    return f"{_words(policy.inner)}; but nothing that is bit for bit what was last saved"


@_words.register
def _(policy: Either) -> str:
    return "what any of these asks for: " + "; or ".join(f"({_words(part)})" for part in policy.policies)


def _stored(policy: Moments | Drift | Budget) -> str:
    narrow = [
        f"{what} in {dtype}"
        for what, dtype in (("weights", policy.weights), ("the optimizer state", policy.moments))
        if dtype != _FULL
    ]
    return f"; stored are {' and '.join(narrow)}" if narrow else ""


def _saves(count: int) -> str:
    return "one save" if count == 1 else f"{count} saves"


def _layers(count: int) -> str:
    return "layer" if count == 1 else f"{count} layers"


def _nth(every: int) -> str:
    if every == 1:
        return "every save"
    return f"every {_ORDINALS[every - 2]} save" if every - 2 < len(_ORDINALS) else f"one save in {every}"
