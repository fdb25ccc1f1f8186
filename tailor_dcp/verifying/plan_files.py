"""Plan files: where repair plans are written, and those that an earlier verification has left there.

A plan that outlives the damage that it was made for would undo, by the next merge, what was saved since. So an earlier
one goes before anything is verified.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from tailor_dcp.errors import TailorError
from tailor_dcp.location import locate
from tailor_dcp.verifying.repair import HEAD, RepairPlan
from tailor_dcp.visible import visible


def check_target(file: Path) -> None:
    """Refuse to write plans where they cannot be written, or where something else is.

    Raises:
        TailorError: saying which.
    """
    if not file.absolute().parent.is_dir():
        raise TailorError(f"{file.parent} is no folder; make it first.")
    if file.is_dir():
        raise TailorError(f"{file} is a folder; name a file in it.")
    if file.is_file() and file.stat().st_size and _head(file) is None:
        raise TailorError(f"{file} is there and is no repair plan, so it is not overwritten; name another file.")


def remove_earlier(file: Path, verified: Path) -> list[Path]:
    """Remove the plans that an earlier verification wrote.

    Args:
        file: where plans are to be written now; whatever plan it is goes.
        verified: the checkpoint or run. Of the files for several checkpoints those go that are for some of it.

    Returns:
        What was removed.
    """
    root = visible(str(locate(verified).folder), lines=False)
    gone = [file] if _head(file) is not None else []
    for other in sorted(file.parent.glob(f"{glob.escape(file.stem)}.*{glob.escape(file.suffix)}")):
        head = _head(other)
        if head is not None and (head == root or head.startswith(f"{root.rstrip('/')}/")):
            gone.append(other)
    for path in gone:
        path.unlink(missing_ok=True)
    return gone


def write(plans: Sequence[RepairPlan], file: Path) -> list[Path | None]:
    """Write each plan that has a recipe: to the file that was asked for, or to one for each checkpoint.

    Returns:
        Where each plan is; None for one without a recipe.
    """
    several = len(plans) > 1
    places = [file.with_name(f"{file.stem}.{_quoted(made.checkpoint)}{file.suffix}") for made in plans]
    return list(_written(plans, places if several else [file] * len(plans)))


def _written(plans: Sequence[RepairPlan], places: Sequence[Path]) -> Iterator[Path | None]:
    for made, place in zip(plans, places, strict=True):
        if made.recipe is not None:
            place.write_text(made.yaml(), encoding="utf-8")
        yield None if made.recipe is None else place


def _quoted(name: str) -> str:
    """Return a checkpoint's name, which may have folders, as one that no other checkpoint's becomes."""
    return name.replace("%", "%25").replace("/", "%2F")


def _head(file: Path) -> str | None:
    """Return the path of the checkpoint that a file is a plan for; None if it is no plan of ours."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        line = stream.readline(1 << 16).decode("utf-8", "replace").rstrip("\n")
    return line.removeprefix(HEAD) if line.startswith(HEAD) else None
