"""Retention: what any rule keeps stays, with all reasons; told by sorting, not by the rules themselves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.retention import All, Best, Candidate, Every, Last, PruneRefusedError, Rule, Within, kept_by, span

values = st.one_of(st.integers(-3, 3).map(float), st.just(math.nan), st.just(math.inf))


@st.composite
def runs(draw: st.DrawFn) -> list[Candidate]:
    """Return checkpoints in the order of saving; a run that went back has steps in another order."""
    steps = draw(st.lists(st.integers(0, 40), unique=True, min_size=1, max_size=12))
    gaps = draw(st.lists(st.floats(0.001, 1e6), min_size=len(steps), max_size=len(steps)))
    return [Candidate(f"step-{step}", step, sum(gaps[: n + 1])) for n, step in enumerate(steps)]


@given(saved=runs(), count=st.integers(1, 5), data=st.data(), mode=st.sampled_from(["min", "max"]))
def test_the_best_are_no_worse_than_any_other(
    saved: list[Candidate], count: int, data: st.DataObject, mode: str
) -> None:
    """As many as there are values, none of the others better, and of equal ones the later; what is still to come."""
    told = {one.step: data.draw(values) for one in saved if data.draw(st.booleans())}
    finite = {one.name: told[one.step] for one in saved if math.isfinite(told.get(one.step, math.nan))}
    if not finite:
        with pytest.raises(PruneRefusedError, match="none of the"):
            Best(count, "loss", told, mode).keep(saved)  # type: ignore[arg-type]
        return
    kept = Best(count, "loss", told, mode).keep(saved)  # type: ignore[arg-type]
    waiting = {one.name for one in saved if all(step < one.step for step in told)}
    assert waiting <= kept.keys()
    assert len(kept) == min(count, len(finite)) + len(waiting)
    order = [one.name for one in saved]
    for name in kept.keys() - waiting:
        for other in finite.keys() - kept.keys():
            better = finite[other] < finite[name] if mode == "min" else finite[other] > finite[name]
            assert not better
            assert finite[other] != finite[name] or order.index(other) < order.index(name)


@given(saved=runs(), count=st.integers(1, 5), steps=st.integers(1, 9), seconds=st.floats(0.1, 3e6))
def test_any_rule_keeps(saved: list[Candidate], count: int, steps: int, seconds: float) -> None:
    """Each checkpoint has one reason from each rule that keeps it, in the order of the rules."""
    now = saved[-1].time
    rules: list[Rule] = [Last(count), Every(steps), Within(seconds, now)]
    kept = kept_by(rules, saved)
    for place, one in enumerate(saved):
        whys = [place >= len(saved) - count, one.step % steps == 0, now - one.time <= seconds]
        assert len(kept.get(one.name, [])) == sum(whys)
    assert kept_by([All("why")], saved) == {one.name: ["why"] for one in saved}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("90min", 5400), ("90m", 5400), ("1.5h", 5400), ("7d", 604800), (" 2 W ", 1209600)],
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    """A number with its unit."""
    assert span(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "0h", "7days", "1e9d", "infd", "9" * 400 + "w"])
def test_what_is_no_length_of_time(text: str) -> None:
    """It is refused: nothing is kept by guessing."""
    with pytest.raises(PruneRefusedError, match="keep_within"):
        span(text)
