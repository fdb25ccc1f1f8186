"""``python -m tests.fuzz``: fuzz the parsers, and show what was reached and found."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tests.fuzz import runner
from tests.fuzz.registry import TARGETS
from tests.fuzz.runner import Turn

_ROW = "{:<16}{:>12}{:>10}{:>8}{:>10}{:>8}{:>10}"


def main() -> int:
    """Return 1 if there is a finding."""
    asked = _arguments()
    names = asked.target or list(TARGETS)
    if asked.keep:
        return _keep(names, asked.work, asked.keep)
    try:
        from tests.fuzz import child
    except ImportError:
        print("Fuzzing needs atheris: pip install -e '.[fuzz]'", file=sys.stderr)
        return 2
    asked.work.mkdir(parents=True, exist_ok=True)
    child.preload(names)
    if asked.total:
        turns: Iterable[Turn] = runner.fuzz_until(names, asked.work, asked.total, asked.least, asked.seconds or 60)
    else:
        runs = asked.runs or (0 if asked.seconds else 20_000)
        turns = (runner.turn(name, asked.work, runs, asked.seconds or 0, asked.seed) for name in names)
    print(_ROW.format("target", "executions", "a CPU-s", "edges", "features", "corpus", "findings"))
    shown = []
    for one in turns:
        _show(one)
        shown.append(one)
    told = runner.totals(list(runner.turns_in(asked.work)) if asked.total else shown)
    done = {name: one for name, one in told.items() if name in names}
    print(f"\n{sum(one.executions for one in done.values()):,} executions of {len(done)} targets")
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(_result(done), indent=1) + "\n")
    return int(any(one.findings or one.exit for one in done.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="one of them; all by default")
    parser.add_argument("--runs", type=int, help="executions of each target; 20,000 by default")
    parser.add_argument("--seconds", type=int, help="seconds of each target, or of each turn with --total")
    parser.add_argument("--total", type=int, help="take turns until all turns in --work have so many executions")
    parser.add_argument("--least", type=int, default=0, help="with --total: executions that each target has at least")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn")
    parser.add_argument("--work", type=Path, default=Path("fuzz-run"), help="where corpora, findings and logs are")
    parser.add_argument(
        "--keep", type=int, metavar="BYTES", help="minimise the corpora in --work into the repository's"
    )
    parser.add_argument("--json", type=Path, help="write what was done")
    return parser.parse_args()


def _keep(names: Iterable[str], work: Path, most: int) -> int:
    from tests.fuzz.minimise import minimised  # imports the parsers, which fuzzing does later

    for name in names:
        files = minimised(name, work)
        print(f"{name}: {runner.keep(name, files, most)} of {len(files)} files")
    return 0


def _show(one: Turn) -> None:
    rate = f"{one.executions / one.seconds:,.0f}" if one.seconds else ""
    row = _ROW.format(one.target, f"{one.executions:,}", rate, one.edges, one.features, one.corpus, one.findings)
    print(row + (f"  ended with {one.exit}" if one.exit else ""), flush=True)


def _result(done: dict[str, Turn]) -> dict[str, object]:
    return {
        "executions": sum(one.executions for one in done.values()),
        "findings": sum(one.findings for one in done.values()),
        "date": date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "atheris": version("atheris")},
        "targets": {name: asdict(one) for name, one in done.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
