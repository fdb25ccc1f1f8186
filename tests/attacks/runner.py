"""Running: one attack through everything that takes such a file, in a process with little memory and time."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib
import io
import json
import os
import pkgutil
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import typer.main

import tailor_dcp
from tailor_dcp import converters
from tailor_dcp.cli import app as tailor_app
from tailor_dcp.converters.cli import app as convert_app
from tests.attacks.attack import Attack
from tests.attacks.entries import CHANGING, ENTRIES, LOOKING_BEHIND_LINKS, Entry
from tests.attacks.ground import Ground, Honest
from tests.attacks.watch import Watch, leaked

MEMORY = 1536 << 20
"""Bytes of address space that a process may take beside what it begins with."""
SECONDS = 10
"""Of processor time for one entry."""
WAITING = 100
"""Seconds for one entry on a busy machine; only what waits for somebody takes so long."""
_SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Memory, if there is such a place: a disk, to which every save and copy is flushed, takes most of the time."""
_CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
_LONGEST = 5000
_FETCHED = ("javascript:", "http", "//", "data:")
_STOCK = ("checkpoint/default_planner.py", "checkpoint/planner_helpers.py", "checkpoint/state_dict_loader.py")


Tell = Callable[[object], None]
"""What a process calls with what has become of it so far."""


class HungError(BaseException):
    """An entry has not come to an end."""


@dataclass
class Outcome:
    """What became of an attack.

    Attributes:
        name: the attack's.
        group: the module that it is in.
        tries: what it tries.
        entries: for each entry ``refused: <sentence>``, ``harmless``, or ``FAULT: <what>``.
        seconds: that all took.
        peak: bytes of memory, at most, beside what the process began with.
    """

    name: str
    group: str
    tries: str
    entries: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    peak: int = 0

    @property
    def faults(self) -> dict[str, str]:
        """The entries that did not withstand."""
        return {entry: said for entry, said in self.entries.items() if said.startswith("FAULT")}


def run(attacks: Sequence[tuple[str, Attack]], tries: int | None = None, seed: int = 0) -> Iterator[Outcome]:
    """Run attacks one after another, each in a process of its own.

    Args:
        attacks: each with the module that it is in.
        tries: how many of the entries that take such a file are tried; None for all.
        seed: which these are.
    """
    _warm(any(attack.kind in ("config", "model", "recipe") for _, attack in attacks))
    with tempfile.TemporaryDirectory(dir=_SCRATCH) as scratch:
        honest = Honest(Path(scratch))
        gc.collect()
        gc.freeze()  # or every child would copy the memory that it looks through
        for number, (group, attack) in enumerate(attacks):
            root = Path(scratch) / f"attack-{number}"
            entries = ENTRIES[attack.kind]
            if tries is not None and tries < len(entries):
                drawn = random.Random(f"{seed} {attack.name}").sample(list(entries), tries)
                entries = {name: entry for name, entry in entries.items() if name in drawn}
            yield _apart(attack, Outcome(attack.name, group, attack.tries), root, honest, entries)


def _warm(models: bool) -> None:
    """Import what calls would import, and build the commands, once for all processes."""
    typer.main.get_command = functools.cache(typer.main.get_command)  # of half the time that a command takes
    for app in (tailor_app, convert_app):
        typer.main.get_command(app)
    for package in (tailor_dcp, converters):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__") and ".integrations." not in module.name:
                importlib.import_module(module.name)
    if models:
        import transformers

        assert transformers.LlamaForCausalLM is not None


def _apart(attack: Attack, outcome: Outcome, root: Path, honest: Honest, entries: Mapping[str, Entry]) -> Outcome:
    """Run in forked processes; whatever happens to one is the outcome."""
    start = time.monotonic()
    _try({name: entry for name, entry in entries.items() if name not in CHANGING}, attack, outcome, root, honest)
    for name in [name for name in entries if name in CHANGING]:  # each is given what was built, not what another left
        _try({name: entries[name]}, attack, outcome, root, honest)
    outcome.seconds = time.monotonic() - start
    return outcome


def _try(left: Mapping[str, Entry], attack: Attack, outcome: Outcome, root: Path, honest: Honest) -> None:
    """Note what becomes of some entries. Where a process dies another one goes on with the next."""
    while left:
        told, ended = _forked(functools.partial(_attacked, attack, root, honest, left))
        for name, said, peak in told[1:]:
            outcome.entries[name] = said
            outcome.peak = max(outcome.peak, peak)
        left = {name: entry for name, entry in left.items() if name not in outcome.entries}
        if left:
            at = next(iter(left)) if told else "building"
            outcome.entries[at] = f"FAULT: {ended}"
            left = {name: entry for name, entry in left.items() if told and name != at}
        shutil.rmtree(root, ignore_errors=True)


def _forked(call: Callable[[Tell], None]) -> tuple[list[Any], str]:
    """Return what a call tells in a process of its own, and how that ended; silence ends it."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        status = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "w", buffering=1) as pipe:
                call(lambda value: print(json.dumps(value), file=pipe))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        told, ended = b"", ""
        while not ended:
            if not select.select([pipe], [], [], WAITING)[0]:
                os.kill(child, signal.SIGKILL)  # code that is not Python waits on, whatever handlers raise
                ended = f"it has not ended after {WAITING} s"
            elif more := pipe.read(1 << 16):
                told += more
            else:
                ended = "the process died"
    _, status = os.waitpid(child, 0)
    return [json.loads(line) for line in told.split(b"\n")[:-1]], f"{ended} ({os.waitstatus_to_exitcode(status)})"


# In the process ---------------------------------------------------------------------------


def _attacked(attack: Attack, root: Path, honest: Honest, entries: Mapping[str, Entry], tell: Tell) -> None:
    """Build an attack, and tell what became of each entry, after a first word when it is built."""
    ground = Ground(root, honest)
    subject = attack.build(ground)
    tempfile.tempdir = str(ground.folder)
    signal.signal(signal.SIGPROF, _hung)
    began, peak = _memory("VmSize"), _memory("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (began + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = Watch(ground)
    tell(None)
    for name, entry in entries.items():
        before = _digest(subject)
        out = ground.folder / "out" / re.sub(r"\W+", "-", name)
        out.parent.mkdir(exist_ok=True)
        said, shown = _called(entry, subject, out)
        seen = watch.taken()
        if name in LOOKING_BEHIND_LINKS:
            seen = [one for one in seen if not one.startswith("os.scandir of ")]
        problems = [*seen, *_shown_badly(shown), *leaked(out.parent), *_scripts(out.parent)]
        if name not in CHANGING and _digest(subject) != before:
            problems.append("the attacked file was changed")
        if problems and not said.startswith("FAULT"):
            said = f"FAULT: {'; '.join(problems)}"
        shutil.rmtree(out.parent)
        tell([name, said, max(0, _memory("VmHWM") - peak)])


def _called(entry: Entry, subject: Path, out: Path) -> tuple[str, str]:
    """Return what became of a call, and what it printed."""
    shown = io.StringIO()
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS)
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            entry(subject, out)
        said = "harmless"
    except SystemExit as done:
        said = _exited(done.code, shown.getvalue())
    except HungError:
        said = f"FAULT: it has not ended after {SECONDS} s of work"
    except BaseException as error:  # DCP's own is no Exception
        said = _raised(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return said, shown.getvalue()


def _hung(*_: Any) -> None:
    raise HungError


def _exited(code: Any, shown: str) -> str:
    if code in (0, None):
        return "harmless"
    longest = max(map(len, shown.splitlines()), default=0) if not shown.startswith("{") else 0  # JSON is for machines
    if code not in (1, 2) or "Traceback" in shown or longest > _LONGEST:
        return f"FAULT: exit code {code}: {shown[-500:]}"
    return f"refused: {shown.strip().splitlines()[-1][:300] if shown.strip() else 'without a word'}"


def _raised(error: BaseException) -> str:
    inner: list[BaseException] = [error]
    if failures := getattr(error, "failures", None):
        inner = [failed[0] for failed in failures.values()]
    for one in inner:
        if not isinstance(one, tailor_dcp.TailorError):
            where = traceback.extract_tb(one.__traceback__)
            if where and where[-1].filename.endswith(_STOCK):  # its planner was asked for what is not there
                continue
            frames = [f"{Path(at.filename).name}:{at.lineno}" for at in where][-6:]
            return f"FAULT: {type(one).__name__}: {str(one)[:200]} ({' '.join(frames)})"
    return f"refused: {str(inner[0])[:300]}"


def _shown_badly(shown: str) -> list[str]:
    """Return what no terminal should be sent."""
    found = sorted(set(_CONTROLS.findall(shown)))
    return [f"printed the characters {[hex(ord(c)) for c in found]}"] if found else []


class _Page(HTMLParser):
    """Finds what in a page would run, or be fetched."""

    found: list[str]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "link" and dict(attrs) == {"rel": "icon", "href": "data:,"}:  # else browsers ask for an icon
            return
        if tag in ("script", "iframe", "object", "embed", "img", "base", "form", "link"):
            self.found.append(f"the page has a <{tag}>")
        for name, value in attrs:
            where = (value or "").strip().lower()
            if name.startswith("on") or (where.startswith(_FETCHED) and not where.startswith("http://www.w3.org/")):
                self.found.append(f"the page has {name}={value!r}"[:100])


def _scripts(folder: Path) -> list[str]:
    found: list[str] = []
    for path in folder.glob("*.html"):
        page = _Page()
        page.found = found
        page.feed(path.read_text(encoding="utf-8"))
    return found


def _digest(subject: Path) -> str:
    """Return what a file, or all in a folder, is; without opening what is no file."""
    found = hashlib.sha256()
    for path in sorted(subject.rglob("*")) if subject.is_dir() else [subject]:
        found.update(str(path).encode("utf-8", "surrogateescape"))
        if path.is_symlink():
            found.update(os.fsencode(path.readlink()))
        elif path.is_file() and path.stat().st_size < 1 << 26:
            found.update(path.read_bytes())
    return found.hexdigest()


def _memory(what: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) << 10
    return 0


if sys.platform != "linux":
    raise SystemExit("The gallery measures memory by /proc, so it runs on Linux alone.")
