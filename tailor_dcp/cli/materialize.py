"""``tailor materialize``: a self-contained copy of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailor_dcp.cli.output import print_json, say, size
from tailor_dcp.cli.progress import progress_bar
from tailor_dcp.materialize import materialize as make


def materialize(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder, such as run/step-200.")],
    out: Annotated[Path, typer.Argument(help="The folder to make; it must not exist.")],
    verify: Annotated[bool, typer.Option(help="Check what is copied against its checksums.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Copy the bytes that a checkpoint needs, and no others, into a folder that needs no other.

    Exit code 1 means that the checkpoint is damaged; nothing is left of the copy then.
    """
    with progress_bar("copying") as progress:
        made = make(checkpoint, out, verify=verify, progress=progress)
    if as_json:
        print_json(made.to_dict())
        return
    checked = f"{made.checked} of {made.blobs} checksums compared" if verify else "no checksum compared"
    say(f"{made.path}: {size(made.bytes)} in {made.files} files, {checked}")
