"""Fuzzing all targets in turns, a process for each, and adding up what was done."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.fuzz import scratch
from tests.fuzz.registry import TARGETS

HERE = Path(__file__).parent
STOP = "stop"
"""A file of this name in the working folder ends a long run after the turn that it is in."""
CORPUS = HERE / "corpus"
REGRESSIONS = HERE / "regressions"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_PROGRESS = re.compile(r"^#\d+\s+\w+\s+cov: (\d+) ft: (\d+)", re.MULTILINE)
_EXECUTED = re.compile(r"^stat::number_of_executed_units: (\d+)", re.MULTILINE)
_LINES = re.compile(r"^#(\d+)\s", re.MULTILINE)


@dataclass(frozen=True)
class Turn:
    """What one process did.

    Attributes:
        target: the target's name.
        executions: inputs that were run.
        seconds: processor time that it took, the start included.
        edges: branches of the parser's modules that were reached.
        features: those with how often they were taken, as libFuzzer counts.
        corpus: inputs that are kept because each reaches something new.
        findings: kinds of findings there are so far.
        exit: the process's exit code; other than 0 after a crash or a hang, which is a finding, too.
    """

    target: str
    executions: int
    seconds: float
    edges: int
    features: int
    corpus: int
    findings: int
    exit: int


def turn(name: str, work: Path, runs: int, seconds: int, seed: int) -> Turn:
    """Fuzz one target for some time, or with some inputs, beginning with what is known."""
    from tests.fuzz.child import run_forked

    folder = work / name
    for part in ("corpus", "findings"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    if not any((folder / "corpus").iterdir()):
        for entry, data in kept(name):
            (folder / "corpus" / entry).write_bytes(data)
    log = folder / "log.txt"
    pid, code, used = run_forked(name, folder, runs, seconds, seed, log)
    scratch.remove(pid)
    text = log.read_text(errors="replace")
    reached = _PROGRESS.findall(text)
    edges, features = map(int, reached[-1]) if reached else (0, 0)
    done = Turn(
        target=name,
        executions=_executed(text),
        seconds=round(used, 2),
        edges=edges,
        features=features,
        corpus=sum(1 for _ in (folder / "corpus").iterdir()),
        findings=sum(1 for path in (folder / "findings").iterdir() if path.suffix != ".txt"),
        exit=code,
    )
    with (work / "turns.jsonl").open("a") as stream:
        stream.write(json.dumps(asdict(done)) + "\n")
    return done


def _executed(log: str) -> int:
    told = _EXECUTED.findall(log) or _LINES.findall(log)  # a process that crashed did not add up
    return int(told[-1]) if told else 0


def turns_in(work: Path) -> Iterator[Turn]:
    """Yield all turns that were recorded in a folder."""
    record = work / "turns.jsonl"
    for line in record.read_text().splitlines() if record.exists() else ():
        yield Turn(**json.loads(line))


def totals(turns: Sequence[Turn]) -> dict[str, Turn]:
    """Add up the turns of each target; edges and features are the most that one reached."""
    added: dict[str, Turn] = {}
    for name in TARGETS:
        own = [one for one in turns if one.target == name]
        if own:
            added[name] = Turn(
                target=name,
                executions=sum(one.executions for one in own),
                seconds=round(sum(one.seconds for one in own), 2),
                edges=max(one.edges for one in own),
                features=max(one.features for one in own),
                corpus=own[-1].corpus,
                findings=own[-1].findings,
                exit=own[-1].exit,
            )
    return added


def fuzz_until(names: Sequence[str], work: Path, total: int, least: int, seconds: int) -> Iterator[Turn]:
    """Take turns until all together, and each alone, have run so many inputs; those that have not come first."""
    while True:
        done = totals(list(turns_in(work)))
        executed = {name: done[name].executions if name in done else 0 for name in names}
        short = [name for name in names if executed[name] < least]
        if not short and sum(executed.values()) >= total:
            return
        for name in short or names:
            done_now = turn(name, work, 0, seconds, seed=executed[name] % (1 << 31) + 1)
            yield done_now
            if not done_now.executions:
                raise RuntimeError(f"{name} did not begin; see {work / name / 'log.txt'}")
            if (work / STOP).exists():
                return


def kept(name: str) -> list[tuple[str, bytes]]:
    """Return the files of a target's corpus in the repository, by their names."""
    path = CORPUS / f"{name}.zip"
    if not path.exists():
        return []
    with zipfile.ZipFile(path) as held:
        return [(info.filename, held.read(info)) for info in held.infolist()]


def keep(name: str, files: Sequence[Path], most: int) -> int:
    """Put the smallest files into the corpus in the repository, as many as fit; return how many."""
    CORPUS.mkdir(exist_ok=True)
    path, count = CORPUS / f"{name}.zip", 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as made:
        for file in sorted(files, key=lambda file: (file.stat().st_size, file.name)):
            if made.start_dir > most:
                break
            made.writestr(zipfile.ZipInfo(file.name, _EPOCH), file.read_bytes(), zipfile.ZIP_DEFLATED)
            count += 1
    return count
