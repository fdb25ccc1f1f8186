"""``tailor merge``: a checkpoint put together from others."""

from __future__ import annotations

from typing import Annotated

import typer

from tailor_dcp.cli.output import print_json, say, size
from tailor_dcp.cli.progress import progress_bar
from tailor_dcp.merge import Merged
from tailor_dcp.merge import merge as run_merge
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.native import KEEP, Recipe, Take


def merge(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[RECIPE | RUN | MODEL...] OUT",
            help="A recipe's YAML file and the folder to make; only the folder with --base; the models before it with "
            "--models; the run before it with --flags.",
            show_default=False,
        ),
    ],
    base: Annotated[str | None, typer.Option(help="Without a recipe: where everything comes from.")] = None,
    take: Annotated[
        list[str] | None, typer.Option(help="With --base: LAYERS=SOURCE, a glob of layers and where they come from.")
    ] = None,
    rename: Annotated[
        list[str] | None, typer.Option(help="With --base: OLD=NEW, a layer and another that it fills as well.")
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(help="With --base: layers to leave out.")] = None,
    train: Annotated[str | None, typer.Option(help="With --base: where scheduler, RNG and step come from.")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="keep, drop, average, or the source that all moments come from.")
    ] = None,
    max_stale_steps: Annotated[int | None, typer.Option(help="With --base: refuse layers that are older.")] = None,
    to: Annotated[str | None, typer.Option(help="dcp, hf, zero3, zero2 or zero1.")] = None,
    materialize: Annotated[
        bool, typer.Option("--materialize", help="Copy the bytes, link no file.")
    ] = False,
    seed: Annotated[int, typer.Option(help="For methods that draw random numbers.")] = 0,
    world_size: Annotated[int | None, typer.Option(help="Ranks that a ZeRO checkpoint is written for.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="A class that may be unpickled, as module.Class.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Build a checkpoint from a recipe: layers of other steps, of other runs, or a merge of models.

    Layers of DCP checkpoints are taken by metadata alone: no tensor is read or written.
    """
    *before, out = arguments
    if base is not None:
        recipe: str | Recipe = _short(before, base, take, rename, drop, train, optimizer, max_stale_steps)
    elif len(before) == 1:
        recipe = before[0]
    else:
        raise RecipeError("Give a recipe and the folder to make, or --base with --take and the folder to make.")
    with progress_bar("merging") as progress:
        done = run_merge(
            recipe,
            out,
            to=to,
            materialize=materialize,
            seed=seed,
            world_size=world_size,
            allow=tuple(allow or ()),
            progress=progress,
        )
    if as_json:
        print_json(done.to_dict())
    else:
        _show(done)


def _short(
    before: list[str],
    base: str,
    take: list[str] | None,
    rename: list[str] | None,
    drop: list[str] | None,
    train: str | None,
    optimizer: str | None,
    max_stale_steps: int | None,
) -> Recipe:
    """Return the recipe that options spell out."""
    if before:
        raise RecipeError(
            f"With --base there is no recipe file, so {before[0]!r} has no meaning; give the folder alone."
        )
    renames: dict[str, tuple[str, ...]] = {}
    for text in rename or ():
        old, new = _pair(text, "--rename", "OLD=NEW")
        renames[old] = (*renames.get(old, ()), new)
    takes = tuple(Take(*_pair(text, "--take", "LAYERS=SOURCE")) for text in take or ())
    chosen = optimizer or KEEP
    return Recipe(base, takes, renames, tuple(drop or ()), train, chosen, max_stale_steps, "the command line")


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    left, found, right = text.partition("=")
    if not (left and found and right):
        raise RecipeError(f"{option} {text!r} makes no sense; write it as {form}.")
    return left, right


def _show(done: Merged) -> None:
    for note in done.notes:
        say(f"note: {note}")
    shared = f", {done.linked} files linked" if done.linked else ""
    say(
        f"{done.path} ({done.format}): {done.layers} layers from {len(done.sources)} sources, {size(done.live)} of "
        f"tensors, {size(done.written)} written{shared}; {done.seconds:.2f} s, peak memory {size(done.peak_memory)}"
    )
