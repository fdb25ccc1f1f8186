"""The few inputs of a corpus that take every step from line to line that all of it takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz import scratch
from tests.fuzz.registry import TARGETS
from tests.fuzz.target import FindingError, judge, target_named


def minimised(name: str, work: Path) -> list[Path]:
    """Return files that take together all the steps from line to line that the whole corpus takes, small ones first."""
    target, packages = target_named(name), TARGETS[name]
    taken: set[tuple[str, int, int]] = set()
    files = []
    for path in sorted((work / name / "corpus").iterdir(), key=lambda path: (path.stat().st_size, path.name)):
        steps = _steps(partial(judge, target, path.read_bytes()), packages)
        if not steps <= taken:
            taken |= steps
            files.append(path)
    scratch.remove()
    return files


def _steps(run: Callable[[], object], packages: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the steps from line to line that a call takes in some packages."""
    found: set[tuple[str, int, int]] = set()

    def on_call(frame: FrameType, _: str, __: object) -> Any:
        module = frame.f_globals.get("__name__", "")
        if not any(module == package or module.startswith(f"{package}.") for package in packages):
            return None
        before = 0

        def on_line(frame: FrameType, event: str, _: object) -> Any:
            nonlocal before
            found.add((module, before, frame.f_lineno))
            before = frame.f_lineno
            return on_line

        return on_line

    sys.settrace(on_call)
    try:
        run()
    except FindingError:
        return set()  # it belongs to the findings
    finally:
        sys.settrace(None)
    return found
