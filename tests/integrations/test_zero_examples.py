"""The examples with DeepSpeed, run as a newcomer runs them, in short forms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_demo import run


@pytest.mark.long
def test_fsdp2_takes_over_from_zero(tmp_path: Path) -> None:
    result = run("zero_to_fsdp.py", "--steps", 3, "--leave", 1, "--ranks", 1, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    rows = re.findall(r"^ +(\d+) +(\d\.\d+) +(\d\.\d+) +[+-]\d", result.stdout, re.MULTILINE)
    assert [int(step) for step, _, _ in rows] == [2, 3]
    for _, stayed, left in rows:
        assert float(left) == pytest.approx(float(stayed), abs=1e-4)


@pytest.mark.long
def test_a_killed_engine_goes_on(tmp_path: Path) -> None:
    result = run("train_zero.py", "--steps", 8, "--every", 2, "--kills", 1, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    text = " ".join(result.stdout.split())
    killed = re.search(r"killed in step-(\d+)", text)
    resumed = re.search(r"goes on from step-(\d+), the newest complete checkpoint", text)
    assert killed and resumed
    assert int(resumed[1]) == int(killed[1]) - 2
    committed = {path.parent.name for path in (tmp_path / "zero-run" / "killed").glob("*/.metadata")}
    assert committed == {"step-2", "step-4", "step-6", "step-8"}
