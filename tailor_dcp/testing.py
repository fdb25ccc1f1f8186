"""A conformance suite for policies: everything that a save relies on, tried out by simulation.

    from tailor_dcp.testing import PolicyConformance

    class TestEveryOther(PolicyConformance):
        policy = EveryOther(offset=1)
        bound = 1

Or without pytest, ``check_policy(EveryOther(offset=1), bound=1)``. A broken rule is an
``AssertionError`` of one sentence that names the policy, the rule and the units.
"""

from __future__ import annotations

import functools
import pickle
import random
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

import torch

from tailor_dcp.errors import PolicyError, TailorWarning
from tailor_dcp.policies import Policy, SaveRequest, UnitInfo, parse_policy
from tailor_dcp.policies.from_callable import FromCallable
from tailor_dcp.units import WEIGHT, Unit

__all__ = ["PolicyConformance", "check_policy"]

_ADAM = (WEIGHT, "exp_avg", "exp_avg_sq")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)


# Made-up states ---------------------------------------------------------------------------


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


_STATES: dict[str, tuple[UnitInfo, ...]] = {
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


class _Run:
    """A simulated training run that keeps its own books of what was written when."""

    def __init__(self, state: str, index: int, ages: Mapping[Unit, int] | None = None) -> None:
        self.state = state
        self.index = index
        self.written = {unit: index - age for unit, age in (ages or {}).items()}

    def request(self, changed: bool | None, moves: bool = False) -> SaveRequest:
        units = tuple(self._info(info, changed, moves) for info in _STATES[self.state])
        return SaveRequest(self.index * 100, self.index, units)

    def _info(self, info: UnitInfo, changed: bool | None, moves: bool) -> UnitInfo:
        at = self.written.get(info.unit)
        if at is None:
            return info
        drift = _pace(info.unit) * (self.index - at) if moves else None
        return replace(info, saved_step=max(0, at * 100), age=self.index - at, changed=changed, drift=drift)

    def save(self, due: set[Unit]) -> None:
        for info in _STATES[self.state]:
            if info.unit in due or info.unit not in self.written:
                self.written[info.unit] = self.index
        self.index += 1

    def staleness(self) -> dict[Unit, int]:
        return {unit: self.index - 1 - at for unit, at in self.written.items()}

    def __str__(self) -> str:
        return f"{self.state}, save {self.index}"


def _ages(state: str, seed: int, longest: int) -> dict[Unit, int]:
    """Draw an age for each unit, as other policies and saves that failed would leave them."""
    draw = random.Random(seed)
    return {info.unit: draw.randint(1, longest) for info in _STATES[state]}


# One policy under test --------------------------------------------------------------------


@dataclass(frozen=True)
class _Subject:
    policy: Policy
    bound: int | None
    saves: int

    def called(self) -> str:
        try:
            return str(self.policy) or type(self.policy).__name__
        except Exception:  # the rule about strings says so
            return type(self.policy).__name__

    def broken(self, rule: str, how: str) -> NoReturn:
        raise AssertionError(f"The policy {self.called()} breaks the rule '{rule}': {how}.")

    def changed(self) -> bool | None:
        """Return what a policy is told of units that were trained on since they were written."""
        return True if self.policy.needs_fingerprints else None

    def runs(self, aged: bool = True) -> Iterator[_Run]:
        for state in _STATES:
            for index in (0, 1, 7):
                yield _Run(state, index)
            for seed, index in enumerate((0, 3, 50) if aged else ()):
                yield _Run(state, index, _ages(state, seed, 2 * self.saves))

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
        try:
            return set(self.policy.select(request))
        except Exception as error:
            self.broken(rule, f"{where}: select raised {_words(error)}")

    def cohorts(self, rule: str, request: SaveRequest, where: str) -> dict[Unit, str]:
        try:
            return dict(self.policy.cohorts(request))
        except Exception as error:
            self.broken(rule, f"{where}: cohorts raised {_words(error)}")

    def follow(self, rule: str, run: _Run, saves: int) -> Iterator[tuple[str, SaveRequest, set[Unit]]]:
        """Save again and again; yield each save after it is done."""
        for _ in range(saves):
            request, where = run.request(self.changed(), bool(self.policy.needs_drift)), str(run)
            due = self.select(rule, request, where)
            run.save(due)
            yield where, request, due


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")


def _shown(units: Iterable[object], most: int = 3) -> str:
    names = sorted(map(_name, units))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _name(unit: object) -> str:
    # A policy may return anything at all.
    match unit:
        case (str(layer), str(kind)):
            return str(Unit(layer, kind))
    return repr(unit)


# The rules --------------------------------------------------------------------------------


def _answers(subject: _Subject) -> None:
    rule = "it answers every request"
    for where, request in subject.requests():
        subject.select(rule, request, where)
        subject.cohorts(rule, request, where)


def _existing(subject: _Subject) -> None:
    rule = "select returns existing units only"
    for where, request in subject.requests():
        strange = subject.select(rule, request, where) - {info.unit for info in request.units}
        if strange:
            subject.broken(rule, f"{where}: it returned {_shown(strange)}")


def _deterministic(subject: _Subject) -> None:
    rule = "equal requests get equal answers"
    for where, request in subject.requests():
        first, again = (subject.select(rule, _copy(request), where) for _ in range(2))
        if first != again:
            subject.broken(rule, f"{where}: asked twice, it differed about {_shown(first ^ again)}")
        one, two = (subject.cohorts(rule, _copy(request), where) for _ in range(2))
        if one != two:
            differ = {unit for unit in {*one, *two} if one.get(unit) != two.get(unit)}
            subject.broken(rule, f"{where}: asked twice, it labelled {_shown(differ)} differently")


def _unmodified(subject: _Subject) -> None:
    rule = "requests are not modified"
    for where, request in subject.requests():
        before, given = _copy(request), _copy(request)
        subject.select(rule, given, where)
        subject.cohorts(rule, given, where)
        if given != before:
            touched = {b.unit for b, g in zip(before.units, given.units, strict=False) if b != g}
            subject.broken(rule, f"{where}: it changed {_shown(touched) or 'the request itself'}")


def _copy(request: SaveRequest) -> SaveRequest:
    copied: SaveRequest = pickle.loads(pickle.dumps(request))
    return copied


def _bounded(subject: _Subject) -> None:
    if subject.bound is None:
        return
    rule = f"no unit is more than {subject.bound} saves old"
    for run in _bound_runs(subject, subject.bound):
        known = bool(run.written)
        for count, (where, _, _) in enumerate(subject.follow(rule, run, max(subject.saves, 3 * subject.bound + 3))):
            old = {unit: age for unit, age in run.staleness().items() if age > subject.bound}
            if old and (not known or count >= subject.bound):
                subject.broken(rule, f"{where}: {_shown(old)} had last been written {max(old.values())} saves before")


def _bound_runs(subject: _Subject, bound: int) -> Iterator[_Run]:
    """Yield runs that start anew or after an anchor at every turn, and runs of which anything may be old."""
    for state in _STATES:
        yield from (_Run(state, index) for index in range(bound + 2))
    yield from (run for run in subject.runs() if run.written)


def _labelled(subject: _Subject) -> None:
    rule = "cohorts label existing units"
    for where, request in subject.requests():
        labels = subject.cohorts(rule, request, where)
        strange = labels.keys() - {info.unit for info in request.units}
        if strange:
            subject.broken(rule, f"{where}: it labelled {_shown(strange)}")
        wordless = {unit for unit, label in labels.items() if not isinstance(label, str)}
        if wordless:
            subject.broken(rule, f"{where}: the label of {_shown(wordless)} is not a string")


def _together(subject: _Subject) -> None:
    rule = "units of one cohort are due together"
    for run in subject.runs(aged=False):
        for count, (where, request, due) in enumerate(subject.follow(rule, run, 3 * subject.saves)):
            if count < subject.saves:
                continue
            members: defaultdict[str, set[Unit]] = defaultdict(set)
            for unit, label in subject.cohorts(rule, request, where).items():
                members[label].add(unit)
            for label, units in members.items():
                if units & due and units - due:
                    apart = f"{_shown(units & due)} was due without {_shown(units - due)}"
                    subject.broken(rule, f"{where}: in the cohort {label!r}, {apart}")


def _stored(subject: _Subject) -> None:
    rule = "storage_dtype narrows floating-point dtypes only"
    units = dict.fromkeys(info.unit for state in _STATES.values() for info in state)
    for unit in units:
        for dtype in (*_FLOATS, *_OTHERS):
            try:
                chosen, again = (subject.policy.storage_dtype(unit, dtype) for _ in range(2))
            except Exception as error:
                subject.broken(rule, f"for {unit} in {dtype}, storage_dtype raised {_words(error)}")
            problem = _dtype_problem(dtype, chosen, again)
            if problem:
                subject.broken(rule, f"{unit} in {dtype} {problem}")


def _dtype_problem(dtype: torch.dtype, chosen: object, again: object) -> str | None:
    if not isinstance(chosen, torch.dtype):
        return f"would be stored in {chosen!r}, which is no dtype"
    if chosen != again:
        return f"would be stored in {chosen} and, asked again, in {again}"
    if chosen == dtype:
        return None
    if not dtype.is_floating_point:
        return f"would be stored in {chosen}, though only floating-point tensors may be"
    if not chosen.is_floating_point:
        return f"would be stored in {chosen}, which is not floating-point"
    return f"would be stored in {chosen}, which is wider" if chosen.itemsize > dtype.itemsize else None


def _pickled(subject: _Subject) -> None:
    rule = "it can be pickled"
    try:
        twin: Policy = pickle.loads(pickle.dumps(subject.policy))
    except Exception as error:
        subject.broken(rule, f"a save in another process needs that, and pickle said {_words(error)}")
    for where, request in subject.requests():
        try:
            theirs = set(twin.select(request))
        except Exception as error:
            subject.broken(rule, f"{where}: its copy's select raised {_words(error)}")
        differ = subject.select(rule, request, where) ^ theirs
        if differ:
            subject.broken(rule, f"{where}: its copy differs about {_shown(differ)}")


def _written_out(subject: _Subject) -> None:
    rule = "its string is read back as the same policy"
    policy = subject.policy
    try:
        text = str(policy)
    except Exception as error:
        subject.broken(rule, f"str() raised {_words(error)}")
    if not policy.name or isinstance(policy, FromCallable):
        said = f"{text or type(policy).__name__} has no string that parse_policy reads"
        warnings.warn(f"{said}, so no configuration can name it.", TailorWarning, stacklevel=2)
        return
    try:
        again = parse_policy(text)
    except PolicyError as error:
        subject.broken(rule, f"{text!r} was refused, {_words(error)}")
    if again != policy:
        subject.broken(rule, f"{text!r} was read as {again!r}")


# What others use ---------------------------------------------------------------------------


def check_policy(policy: Policy | str | Any, bound: int | None = None, saves: int = 12) -> None:
    """Try out by simulation whether a policy keeps all the rules. No pytest is needed.

    A policy without a string of its own keeps them too; a ``TailorWarning`` says so.

    Args:
        policy: what `parse_policy` takes: a policy, its string, or a function.
        bound: how many saves old a unit may at most be after any save; None for no bound. Where other
            policies left older units, they must be written within ``bound + 1`` saves.
        saves: how many saves each simulated run has at least. Take more than a policy needs to have
            had every unit's turn.

    Raises:
        AssertionError: it breaks a rule; the sentence names the policy, the rule and the units.
        PolicyError: it makes no sense as a policy.
    """
    subject = _Subject(parse_policy(policy), bound, saves)
    for rule in (
        _answers,
        _existing,
        _deterministic,
        _unmodified,
        _bounded,
        _labelled,
        _together,
        _stored,
        _pickled,
        _written_out,
    ):
        rule(subject)


class PolicyConformance:
    """The same rules as tests for pytest, one for each: subclass it as ``class TestMine(PolicyConformance)``.

    Attributes:
        policy: what is tested: a policy, its string, or a function wrapped in ``staticmethod``.
        bound: how many saves old a unit may at most be after any save; None for no bound.
        saves: how many saves each simulated run has at least.
    """

    policy: ClassVar[Any]
    bound: ClassVar[int | None] = None
    saves: ClassVar[int] = 12

    @property
    def _subject(self) -> _Subject:
        return _Subject(parse_policy(self.policy), self.bound, self.saves)

    def test_it_answers_every_request(self) -> None:
        """Whatever is known of a unit, or nothing is."""
        _answers(self._subject)

    def test_select_returns_existing_units_only(self) -> None:
        """What does not exist cannot be written."""
        _existing(self._subject)

    def test_equal_requests_get_equal_answers(self) -> None:
        """A stager asks before the save; both must come out the same."""
        _deterministic(self._subject)

    def test_requests_are_not_modified(self) -> None:
        """Other policies are asked with the same request."""
        _unmodified(self._subject)

    def test_staleness_is_bounded(self) -> None:
        """From a new start, after an anchor and from any ages."""
        _bounded(self._subject)

    def test_cohorts_label_existing_units(self) -> None:
        """With a string each."""
        _labelled(self._subject)

    def test_units_of_one_cohort_are_due_together(self) -> None:
        """They share a file, which is freed as a whole."""
        _together(self._subject)

    def test_storage_dtype_narrows_floating_point_dtypes_only(self) -> None:
        """Nothing is widened, and no number of steps or token is rounded."""
        _stored(self._subject)

    def test_it_can_be_pickled(self) -> None:
        """Asynchronous saves take it to another process."""
        _pickled(self._subject)

    def test_its_string_is_read_back(self) -> None:
        """Configurations and the record name it by its string."""
        _written_out(self._subject)
