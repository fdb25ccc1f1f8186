"""One run that is saved, killed, resumed and pruned at random, and what it must have become."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import soak_world
from benchmarks.soak_world import DEFAULT
from tailor_dcp import prune, verify
from tests.support.fleet import Fleet
from tests.support.forks import killed_at

POLICIES = (
    DEFAULT,
    DEFAULT,
    "full",
    "parity",
    "parity:groups=3",
    "filter:head=1,tail=1,every=3",
    "moments:every=3",
    "drift:threshold=0.02,max_stale=4",
    "budget:fraction=0.4,max_stale=4",
    "unchanged+parity",
    "unchanged+full",
    "parity|filter:head=1,tail=0,every=4",
)
_FRESH = {"full": ("weight", "exp_avg", "exp_avg_sq"), DEFAULT: ("weight",), "moments:every=3": ("weight",)}
"""The kinds that a policy writes in every save."""
_RANKS = 3


class Past(NamedTuple):
    """A moment, and those before it."""

    moment: int
    earlier: Past | None

    def has(self, moment: int) -> bool:
        """Tell whether a moment is among them."""
        past: Past | None = self
        while past is not None and past.moment > moment:
            past = past.earlier
        return past is not None and past.moment == moment


@dataclass
class Held:
    """A checkpoint as the soak remembers it.

    Attributes:
        step: of its folder's name.
        moment: when it was saved.
        save_id: of its save.
        past: the moments of the saves that it descends from, its own first.
        origins: for each key of a unit the moment of its value.
        narrow: the keys whose values are rounded to bfloat16; None until somebody has looked.
    """

    step: int
    moment: int
    save_id: str
    past: Past
    origins: dict[str, int] = field(default_factory=dict)
    narrow: set[str] | None = None


class Soak:
    """One run, what it must have become, and a process for each rank.

    Args:
        run: the run's folder; must not exist.
        seed: what decides all that happens.
        stock: processes that know torch alone, to look at checkpoints; two at least.
    """

    def __init__(self, run: Path, seed: int, stock: Fleet) -> None:
        self.run, self._draw = run, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.sizes: Counter[int] = Counter()
        self.held: dict[str, Held] = {}
        self.lost: list[str] = []
        self.uses: list[tuple[int, int, int]] = []
        self._moments: dict[str, int] = {}  # of each save, by its id
        self._current: Held | None = None
        self._clock = self._step = 0
        self._fleet: Fleet | None = None
        self._stock = stock

    def live(self, saves: int, report: Callable[[int], None] = lambda _: None) -> None:
        """Go on until there were so many saves."""
        acts = (self._go_on, self._together, self._killed, self._prune, self._go_back)
        coming = list(acts)  # each of them once, then any
        self._save_alone()
        while self.counts["saves"] < saves:
            act = coming.pop(0) if coming else self._draw.choices(acts, (8, 1.2, 3, 4, 2))[0]
            act()
            memory, files = soak_world.use(None)
            self.uses.append((self.counts["saves"], memory, files))
            report(self.counts["saves"])

    def close(self) -> None:
        """End the processes that save."""
        if self._fleet:
            self._fleet.close()

    # Saving -------------------------------------------------------------------------------

    def _go_on(self) -> None:
        for _ in range(self._draw.randint(1, 6)):
            self._save_alone()

    def _save_alone(self) -> None:
        path, how = self._next()
        soak_world.save(None, *how)
        self._committed(path, how, ranks=1)

    def _together(self) -> None:
        """Resume on some ranks, save there, and come back; now and then a rank is killed, and all with it."""
        ranks = self._draw.randint(1, _RANKS)
        current = self._resumable()
        fleet = self._ranks()
        how_to_load = self._draw.choice(("load", "load_atomically"))
        for loaded in fleet.call(f"benchmarks.soak_world:{how_to_load}", str(self._path(current)), ranks=ranks):
            self._check(current, loaded)
        self._current = current
        self.counts["resumes"] += 1
        for _ in range(self._draw.randint(1, 4)):
            path, how = self._next()
            if self._draw.random() < 0.06:
                self._kill_a_rank(fleet, ranks, path, how)
                break
            fleet.call("benchmarks.soak_world:save", *how, ranks=ranks)
            self._committed(path, how, ranks)
        self._load(self._resumable())

    def _kill_a_rank(self, fleet: Fleet, ranks: int, path: Path, how: tuple[Any, ...]) -> None:
        victim, nth = self._draw.randrange(ranks), self._draw.randint(1, 12)
        how = self._safe_to_kill(path, how)
        before, function = self._save_id(path), "benchmarks.soak_world:save_and_die"
        if fleet.lose(victim, function, victim, nth, str(self.run), *how, ranks=ranks):
            self.counts["ranks killed"] += 1
        fleet.close()  # those that are left would wait for ever
        self._fleet = None
        self._settled(path, how, before, ranks)

    def _killed(self) -> None:
        """Let a child be killed while it saves; this process goes on as if it had not been."""
        for _ in range(self._draw.randint(1, 3)):
            path, how = self._next()
            how = (*self._safe_to_kill(path, how)[:-1], "now")
            before, current = self._save_id(path), self._current
            killed = killed_at(self._draw.randint(1, 24), self.run, partial(soak_world.save, None, *how))
            self.counts["saves killed"] += killed
            self._settled(path, how, before, 1)
            self._current = current  # what the child saved is no ancestor of what this process saves

    def _safe_to_kill(self, path: Path, how: tuple[Any, ...]) -> tuple[Any, ...]:
        """Torch's own writer deletes the old ``.metadata`` before it commits: the one known exception."""
        moment, to, policy, carry, writer, way = how
        return moment, to, policy, carry, "layerwise" if path.name in self.held else writer, way

    def _settled(self, path: Path, how: tuple[Any, ...], before: str | None, ranks: int) -> None:
        """Take in what became of a save that was to be killed: all of it, or nothing."""
        after = self._save_id(path)
        if after != before:
            if after is None:
                self.lost.append(f"{path.name} is gone after a save into it was killed")
                self.held.pop(path.name, None)
            else:
                self._committed(path, how, ranks)

    def _next(self) -> tuple[Path, tuple[Any, ...]]:
        """Return the next folder, and how to save into it."""
        self._clock += 1
        self._step += 10
        path = self.run / f"step-{self._step}"
        policy, carry = self._draw.choice(POLICIES), self._draw.choice(("link", "link", "auto", "reference", "copy"))
        writer = self._draw.choice(("layerwise", "layerwise", "stock"))
        way = self._draw.choice(("now", "now", "thread", "staged"))
        return path, (self._clock, str(path), policy, carry, writer, way)

    # Remembering --------------------------------------------------------------------------

    def _committed(self, path: Path, how: tuple[Any, ...], ranks: int) -> None:
        """Look at a new checkpoint with torch alone, hold it to the laws, and remember it."""
        moment, _, policy, *_ = how
        self.counts["saves"] += 1
        self.sizes[ranks] += 1
        told = soak_world.record(str(path))
        self._moments[told["save_id"]] = moment
        past = Past(moment, self._current.past if self._current else None)
        new = Held(int(path.name.partition("-")[2]), moment, told["save_id"], past)
        for kinds in told["units"].values():
            for kind, (number, keys) in kinds.items():
                self._take(new, kind, keys, self._moments.get(told["origins"][number][0]), policy)
        self.held[path.name] = self._current = new

    def _take(self, new: Held, kind: str, keys: list[str], origin: int | None, policy: str) -> None:
        """Note where a unit's values come from: one save, an ancestor, and whatever the policy writes in each save."""
        what = f"{self._path(new).name}: {keys[0]}"
        if origin is None or not new.past.has(origin):
            self._say(f"{what} comes from {origin}, which is no ancestor")
            return
        if kind in _FRESH.get(policy, ()) and origin != new.moment:
            self._say(f"{what} was not written by {policy}")
        new.origins.update(dict.fromkeys(keys, origin))

    def _check(self, held: Held, loaded: dict[str, Any]) -> None:
        """Compare everything that was loaded, bit for bit."""
        wants = {key: soak_world.full_value(key, held.origins.get(key, held.moment)) for key in soak_world.KEYS}
        if held.narrow is None:  # nobody but the policy says what is rounded; from now on it must stay so
            held.narrow = {key for key, want in wants.items() if not torch.equal(loaded[key], want)}
            self.counts["checkpoints looked at"] += 1
        for key, want in wants.items():
            rounded = want.to(torch.bfloat16).to(want.dtype) if key in held.narrow else want
            if not torch.equal(loaded[key], rounded):
                self._say(f"{self._path(held).name}: {key} is not what it was at {held.origins.get(key)}")
        rest = (float(loaded["lr"]), loaded["train.step"], int(loaded["train.rng"][0]))
        if rest != (float(held.moment), held.moment, held.moment % 251):
            self._say(f"{self._path(held).name}: what every save writes is not of {held.moment}, but {rest}")

    def _say(self, what: str) -> None:
        self.lost.append(f"{what} (save {self.counts['saves']})")

    # Going back and pruning ---------------------------------------------------------------

    def _go_back(self) -> None:
        """Resume from any checkpoint; half of the time later saves go into the folders that were abandoned."""
        to = self._draw.choice(list(self.held.values()))
        self._load(to)
        if self._draw.random() < 0.5:
            self._step = to.step
        else:
            self._step = max([self._step, *(held.step for held in self.held.values())])

    def _load(self, held: Held) -> None:
        how = self._draw.choice((soak_world.load, soak_world.load_atomically))
        self._check(held, how(None, str(self._path(held))))
        self._current = held
        self.counts["resumes"] += 1

    def _prune(self) -> None:
        """Prune by any rules; now and then killed in the midst of it, and called again."""
        if len(self.held) < self._draw.randint(3, 14):
            return
        self._look_at(held for held in self.held.values() if held.narrow is None)
        values = {held.step: self._draw.random() for held in self.held.values()}
        offered = {"keep_last": self._draw.randint(1, 4), "keep_every": self._draw.choice((50, 70))}
        rules: dict[str, Any] = {name: value for name, value in offered.items() if self._draw.random() < 0.6}
        if not rules or self._draw.random() < 0.4:
            rules |= {"keep_best": self._draw.randint(1, 3), "metrics": values}
        compacts = self._draw.random() < 0.5
        if compacts:
            rules |= {"compact": self._draw.choice((0.1, 0.5)), "idle": self._draw.random() < 0.7}
        rules["incomplete"] = self._draw.random() < 0.3
        if self._draw.random() < 0.4:
            killed = killed_at(self._draw.randint(1, 60), self.run, lambda: prune(self.run, **rules))
            self.counts["prunes killed"] += killed
            self._look_at(self._some())
        done = prune(self.run, **rules)
        self.counts["prunes"] += 1
        self.counts["files compacted"] += sum(one.why_not is None for one in done.rewrites)
        self.counts["bytes freed"] += done.freed
        for name in self._must_stay(rules):
            if not (self.run / name / ".metadata").exists():
                self._say(f"{name} was pruned although a rule keeps it")
        self.held = {name: held for name, held in self.held.items() if (self.run / name / ".metadata").exists()}
        self._look_at(self.held.values() if done.rewrites else self._some())

    def _some(self) -> list[Held]:
        return self._draw.sample(list(self.held.values()), min(3, len(self.held)))

    def _must_stay(self, rules: dict[str, Any]) -> set[str]:
        """Return what rules keep at least, by this soak's own reckoning."""
        order = sorted(self.held, key=lambda name: self.held[name].moment)
        stay = {*order[-max(1, rules.get("keep_last", 0)) :]}
        stay |= {name for name in order if "keep_every" in rules and self.held[name].step % rules["keep_every"] == 0}
        if "keep_best" in rules:
            best = sorted(order, key=lambda name: rules["metrics"].get(self.held[name].step, 2.0))
            stay |= set(best[: rules["keep_best"]])
        return stay

    def _look_at(self, some: Iterable[Held]) -> None:
        """Load checkpoints with torch alone, in a process that cannot import this package."""
        there = [held for held in some if (self._path(held) / ".metadata").exists()]
        paths = [str(self._path(held)) for held in there]
        for held, loaded in zip(there, self._stock.one("benchmarks.soak_world:load_each", paths), strict=True):
            self._check(held, loaded)
            self.counts["looks"] += 1

    def _resumable(self) -> Held:
        """Return what training goes on from: the current state, or the newest if that is pruned."""
        if self._current and self.held.get(self._path(self._current).name) is self._current:
            return self._current
        return max(self.held.values(), key=lambda held: held.moment)

    def _path(self, held: Held) -> Path:
        return self.run / f"step-{held.step}"

    def _save_id(self, path: Path) -> str | None:
        return soak_world.record(str(path))["save_id"] if (path / ".metadata").exists() else None

    def _ranks(self) -> Fleet:
        if self._fleet is None:
            self._fleet = Fleet(_RANKS)
            self.counts["process groups"] += 1
        return self._fleet

    # The end -----------------------------------------------------------------------------

    def finish(self) -> None:
        """Compact, then look at all that is left: by torch alone on one and two ranks, by our reader, and by verify."""
        prune(self.run, compact=0.5, idle=True, incomplete=True)
        for name, held in self.held.items():
            for ranks in (1, 2):
                for loaded in self._stock.call("benchmarks.soak_world:load", str(self.run / name), ranks=ranks):
                    self._check(held, loaded)
            self._check(held, soak_world.load_atomically(None, str(self.run / name)))
            self.counts["loaded at the end"] += 1
        for verdict in verify(self.run).checkpoints:
            self.counts["verified at the end"] += 1
            if verdict.state == "damaged":
                self._say(f"verify calls {verdict.path} damaged")
        inodes = {path.stat().st_ino: path.stat().st_size for path in self.run.rglob("*.distcp")}
        if sum(inodes.values()) > 2 * self._live():
            self._say(f"{sum(inodes.values())} bytes of data lie there where {self._live()} are needed")
        self.counts["bytes at the end"] = sum(inodes.values())

    def _live(self) -> int:
        """Return the bytes that checkpoints need, as stock pickle sees them."""
        live: set[tuple[int, int, int]] = set()
        for path in self.run.glob("*/.metadata"):
            for info in pickle.loads(path.read_bytes()).storage_data.values():
                inode = (path.parent / info.relative_path).stat().st_ino
                live.add((inode, info.offset, info.length))
        return sum(length for _, _, length in live)
