"""Scale: a merge of Llama-3-8B's shapes opens no data file, and does not notice how many bytes there are."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import LLAMA_8B
from benchmarks.sharded import write_checkpoint

RANKS, LAYERS = 8, 32
_ROOT = Path(__file__).parents[2]

WATCHED = """
import json, sys
from tailor_dcp.merge import merge
events = []
sys.addaudithook(lambda event, args: events.append((event, str(args[:1]))))
found = {}
for name, recipe, out in json.loads(sys.argv[1]):
    events.clear()
    done = merge(recipe, out)
    found[name] = {
        "opened": [what for event, what in events if event == "open" and ".distcp" in what],
        "calls": sorted(event for event, _ in events if event.startswith(("os.", "open", "shutil."))),
        "done": [done.layers, done.linked, done.live],
    }
print(json.dumps(found))
"""


def narrow(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return a model of as many tensors, each a ten-thousandth of the size or less."""
    return {name: tuple(max(RANKS, size // 128) for size in shape) for name, shape in shapes.items()}


def recipe(run: Path) -> dict[str, Any]:
    even = ",".join(map(str, range(0, LAYERS, 2)))
    return {"base": str(run / "step-200"), "layers": {f"model.layers.{{{even}}}": str(run / "step-100")}}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two steps of each of two models, merged by parity in a process that is watched; the first merge imports."""
    folder = tmp_path_factory.mktemp("scale")
    for name, shapes in (("narrow", narrow(LLAMA_8B)), ("8b", LLAMA_8B)):
        for step in (100, 200):
            write_checkpoint(folder / name / f"step-{step}", shapes, RANKS)
    asked = [
        (name, recipe(folder / name.split("-")[0]), str(folder / name)) for name in ("narrow-0", "narrow-1", "8b-1")
    ]
    found = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(asked)],
        capture_output=True, text=True, check=True, cwd=_ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return folder, json.loads(found.stdout)


def test_no_data_file_is_opened(merged: tuple[Path, dict[str, Any]]) -> None:
    _, found = merged
    assert found["8b-1"]["opened"] == []
    layers, linked, live = found["8b-1"]["done"]
    assert (layers, linked) == (LAYERS + 3, 2 * RANKS)
    assert live > 96e9


def test_the_work_does_not_depend_on_the_bytes(merged: tuple[Path, dict[str, Any]]) -> None:
    """The same calls for five hundred megabytes as for ninety gigabytes, and metadata of one size."""
    folder, found = merged
    assert found["8b-1"]["calls"] == found["narrow-1"]["calls"]
    sizes = [(folder / name / ".metadata").stat().st_size for name in ("narrow-1", "8b-1")]
    assert abs(sizes[0] - sizes[1]) < 0.05 * sizes[1]
    assert found["8b-1"]["done"][2] > 5000 * found["narrow-1"]["done"][2]


def test_every_chunk_lies_where_its_source_has_it(merged: tuple[Path, dict[str, Any]]) -> None:
    """Even layers in the files of the earlier step, all else in those of the later one, at the same offsets."""
    folder, _ = merged

    def read(path: Path) -> Any:
        return pickle.loads((path / ".metadata").read_bytes())

    of_step = {step: read(folder / "8b" / f"step-{step}") for step in (100, 200)}
    result = read(folder / "8b-1")
    assert result.state_dict_metadata == of_step[200].state_dict_metadata
    assert result.storage_data.keys() == of_step[200].storage_data.keys()
    for index, info in result.storage_data.items():
        even = ".layers." in index.fqn and int(index.fqn.split(".layers.")[1].split(".")[0]) % 2 == 0
        step = 100 if even else 200
        known = of_step[step].storage_data[index]
        assert (info.offset, info.length) == (known.offset, known.length)
        source = folder / "8b" / f"step-{step}" / known.relative_path
        assert source.samefile(folder / "8b-1" / info.relative_path)
