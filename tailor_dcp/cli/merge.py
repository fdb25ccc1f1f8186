"""``tailor merge``: a checkpoint put together from others."""

from __future__ import annotations

from typing import Annotated

import typer

from tailor_dcp.cli.merge_forms import Asked, recipe_of
from tailor_dcp.cli.output import print_json, say, size
from tailor_dcp.cli.progress import progress_bar
from tailor_dcp.merge import Merged
from tailor_dcp.merge import merge as run_merge


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
    base: Annotated[
        str | None,
        typer.Option(help="Where everything comes from that --take does not name; with --method the base model."),
    ] = None,
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
    method: Annotated[str | None, typer.Option(help="Merge whole models, given with --models, by this method.")] = None,
    models: Annotated[bool, typer.Option("--models", help="With --method: the models follow, and OUT.")] = False,
    weights: Annotated[str | None, typer.Option(help="With --method: a weight for each model, as 0.5,0.3,0.2.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="With --method: NAME=VALUE, a parameter of the method.")
    ] = None,
    flags: Annotated[str | None, typer.Option(help="A flag log: the newest saved copy of each layer of RUN.")] = None,
    at: Annotated[int | None, typer.Option(help="With --flags: the step that nothing may be newer than.")] = None,
    to: Annotated[str | None, typer.Option(help="dcp, hf, zero3, zero2 or zero1.")] = None,
    materialize: Annotated[bool, typer.Option("--materialize", help="Copy the bytes, link no file.")] = False,
    seed: Annotated[int | None, typer.Option(help="Fixes what methods draw that draw random numbers.")] = None,
    world_size: Annotated[int | None, typer.Option(help="Ranks that a ZeRO checkpoint is written for.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="A class that may be unpickled, as module.Class.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Build a checkpoint from a recipe: layers of other steps, of other runs, or a merge of models.

    Layers of DCP checkpoints are taken by metadata alone: no tensor is read or written.
    """
    *before, out = arguments
    asked = Asked(
        base=base,
        take=take or (),
        rename=rename or (),
        drop=drop or (),
        train=train,
        optimizer=optimizer,
        max_stale_steps=max_stale_steps,
        method=method,
        models=models,
        weights=weights,
        settings=settings or (),
        flags=flags,
        at=at,
    )
    recipe = recipe_of(before, asked, tuple(allow or ()))
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


def _show(done: Merged) -> None:
    for note in done.notes:
        say(f"note: {note}")
    shared = f", {done.linked} files linked" if done.linked else ""
    say(
        f"{done.path} ({done.format}): {done.layers} layers from {len(done.sources)} sources, {size(done.live)} of "
        f"tensors, {size(done.written)} written{shared}; {done.seconds:.2f} s, peak memory {size(done.peak_memory)}"
    )
