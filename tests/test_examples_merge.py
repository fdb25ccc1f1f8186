"""The examples about merging, run as a newcomer runs them, with few steps."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

EXAMPLES = Path(__file__).parents[1] / "examples"
Example = Callable[[str], Any]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}


def run(script: str, *options: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, options)],
        cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Example:
    """Return what imports an example into this process, which has imported torch already; run in an empty folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    return importlib.import_module


def losses(text: str) -> dict[str, list[float]]:
    """Return the table's losses by the words that its rows begin with."""
    rows = re.findall(r"^(.+?) +(\d+\.\d{4}) +(\d+\.\d{4})$", text, re.MULTILINE)
    return {name: [float(now), float(later)] for name, now, later in rows}


def test_parity_takes_odd_layers_from_before_and_goes_on(tmp_path: Path) -> None:
    text = run("merge_parity.py", "--steps", 9, cwd=tmp_path)
    origins = dict(re.findall(r"^  (\S+) +step (\d+)$", text, re.MULTILINE))
    layers = {f"model.layers.{n}": "3" if n % 2 else "6" for n in range(8)}
    assert origins == {"model.embed_tokens": "6", **layers, "model.norm": "6", "lm_head": "6"}
    full, merged = losses(text).values()
    assert full != merged
    assert max(abs(a - b) for a, b in zip(full, merged, strict=True)) < 1


def test_the_deeper_model_starts_below_a_new_one(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    example("depth_upscaling").main(Path("run"), steps=8)
    found = losses(capsys.readouterr().out)
    assert found["12 layers, made of them"][0] < found["12 layers, new at step 4"][0] - 1


def test_the_average_is_another_model_and_goes_on(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    example("average_checkpoints").main(Path("run"), steps=10, every=2)
    found = losses(capsys.readouterr().out)
    assert list(found) == ["step-2", "step-4", "step-6", "step-8", "step-10", "average"]
    assert found["average"] not in [one for name, one in found.items() if name != "average"]


def test_strange_folders_are_left_alone(example: Example) -> None:
    precious = Path("precious.txt")
    precious.touch()
    with pytest.raises(SystemExit, match="was not made by an example, so it is left alone"):
        example("tiny_training").fresh(Path.cwd())
    assert precious.exists()


def test_the_questions_are_questions() -> None:
    folder = EXAMPLES / "evaluation"
    task = yaml.safe_load((folder / "tailor_python_words.yaml").read_text())
    lines = (folder / task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    for question in map(json.loads, lines):
        choices = question["choices"]
        assert len(set(choices)) == 4
        assert len({len(choice) for choice in choices}) == 1  # a longer answer is a less likely one
        assert 0 <= question[task["doc_to_target"]] < 4


@pytest.mark.long
def test_an_llmtailor_plan_is_taken_over_and_resumed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "llmtailor_plan" / "run.py"), "--further", "2"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^ *(\d+) +(\d+\.\d+) +(\d+\.\d+)$", done.stdout, re.MULTILINE)
    assert [step for step, *_ in rows] == ["13", "14"]
    assert all(full != merged and abs(float(full) - float(merged)) < 0.5 for _, full, merged in rows)


@pytest.mark.long
def test_lm_eval_reads_both_models(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "evaluate_merged.py"), "--steps", "50"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(\w+) +tailor_python_words: acc \d", done.stdout, re.MULTILINE) == ["before", "after"]
