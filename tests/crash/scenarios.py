"""What is killed: each scenario makes a folder, and then does one thing in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import tailor_dcp.cli
from tailor_dcp import LayerwisePlanner, LayerwiseWriter
from tailor_dcp.converters import cli as converters_cli
from tests.support import zero_samples
from tests.support.world import Model, Param, load, save, state

Operation = Callable[[], Any]
Prepare = Callable[[Path, int, Any], None]
Ready = Callable[[Path, int, Any], Operation]
Writer = Callable[[str], dcp.FileSystemWriter]

POLICY = "parity"
MODEL = Model(
    (
        Param("model.embed_tokens.weight", (6, 2), "shard"),
        Param("model.layers.0.weight", (4, 3), "shard"),
        Param("model.layers.1.weight", (5, 2), "shard"),
        Param("lm_head.weight", (6, 2)),
    )
)
_OLD = ("run/step-10", "run/step-20")


@dataclass(frozen=True)
class Scenario:
    """An operation in a folder of its own.

    Attributes:
        name: what it is called.
        prepare: makes what is there before, on every rank: ``prepare(root, rank, group)``.
        ready: does what goes before, and returns the operation itself.
        result: what it makes or changes, below the root.
        untouched: folders of which no byte may change.
        kept: folders whose files may change, and that stay checkpoints of the same values all the same.
        makes_new: whether it refuses to write what is there already.
        saves: what each folder may hold that is saved to.
        ranks: processes that do it together.
        rivals: whether these know nothing of each other, and are in each other's way.
        linked: whether only ``LayerwiseReader`` can read the result.
        stock: whether DCP's own writer writes it, which for a moment leaves a folder that it overwrites without
            ``.metadata``, and flushes no folder.
        daemon: whether each rank starts a process of its own for it, which may die as well. That takes seconds.
    """

    name: str
    prepare: Prepare
    ready: Ready
    result: str
    untouched: tuple[str, ...]
    makes_new: bool = False
    saves: Mapping[str, Save] = field(default_factory=dict)
    ranks: int = 1
    rivals: bool = False
    linked: bool = False
    stock: bool = False
    kept: tuple[str, ...] = ()
    daemon: bool = False


class Save(NamedTuple):
    """What a save may make of a folder.

    Attributes:
        ancestors: the steps of the saves that it descends from.
        steps: its own; several where several save into one folder at once.
    """

    ancestors: tuple[int, ...]
    steps: tuple[int, ...]


class Said(NamedTuple):
    """What a command ended with.

    Attributes:
        code: its exit code.
        error: what it wrote to standard error.
    """

    code: int
    error: str


# Saves ----------------------------------------------------------------------------------------------------------


def steps(*steps: int, policy: str = POLICY, **options: Any) -> Prepare:
    """Save some steps."""

    def prepare(root: Path, rank: int, group: Any) -> None:
        for step in steps:
            save(group, MODEL, step, f"{root}/run/step-{step}", policy, **options)

    return prepare


def _save(after: int, step: int, to: int | None = None, **options: Any) -> Ready:
    """Go on from a step, and save another one, maybe to the folder of a third."""

    def ready(root: Path, rank: int, group: Any) -> Operation:
        load(group, MODEL, f"{root}/run/step-{after}")
        return partial(save, group, MODEL, step, f"{root}/run/step-{to or step}", POLICY, **options)

    return ready


def _save_in_the_background(executor: str) -> Ready:
    def ready(root: Path, rank: int, group: Any) -> Operation:
        if executor == "process":
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # where the daemons of all ranks meet; their host has no other name
            if group is None:  # it wants one, of however few ranks
                dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        load(group, MODEL, f"{root}/run/step-20")

        def operation() -> None:
            path, planner = f"{root}/run/step-30", LayerwisePlanner(POLICY)
            answer = dcp.async_save(
                state(MODEL, 30, group),
                storage_writer=LayerwiseWriter(path),
                planner=planner,
                process_group=group,
                async_checkpointer_type=AsyncCheckpointerType(executor),
                async_stager=planner.stager(path, group),
            )
            getattr(answer, "upload_completion", answer).result()  # type: ignore[union-attr]

        return operation

    return ready


def _saves() -> Iterator[Scenario]:
    def new(name: str, prepare: Prepare, ready: Ready, ranks: int = 1, stock: bool = False) -> Scenario:
        saves = {"run/step-30": Save((10, 20), (30,))}
        return Scenario(name, prepare, ready, "run/step-30", _OLD, saves=saves, ranks=ranks, stock=stock)

    for writer in ("stock", "layerwise"):
        stock = writer == "stock"
        prepare, ready = steps(10, 20, writer=writer), _save(20, 30, writer=writer)
        yield new(f"save, {writer}", prepare, ready, stock=stock)
        yield new(f"save, {writer}, 2 ranks", prepare, ready, 2, stock)
        again = _save(10, 25, to=20, writer=writer)
        saves = {"run/step-20": Save((10,), (25,))}
        yield Scenario(f"save again, {writer}", prepare, again, "run/step-20", _OLD[:1], saves=saves, stock=stock)
        for carry in ("reference", "copy"):
            prepare, ready = steps(10, 20, writer=writer, carry=carry), _save(20, 30, writer=writer, carry=carry)
            yield new(f"save, {writer}, {carry}", prepare, ready, stock=stock)
    prepare = steps(10, 20, writer="layerwise")
    for executor in ("thread", "process"):
        for ranks in (1, 2):
            name, ready = f"save, {executor}, {ranks} rank{'s' * (ranks > 1)}", _save_in_the_background(executor)
            yield replace(new(name, prepare, ready, ranks), daemon=executor == "process")


# Commands -------------------------------------------------------------------------------------------------------


def _with_tokenizer(prepare: Prepare) -> Prepare:
    """Give the checkpoints a file that goes along with the model."""

    def extended(root: Path, rank: int, group: Any) -> None:
        prepare(root, rank, group)
        for folder in (root / "run").iterdir():
            (folder / "hf").mkdir()
            (folder / "hf" / "tokenizer.json").write_text('{"version": "1.0"}')

    return extended


def command(main: Callable[[], None], *arguments: str) -> Ready:
    """Run a command line; ``{}`` in an argument is the root."""

    def ready(root: Path, rank: int, group: Any) -> Operation:
        def operation() -> Said:
            sys.argv = ["tailor", *(argument.format(root) for argument in arguments)]
            error, code = StringIO(), 0
            with redirect_stderr(error), redirect_stdout(StringIO()):
                try:
                    main()
                except SystemExit as ended:
                    code = int(ended.code or 0)
            return Said(code, error.getvalue())

        return operation

    return ready


_tailor = partial(command, tailor_dcp.cli.main)
_PICKED = ("--base", "{}/run/step-20", "--take", "model.layers.1={}/run/step-10")
_COMPACT = ("--compact", "--threshold", "0.3")
_convert = partial(command, converters_cli.main)


def _model(root: Path, rank: int, group: Any) -> None:
    """Make a folder as Hugging Face has them, of two files."""
    (root / "hf").mkdir()
    names = [f"model.layers.{n}.weight" for n in range(4)]
    for part in (0, 1):
        held = {name: torch.full((4, 3), float(n)) for n, name in enumerate(names) if n % 2 == part}
        save_file(held, root / "hf" / f"model-0000{part + 1}-of-00002.safetensors", {"format": "pt"})
    where = ", ".join(f'"{name}": "model-0000{n % 2 + 1}-of-00002.safetensors"' for n, name in enumerate(names))
    (root / "hf" / "model.safetensors.index.json").write_text(f'{{"metadata": {{}}, "weight_map": {{{where}}}}}')


def _zero(root: Path, rank: int, group: Any) -> None:
    """Make a folder as DeepSpeed has them, of two ranks."""
    zero_samples.sample(root / "zero")


def _commands() -> Iterator[Scenario]:
    prepare = _with_tokenizer(steps(10, 20, policy="full", writer="layerwise"))
    renamed = (*_PICKED, "--rename", "model.layers.1=model.layers.2")
    averaged = ("--method", "linear", "--optimizer", "drop", "--models", "{}/run/step-10", "{}/run/step-20")
    for name, arguments in {
        "merge": _PICKED,
        "merge, renaming": renamed,
        "merge, copying": (*_PICKED, "--materialize"),
        "merge, to hf": (*_PICKED, "--to", "hf"),
        "merge, to zero3": (*_PICKED, "--to", "zero3", "--world-size", "2"),
        "merge, linear": averaged,
    }.items():
        ready = _tailor("merge", *arguments, "{}/out/merged")
        yield Scenario(name, prepare, ready, "out/merged", _OLD, makes_new=True)
    composite = _with_tokenizer(steps(10, 20, 30, writer="layerwise"))
    three = (*_OLD, "run/step-30")
    copied = _tailor("materialize", "{}/run/step-30", "{}/out/copied")
    yield Scenario("materialize", composite, copied, "out/copied", three, makes_new=True)
    yield Scenario("copy", composite, _tailor("copy", "{}/run", "{}/other/run"), "other/run", three)
    for carry in ("link", "reference"):
        five = steps(10, 20, 30, 40, 50, policy="parity:groups=3", writer="layerwise", carry=carry)
        pruned = _tailor("prune", "{}/run", "--keep-last", "2")
        yield Scenario(f"prune, {carry}", five, pruned, "run", ("run/step-40", "run/step-50"))


def _compactions() -> Iterator[Scenario]:
    """The first save has all in one file, of which the last two need a part, the last one less."""
    for carry, more in (("link", ()), ("reference", ("--idle",))):
        four = steps(10, 20, 30, 40, policy="parity:groups=4", carry=carry)
        compacted = _tailor("prune", "{}/run", "--keep-last", "2", *_COMPACT, *more)
        yield Scenario(f"prune, compacting, {carry}", four, compacted, "run", (), kept=("run/step-30", "run/step-40"))


def _conversions() -> Iterator[Scenario]:
    for name, prepare, source, to in (
        ("hf to dcp", _model, "hf", ("dcp",)),
        ("zero to dcp", _zero, "zero", ("dcp",)),
        ("zero to dcp, linked", _zero, "zero", ("dcp", "--link")),
        ("dcp to hf", steps(20, policy="full"), "run/step-20", ("hf",)),
        ("dcp to torch", steps(20, policy="full"), "run/step-20", ("torch",)),
        ("dcp to zero3", steps(20, policy="full"), "run/step-20", ("zero3", "--world-size", "2")),
    ):
        ready = _convert(f"{{}}/{source}", "{}/out", "--to", *to)
        yield Scenario(name, prepare, ready, "out", (source,), makes_new=True, linked="--link" in to)


# Rivals ---------------------------------------------------------------------------------------------------------


def _in_turn(*ready: Ready) -> Ready:
    """Let each process do something else."""
    return lambda root, rank, group: ready[rank](root, rank, group)


def _rivals() -> Iterator[Scenario]:
    for writer in ("stock", "layerwise"):
        prepare, ready = steps(10, 20, writer=writer), _save(20, 30, writer=writer)
        two = {"run/step-30": Save((10, 20), (30,)), "run/step-40": Save((10, 20), (40,))}
        one = {"run/step-30": Save((10, 20), (30, 31))}
        for name, other, held in (
            ("two saves, two folders", _save(20, 40, writer=writer), two),
            ("two saves, one folder", _save(20, 31, to=30, writer=writer), one),
        ):
            both = _in_turn(ready, other)
            yield Scenario(
                f"{name}, {writer}",
                prepare,
                both,
                "run/step-30",
                _OLD,
                saves=held,
                ranks=2,
                rivals=True,
                stock=writer == "stock",
            )
    five = steps(10, 20, 30, 40, 50, writer="layerwise")
    # Two are kept, as once the save is committed the one before it may go.
    both = _in_turn(_save(50, 60, writer="layerwise"), _tailor("prune", "{}/run", "--keep-last", "2"))
    saves = {"run/step-60": Save((10, 20, 30, 40, 50), (60,))}
    yield Scenario("save and prune", five, both, "run/step-60", ("run/step-50",), saves=saves, ranks=2, rivals=True)
    four = steps(10, 20, 30, 40, policy="parity:groups=4")
    saves = {"run/step-50": Save((10, 20, 30, 40), (50,))}
    both = _in_turn(_save(40, 50, writer="layerwise"), _tailor("prune", "{}/run", "--keep-last", "2", *_COMPACT))
    yield Scenario(
        "save and compacting prune",
        four,
        both,
        "run/step-50",
        (),
        saves=saves,
        ranks=2,
        rivals=True,
        kept=("run/step-40",),
    )
    prepare = steps(10, 20, policy="full", writer="layerwise")
    merged = _tailor("merge", *_PICKED, "{}/out/merged")
    yield Scenario("two merges", prepare, merged, "out/merged", _OLD, makes_new=True, ranks=2, rivals=True)


ALL = {scenario.name: scenario for scenario in (*_saves(), *_commands(), *_compactions(), *_conversions(), *_rivals())}
