"""``tailor materialize``: a self-contained copy of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Annotated

import torch.distributed as dist
import typer

from tailor_dcp.cli.output import print_json, say, size
from tailor_dcp.cli.progress import progress_bar
from tailor_dcp.errors import TailorError
from tailor_dcp.materialize import Materialized
from tailor_dcp.materialize import materialize as make
from tailor_dcp.ranks import RankLostError


def materialize(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's folder or URL, such as run/step-200.")],
    out: Annotated[str, typer.Argument(help="The folder or URL to make; it must not exist.")],
    verify: Annotated[bool, typer.Option(help="Check what is copied against its checksums.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="That copy; by default as many as help.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Copy the bytes that a checkpoint needs, and no others, into a folder that needs no other.

    Under torchrun the ranks share the work: torchrun --nproc-per-node 4 --no-python tailor materialize CKPT OUT.
    Exit code 1 means that the checkpoint is damaged; nothing is left of the copy then.
    """
    with _ranks() as rank, progress_bar("copying") if rank == 0 else nullcontext() as progress:
        made = make(checkpoint, out, verify=verify, progress=progress, threads=threads)
    if rank == 0:
        _show(made, verify, as_json)


@contextmanager
def _ranks() -> Generator[int, None, None]:
    """Join the other ranks that torchrun has started; yield which one this is. One of them says what went wrong."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield 0
        return
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        yield rank
    except RankLostError:
        raise
    except TailorError as error:
        if rank:
            raise typer.Exit(error.exit_code) from error
        raise
    finally:
        dist.destroy_process_group()


def _show(made: Materialized, verify: bool, as_json: bool) -> None:
    if as_json:
        print_json(made.to_dict())
        return
    checked = f"{made.checked} of {made.blobs} checksums compared" if verify else "no checksum compared"
    say(f"{made.path}: {size(made.bytes)} in {made.files} files, {checked}")
