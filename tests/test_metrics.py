"""Metrics: every form says the same, and what is none of them is refused in a sentence."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.errors import TailorError
from tailor_dcp.metrics import MetricsError, read_metric

Told = dict[int, float]


def lines(told: Told) -> str:
    rows = [{"step": step, "eval_loss": value, "epoch": 1} for step, value in told.items()]
    return "".join(json.dumps(row) + "\n" for row in rows)


def trainer_state(told: Told) -> str:
    history = [{"step": step, "eval_loss": value} for step, value in told.items()]
    between: list[dict[str, Any]] = [{"step": step, "loss": 9.0} for step in told]
    return json.dumps({"best_metric": None, "log_history": [*history, *between]})


def table(told: Told, behind: str = "") -> str:
    stream = io.StringIO()
    rows = csv.DictWriter(stream, ["epoch", "global_step", "eval_loss"])
    rows.writeheader()
    for step, value in told.items():
        rows.writerow({"epoch": "", "global_step": f"{step}{behind}", "eval_loss": value})
    return stream.getvalue()


FORMS: dict[str, Callable[[Told], str]] = {
    "lines": lines,
    "list": lambda told: json.dumps([{"step": step, "eval_loss": value} for step, value in told.items()]),
    "steps": lambda told: json.dumps({str(step): value for step, value in told.items()}),
    "steps of metrics": lambda told: json.dumps({str(step): {"eval_loss": value} for step, value in told.items()}),
    "trainer_state": trainer_state,
    "csv": table,
    "csv of a data frame": lambda told: table(told, ".0"),
}


@given(
    told=st.dictionaries(st.integers(0, 10**9), st.floats(allow_nan=False), min_size=1, max_size=5),
    form=st.sampled_from(sorted(FORMS)),
)
def test_every_form_says_the_same(told: Told, form: str, tmp_path: Path) -> None:
    """Whatever the file is called."""
    path = tmp_path / "metrics"
    path.write_text(FORMS[form](told))
    assert read_metric(path, "eval_loss") == told


def test_the_last_word_counts(tmp_path: Path) -> None:
    """A run that went back tells of a step twice; a line that is just being written is left out."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "m": 2}\n\n{"step": 1.0, "m": "3"}\n{"step": 2, "m"')
    assert read_metric(path, "m") == {1: 3.0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "does not tell 'm' of any step"),
        ('{"step": 1, "loss": 2, "acc": 3}', "it has 'loss', 'acc'"),
        ('{"step": 1, "m": 2}\nnonsense\n', "Line 2 of .* is no JSON"),
        ('{"step": 1, "m": 2}\n[1]\n', "Line 2 of .* is no JSON object"),
        ('{"step": "one", "m": 2}', "a step 'one', which is no step"),
        ('{"step": 1.5, "m": 2}', "a step 1.5"),
        ('{"step": -1, "m": 2}', "a step -1"),
        ('{"step": true, "m": 2}', "a step True"),
        ('{"step": 1, "m": true}', "m is True at step 1, which is no number"),
        ('{"step": 1, "m": [2]}', "which is no number"),
        ('{"step": 1, "m": 1' + "0" * 400 + "}", "which is no number"),
        ('{"step": ' + "9" * 9000 + ', "m": 1}\n', "no JSON"),
        ('{"step": "' + "9" * 9000 + '", "m": 1}', "which is no step"),
        ("[" * 100000, "nested too deeply"),
        ("[1, 2]", "a list of something else"),
        ('{"log_history": 7}', "neither a list nor an object"),
        ("step,m\n1,2,3\n", "another length"),
        ("step,m\n1\n", "another length"),
        ('step,m\n"1', "neither JSON nor CSV"),
        ("step,m\n1,two\n", "m is 'two' at step '1'"),
        ("\0\1", "."),
    ],
)
def test_what_it_refuses(tmp_path: Path, text: str, words: str) -> None:
    """One sentence each, that names the file."""
    path = tmp_path / "metrics.txt"
    path.write_text(text)
    with pytest.raises(MetricsError, match=words) as caught:
        read_metric(path, "m")
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400


@given(data=st.binary(max_size=200))
def test_anything_else(data: bytes, tmp_path: Path) -> None:
    """No file makes it fail otherwise than with a sentence."""
    path = tmp_path / "metrics"
    path.write_bytes(data)
    try:
        read_metric(path, "m")
    except TailorError as error:
        assert str(path) in str(error)


def test_what_is_no_file(tmp_path: Path) -> None:
    """A pipe would be waited for; a folder is none."""
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("pipe", "not a regular file"), ("nothing", "does not exist"), ("", "not a regular file")):
        with pytest.raises(MetricsError, match=words):
            read_metric(tmp_path / name, "m")


def test_in_a_store(store: str) -> None:
    """By its URL."""
    from tailor_dcp.stores import place

    place(f"{store}/log.jsonl").write_bytes(b'{"step": 1, "m": 2}')
    assert read_metric(f"{store}/log.jsonl", "m") == {1: 2.0}
