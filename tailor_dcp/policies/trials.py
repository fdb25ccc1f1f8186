"""What policies are tried on: made-up training states, and simulated runs that save by them."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

from tailor_dcp.policies import Policy, SaveRequest, UnitInfo
from tailor_dcp.units import WEIGHT, Unit

_ADAM = (WEIGHT, "exp_avg", "exp_avg_sq")


def _layer(
    name: str, size: int, kinds: tuple[str, ...] = _ADAM, stack: str | None = None, number: int | None = None
) -> list[UnitInfo]:
    return [UnitInfo(name, kind, size, stack=stack, number=number) for kind in kinds]


def _stack(numbers: Iterable[int], kinds: tuple[str, ...] = _ADAM, experts: int = 0) -> list[UnitInfo]:
    units: list[UnitInfo] = []
    for n in numbers:
        name = f"model.layers.{n}"
        units += _layer(name, 100, kinds, "model.layers", n)
        for e in range(experts):
            units += _layer(f"{name}.mlp.experts.{e}", 200, kinds, "model.layers", n)
    return units


def _around(units: list[UnitInfo], kinds: tuple[str, ...] = _ADAM) -> tuple[UnitInfo, ...]:
    ends = [*_layer("model.norm", 1, kinds), *_layer("lm_head", 300, kinds)]
    return (*_layer("model.embed_tokens", 300, kinds), *units, *ends)


STATES: dict[str, tuple[UnitInfo, ...]] = {
    "a stack of eight blocks": _around(_stack(range(8))),
    "a stack with gaps": _around(_stack([0, 3, 4, 17], (WEIGHT, "momentum_buffer"))),
    "layers without numbers": _around([]),
    "blocks with experts": _around(_stack(range(4), experts=3)),
    "weights only": _around(_stack(range(5), (WEIGHT,)), (WEIGHT,)),
    "one layer": tuple(_layer("lm_head", 100)),
}


@functools.cache
def _pace(unit: Unit) -> float:
    """Every unit moves at a pace of its own, some not at all: policies must keep their bounds for these, too."""
    return random.Random(str(unit)).choice([0.0, 0.001, 0.02, 0.5])


class SimulatedRun:
    """A simulated training run that keeps its own books of what was written when."""

    def __init__(self, state: str, index: int, ages: Mapping[Unit, int] | None = None) -> None:
        self.state = state
        self.index = index
        self.written = {unit: index - age for unit, age in (ages or {}).items()}

    def request(self, changed: bool | None, moves: bool = False) -> SaveRequest:
        """Return what a policy is asked at the next save.

        Args:
            changed: what it is told of units that were written before.
            moves: whether it is told how far these have moved.
        """
        units = tuple(self._info(info, changed, moves) for info in STATES[self.state])
        return SaveRequest(self.index * 100, self.index, units)

    def _info(self, info: UnitInfo, changed: bool | None, moves: bool) -> UnitInfo:
        at = self.written.get(info.unit)
        if at is None:
            return info
        drift = _pace(info.unit) * (self.index - at) if moves else None
        return replace(info, saved_step=max(0, at * 100), age=self.index - at, changed=changed, drift=drift)

    def save(self, due: set[Unit]) -> None:
        """Write units, and those that were never written."""
        for info in STATES[self.state]:
            if info.unit in due or info.unit not in self.written:
                self.written[info.unit] = self.index
        self.index += 1

    def staleness(self) -> dict[Unit, int]:
        """Return by how many saves each unit is older than the last one."""
        return {unit: self.index - 1 - at for unit, at in self.written.items()}

    def __str__(self) -> str:
        return f"{self.state}, save {self.index}"


def _ages(state: str, seed: int, longest: int) -> dict[Unit, int]:
    """Draw an age for each unit, as other policies and saves that failed would leave them."""
    draw = random.Random(seed)
    return {info.unit: draw.randint(1, longest) for info in STATES[state]}


# One policy under test --------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """One policy under test.

    Attributes:
        policy: the policy.
        bound: how many saves old a unit may at most be after any save; None for no bound.
        saves: how many saves each simulated run makes.
    """

    policy: Policy
    bound: int | None
    saves: int

    def called(self) -> str:
        """Return what it is called in messages."""
        try:
            return str(self.policy) or type(self.policy).__name__
        except Exception:  # the rule about strings says so
            return type(self.policy).__name__

    def broken(self, rule: str, how: str) -> NoReturn:
        """Say that it breaks a rule.

        Raises:
            AssertionError: always.
        """
        raise AssertionError(f"The policy {self.called()} breaks the rule '{rule}': {how}.")

    def changed(self) -> bool | None:
        """Return what a policy is told of units that were trained on since they were written."""
        return True if self.policy.needs_fingerprints else None

    def runs(self, aged: bool = True) -> Iterator[SimulatedRun]:
        """Yield runs of every state, begun anew and gone on with; with ages that other policies left, if wanted."""
        for state in STATES:
            for index in (0, 1, 7):
                yield SimulatedRun(state, index)
            for seed, index in enumerate((0, 3, 50) if aged else ()):
                yield SimulatedRun(state, index, _ages(state, seed, 2 * self.saves))

    def requests(self) -> Iterator[tuple[str, SaveRequest]]:
        """Yield requests of every sort, each with words for where it comes from."""
        yield "an empty state", SaveRequest(0, 0, ())
        for run in self.runs():
            request = run.request(self.changed(), bool(self.policy.needs_drift))
            yield str(run), request
            yield f"{run}, without a step", replace(request, step=None)
            if self.policy.needs_fingerprints:
                odd = (replace(info, changed=(None, False, True)[i % 3]) for i, info in enumerate(request.units))
                yield f"{run}, partly unchanged", replace(request, units=tuple(odd))

    def select(self, rule: str, request: SaveRequest, where: str) -> set[Unit]:
        """Return the units that are due; an error breaks the rule."""
        try:
            return set(self.policy.select(request))
        except Exception as error:
            self.broken(rule, f"{where}: select raised {words(error)}")

    def cohorts(self, rule: str, request: SaveRequest, where: str) -> dict[Unit, str]:
        """Return the labels of units; an error breaks the rule."""
        try:
            return dict(self.policy.cohorts(request))
        except Exception as error:
            self.broken(rule, f"{where}: cohorts raised {words(error)}")

    def follow(self, rule: str, run: SimulatedRun, saves: int) -> Iterator[tuple[str, SaveRequest, set[Unit]]]:
        """Save again and again; yield each save after it is done."""
        for _ in range(saves):
            request, where = run.request(self.changed(), bool(self.policy.needs_drift)), str(run)
            due = self.select(rule, request, where)
            run.save(due)
            yield where, request, due


def words(error: Exception) -> str:
    """Return an error as half a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")


def shown(units: Iterable[object], most: int = 3) -> str:
    """Return the names of units, or of whatever a policy took for some; the first ones where there are many."""
    names = sorted(map(_name, units))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _name(unit: object) -> str:
    # A policy may return anything at all.
    match unit:
        case (str(layer), str(kind)):
            return str(Unit(layer, kind))
    return repr(unit)
