"""``tailor-convert``: translate checkpoints between formats. Under torchrun the ranks share the work."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from tailor_dcp.cli.output import complain, console, print_json, say, size
from tailor_dcp.errors import TailorError

from . import ranks
from .convert import Converted
from .convert import convert as convert_checkpoint
from .formats import SOURCES, TARGETS
from .key_layouts import LAYOUTS
from .options import Options, bytes_of, dtype_of

To = StrEnum("To", [target.name for target in TARGETS])  # type: ignore[misc]
From = StrEnum("From", [source.name for source in SOURCES])  # type: ignore[misc]
Keys = StrEnum("Keys", list(LAYOUTS))  # type: ignore[misc]
_TAILOR = Keys("tailor")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint: its folder, or a torch.save file.")],
    target: Annotated[str, typer.Argument(help="What to write; it must not exist yet.")],
    to: Annotated[To, typer.Option(help="The format to write.")],
    from_: Annotated[From | None, typer.Option("--from", help="The source's format, if it is not recognised.")] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave out optimizer and progress.")] = False,
    layers: Annotated[str | None, typer.Option(help="Only the layers of this glob, e.g. 'model.layers.[0-3]'.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Weights in fp32, bf16 or fp16; the source's by default.")] = None,
    tag: Annotated[str | None, typer.Option(help="Which checkpoint of a DeepSpeed folder.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="A class, as module.Class, that may be unpickled.")] = None,
    world_size: Annotated[int | None, typer.Option(min=1, help="Ranks to write a ZeRO checkpoint for.")] = None,
    sub_group_size: Annotated[
        int | None, typer.Option(min=1, help="ZeRO-3's, as in the engine that will load it.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="The largest safetensors file to write.")] = "5GB",
    keys: Annotated[Keys, typer.Option(help="Whose names the keys of a DCP checkpoint get.")] = _TAILOR,
    link: Annotated[
        bool, typer.Option("--link", help="Point into the source's files instead of copying (--to dcp).")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be read and written.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Translate a checkpoint. The source is never modified, and nothing in it is executed."""
    options = Options(
        weights_only=weights_only,
        layers=layers,
        dtype=dtype_of(dtype),
        tag=tag,
        allow=tuple(allow or ()),
        world_size=world_size,
        sub_group_size=sub_group_size,
        max_shard_size=bytes_of(max_shard_size),
        keys=keys.value,
        link=link,
    )
    with _progress() as (total, advance):
        chosen = replace(options, progress=advance)
        done = convert_checkpoint(source, target, to.value, from_ and from_.value, chosen, dry_run, total)
    if ranks.rank() != 0:
        return
    if as_json:
        print_json(done.to_dict())
    else:
        _show(done)


def _show(done: Converted) -> None:
    if done.dry_run:
        console().print(_table(done))
    for note in done.notes:
        say(f"note: {note}")
    say(_closing(done))


def _table(done: Converted) -> Table:
    table = Table(show_header=False, title=escape(done.source), title_justify="left", pad_edge=False)
    table.add_row("format", done.source_format)
    table.add_row("holds", f"{done.weights} weights in {done.layers} layers, {done.states} optimizer states")
    for kind, count in done.kinds.items():
        table.add_row(escape(kind), size(count))
    if done.train:
        table.add_row("train", escape(", ".join(done.train)))
    if done.files:
        table.add_row("files", escape(", ".join(done.files)))
    return table


def _closing(done: Converted) -> str:
    if done.dry_run:
        return (
            f"would read {size(done.read)} and write {size(done.written)} of tensors to {done.target} "
            f"({done.target_format}){_linked(done)}; nothing was written"
        )
    if done.linked:
        return (
            f"{done.target} ({done.target_format}){_linked(done)}, {size(done.written)} written in {done.seconds:.1f} s"
        )
    rate = f" ({size(int(done.written / done.seconds))}/s)" if done.seconds > 0 else ""
    return (
        f"{done.target} ({done.target_format}): {size(done.written)} in {done.seconds:.1f} s{rate}, "
        f"peak memory {size(done.peak_memory)}"
    )


def _linked(done: Converted) -> str:
    return f", {size(done.linked)} linked" if done.linked else ""


@contextmanager
def _progress() -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Yield what is to be told of the bytes to do and of bytes done; rank 0 speaks for all, as shares are alike."""
    screen = Console(stderr=True)
    if ranks.rank() != 0 or not screen.is_terminal:
        yield (lambda _: None), (lambda _: None)
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    lock = threading.Lock()
    with Progress(TextColumn("converting"), *columns, console=screen, transient=True) as bar:
        task = bar.add_task("converting", total=None)

        def advance(count: int) -> None:
            with lock:
                bar.advance(task, count * ranks.world())

        yield (lambda total: bar.update(task, total=total)), advance


def main() -> None:
    """Run the command line; errors are one sentence, never a traceback."""
    warnings.simplefilter("ignore", UserWarning)
    ranks.start()
    try:
        app()
    except TailorError as error:
        if ranks.rank() == 0:
            complain("tailor-convert", error)
        sys.exit(error.exit_code)
    except OSError as error:  # a disk's, or a store's that nothing else gave a meaning
        if ranks.rank() == 0:
            what = f"{error.filename} cannot be reached: {error.strerror}" if error.filename else str(error)
            complain("tailor-convert", f"{what.rstrip('.')}.")
        sys.exit(TailorError.exit_code)


if __name__ == "__main__":
    main()
