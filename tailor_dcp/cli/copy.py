"""``tailor copy``: bring a run to another place without inflating what its checkpoints share."""

from __future__ import annotations

from typing import Annotated

import typer

from tailor_dcp.cli.output import print_json, say, size
from tailor_dcp.cli.progress import progress_bar
from tailor_dcp.copying import Copied
from tailor_dcp.copying import copy as copy_run


def copy(
    run: Annotated[str, typer.Argument(help="A run's folder or URL, or one checkpoint's.")],
    dst: Annotated[str, typer.Argument(help="The folder or URL to copy to: new, or what an earlier copy has left.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare what was copied before byte by byte.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Copy a run; bytes that several checkpoints share are copied once.

    A copy that was cut off is continued by the same command.
    """
    with progress_bar("copying") as progress:
        done = copy_run(run, dst, verify, progress)
    if as_json:
        print_json(done.to_dict())
    else:
        say(_summary(done))


def _summary(done: Copied) -> str:
    before = f", {done.skipped} files were there already" if done.skipped else ""
    return (
        f"{done.path}: copied {size(done.copied)}, linked {done.linked} files{before}; it takes {size(done.bytes)}, "
        f"where a copy of each file by itself would take {size(done.naive)}"
    )
