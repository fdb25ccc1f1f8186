"""Metrics: what a training script has noted of its steps, in any of the forms in which that is done.

Whoever wrote the file, nothing in it is trusted: it decides what is removed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tailor_dcp.errors import TailorError
from tailor_dcp.store_path import place
from tailor_dcp.stores import is_remote

_STEPS = ("step", "global_step")
_WHOLE = re.compile(r"^(\d+)\.0*$")
_LARGEST = 256 << 20
"""Bytes; what is larger is no file of metrics."""


class MetricsError(TailorError, ValueError):
    """A file of metrics cannot be read, or does not tell what is asked for."""


def read_metric(path: str | os.PathLike[str], metric: str) -> dict[int, float]:
    """Return a metric's value at each step that has one; the last one where several lines tell of a step.

    Args:
        path: a file of JSON lines (``{"step": 200, "eval_loss": 1.3}``), of one JSON list of such objects, of a JSON
            object of steps and values (``{"200": 1.3}`` or ``{"200": {"eval_loss": 1.3}}``), transformers'
            ``trainer_state.json``, or CSV with a column ``step``; or its URL.
        metric: what it is called.

    Raises:
        MetricsError: the file is none of these, or does not have the metric.
    """
    where = place(path)
    text = _text(where)
    values = dict(_values(_rows(text, where), metric, where))
    if not values:
        raise MetricsError(f"{where} does not tell {metric!r} of any step; {_known(text, where)}.")
    return values


def _text(path: Path) -> str:
    try:
        status = path.stat()
        if not is_remote(path) and not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise MetricsError(f"{path} is not a regular file; name the file that holds the metrics.")
        if status.st_size > _LARGEST:
            raise MetricsError(f"{path} has {status.st_size} bytes, more than any file of metrics; name another.")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MetricsError(f"{path} is not text; give JSON lines, JSON or CSV.") from error
    except FileNotFoundError as error:
        raise MetricsError(f"{path} does not exist; name the file that holds the metrics.") from error
    except OSError as error:
        raise MetricsError(f"{path} cannot be read: {error.strerror or error}.") from error


def _rows(text: str, path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield an object for each note that the file holds."""
    if not text.lstrip().startswith(("{", "[")):
        yield from _of_csv(text, path)
        return
    try:
        whole = json.loads(text)
    except RecursionError as error:
        raise MetricsError(f"{path} is nested too deeply to be a file of metrics.") from error
    except ValueError:  # several objects, then
        yield from _of_lines(text, path)
        return
    yield from _of_json(whole, path)


def _of_lines(text: str, path: Path) -> Iterator[Mapping[str, Any]]:
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not text.endswith("\n"):
                return  # the script is just writing it
            raise MetricsError(f"Line {number} of {path} is no JSON; write lines like {_LIKE}.") from error
        if not isinstance(row, dict):
            raise MetricsError(f"Line {number} of {path} is no JSON object; write lines like {_LIKE}.")
        yield row


_LIKE = '{"step": 200, "eval_loss": 1.3}'


def _of_json(whole: Any, path: Path) -> Iterator[Mapping[str, Any]]:
    rows = whole.get("log_history", whole) if isinstance(whole, dict) else whole
    if isinstance(rows, list):
        for row in rows:
            if not isinstance(row, dict):
                raise MetricsError(f"{path} is a list of something else than objects like {_LIKE}.")
            yield row
    elif not isinstance(rows, dict):
        raise MetricsError(f"{path} holds neither a list nor an object; write objects like {_LIKE}.")
    elif any(name in rows for name in _STEPS):
        yield rows
    else:
        for step, value in rows.items():
            yield {**value, "step": step} if isinstance(value, dict) else {"step": step, "": value}


def _of_csv(text: str, path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        for row in csv.DictReader(io.StringIO(text, newline=""), strict=True):
            if None in row or None in row.values():
                raise MetricsError(f"{path} has a row of another length than its first one, which names the columns.")
            yield {name.strip(): value.strip() for name, value in row.items() if value.strip()}
    except csv.Error as error:
        raise MetricsError(f"{path} is neither JSON nor CSV ({error}).") from error


def _values(rows: Iterable[Mapping[str, Any]], metric: str, path: Path) -> Iterator[tuple[int, float]]:
    for row in rows:
        told = next((row[name] for name in _STEPS if name in row), None)
        value = row.get(metric, row.get(""))  # steps and bare values: there is one metric, whatever it is called
        if told is None or value is None:
            continue  # trainers note other things between
        yield _step(told, path), _value(value, metric, told, path)


def _step(told: Any, path: Path) -> int:
    if isinstance(told, str):  # data frames write whole numbers so where a row has none
        told = _WHOLE.sub(r"\1", told)
    try:
        step = int(told) if isinstance(told, int | str) and not isinstance(told, bool) else None
        step = int(told) if isinstance(told, float) and told.is_integer() else step
    except ValueError:
        step = None
    if step is None or step < 0:
        raise MetricsError(f"{path} tells of a step {_short(told)}, which is no step; steps are whole numbers.")
    return step


def _value(told: Any, metric: str, step: Any, path: Path) -> float:
    try:
        if not isinstance(told, bool) and isinstance(told, int | float | str):
            return float(told)
    except (ValueError, OverflowError):
        pass
    raise MetricsError(f"{path} says that {metric} is {_short(told)} at step {_short(step)}, which is no number.")


def _short(told: Any) -> str:
    text = repr(told)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _known(text: str, path: Path) -> str:
    names = dict.fromkeys(name for row in _rows(text, path) for name in row if name not in _STEPS)
    if not names:
        return "it holds no steps with values"
    shown = [_short(name) for name in list(names)[:8]]
    return f"it has {', '.join(shown)}" + (", and more" if len(names) > 8 else "")
