"""How a demo ends: well, with a sentence about what went wrong, or stopped by its user."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer

from demo.errors import DemoError
from demo.screen import Screen

_TAIL = 20  # lines of a log that are shown after a failure


@contextmanager
def failures_told(screen: Screen) -> Iterator[None]:
    """Tell of what goes wrong, and leave with the exit code for that; SIGTERM is taken for Ctrl-C."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except DemoError as error:
        if error.log:
            screen.console.print(_tail(error.log), style="dim", markup=False)
        screen.failed(str(error) + (f" The whole log is {error.log}." if error.log else ""))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        screen.failed("Stopped; nothing of it is still running.")
        raise typer.Exit(130) from None


def _tail(log: Path) -> str:
    """Return the end of what the trainer itself said; torchrun's report on it comes after and is longer."""
    lines = log.read_text(errors="replace").splitlines()
    own = itertools.takewhile(lambda line: "torch/distributed/elastic/multiprocessing" not in line, lines)
    return "\n".join([*own][-_TAIL:])


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
