"""The examples, run as a newcomer runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# Nothing of what the tests' own process was told may decide how the demo looks.
PLAIN = {"COLUMNS": "100", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "TERM": "dumb"}


def run(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **PLAIN},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )


def test_single_gpu_goes_on_where_it_was(tmp_path: Path) -> None:
    first = run("single_gpu.py", "my-run", cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    assert re.findall(r"step (\d+): loss", first.stdout) == ["5", "10", "15", "20"]
    second = run("single_gpu.py", "my-run", cwd=tmp_path)
    assert (second.returncode, second.stderr) == (0, "")
    assert second.stdout.startswith("resumed from my-run/step-20\nstep 25: loss")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run a short form of the demo: four saves, and one kill in the second."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run("train_fsdp.py", "--steps", 8, "--every", 2, "--kills", 1, cwd=folder)


def test_demo_does_what_it_says(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, result = demo
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    text = " ".join(result.stdout.split())
    killed = re.search(r"killed in step-(\d+), its folder just made: .*?, no \.metadata", text)
    resumed = re.search(r"goes on from step-(\d+), the newest complete checkpoint", text)
    assert killed and resumed
    assert int(resumed[1]) == int(killed[1]) - 2
    committed = {path.parent.name for path in (folder / "demo-run" / "killed").glob("*/.metadata")}
    assert committed == {"step-2", "step-4", "step-6", "step-8"}


def test_demo_ends_with_its_tables(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    lines = [" ".join(line.split()) for line in demo[1].stdout.splitlines()]
    for title in ("What each save wrote", "Where the layers of step-8 come from", "The kills"):
        assert title in lines
    shares = [int(share) for line in lines for share in re.findall(r"^step-\d+ .* (\d+)% █", line)]
    assert len(shares) == 4
    assert shares[0] > 80
    assert max(shares[1:]) < 40
    origins = dict(pair for line in lines for pair in re.findall(r"^(\S+) 8 (\d+) (?:carried|written)", line))
    assert {*origins} >= {"model.embed_tokens", "model.layers.0", "model.layers.7", "model.norm", "lm_head"}
    assert set(origins.values()) <= {"2", "4", "6", "8"}
    assert any(re.match(r"8 \d\.\d{4} \d\.\d{4} ", line) for line in lines)
    assert any(line.startswith("held-out text ") for line in lines)


def test_demo_leaves_strange_folders_alone(tmp_path: Path) -> None:
    precious = tmp_path / "demo-run" / "precious.txt"
    precious.parent.mkdir()
    precious.touch()
    result = run("train_fsdp.py", cwd=tmp_path)
    assert result.returncode == 1
    assert "was not made by this demo, so it is left alone" in " ".join(result.stdout.split())
    assert [*precious.parent.iterdir()] == [precious]
