"""The long form: every scenario, every call, until the time is up. ``python -m tests.crash --json FILE``.

What is tried is drawn with a seed from everything that could be, so a shorter run is a sample of a longer one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.crash import loads
from tests.crash.plan import Action, missing
from tests.crash.scenarios import ALL
from tests.crash.stage import Stage
from tests.crash.theatre import LawBrokenError, Theatre
from tests.crash.trials import FAULTS, LOADS, count, interrupt, kill, load, lose_power, refuse

_SHARES = {"daemon": 0.2, "kill": 0.32, "power": 0.12, "refuse": 0.2, "interrupt": 0.08, "load": 0.08}
"""The part of the time that each kind of trial has; what one leaves is the next one's."""
_DEATHS = {"kills": Action.KILL, "torn": Action.TEAR, "nodes": Action.NODE, "orphans": Action.ORPHAN}
"""What happens to a rank, by where it is counted."""
_SAMPLE = 12
"""How many calls of a daemon's single rank are tried in each of these ways; of two ranks a quarter, for each."""


@dataclass
class Row:
    """What was tried of one scenario.

    Attributes:
        calls: how many calls of each rank change something.
        kills: kill points: a rank and its n-th call, each counted once.
        nodes: calls at which a rank died together with its daemon.
        orphans: calls at which a rank died and its daemon went on.
        torn: writes of which half was made before the kill.
        power: different disks that a loss of power may leave.
        faults: calls that were refused, fell short or waited.
        failed: how many of these made the operation fail; the others it went round, and its result was right.
        interrupted: calls at which a rival came in between.
        loads: loads that were disturbed.
        failed_loads: how many of them failed.
        broken: laws that did not hold.
        seconds: how long it took.
    """

    calls: list[int] = field(default_factory=list)
    kills: int = 0
    nodes: int = 0
    orphans: int = 0
    torn: int = 0
    power: int = 0
    faults: int = 0
    failed: int = 0
    interrupted: int = 0
    loads: int = 0
    failed_loads: int = 0
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Tour:
    """Goes through trials in an order that is drawn.

    Args:
        theatre: where.
        draw: what chooses.
        again: the share of trials after which the operation is done again.
        tell: is told the rows after each trial.
    """

    def __init__(
        self, theatre: Theatre, draw: random.Random, again: float, tell: Callable[[dict[str, Row]], None]
    ) -> None:
        self._theatre, self._draw, self._again, self._tell = theatre, draw, again, tell
        self.rows: dict[str, Row] = {}
        self._loads_stage = Stage(LOADS)

    def close(self) -> None:
        """End the processes."""
        self._loads_stage.close()
        self._theatre.close()

    def go(self, minutes: float) -> None:
        """Try as much as there is time for."""
        end, left = time.monotonic() + minutes * 60, 1.0
        for kind, share in _SHARES.items():
            deadline = time.monotonic() + (end - time.monotonic()) * share / left
            left -= share
            trials: list[tuple[str, Callable[[Row], None]]] = list(getattr(self, f"_{kind}s")())
            self._draw.shuffle(trials)
            for name, trial in trials:
                if time.monotonic() > deadline:
                    break
                self._do(name, trial)
                self._tell(self.rows)

    def _do(self, name: str, trial: Callable[[Row], None]) -> None:
        row, start = self.rows.setdefault(name, Row()), time.monotonic()
        try:
            trial(row)
        except LawBrokenError as error:
            row.broken.append(str(error))
            print(error, file=sys.stderr, flush=True)
        row.seconds += time.monotonic() - start

    def _repeat(self, name: str) -> bool:
        share = self._again / 3 if ALL[name].daemon else self._again
        return self._draw.random() < share

    # Each yields trials by the name of their scenario -----------------------------------------------------------

    def _daemons(self) -> Iterator[tuple[str, Callable[[Row], None]]]:
        """Each takes seconds, so it is a sample however long there is; of two ranks fewer."""
        for name in [name for name, scenario in ALL.items() if scenario.daemon]:
            self.rows.setdefault(name, Row()).calls = list(self._theatre.baseline(name).calls)
            calls = self._theatre.baseline(name).calls
            for rank, number in enumerate(calls):
                for kind in _DEATHS:
                    last = number // 3 if kind == "torn" else number
                    chosen = self._draw.sample(range(1, last + 1), min(last, _SAMPLE // len(calls) ** 2))
                    yield from ((name, self._killing(name, at, rank, kind)) for at in chosen)
            faults = self._draw.sample(list(FAULTS), 6 // len(calls))
            yield from ((name, self._refusing(name, fault, 1)) for fault in faults)

    def _kills(self) -> Iterator[tuple[str, Callable[[Row], None]]]:
        for name, scenario in ALL.items():
            if scenario.rivals or scenario.daemon:
                continue
            row = self.rows.setdefault(name, Row())
            row.calls = list(self._theatre.baseline(name).calls)
            for rank, calls in enumerate(row.calls):
                yield from ((name, self._killing(name, at, rank, "kills")) for at in range(1, calls + 1))
                # About a third of the calls write; beyond the last one nothing happens, and nothing is counted.
                yield from ((name, self._killing(name, at, rank, "torn")) for at in range(1, calls // 3 + 1))

    def _killing(self, name: str, at: int, rank: int, kind: str) -> Callable[[Row], None]:
        def trial(row: Row) -> None:
            where = kill(self._theatre, name, at, rank, _DEATHS[kind], self._repeat(name))
            setattr(row, kind, getattr(row, kind) + (where is not None))

        return trial

    def _powers(self) -> Iterator[tuple[str, Callable[[Row], None]]]:
        def losing(name: str) -> Callable[[Row], None]:
            def trial(row: Row) -> None:
                row.power += lose_power(self._theatre, name, self._draw, 2, 25).states

            return trial

        yield from ((name, losing(name)) for name, scenario in ALL.items() if not scenario.rivals)

    def _refuses(self) -> Iterator[tuple[str, Callable[[Row], None]]]:
        for name, scenario in ALL.items():
            if not scenario.rivals and not scenario.daemon:
                yield from ((name, self._refusing(name, fault, 4)) for fault in FAULTS)

    def _refusing(self, name: str, fault: str, calls: int) -> Callable[[Row], None]:
        def trial(row: Row) -> None:
            for rank, number in enumerate(count(self._theatre, name, FAULTS[fault])):
                for at in self._draw.sample(range(1, number + 1), min(calls, number)):
                    row.failed += refuse(self._theatre, name, FAULTS[fault], at, rank, self._repeat(name))
                    row.faults += 1

        return trial

    def _interrupts(self) -> Iterator[tuple[str, Callable[[Row], None]]]:
        def interrupting(name: str, at: int, first: int) -> Callable[[Row], None]:
            def trial(row: Row) -> None:
                interrupt(self._theatre, name, at, first)
                row.interrupted += 1

            return trial

        for name, scenario in ALL.items():
            if scenario.rivals:
                self.rows.setdefault(name, Row()).calls = list(self._theatre.baseline(name).calls)
                for first, calls in enumerate(self._theatre.baseline(name).calls):
                    yield from ((name, interrupting(name, at, first)) for at in range(1, calls + 1))

    def _loads(self) -> Iterator[tuple[str, Callable[[Row], None]]]:
        def loading(name: str) -> Callable[[Row], None]:
            def trial(row: Row) -> None:
                tried = load(self._loads_stage, self._theatre.place(name), name)
                row.loads, row.failed_loads = tried.loads, tried.failed
                row.broken += tried.wrong

            return trial

        yield from ((name, loading(name)) for name in loads.ALL)


# What it says ---------------------------------------------------------------------------------------------------

_WIDE = 160
_COLUMNS = ("kills", "torn", "nodes", "orphans", "power", "faults", "failed", "interrupted", "loads", "failed_loads")


def summary(rows: dict[str, Row]) -> dict[str, int]:
    """Return the sums over all scenarios."""
    sums = {column: sum(getattr(row, column) for row in rows.values()) for column in _COLUMNS}
    return {**sums, "laws_broken": sum(len(row.broken) for row in rows.values())}


def _show(rows: dict[str, Row]) -> None:
    table = Table("scenario", "calls", *(column.replace("_", " ") for column in _COLUMNS), "broken", "s")
    for name, row in sorted(rows.items()):
        counts = [str(getattr(row, column) or "") for column in _COLUMNS]
        calls = " + ".join(map(str, row.calls))
        table.add_row(name, calls, *counts, str(len(row.broken) or ""), f"{row.seconds:.0f}")
    sums = summary(rows)
    table.add_section()
    table.add_row("all", "", *(str(sums[column]) for column in _COLUMNS), str(sums["laws_broken"]), "")
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)


def _write(path: Path, rows: dict[str, Row], told: dict[str, Any]) -> None:
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    document = {
        "what": "tests.crash",
        "torch": torch.__version__,
        "machine": machine,
        **told,
        "summary": summary(rows),
        "scenarios": {name: asdict(row) for name, row in sorted(rows.items())},
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> int:
    """Run it; 1 if a law was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--minutes", type=float, default=18.0, help="how long it may take")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--again", type=float, default=0.5, help="the share of trials that are done again")
    parser.add_argument("--json", type=Path, help="where the counts are written")
    parser.add_argument("--work", type=Path, help="a folder to work in; memory where there is some")
    told = parser.parse_args()
    if (why := missing()) is not None:
        print(f"Nothing can be tried here: {why}.", file=sys.stderr)
        return 2
    shared = Path("/dev/shm")
    room = Path(tempfile.mkdtemp(prefix="crash", dir=told.work or (shared if shared.is_dir() else None)))
    theatre, start = Theatre(room), time.monotonic()

    def note(rows: dict[str, Row]) -> None:
        if told.json:
            seconds = round(time.monotonic() - start)
            _write(told.json, rows, {"seed": told.seed, "again": told.again, "seconds": seconds})

    tour = Tour(theatre, random.Random(told.seed), told.again, note)
    try:
        tour.go(told.minutes)
    finally:
        tour.close()
        shutil.rmtree(room, ignore_errors=True)
    _show(tour.rows)
    return 1 if summary(tour.rows)["laws_broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
