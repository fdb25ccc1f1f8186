"""A conformance suite for policies: everything that a save relies on, tried out by simulation.

    from tailor_dcp.testing import PolicyConformance

    class TestEveryOther(PolicyConformance):
        policy = EveryOther(offset=1)
        bound = 1

Or without pytest, ``check_policy(EveryOther(offset=1), bound=1)``. A broken rule is an
``AssertionError`` of one sentence that names the policy, the rule and the units.
"""

from __future__ import annotations

import pickle
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tailor_dcp.errors import PolicyError, TailorWarning
from tailor_dcp.policies import Policy, SaveRequest, parse_policy
from tailor_dcp.policies.from_callable import FromCallable
from tailor_dcp.policies.trials import STATES, SimulatedRun, Subject, shown, words
from tailor_dcp.units import Unit

__all__ = ["PolicyConformance", "check_policy"]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)


def _answers(subject: Subject) -> None:
    rule = "it answers every request"
    for where, request in subject.requests():
        subject.select(rule, request, where)
        subject.cohorts(rule, request, where)


def _existing(subject: Subject) -> None:
    rule = "select returns existing units only"
    for where, request in subject.requests():
        strange = subject.select(rule, request, where) - {info.unit for info in request.units}
        if strange:
            subject.broken(rule, f"{where}: it returned {shown(strange)}")


def _deterministic(subject: Subject) -> None:
    rule = "equal requests get equal answers"
    for where, request in subject.requests():
        first, again = (subject.select(rule, _copy(request), where) for _ in range(2))
        if first != again:
            subject.broken(rule, f"{where}: asked twice, it differed about {shown(first ^ again)}")
        one, two = (subject.cohorts(rule, _copy(request), where) for _ in range(2))
        if one != two:
            differ = {unit for unit in {*one, *two} if one.get(unit) != two.get(unit)}
            subject.broken(rule, f"{where}: asked twice, it labelled {shown(differ)} differently")


def _unmodified(subject: Subject) -> None:
    rule = "requests are not modified"
    for where, request in subject.requests():
        before, given = _copy(request), _copy(request)
        subject.select(rule, given, where)
        subject.cohorts(rule, given, where)
        if given != before:
            touched = {b.unit for b, g in zip(before.units, given.units, strict=False) if b != g}
            subject.broken(rule, f"{where}: it changed {shown(touched) or 'the request itself'}")


def _copy(request: SaveRequest) -> SaveRequest:
    copied: SaveRequest = pickle.loads(pickle.dumps(request))
    return copied


def _bounded(subject: Subject) -> None:
    if subject.bound is None:
        return
    rule = f"no unit is more than {subject.bound} saves old"
    for run in _bound_runs(subject, subject.bound):
        known = bool(run.written)
        for count, (where, _, _) in enumerate(subject.follow(rule, run, max(subject.saves, 3 * subject.bound + 3))):
            old = {unit: age for unit, age in run.staleness().items() if age > subject.bound}
            if old and (not known or count >= subject.bound):
                subject.broken(rule, f"{where}: {shown(old)} had last been written {max(old.values())} saves before")


def _bound_runs(subject: Subject, bound: int) -> Iterator[SimulatedRun]:
    """Yield runs that start anew or after an anchor at every turn, and runs of which anything may be old."""
    for state in STATES:
        yield from (SimulatedRun(state, index) for index in range(bound + 2))
    yield from (run for run in subject.runs() if run.written)


def _labelled(subject: Subject) -> None:
    rule = "cohorts label existing units"
    for where, request in subject.requests():
        labels = subject.cohorts(rule, request, where)
        strange = labels.keys() - {info.unit for info in request.units}
        if strange:
            subject.broken(rule, f"{where}: it labelled {shown(strange)}")
        wordless = {unit for unit, label in labels.items() if not isinstance(label, str)}
        if wordless:
            subject.broken(rule, f"{where}: the label of {shown(wordless)} is not a string")


def _together(subject: Subject) -> None:
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
                    apart = f"{shown(units & due)} was due without {shown(units - due)}"
                    subject.broken(rule, f"{where}: in the cohort {label!r}, {apart}")


def _stored(subject: Subject) -> None:
    rule = "storage_dtype narrows floating-point dtypes only"
    units = dict.fromkeys(info.unit for state in STATES.values() for info in state)
    for unit in units:
        for dtype in (*_FLOATS, *_OTHERS):
            try:
                chosen, again = (subject.policy.storage_dtype(unit, dtype) for _ in range(2))
            except Exception as error:
                subject.broken(rule, f"for {unit} in {dtype}, storage_dtype raised {words(error)}")
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


def _pickled(subject: Subject) -> None:
    rule = "it can be pickled"
    try:
        twin: Policy = pickle.loads(pickle.dumps(subject.policy))
    except Exception as error:
        subject.broken(rule, f"a save in another process needs that, and pickle said {words(error)}")
    for where, request in subject.requests():
        try:
            theirs = set(twin.select(request))
        except Exception as error:
            subject.broken(rule, f"{where}: its copy's select raised {words(error)}")
        differ = subject.select(rule, request, where) ^ theirs
        if differ:
            subject.broken(rule, f"{where}: its copy differs about {shown(differ)}")


def _written_out(subject: Subject) -> None:
    rule = "its string is read back as the same policy"
    policy = subject.policy
    try:
        text = str(policy)
    except Exception as error:
        subject.broken(rule, f"str() raised {words(error)}")
    if not policy.name or isinstance(policy, FromCallable):
        said = f"{text or type(policy).__name__} has no string that parse_policy reads"
        warnings.warn(f"{said}, so no configuration can name it.", TailorWarning, stacklevel=2)
        return
    try:
        again = parse_policy(text)
    except PolicyError as error:
        subject.broken(rule, f"{text!r} was refused, {words(error)}")
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
    subject = Subject(parse_policy(policy), bound, saves)
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
    def _subject(self) -> Subject:
        return Subject(parse_policy(self.policy), self.bound, self.saves)

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
