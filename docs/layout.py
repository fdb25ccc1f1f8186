"""Draws docs/layout.png: what lies in a run's folders, and in which order a save writes it.

    python docs/layout.py

Nothing in the picture is made up: a small run is saved, its folders are listed, and the calls of one save are noted
as Python makes them.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed.checkpoint as dcp
from matplotlib.axes import Axes

from tailor_dcp import LayerwisePlanner, LayerwiseWriter

MONO = {"family": "DejaVu Sans Mono", "size": 8.5}
COLORS = {"step-100": "#1b4f72", "step-200": "#b9770e", "step-300": "#1f7a5c"}
PHASES = {
    "before": ("#f4e3e1", "killed here: no checkpoint of this save;\nthe one that the folder held is still whole"),
    "after": ("#e2efe6", "killed here: the new checkpoint is whole;\nold files wait for the next save or prune"),
}


class Call(NamedTuple):
    """One call that changes a folder: what it is called, and the file that it is about."""

    verb: str
    path: Path


def main() -> None:
    """Save, list, draw."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        for step in (100, 200, 300):
            _save(run, step)
        with _noted(run) as calls:
            _save(run, 300)  # into a folder that holds a checkpoint already: everything a save can do happens
        with mpl.rc_context({"font.family": "DejaVu Sans"}):
            figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6.2), width_ratios=(1, 1.25))
            _draw_folders(left, run)
            _draw_order(right, run, _told(calls))
            figure.tight_layout()
            figure.savefig(Path(__file__).with_name("layout.png"), dpi=110)


def _save(run: Path, step: int) -> None:
    weights = {f"layers.{i}.weight": torch.full((64, 64), float(step)) for i in range(3)}
    moments = {fqn: {"exp_avg": torch.zeros(64, 64)} for fqn in weights}
    state = {"model": weights, "optim": {"state": moments}, "train": {"step": torch.tensor(step)}}
    base = run / f"step-{step - 100}" if step > 100 else None
    planner = LayerwisePlanner("moments:every=3", base=base)
    dcp.save(state, storage_writer=LayerwiseWriter(run / f"step-{step}", thread_count=1), planner=planner)


@contextmanager
def _noted(run: Path) -> Iterator[list[Call]]:
    """Note every call that changes something below ``run``."""
    calls: list[Call] = []
    real_fsync, noting = os.fsync, True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        verb = {"os.link": "link", "os.rename": "rename", "os.mkdir": "mkdir", "os.remove": "unlink"}.get(event)
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            verb = "write"
        if noting and verb:
            path = Path(os.fspath(arguments[1 if event in {"os.link", "os.rename"} else 0]))
            if path.is_relative_to(run):
                calls.append(Call(verb, path))

    def fsync(file: Any) -> None:  # as os.fsync takes it: a descriptor, or what has one
        descriptor = file if isinstance(file, int) else file.fileno()
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_relative_to(run):
            calls.append(Call("fsync", path))
        real_fsync(file)

    sys.addaudithook(hook)
    os.fsync = fsync
    try:
        yield calls
    finally:
        noting = False
        os.fsync = real_fsync


def _told(calls: list[Call]) -> list[Call]:
    """Leave out that a folder is made which is there, and the second of two equal calls in a row."""
    found: list[Call] = []
    for call in calls:
        if call.verb != "mkdir" and (not found or found[-1] != call):
            found.append(call)
    return found


def _draw_folders(axis: Axes, run: Path) -> None:
    axis.set_title("What lies there", loc="left", fontsize=11, fontweight="bold")
    owners: dict[int, str] = {}
    row = 0.0
    for folder in sorted(run.iterdir()):
        axis.text(0, row, f"{folder.name}/", fontdict={**MONO, "weight": "bold"}, color=COLORS[folder.name])
        row += 1
        # A file is shown in the color of the step that wrote it.
        files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: ("carried" in p.parts, p.name))
        for path in files:
            inode = path.stat().st_ino
            owner = owners.setdefault(inode, folder.name)
            name = path.relative_to(folder).as_posix()
            own = owner == folder.name
            short = name if own else f"carried/{path.parent.name[:8]}…/…_{path.stem.split('_')[-1]}.distcp"
            axis.text(0.03, row, short, fontdict=MONO, color=COLORS[owner], alpha=1.0 if own else 0.75)
            note = _note(path) if own else f"the same bytes as in {owner}: a hard link"
            axis.text(0.58, row, note, fontsize=8, color="#555555" if own else COLORS[owner], style="italic")
            row += 1
        row += 0.6
    axis.set(xlim=(0, 1.25), ylim=(row, -1))
    axis.axis("off")


def _note(path: Path) -> str:
    if path.name == ".metadata":
        return "makes the folder a checkpoint"
    return f"rank 0, save {path.name.split('_')[3]}, {path.stat().st_size:,} bytes"


def _draw_order(axis: Axes, run: Path, calls: list[Call]) -> None:
    axis.set_title("The order in which step-300 is saved again", loc="left", fontsize=11, fontweight="bold")
    commit = next(i for i, call in enumerate(calls) if call.verb == "rename")
    for phase, low, high in (("before", -0.6, commit - 0.5), ("after", commit - 0.5, len(calls) - 0.4)):
        color, said = PHASES[phase]
        axis.axhspan(low, high, color=color, linewidth=0)
        axis.text(0.99, (low + high) / 2, said, fontsize=8.5, ha="right", va="center", color="#444444")
    axis.axhline(commit - 0.5, color="#1f7a5c", linewidth=2)
    for row, call in enumerate(calls):
        name = call.path.relative_to(run).as_posix()
        name = name if len(name) < 50 else f"{name[:25]}…/{call.path.name}"
        bold = row == commit
        axis.text(
            0.01,
            row,
            f"{row + 1:>2}  {call.verb:<7}{name}",
            fontdict={**MONO, "weight": "bold" if bold else "normal"},
            va="center",
        )
        if bold:
            axis.text(0.63, row, "← the commit, atomic", fontsize=8.5, va="center", color="#1f7a5c")
    axis.set(xlim=(0, 1), ylim=(len(calls) - 0.4, -0.6), xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


if __name__ == "__main__":
    main()
