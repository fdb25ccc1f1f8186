"""What is kept of each checkpoint once it was checked, and what shows when several of them are put side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from tailor_dcp.base import Base
from tailor_dcp.location import real
from tailor_dcp.verifying.findings import Verdict


@dataclass(frozen=True)
class Kept:
    """What is kept of a checkpoint.

    Attributes:
        verdict: the verdict, before its findings are counted.
        saved_as: what its folder was called when it was saved, where that is not what it is called now.
        origins: folder and save of whatever it carries from.
    """

    verdict: Verdict
    saved_as: str = ""
    origins: frozenset[tuple[str, str]] = frozenset()


def kept(base: Base, verdict: Verdict) -> Kept:
    """Return what is kept of a checkpoint whose metadata can be read."""
    record, meta = base.record, base.metadata.storage_meta
    origins = [held.origin for held in record.units.values()] if record else []
    if record is not None and record.parent is not None:
        origins.append(record.parent)
    saved_as = PurePosixPath(str(meta.checkpoint_id or "")).name if meta else ""
    above = verdict.name.removesuffix(base.location.name)  # of its run, where that is one of several
    named = frozenset((above + one.folder, one.save_id) for one in origins)
    now = {PurePosixPath(verdict.name).name, real(base.location.folder).name}  # a link is no other name of its own
    return Kept(verdict, "" if saved_as in now else saved_as, named)


def oddities(checkpoints: Sequence[Kept]) -> Iterator[str]:
    """Yield what is odd about the folders of several checkpoints, though nothing in them need be damaged."""
    saves = {one.verdict.name: one.verdict.save_id for one in checkpoints}
    same = Counter(save_id for save_id in saves.values() if save_id)
    for save_id in (save_id for save_id, count in same.items() if count > 1):
        names = sorted(name for name, own in saves.items() if own == save_id)
        yield f"{', '.join(names)} have the metadata of one save: all but one are copies of it."
    for one in checkpoints:
        name = one.verdict.name
        if one.saved_as:
            yield f"{name} was saved as {one.saved_as}: it was renamed or copied, or its .metadata is another's."
        for folder, save_id in sorted(one.origins):
            other = saves.get(folder)  # none of what could not be read
            if folder != name and other and other != save_id:
                yield f"{folder} was saved again since {name} carried from it; {name} keeps what it carried."
