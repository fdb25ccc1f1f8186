"""The gallery: no attack gets through, whatever takes it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.attack import Attack
from tests.attacks.gallery import GALLERIES
from tests.attacks.ground import Runs, saved, system
from tests.attacks.runner import run

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="a process's memory is limited by its /proc")


def _gallery(tmp_path: Path, *options: str) -> dict[str, Any]:
    """Run in a process that has done nothing else, whose forks therefore have no threads to miss."""
    told = tmp_path / "attacks.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.attacks", "--json", str(told), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    found: dict[str, Any] = json.loads(told.read_text())
    assert done.returncode == bool(found["faults"])
    return found


def _faults(found: dict[str, Any]) -> list[str]:
    return [
        f"{one['group']}: {one['name']}: {entry}: {said}"
        for one in found["outcomes"]
        for entry, said in one["faults"].items()
    ]


@needs_linux
def test_a_sample_of_the_gallery(tmp_path: Path) -> None:
    """Every kind of file is among it, and another sample every time that an attack is added."""
    found = _gallery(tmp_path, "--sample", "40", "--tries", "4")
    assert not _faults(found)
    assert found["attacks"] == 40
    assert found["refused"] > 50
    assert {one["group"] for one in found["outcomes"]} == {gallery.group for gallery in GALLERIES}


@needs_linux
@pytest.mark.long
def test_the_whole_gallery(tmp_path: Path) -> None:
    found = _gallery(tmp_path)
    assert not _faults(found)
    assert found["attacks"] == sum(len(gallery.attacks) for gallery in GALLERIES)


def test_attacks_are_many_and_each_says_what_it_tries() -> None:
    attacks = [attack for gallery in GALLERIES for attack in gallery.attacks]
    assert len(attacks) >= 100
    assert not [name for name, times in Counter(attack.name for attack in attacks).items() if times > 1]
    assert all(attack.tries.endswith(".") and "\n" not in attack.tries for attack in attacks)


# --- The runner sees what it is there to see ---


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the runner says of entries that do not withstand, one for each way to fail."""
    return json.loads(
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", "from tests.attacks.test_attacks import weak; weak()"],
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()[-1]
    )  # fmt: skip


def weak() -> None:
    """Run entries that are attacked with success, and print what the runner says of each."""
    from tests.attacks import runner

    runner.ENTRIES = {"dcp": WEAK}
    runner.SECONDS, runner.WAITING = 1, 10
    attack = Attack("weak", "Runs a command.", "dcp", lambda ground: ground.entry(saved(system(ground))))
    (outcome,) = run([("weak", attack)])
    print(json.dumps(outcome.entries))


def _unpickle(subject: Path, out: Path) -> None:
    import torch

    torch.load(subject / "evil.distcp", weights_only=False)


def _read_outside(subject: Path, out: Path) -> None:
    (subject.parents[2] / "outside" / "secret.distcp").read_bytes()


def _read_by_link(subject: Path, out: Path) -> None:
    link = out.with_name("link")
    link.symlink_to(subject.parents[2] / "outside" / "secret.distcp")
    out.with_name("copy").write_bytes(link.read_bytes())


def _fetch(subject: Path, out: Path) -> None:
    import urllib.request

    with contextlib.suppress(OSError):
        urllib.request.urlopen("http://127.0.0.1:9/", timeout=1)


def _spin(subject: Path, out: Path) -> None:
    while True:
        pass


def _wait(subject: Path, out: Path) -> None:
    """Wait for who will never come, as safetensors and torch do: no handler of Python's gets a word in."""
    import signal

    os.mkfifo(out.with_name("pipe"))
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    out.with_name("pipe").read_bytes()


def _die(subject: Path, out: Path) -> None:
    os._exit(0)


def _page(subject: Path, out: Path) -> None:
    out.with_suffix(".html").write_text("<p onclick='x()'><script>x()</script>")


def _print(subject: Path, out: Path) -> None:
    print("\x1b[2J")


def _exit(subject: Path, out: Path) -> None:
    raise SystemExit(3)


WEAK = {
    "reads outside": _read_outside,
    "reads by a link": _read_by_link,
    "fetches": _fetch,
    "spins": _spin,
    "waits": _wait,
    "dies": _die,
    "writes a script": _page,
    "prints controls": _print,
    "raises": lambda subject, out: {}[subject],
    "exits": _exit,
    "changes the file": lambda subject, out: (subject / ".metadata").write_bytes(b""),
    "writes outside": lambda subject, out: (subject.parents[2] / "beside").write_text("x"),
    "takes memory": lambda subject, out: bytearray(4 << 30),
    "honest": lambda subject, out: None,
    "unpickles": _unpickle,
}


@needs_linux
@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("unpickles", "unpickled posix.system"),
        ("unpickles", "os.system"),
        ("unpickles", "outside was touched"),
        ("reads outside", "open of "),
        ("reads by a link", "the secret has come into copy"),
        ("fetches", "socket.connect"),
        ("spins", "it has not ended"),
        ("waits", "it has not ended after 10 s (-9)"),
        ("dies", "the process died (0)"),
        ("writes a script", "<script>"),
        ("writes a script", "onclick"),
        ("prints controls", "0x1b"),
        ("raises", "KeyError"),
        ("exits", "exit code 3"),
        ("changes the file", "was changed"),
        ("writes outside", "open changes "),
        ("takes memory", "MemoryError"),
    ],
)
def test_the_runner_sees_an_attack_that_gets_through(seen: dict[str, str], entry: str, says: str) -> None:
    assert seen[entry].startswith("FAULT")
    assert says in seen[entry]


@needs_linux
def test_the_runner_leaves_alone_what_withstands(seen: dict[str, str]) -> None:
    assert seen["honest"] == "harmless"


def test_the_code_in_the_gallery_runs_where_it_is_unpickled(tmp_path: Path) -> None:
    """The attacks are real: stock pickle does what they ask."""
    import pickle

    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Runs(os.system, f"touch {mark}")))
    assert mark.exists()
