"""A file of metrics, by which checkpoints are kept: JSON lines, JSON or CSV."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tailor_dcp.metrics import read_metric
from tests.fuzz.mutators.texts import texts
from tests.fuzz.mutators.trees import jsons
from tests.fuzz.scratch import put
from tests.fuzz.target import Target


def parse(data: bytes) -> None:
    """Read a metric; each step is one, and has a number."""
    found = read_metric(put(data, "metrics"), "eval_loss")
    assert found
    assert all(type(step) is int and step >= 0 and type(value) is float for step, value in found.items())


def seeds() -> Iterator[bytes]:
    """Each form that is read, and some that are not."""
    yield b'{"step": 20, "eval_loss": 1.5}\n{"step": 40, "eval_loss": "1.25"}\n{"lr": 0.1}\n'
    yield b'[{"global_step": 20, "eval_loss": 1}]'
    yield b'{"20": 1.5, "40": 1.25}'
    yield b'{"20": {"eval_loss": 1.5}}'
    yield b'{"log_history": [{"step": 1, "eval_loss": 2.0}], "best_metric": null}'
    yield b"step,eval_loss\n20,1.5\n40,nan\n"
    yield b'step,eval_loss\n"20,1.5\n'
    yield b'\xef\xbb\xbf{"step": 1.0, "eval_loss": 1e999}\n{"st'
    yield b'{"step": -1, "eval_loss": true}'
    yield b"[" * 2000


_WORDS = ("step", "global_step", "eval_loss", "log_history", "1e999", "nan", "20", "", "1.0")
_json, _text = jsons(_WORDS), texts(('"', ",", "\r\n", "step,eval_loss", "{", "}", "[", "]", ":", *_WORDS))


def _mutate(data: bytes, random: Random) -> bytes:
    return _text(data, random) if random.random() < 0.6 else _json(data, random)


TARGET = Target(parse, seeds, _mutate, tuple(word.encode() for word in _WORDS), longest=2048)
