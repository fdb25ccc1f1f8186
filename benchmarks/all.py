"""All benchmarks, one after the other: one table, and ``benchmarks/results.md``.

    python -m benchmarks.all [--quick] [--only save --only load]

Each runs in a process of its own and measures beside its peer, in pairs; so its ratios mean something on a noisy
machine, and its seconds only within that run. Where there is a GPU, what only a GPU can show is measured, too. Exits
with 1 if a bar is missed or a benchmark fails; both are said in the table.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.table import COLUMNS, Row, markdown, rows_in

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE / "results.md"

PARTS: dict[str, tuple[str, ...]] = {
    "save": ("--pairs", "3"),
    "async": ("--pairs", "5"),
    "load": ("--pairs", "3"),
    "materialize": ("--pairs", "3"),
    "verify": ("--pairs", "5"),
    "compose": ("--ranks", "64", "--pairs", "3"),
    "scale": ("--quick",),
    "merge": ("--pairs", "3"),
    "convert": ("--pairs", "2"),
    "link": ("--pairs", "2"),
    "disk_use": (),
    "fingerprint": ("--rounds", "5"),
    "drift": (),
    "published": ("--pairs", "1"),
}
"""Each benchmark, and what makes it short."""


def main(
    quick: Annotated[bool, typer.Option(help="Fewer pairs: minutes, and wider intervals.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Run these, and keep what is known of the others.")] = None,
) -> None:
    """Run the benchmarks and write what they found."""
    parts = [*PARTS, *(["gpu"] if torch.cuda.is_available() else [])]
    unknown = set(only or ()) - set(parts)
    if unknown:
        raise typer.BadParameter(f"there is no benchmark {min(unknown)}; there are {', '.join(parts)}.")
    console = Console(width=140)
    failed = [part for part in only or parts if not _run(part, quick, console)]
    known = {part: json.loads(path.read_text()) for part in parts if (path := RESULTS / f"{part}.json").exists()}
    console.print(_table(known))
    PAGE.write_text(_page(known, failed))
    console.print(f"Written to {PAGE}.")
    for part in failed:
        console.print(f"[red]{part} failed; what is shown of it, if anything, is of an earlier run.[/red]")
    if failed or not all(one.holds for found in known.values() for one in rows_in(found)):
        sys.exit(1)


def _run(part: str, quick: bool, console: Console) -> bool:
    """Run one benchmark; tell whether it left new results. A missed bar is no failure."""
    target = RESULTS / f"{part}.json"
    began = time.time()
    console.rule(part)
    words = [sys.executable, "-m", f"benchmarks.{part}", *(PARTS.get(part, ()) if quick else ()), "--json", str(target)]
    subprocess.run(words, check=False, cwd=HERE.parent)
    return target.exists() and target.stat().st_mtime >= began


def _table(known: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="All benchmarks", title_justify="left")
    for column in COLUMNS:
        table.add_column(column)
    for found in known.values():
        for one in rows_in(found):
            table.add_row(*(cell.replace("**", "") for cell in one.cells()))
        table.add_section()
    return table


def _page(known: dict[str, dict[str, Any]], failed: list[str]) -> str:
    return "".join(_paragraphs(known, failed))


def _paragraphs(known: dict[str, dict[str, Any]], failed: list[str]) -> Iterator[str]:
    yield "# What was measured\n\n"
    yield (
        "Written by `make bench`. Every ratio is ours over the peer's, measured in turns in one run: the median of all "
        "pairs and the 95 % interval of medians of resampled pairs. Where a bar is given with ≥, more is better. "
        "Seconds are of that one run and are never to be compared with another's.\n"
    )
    for part, found in known.items():
        rows = rows_in(found)
        yield f"\n## {part}\n\n{found['title']}. {_machine(found['machine'])}\n\n{markdown(rows)}"
    missed = [f"{part}: {one.work} / {one.beside}" for part, found in known.items() for one in _missed(found)]
    yield "\n## Bars that were missed\n\n"
    yield "".join(f"- {one}\n" for one in missed) or "None.\n"
    yield "".join(f"\n{part} could not be run.\n" for part in failed)


def _missed(found: dict[str, Any]) -> list[Row]:
    return [one for one in rows_in(found) if not one.holds]


def _machine(told: dict[str, Any]) -> str:
    return (
        f"{told['processor']}, {told['cores']} cores, {told['memory_gb']} GB; {told['system']}; "
        f"Python {told['python']}, torch {told['torch']}."
    )


if __name__ == "__main__":
    typer.run(main)
