from __future__ import annotations

import policy_runs as made
from hypothesis import given

from tailor_dcp.policies import Full, SaveRequest


@given(made.runs())
def test_everything_is_due_each_time(run):
    for _ in range(3):
        assert run.save(Full()) == set(run.units)


@given(made.runs())
def test_one_cohort(run):
    cohorts = Full().cohorts(run.request())
    assert cohorts.keys() == set(run.units)
    assert len(set(cohorts.values())) <= 1


def test_nothing_to_save():
    """A state without units (only counters, say) is no error."""
    request = SaveRequest(step=None, index=0, units=())
    assert list(Full().select(request)) == []
    assert Full().cohorts(request) == {}
