"""The ``tailor`` command: one file a verb."""

from __future__ import annotations

import sys
import warnings

import typer

from tailor_dcp.cli.copy import copy
from tailor_dcp.cli.diff import diff
from tailor_dcp.cli.inspect import inspect
from tailor_dcp.cli.materialize import materialize
from tailor_dcp.cli.merge import merge
from tailor_dcp.cli.output import complain
from tailor_dcp.cli.prune import prune
from tailor_dcp.cli.report import report
from tailor_dcp.cli.simulate import simulate
from tailor_dcp.cli.verify import verify
from tailor_dcp.errors import TailorError

app = typer.Typer(
    name="tailor",
    help="Layer-wise checkpoints for PyTorch: look into them, merge them, keep them in order.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (inspect, diff, merge, materialize, copy, prune, verify, report, simulate):
    app.command()(verb)


@app.callback()
def _root() -> None:
    """Layer-wise checkpoints for PyTorch: look into them, merge them, keep them in order."""


def main() -> None:
    """Run the command line; errors are one sentence, never a traceback."""
    warnings.showwarning = _say
    try:
        app()
    except TailorError as error:
        complain("tailor", error)
        sys.exit(error.exit_code)
    except OSError as error:  # a disk's, or a store's that nothing else gave a meaning
        what = f"{error.filename} cannot be reached: {error.strerror}" if error.filename else str(error)
        complain("tailor", f"{what.rstrip('.')}.")
        sys.exit(TailorError.exit_code)


def _say(message: Warning | str, *_: object, **__: object) -> None:
    complain("tailor", message)
