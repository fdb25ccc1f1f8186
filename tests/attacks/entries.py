"""The product's entries: every call and command that takes a file which somebody else may have made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

import tailor_dcp
from tailor_dcp import LayerwiseLoadPlanner, LayerwisePlanner, LayerwiseReader, LayerwiseWriter, lineage
from tailor_dcp.cli import app, main
from tailor_dcp.converters import cli as convert_cli
from tailor_dcp.converters.convert import convert
from tailor_dcp.converters.options import Options
from tailor_dcp.model_states import state_of
from tests.attacks.ground import FQNS, state

Entry = Callable[[Path, Path], Any]
"""What is called with what is attacked and with a folder that does not exist yet, to write to."""

TARGETS = ("dcp", "hf", "zero3", "zero2", "zero1", "universal", "torch")
VERBS = frozenset(command.name or command.callback.__name__ for command in app.registered_commands)  # type: ignore[union-attr]


# Commands ---------------------------------------------------------------------------------


def tailor(*arguments: object) -> Callable[[Path, Path], None]:
    """Return ``tailor`` with arguments, of which CKPT, RUN and OUT stand for what they say."""
    return lambda subject, out: _command(main, "tailor", arguments, subject, out)


def tailor_convert(to: str, *options: str) -> Callable[[Path, Path], None]:
    """Return ``tailor-convert`` to a format."""
    arguments = ("CKPT", "OUT", "--to", to, *options)
    return lambda subject, out: _command(convert_cli.main, "tailor-convert", arguments, subject, out)


def _command(call: Callable[[], None], name: str, arguments: tuple[object, ...], subject: Path, out: Path) -> None:
    places = {"CKPT": subject, "RUN": subject.parent, "OUT": out, "HTML": out.with_suffix(".html")}
    sys.argv = [name, *(str(places.get(str(argument), argument)) for argument in arguments)]
    call()


# DCP checkpoints --------------------------------------------------------------------------


def _open_checkpoint(subject: Path, out: Path) -> None:
    checkpoint = tailor_dcp.open_checkpoint(subject)
    assert checkpoint.layers is not None
    repr(checkpoint)
    problems = [problem for key in checkpoint if (problem := _refused(lambda key=key: checkpoint[key])) is not None]
    if problems:
        raise problems[0]


def _refused(call: Callable[[], Any]) -> Exception | None:
    """Return how a call was refused; whatever else it raises is raised."""
    try:
        call()
    except tailor_dcp.TailorError as error:
        return error
    return None


def _load(subject: Path, planner: bool = False, **options: Any) -> None:
    """Load what the honest checkpoint would have; a load that fails must leave the tensors as they are."""
    target = state(None)
    chosen = LayerwiseLoadPlanner(subject) if planner else None
    try:
        dcp.load(target, storage_reader=LayerwiseReader(subject, **options), planner=chosen)
    except BaseException:
        tensors = [*target["model"].values(), *(t for held in target["optim"]["state"].values() for t in held.values())]
        if options.get("atomic") and not torch.equal(torch.stack(tensors).sum(), torch.tensor(72.0)):
            raise AssertionError("a load that failed has changed tensors") from None
        raise


def _save_on_top(subject: Path, out: Path) -> None:
    """Carry from it: the first unit of every kind is due, all else comes from the attacked checkpoint."""
    planner = LayerwisePlanner("parity", base=subject)
    target = subject.parent / f"step-{300 + len(list(subject.parent.iterdir()))}"
    dcp.save(state(300), storage_writer=LayerwiseWriter(str(target)), planner=planner)


def _save_again(subject: Path, out: Path) -> None:
    """Save into its own folder: what is carried is put into it, and what an earlier save has left is swept away."""
    planner = LayerwisePlanner("parity", base=subject.parent / "step-100")
    dcp.save(state(200), storage_writer=LayerwiseWriter(str(subject)), planner=planner)


def _save_copying(subject: Path, out: Path) -> None:
    """The same, with copies for links."""
    planner = LayerwisePlanner("parity", base=subject.parent / "step-100", carry="copy")
    dcp.save(state(200), storage_writer=LayerwiseWriter(str(subject)), planner=planner)


def _resume(subject: Path, out: Path) -> None:
    lineage.forget()
    tailor_dcp.latest(subject.parent)


def _convert(to: str, **options: Any) -> Entry:
    return lambda subject, out: convert(subject, out, to, options=Options(**options))


_CONVERSIONS: Mapping[str, Entry] = {
    **{f"convert to {to}": _convert(to) for to in TARGETS},
    "tailor-convert --to hf": tailor_convert("hf"),
    "tailor-convert --dry-run": tailor_convert("dcp", "--dry-run"),
}
_ANY: Mapping[str, Entry] = {
    **_CONVERSIONS,
    "convert --link": _convert("dcp", link=True),
    "diff": lambda subject, out: tailor_dcp.diff(subject, subject),
    "state_of": lambda subject, out: state_of(subject),
    "merge --to hf": lambda subject, out: tailor_dcp.merge({"base": str(subject)}, out, to="hf"),
    "tailor diff": tailor("diff", "CKPT", "CKPT"),
    "tailor merge --to dcp": tailor("merge", "--base", "CKPT", "OUT"),
}
_DCP: Mapping[str, Entry] = {
    "inspect": lambda subject, out: tailor_dcp.inspect(subject),
    "open_checkpoint": _open_checkpoint,
    "reader": lambda subject, out: _load(subject),
    "reader, verify": lambda subject, out: _load(subject, verify=True),
    "reader, atomic": lambda subject, out: _load(subject, atomic=True),
    "load planner and reader": lambda subject, out: _load(subject, planner=True, atomic=True),
    "latest": _resume,
    "materialize": tailor_dcp.materialize,
    "copy": lambda subject, out: tailor_dcp.copy(subject.parent, out),
    "merge": lambda subject, out: tailor_dcp.merge({"base": str(subject)}, out),
    "report": lambda subject, out: tailor_dcp.report(subject.parent, out.with_suffix(".html")),
    "report, drift": lambda subject, out: tailor_dcp.report(subject.parent, drift=True),
    **_ANY,
    "tailor inspect": tailor("inspect", "CKPT"),
    "tailor inspect --json": tailor("inspect", "CKPT", "--json"),
    "tailor materialize": tailor("materialize", "CKPT", "OUT"),
    "tailor copy": tailor("copy", "RUN", "OUT"),
    "tailor report": tailor("report", "RUN", "-o", "HTML"),
    "tailor prune --dry-run": tailor("prune", "RUN", "--keep-last", 1, "--dry-run"),
    **(
        {"tailor verify": tailor("verify", "CKPT"), "tailor verify RUN": tailor("verify", "RUN")}
        if "verify" in VERBS
        else {}
    ),
    "save on top": _save_on_top,
    "save again": _save_again,
    "save again, copying": _save_copying,
    "prune": lambda subject, out: tailor_dcp.prune(subject.parent, keep_last=1),
}


# Everything else --------------------------------------------------------------------------


def _models(subject: Path, out: Path) -> None:
    tailor_dcp.merge(
        {"merge_method": "linear", "models": [{"model": str(subject), "parameters": {"weight": 0.5}}] * 2}, out, to="hf"
    )


_RECIPE: Mapping[str, Entry] = {
    "merge": tailor_dcp.merge,
    "merge --to hf": lambda subject, out: tailor_dcp.merge(subject, out, to="hf"),
    "tailor merge": tailor("merge", "CKPT", "OUT"),
    "tailor merge --to zero3": tailor("merge", "CKPT", "OUT", "--to", "zero3"),
}


def _flags(subject: Path, out: Path) -> None:
    tailor("merge", "--flags", "CKPT", "--at", 200, subject.parent / "run", "OUT")(subject, out)


def _simulate(subject: Path, out: Path) -> None:
    tailor("simulate", "--model", "CKPT", "--policy", "parity", "--steps", 300)(subject, out)


def _keep_best(subject: Path, out: Path) -> None:
    tailor("prune", subject.parent / "run", "--keep-best", 1, "--metrics", "CKPT")(subject, out)


ENTRIES: Mapping[str, Mapping[str, Entry]] = {
    "dcp": _DCP,
    "folder": _ANY,
    "model": {**_ANY, "merge by linear": _models},
    "recipe": _RECIPE,
    "flags": {"tailor merge --flags": _flags},
    "config": {"tailor simulate": _simulate, "state_of": lambda subject, out: state_of(subject)},
    "metrics": {"tailor prune --keep-best": _keep_best},
}
"""By kind of file: what takes it."""

CHANGING = frozenset({"prune", "save on top", "save again", "save again, copying", "tailor prune --keep-best"})
"""Those that may change what they are given."""

LOOKING_BEHIND_LINKS = frozenset(
    {"save again", "save again, copying", "prune", "tailor prune --dry-run", "tailor prune --keep-best"}
    | {"tailor verify RUN"}
)
"""Those that list the folders which a run's links lead to: a checkpoint there may need the run's files."""

assert len(FQNS) == 4
