"""Choosing: which folders of a run stay, and why. What a save under way may need stays whatever the rules say."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tailor_dcp.census import Checkpoint, Entry, needed
from tailor_dcp.leftovers import QUIET
from tailor_dcp.location import METADATA, locate
from tailor_dcp.permissions import can_restore
from tailor_dcp.retention import Candidate, Rule, kept_by
from tailor_dcp.runs import Commit, in_order

Why = dict[Path, list[str]]


@dataclass(frozen=True)
class Choice:
    """What becomes of the folders of a run.

    Attributes:
        kept: why each one stays.
        gone: why each of the others goes. A folder that is in neither is none of a run's business.
        busy: folders that a save may be writing.
        sources: folders that a save under way may be carrying from; always kept.
        leftovers: files that earlier saves have left in folders that stay.
    """

    kept: Why
    gone: Why
    busy: frozenset[Path]
    sources: frozenset[Path]
    leftovers: Mapping[Path, list[Path]]


def choose(
    entries: list[Entry],
    rules: Sequence[Rule],
    incomplete: bool,
    links: Mapping[str, list[str]],
    others: Iterable[Checkpoint] = (),
) -> Choice:
    """Say of each folder why it is kept, or why it is not.

    Args:
        entries: the folders; at least one of a step is committed.
        rules: what any of them keeps stays.
        incomplete: whether what was not committed and is older than the newest checkpoint goes.
        links: the symbolic links of the run, by what they lead to.
        others: checkpoints that stay in any case and are none of the run's, such as one that is being merged.
    """
    run = _Run(entries, list(others))
    kept: defaultdict[Path, list[str]] = defaultdict(list)
    candidates = [Candidate(e.name, e.step, e.commit.time) for e in run.whole if e.step is not None]
    by_name = {entry.name: entry for entry in run.whole}
    for name, why in kept_by(rules, candidates).items():
        kept[by_name[name].folder] += why
    sources = _for_saves(kept, run)
    for entry in entries:
        for leads in _leading(links, entry.folder):
            kept[entry.folder].append(leads)
        if entry.step is None and entry.checkpoints:
            is_run = locate(entry.folder).step is not None
            kept[entry.folder].append("a run of its own" if is_run else "no step in its name")
    gone = _gone(kept, run, incomplete)
    for entry in entries:
        if entry.folder in gone and entry.folder not in kept and entry.read_only:
            kept[entry.folder].append(f"{'; '.join(gone[entry.folder])}, but {entry.read_only}")
    gone = {folder: why for folder, why in gone.items() if folder not in kept}
    busy = frozenset(entry.folder for entry in run.busy)
    return Choice(dict(kept), gone, busy, sources, run.leftovers(set(kept), gone))


def _leading(links: Mapping[str, list[str]], folder: Path) -> Iterator[str]:
    real = os.path.realpath(folder)
    for target, names in links.items():
        if target == real or target.startswith(f"{real}{os.sep}"):
            yield from (f"{name} leads {'to it' if target == real else 'to something in it'}" for name in names)


class _Run:
    """The folders of a run, told apart."""

    def __init__(self, entries: list[Entry], others: list[Checkpoint]) -> None:
        self.entries, self._others = entries, others
        checkpoints = [*others, *(c for entry in entries for c in (*entry.checkpoints, *entry.stripped))]
        self._named = needed(checkpoints)
        self._save_ids = frozenset().union(*(c.save_ids for c in checkpoints))
        self.loose = {entry.folder: self._unexplained(entry) for entry in entries}
        self.committed = [e for e in entries if e.checkpoints and e.step is not None]
        self.newest = _past(max(c.changed for e in self.committed for c in e.checkpoints))
        steps = [e for e in entries if e.step is not None]
        self.broken = [e for e in steps if _unfinished(e, self.loose[e.folder])]
        unsettled = [e for e in steps if e in self.broken or self.loose[e.folder] or e.relinked]
        self.busy = [e for e in unsettled if e.touched(self.loose[e.folder]) >= self.newest]
        self.halves = [e for e in entries if e not in self.broken and e.half_withdrawn]
        whole = {e.folder: e for e in self.committed if e not in self.broken and e not in self.halves}
        self.whole = [whole[commit.folder] for commit in in_order(e.commit for e in whole.values())]

    def _unexplained(self, entry: Entry) -> list[Path]:
        loose = entry.loose(self._named)
        left = set(entry.leftovers(loose, frozenset(), self._save_ids))
        return [path for path in loose if path not in left]

    def leftovers(self, kept: set[Path], gone: Mapping[Path, list[str]]) -> dict[Path, list[Path]]:
        """Return what lies in folders that stay, needed by nothing that stays and by no save under way."""
        if self.busy:  # it may refer to what was named when it began, and is not any more
            return {}
        staying = (c for entry in self.entries if entry.folder not in gone for c in entry.checkpoints)
        in_use = needed((*self._others, *staying))
        found = {}
        for entry in self.entries:
            if entry.folder in kept and entry.checkpoints and entry not in self.broken:
                left = entry.leftovers(entry.loose(in_use), self._named, self._save_ids)
                left = [path for path in left if can_restore(path.parent)]
                if left:
                    found[entry.folder] = left
        return found


def _past(newest: float) -> float:
    """Return the time since when what is written may be a save's that is under way.

    Where clocks were put back that is not since the newest commit, which then lies in the future.
    """
    now = time.time()
    return newest if newest <= now else now - QUIET


def _unfinished(entry: Entry, loose: list[Path]) -> bool:
    if entry.doomed or any(path.name.endswith(METADATA) and path.name != METADATA for path in entry.files):
        return False  # saved without collectives: every rank has a metadata file of its own
    return entry.unfinished(loose)


def _for_saves(kept: Why, run: _Run) -> frozenset[Path]:
    """Keep what a save under way carries from, or writes into; return the former."""
    series: defaultdict[Path, list[Commit]] = defaultdict(list)
    for entry in run.committed:
        for c in entry.checkpoints:
            series[c.folder.relative_to(entry.folder)].append(Commit(entry.folder, entry.step or 0, c.time, c.told))
    newest: dict[Path, str] = {}
    for saved in series.values():
        newest = {**_newest(saved), **newest}
    for folder, which in newest.items():
        kept[folder].append(f"{which}: a save may be carrying from it")
    sources = set(newest)
    for entry in run.busy:
        if entry in run.whole:
            kept[entry.folder].append("a save may be writing into it again")
        # A run that went back carries from what lies before the new save, which need not be the newest.
        base = max(_before(run.whole, entry), key=lambda e: e.step or 0, default=None)
        if base is not None:
            kept[base.folder].append(f"the save into {entry.name} may be carrying from it")
            sources.add(base.folder)
    return frozenset(sources)


def _newest(saved: list[Commit]) -> dict[Path, str]:
    """Return the folders of one series of which each may be the newest, and which it is."""
    last = {in_order(saved)[-1].folder: "the newest"}
    if all(one.told for one in saved):
        return last
    youngest, highest = max(saved, key=lambda one: one.time), max(saved, key=lambda one: one.step)
    unsure = {youngest.folder: "the one with the youngest file", highest.folder: "the one of the highest step"}
    return {**unsure, **last}


def _before(whole: Iterable[Entry], entry: Entry) -> list[Entry]:
    return [e for e in whole if (e.step or 0) < (entry.step or 0)]


def _gone(kept: Why, run: _Run, incomplete: bool) -> Why:
    """Return why folders go that nothing keeps; add to ``kept`` those that only a request removes."""
    gone: Why = {}
    for entry in run.broken:
        if entry in run.busy:
            kept[entry.folder].append("not committed: a save may be writing it")
        elif incomplete:
            gone[entry.folder] = ["not committed, and older than the newest checkpoint"]
        else:
            kept[entry.folder].append("not committed, and older than the newest checkpoint: --incomplete removes it")
    for entry in run.entries:
        if entry.doomed or entry in run.halves:
            gone[entry.folder] = ["an earlier prune was cut off in it"]
        elif entry.stripped and not entry.checkpoints and entry not in run.broken:
            gone[entry.folder] = ["no checkpoint any more since an earlier prune"]
    for entry in run.whole:
        gone[entry.folder] = ["no rule keeps it"]
    return gone
