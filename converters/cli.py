"""``tailor-convert``: translate checkpoints between formats."""

from __future__ import annotations

import sys
import time
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tailor_dcp.cli.output import print_json, size
from tailor_dcp.errors import TailorError
from tailor_dcp.location import METADATA

from .torch_save import ConversionError, to_dcp, to_torch

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Format(StrEnum):
    """What can be written."""

    dcp = "dcp"
    torch = "torch"


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A DCP checkpoint's folder, or a torch.save file.")],
    target: Annotated[Path, typer.Argument(help="What to write; it must not exist yet.")],
    to: Annotated[Format, typer.Option(help="dcp: a DCP checkpoint; torch: one torch.save file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the closing line as JSON.")] = False,
) -> None:
    """Translate a checkpoint. The source is never modified, and nothing in it is executed."""
    if target.exists():
        raise ConversionError(f"{target} exists already; name a new one, or remove it first.")
    is_checkpoint = (source / METADATA).exists()
    if is_checkpoint == (to is Format.dcp):
        have = "a DCP checkpoint" if is_checkpoint else "no DCP checkpoint"
        raise ConversionError(f"{source} is {have}, so there is nothing to convert --to {to.value}.")
    start = time.monotonic()
    (to_torch if is_checkpoint else to_dcp)(source, target)
    _close(target, time.monotonic() - start, as_json)


def _close(target: Path, seconds: float, as_json: bool) -> None:
    files = [target] if target.is_file() else list(target.glob("*"))
    written = sum(path.stat().st_size for path in files)
    if as_json:
        print_json({"target": str(target), "bytes": written, "seconds": round(seconds, 3)})
    else:
        typer.echo(f"{target}: {size(written)} in {seconds:.1f} s")


def main() -> None:
    """Run the command line; errors are one sentence, never a traceback."""
    warnings.simplefilter("ignore", UserWarning)
    try:
        app()
    except TailorError as error:
        typer.echo(f"tailor-convert: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
