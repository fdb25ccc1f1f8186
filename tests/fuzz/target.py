"""Targets: a parser, what it may do with any bytes, and where its coverage is measured."""

from __future__ import annotations

import importlib
import resource
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from tailor_dcp.errors import TailorError

SECONDS = 1.0
"""Processor time that a parser may take for an input of at most a few KiB."""
MEMORY = 128 << 20
"""Bytes by which one input may raise the process's peak."""


@dataclass(frozen=True)
class Target:
    """A parser under test.

    Attributes:
        parse: gives bytes to the parser; returns whatever it makes of them, or raises what it raises. An oracle that
            disagrees raises ``AssertionError``.
        seeds: honest inputs, and the hostile ones that other tests have.
        mutate: changes an input as its format has it; None where flipping bytes is enough.
        words: what inputs of this kind are made of.
        longest: bytes of an input.
        seconds: processor time that an input may take.
    """

    parse: Callable[[bytes], object]
    seeds: Callable[[], Iterable[bytes]]
    mutate: Callable[[bytes, Random], bytes] | None = None
    words: tuple[bytes, ...] = field(default=(), repr=False)
    longest: int = 4096
    seconds: float = SECONDS


class FindingError(Exception):
    """A parser did what none may do. ``key`` is the same for inputs that lead to the same place."""

    def __init__(self, key: str, told: str) -> None:
        super().__init__(told)
        self.key = key


def target_named(name: str) -> Target:
    """Import a target."""
    found: Target = importlib.import_module(f"tests.fuzz.targets.{name}").TARGET
    return found


def judge(target: Target, data: bytes) -> str:
    """Run one input.

    Returns:
        ``accepted``, or ``refused`` if the parser said in a sentence why it does not take it.

    Raises:
        FindingError: it did anything else, or took too long or too much.
    """
    peak, start = _peak(), time.process_time()
    verdict = "accepted"
    try:
        target.parse(data)
    except TailorError as error:
        if not str(error).strip():
            raise FindingError("no sentence", f"{type(error).__name__} without a sentence") from error
        verdict = "refused"
    except BaseException as error:
        raise FindingError(_key(error), "".join(traceback.format_exception(error, limit=-12))) from error
    seconds, grown = time.process_time() - start, _peak() - peak
    if seconds > target.seconds:
        raise FindingError("slow", f"took {seconds:.1f} s of processor time")
    if grown > MEMORY:
        raise FindingError("memory", f"took {grown >> 20} MiB")
    return verdict


def _key(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/fuzz/target.py" not in frame.filename]
    ours = [frame for frame in frames if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
    last = (ours or frames)[-1]
    return f"{type(error).__name__} at {last.filename.rpartition('/')[2]}-{last.name}"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
