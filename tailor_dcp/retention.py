"""Retention: rules that say which checkpoints of a run to keep, and why. Pure arithmetic."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol

from tailor_dcp.amounts import lasting
from tailor_dcp.errors import TailorError

Mode = Literal["min", "max"]

_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d|w)")


class PruneRefusedError(TailorError, ValueError):
    """What is asked for does not make sense, or would endanger what it should keep."""


@dataclass(frozen=True)
class Candidate:
    """A checkpoint as rules see it.

    Attributes:
        name: its folder's name.
        step: its step.
        time: when it was saved, seconds since the epoch.
    """

    name: str
    step: int
    time: float


class Rule(Protocol):
    """Says which checkpoints to keep; what no rule keeps may go."""

    def keep(self, saved: Sequence[Candidate]) -> Mapping[str, str]:
        """Return the reason for each that is kept, by its name.

        Args:
            saved: all of the run, in the order in which they were saved.
        """


def kept_by(rules: Sequence[Rule], saved: Sequence[Candidate]) -> dict[str, list[str]]:
    """Return what any of the rules keeps, with all reasons."""
    kept: defaultdict[str, list[str]] = defaultdict(list)
    for rule in rules:
        for name, why in rule.keep(saved).items():
            kept[name].append(why)
    return dict(kept)


@dataclass(frozen=True)
class All:
    """Keeps everything.

    Attributes:
        why: the reason.
    """

    why: str

    def keep(self, saved: Sequence[Candidate]) -> Mapping[str, str]:
        """Return all of them."""
        return {one.name: self.why for one in saved}


@dataclass(frozen=True)
class Last:
    """Keeps those that were saved last.

    Attributes:
        count: how many.
    """

    count: int

    def __post_init__(self) -> None:
        _check("keep_last", self.count)

    def keep(self, saved: Sequence[Candidate]) -> Mapping[str, str]:
        """Return the last ones, which need not have the highest steps: a run may have gone back."""
        why = "the last one" if self.count == 1 else f"one of the last {self.count}"
        return {one.name: why for one in saved[-self.count :]}


@dataclass(frozen=True)
class Every:
    """Keeps those whose step is a multiple.

    Attributes:
        steps: of how many steps.
    """

    steps: int

    def __post_init__(self) -> None:
        _check("keep_every", self.steps)

    def keep(self, saved: Sequence[Candidate]) -> Mapping[str, str]:
        """Return the multiples."""
        return {one.name: f"every {self.steps} steps" for one in saved if one.step % self.steps == 0}


@dataclass(frozen=True)
class Within:
    """Keeps what was saved not long ago.

    Attributes:
        seconds: how long.
        now: seconds since the epoch.
    """

    seconds: float
    now: float

    def keep(self, saved: Sequence[Candidate]) -> Mapping[str, str]:
        """Return those that are young enough; one from the future is."""
        why = f"saved within {lasting(self.seconds)}"
        return {one.name: why for one in saved if self.now - one.time <= self.seconds}


@dataclass(frozen=True)
class Best:
    """Keeps those of the best values of a metric; of equal ones, what was saved later. What may have none yet, too.

    Attributes:
        count: how many.
        metric: what the values are called.
        values: of each step that has one. What is no number, or none at all, is never among the best.
        mode: whether the lowest are the best, or the highest.
    """

    count: int
    metric: str
    values: Mapping[int, float]
    mode: Mode = "min"

    def __post_init__(self) -> None:
        _check("keep_best", self.count)
        if self.mode not in ("min", "max"):
            raise PruneRefusedError(f"mode={self.mode!r} is unknown; min keeps the lowest values, max the highest.")

    def keep(self, saved: Sequence[Candidate]) -> Mapping[str, str]:
        """Return the best, and what lies beyond the last step that was evaluated: one of these may be better.

        Raises:
            PruneRefusedError: no checkpoint has a value: the metrics are another run's.
        """
        sign = 1 if self.mode == "min" else -1
        known = [one for one in reversed(saved) if math.isfinite(self.values.get(one.step, math.nan))]
        if saved and not known:
            raise PruneRefusedError(
                f"{self.metric} is told for none of the {len(saved)} checkpoints' steps, such as {saved[-1].step}; "
                f"give the metrics of this run."
            )
        best = sorted(known, key=lambda one: sign * self.values[one.step])[: self.count]
        last = max(self.values, default=0)
        why = f"not evaluated yet: {self.metric} ends at step {last}"
        waiting = {one.name: why for one in saved if one.step > last}
        return waiting | {one.name: self._why(place, one) for place, one in enumerate(best, 1)}

    def _why(self, place: int, one: Candidate) -> str:
        rank = "the best" if self.count == 1 else f"number {place} of the best {self.count}"
        return f"{rank} by {self.metric} ({self.values[one.step]:.6g})"


def span(text: str | timedelta) -> float:
    """Return the seconds of a length of time.

    Args:
        text: a number with its unit: ``s``, ``m`` or ``min``, ``h``, ``d`` or ``w``; or a ``timedelta``.

    Raises:
        PruneRefusedError: it is none, or not longer than nothing.
    """
    seconds = text.total_seconds() if isinstance(text, timedelta) else _seconds(text)
    if not 0 < seconds < math.inf:
        raise PruneRefusedError(f"keep_within={text!s} keeps nothing; give a time such as 12h, 7d or 2w.")
    return seconds


def _seconds(text: str) -> float:
    found = _SPAN.fullmatch(text.strip().lower())
    if found is None:
        raise PruneRefusedError(f"keep_within={text!r} is no length of time; write it like 90min, 12h, 7d or 2w.")
    return float(found[1]) * _UNITS[found[2]]


def _check(name: str, count: int) -> None:
    if count < 1:
        raise PruneRefusedError(f"{name}={count} keeps nothing; give 1 or more.")
