"""The check of a run: one checkpoint after another, what they share once, and what only shows among several."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from tailor_dcp.amounts import counted
from tailor_dcp.base import Base, base_of, open_base
from tailor_dcp.errors import NewerFormatError, NoCheckpointError, UnreadableMetadataError
from tailor_dcp.location import METADATA, locate
from tailor_dcp.metadata.safe_pickle import content, loads
from tailor_dcp.stores import is_remote
from tailor_dcp.units import Unit
from tailor_dcp.verifying.blob_checks import Seen, Want
from tailor_dcp.verifying.blob_reading import check_blobs
from tailor_dcp.verifying.checkpoint_check import CheckpointCheck, FileId, Part, Place
from tailor_dcp.verifying.copies import Copies, Odd
from tailor_dcp.verifying.failures import is_lost
from tailor_dcp.verifying.findings import Finding, State, Verdict, worst
from tailor_dcp.verifying.kept import Kept, kept, oddities
from tailor_dcp.verifying.outcomes import Outcomes
from tailor_dcp.verifying.structure import Problem, authenticity, structure

Progress = Callable[[int, int], None]


class RunCheck:
    """Checks checkpoints, and remembers what was read of which file.

    Args:
        root: what checkpoints are named by their paths in; a checkpoint itself, or a run.
        threads: that read.
        progress: is told how many of how many bytes are done.
    """

    def __init__(self, root: Path, threads: int, progress: Progress | None) -> None:
        self._root, self._threads, self._progress = root, threads, progress
        self._lock = threading.Lock()
        self._unplanned: dict[FileId, int] = {}
        self._total = 0
        self._outcomes = Outcomes()
        self._sizes: dict[FileId, int] = {}
        self._copies = Copies()
        self._kept: list[Kept] = []
        self.findings: list[Finding] = []
        self.done = 0

    @property
    def files(self) -> int:
        """The files that were read, each once."""
        return len(self._sizes)

    @property
    def blobs(self) -> int:
        """The stretches of them that were checked."""
        return self._outcomes.count()

    def announce(self, folders: Iterable[Path]) -> None:
        """Tell which files may have to be read, so that progress knows how much there is to do."""
        for folder in folders:
            for place, _, names in os.walk(folder) if not is_remote(folder) else ():
                for name in names:
                    if name != METADATA:
                        with suppress(OSError):  # removed since it was listed
                            status = os.lstat(os.path.join(place, name))  # noqa: PTH118 - many of them
                            self._unplanned[status.st_dev, status.st_ino] = status.st_size
        self._total = sum(self._unplanned.values())

    # One checkpoint -------------------------------------------------------------------------

    def check(self, folder: Path, units: Collection[Unit] | None = None) -> None:
        """Check one checkpoint.

        Args:
            folder: its folder.
            units: look at nothing but these, and at its metadata; None for everything.
        """
        path = folder / METADATA
        try:
            now = content(path)
            while True:  # what was compacted or saved again while it was read is not damaged
                data = now
                check, places = self._checked(folder, data, units)
                now = content(path) if check.is_doubtful else data
                if now == data:
                    break
        except NoCheckpointError:  # pruned since it was listed
            return
        except UnreadableMetadataError as error:
            self._unreadable(folder, error)
            return
        self._copies.note(check.base, places)
        self._keep(check, path)

    def _checked(
        self, folder: Path, data: bytes, units: Collection[Unit] | None
    ) -> tuple[CheckpointCheck, dict[str, Place]]:
        self._outcomes.settle()
        metadata = loads(data, str(folder / METADATA))
        own = list(authenticity(metadata, data))
        base = _base_of(metadata, folder, own)
        check = CheckpointCheck(base, self._named(folder), units)
        for problem in (*own, *structure(base)):
            check.problem(problem)
        places = check.places()
        self._blobs(check, places, check.linked(places))
        return check, places

    def _named(self, folder: Path) -> str:
        """Return what a checkpoint is called: not by its own run alone, since there may be several."""
        return locate(folder).name if folder == self._root else folder.relative_to(self._root).as_posix()

    def unlisted(self, folder: Path, why: str) -> None:
        """Note a folder in which there may be checkpoints."""
        what = f"{folder} {why}; nothing is said about what is in it."
        self.findings.append(Finding(self._named(folder), "unverifiable", what, undecided=True))

    def _unreadable(self, folder: Path, error: UnreadableMetadataError) -> None:
        here, name = locate(folder), self._named(folder)
        if _is_untold(error, folder / METADATA):
            what = f"{error} Nothing is said about this checkpoint."
            self.findings.append(Finding(name, "unverifiable", what, METADATA, undecided=True))
        else:
            self.findings.append(Finding(name, "damaged", str(error), METADATA))
        verdict = Verdict(name, str(here.folder), here.step, "", _changed(folder / METADATA), "good", 0, 0, 0, 0)
        self._kept.append(Kept(verdict))

    def _blobs(
        self, check: CheckpointCheck, places: Mapping[str, Place], linked: Sequence[tuple[Part, tuple[Want, ...]]]
    ) -> None:
        needs = [(part, (part.want,)) for part in check.parts if part.want is not None and _is_there(part, places)]
        every: list[tuple[Part, tuple[Want, ...]]] = [*needs, *linked]
        self._read(every, places)
        untold: dict[str, list[Part]] = {}
        files: dict[tuple[str, Seen], list[Part]] = {}
        for part, wants in every:
            seen = self._outcomes.of(places[part.info.relative_path].id)
            found = next((seen[want] for want in wants if seen[want].outcome != "good"), None)
            if found is None:
                continue
            if found.outcome == "damaged":
                check.blob(part, found.why)
            elif found.outcome == "untold":
                untold.setdefault(found.why, []).append(part)
            else:
                files.setdefault((part.info.relative_path, found), []).append(part)
        for (name, found), lot in files.items():
            if found.outcome == "gone":
                check.lot(lot, "damaged", f"{name} is missing, or is no file.", name)
            else:
                check.unread(lot, name, found.why)
        for why, lot in untold.items():
            names = sorted({part.info.relative_path for part in lot})
            what = f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
            each = "it" if len(lot) == 1 else "each"
            check.lot(lot, "unverifiable", f"{counted(len(lot), 'blob')} in {what}: {each} {why}.", names[0])

    def _read(self, needs: Iterable[tuple[Part, tuple[Want, ...]]], places: Mapping[str, Place]) -> None:
        """Check what no other checkpoint has needed yet."""
        missing: dict[Path, dict[Want, None]] = {}
        for part, wants in needs:
            place = places[part.info.relative_path]
            self._total -= self._unplanned.pop(place.id, 0)
            self._sizes[place.id] = place.size
            seen = self._outcomes.of(place.id)
            for want in wants:
                if want not in seen:
                    missing.setdefault(place.path, {})[want] = None
        ids = {place.path: place.id for place in places.values()}
        lots = {path: list(lot) for path, lot in missing.items()}
        self._total += sum(want.length for lot in lots.values() for want in lot)
        for path, seen in check_blobs(lots, self._threads, self._advance).items():
            self._outcomes.note(ids[path], seen)

    def _advance(self, count: int) -> None:
        with self._lock:
            self.done += count
            if self._progress:
                self._progress(self.done, max(self.done, self._total))

    def _keep(self, check: CheckpointCheck, path: Path) -> None:
        base, record = check.base, check.base.record
        stretches = {(part.info.relative_path, part.info.offset): part.info.length for part in check.parts}
        verdict = Verdict(
            name=check.name,
            path=str(base.location.folder),
            step=base.origin.step,
            save_id=base.save_id,
            time=record.time if record else _changed(path),
            state="good",
            files=len({name for name, _ in stretches}),
            blobs=len(stretches),
            bytes=sum(stretches.values()),
            unverifiable_bytes=check.unverifiable_bytes,
        )
        self.findings += check.findings
        self._kept.append(kept(base, verdict))

    # Among several --------------------------------------------------------------------------

    def verdicts(self) -> list[Verdict]:
        """Return the verdict on each checkpoint, in the order of saving."""
        states: dict[str, list[State]] = {}
        for finding in self.findings:
            states.setdefault(finding.checkpoint, []).append(finding.state)
        ordered = sorted((one.verdict for one in self._kept), key=lambda verdict: verdict.time)
        return [replace(verdict, state=worst(states.get(verdict.name, []))) for verdict in ordered]

    def compare_copies(self) -> None:
        """Note files that are not what other copies of them are.

        What torch alone wrote has checksums of its own, which also a file has that does not belong there.
        """
        names = {one.verdict.path: one.verdict.name for one in self._kept}
        by_folder: dict[Path, list[Odd]] = {}
        for odd in self._copies.odd(self._outcomes):
            by_folder.setdefault(odd.folder, []).append(odd)
        for folder, odds in by_folder.items():
            with suppress(NoCheckpointError):  # pruned since it was read
                check = CheckpointCheck(open_base(folder), names[str(folder)])
                _note_odd(check, odds)
                self.findings += check.findings

    def notes(self) -> Iterator[str]:
        """Yield what is right, but not as it was made."""
        yield from self._copies.lost_links()
        yield from oddities(self._kept)


def _base_of(metadata: Metadata, folder: Path, problems: Sequence[Problem]) -> Base:
    """Return a checkpoint; a format that was damaged, and now seems to be a newer one, is told from a newer one."""
    try:
        return base_of(metadata, folder)
    except NewerFormatError as error:
        wrong = next((problem.what for problem in problems if problem.state == "damaged"), None)
        if wrong is None:
            raise
        raise UnreadableMetadataError(f"{error} {wrong}") from error


def _is_untold(error: UnreadableMetadataError, path: Path) -> bool:
    """Tell whether what cannot be read need not be damaged."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return not is_lost(cause, path)
    return isinstance(error, NewerFormatError) or isinstance(cause, MemoryError)


def _note_odd(check: CheckpointCheck, odds: Sequence[Odd]) -> None:
    parts: dict[str, list[Part]] = {}
    for part in check.parts:
        parts.setdefault(part.info.relative_path, []).append(part)
    for odd in odds:
        lot = [one for one in parts.get(odd.name, ()) if (one.info.offset, one.info.length) in odd.stretches]
        if odd.decided:
            what = f"{odd.name} is not what other copies of that file are: it was put in the place of it."
            check.lot(lot, "damaged", what, odd.name)
        else:
            what = (
                f"{odd.name} is not what other copies of that file are: it, or they, were put in the place of it, and "
                f"nothing tells which."
            )
            check.lot(lot, "unverifiable", what, odd.name, undecided=True)


def _is_there(part: Part, places: Mapping[str, Place]) -> bool:
    place = places.get(part.info.relative_path)
    return place is not None and part.info.offset + part.info.length <= place.size


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed meanwhile
        return 0.0
