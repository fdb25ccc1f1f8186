"""Flag logs: reading them, whatever they hold, and where the newest copy of each unit is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.merging.index import Index
from tailor_dcp.merging.sources import open_source
from tailor_dcp.recipes import flags as flags_module
from tailor_dcp.recipes.documents import parse
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.flags import Flags, Save, assemble, read_flags
from tailor_dcp.recipes.native import Recipe, Take
from tailor_dcp.recipes.native_file import native
from tests.recipes.test_llmtailor import EMBED, HEAD, LAYERS, NORM, index

ALL = range(LAYERS + 3)


def layers_of(unit: int) -> str:
    """Return the layer of a unit."""
    return {0: NORM, LAYERS + 1: HEAD, LAYERS + 2: EMBED}.get(unit, f"model.layers.{unit - 1}")


def log(path: Path, *lines: tuple[int, Iterable[int]]) -> Flags:
    """Write a log and read it."""
    path.write_text("".join(json.dumps({"step": step, "flag": list(units)}) + "\n" for step, units in lines))
    return read_flags(path)


def folders(run: Path, *steps: int, name: str = "checkpoint-{}") -> Path:
    """Make the folders of a run."""
    for step in steps:
        (run / name.format(step)).mkdir(parents=True)
    return run


def whole(name: str) -> Index:
    """Return what a full checkpoint holds."""
    return index(name)


# Reading ----------------------------------------------------------------------------------------------------


def test_reading_a_log(tmp_path: Path) -> None:
    """A line a save; other keys and empty lines do not matter."""
    path = tmp_path / "flags.jsonl"
    path.write_bytes(b'{"step": 100, "flag": [0, 3]}\r\n\n  {"flag": [], "step": 120, "time": 1.5}')
    found = read_flags(path)
    assert found.saves == (Save(100, frozenset({0, 3}), 1), Save(120, frozenset(), 3))
    assert found.name == str(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "is no JSON"),
        (b'\xff{"step": 1, "flag": []}', "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[1, 2]", "no step that is a number"),
        (b'{"flag": [1]}', "no step that is a number"),
        (b'{"step": "100", "flag": [1]}', "no step that is a number"),
        (b'{"step": 1.5, "flag": [1]}', "no step that is a number"),
        (b'{"step": true, "flag": [1]}', "no step that is a number"),
        (b'{"step": -1, "flag": [1]}', "no step that is a number"),
        (b'{"step": NaN, "flag": [1]}', "no step that is a number"),
        (b'{"step": 1}', "'flag' is no list"),
        (b'{"step": 1, "flag": 3}', "'flag' is no list"),
        (b'{"step": 1, "flag": [true]}', "'flag' is no list"),
        (b'{"step": 1, "flag": [-1]}', "'flag' is no list"),
        (b'{"step": 1, "flag": ["0"]}', "'flag' is no list"),
        (b'{"step": 1, "flag": [' + b"9" * 5000 + b"]}", "is no JSON"),
        (b'{"step": 1, "flag": [99999999]}', "'flag' is no list"),
    ],
)
def test_a_line_that_is_none(tmp_path: Path, line: bytes, words: str) -> None:
    """Is named by its number, in one sentence."""
    path = tmp_path / "flags.jsonl"
    path.write_bytes(b'{"step": 1, "flag": [0]}\n\n' + line + b'\n{"step": 9, "flag": []}\n')
    with pytest.raises(RecipeError, match=words) as caught:
        read_flags(path)
    assert f"{path}, line 3: " in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, empty, a folder, a pipe, too large."""
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        read_flags(tmp_path / "none")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        read_flags(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecipeError, match="is no regular file; name a flag log"):
        read_flags(tmp_path / "pipe")
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(RecipeError, match="is empty"):
        read_flags(tmp_path / "empty")
    monkeypatch.setattr(flags_module, "LARGEST", 1 << 20)
    (tmp_path / "large").write_bytes(b"\n" * ((1 << 20) + 1))
    with pytest.raises(RecipeError, match="larger than 1 MiB"):
        read_flags(tmp_path / "large")


@given(st.lists(st.binary(max_size=60) | st.just(b'{"step": 3, "flag": [1]}'), max_size=4))
def test_any_bytes(tmp_path: Path, lines: list[bytes]) -> None:
    """Are read or refused in one sentence."""
    path = tmp_path / "log"
    path.write_bytes(b"\n".join(lines))
    try:
        assert read_flags(path).saves
    except RecipeError as error:
        assert "\n" not in str(error)


# Assembling -------------------------------------------------------------------------------------------------


def sources_of(recipe: Recipe) -> dict[str, str]:
    """Return the folder of each layer, by its name."""
    found = {layers_of(unit): Path(recipe.base).name for unit in ALL}
    return found | {take.layers: Path(take.source).name for take in recipe.takes}


def test_the_newest_flag_wins(tmp_path: Path) -> None:
    """At or below the step, for each unit; what none flags comes from the full save."""
    run = folders(tmp_path / "run", 100, 120, 140, 160, 180)
    flags = log(tmp_path / "log", (100, ALL), (120, {0, 1, 2}), (140, {2, HEAD_ID}), (160, {5}), (180, {0, 1, 2, 3}))
    recipe = assemble(flags, 160, run, whole)
    assert recipe.base == str(run / "checkpoint-100") and recipe.train == str(run / "checkpoint-160")
    assert recipe.takes == (
        Take("model.layers.0", str(run / "checkpoint-120")),
        Take("model.layers.1", str(run / "checkpoint-140")),
        Take("model.layers.4", str(run / "checkpoint-160")),
        Take(NORM, str(run / "checkpoint-120")),
        Take(HEAD, str(run / "checkpoint-140")),
    )
    again = native(parse(recipe.text, "again"))
    assert (again.base, again.takes, again.train) == (recipe.base, recipe.takes, recipe.train)
    first = assemble(flags, 100, run, whole)
    assert first == Recipe(str(run / "checkpoint-100"), name=flags.name, text=f"base: {run / 'checkpoint-100'}\n")


HEAD_ID = LAYERS + 1


@given(st.data())
def test_any_log(tmp_path: Path, data: st.DataObject) -> None:
    """Held against a loop over steps; the log is of a run that never went back."""
    steps = sorted(data.draw(st.sets(st.integers(101, 140), max_size=6)))
    saves = [(step, data.draw(st.sets(st.sampled_from(ALL)))) for step in steps]
    at = data.draw(st.integers(100, 145))
    run = folders(tmp_path / f"{len(list(tmp_path.iterdir()))}", 100, *steps)
    recipe = assemble(log(run / "log", (100, ALL), *saves), at, run, whole)
    expected = dict.fromkeys(map(layers_of, ALL), 100)
    for step, units in saves:
        expected |= {layers_of(unit): step for unit in units if step <= at}
    assert sources_of(recipe) == {layer: f"checkpoint-{step}" for layer, step in expected.items()}
    newest = max(expected.values())
    assert Path(recipe.train or recipe.base).name == f"checkpoint-{newest}"


def test_a_run_that_went_back(tmp_path: Path) -> None:
    """What came after the step that it went back to is of another past; a step saved again counts as saved last."""
    run = folders(tmp_path / "run", 100, 120, 130, 140, 160)
    lines = [(100, ALL), (120, {1}), (140, {2}), (160, {3}), (130, {4}), (130, {5})]
    found = sources_of(assemble(log(tmp_path / "log", *lines), 200, run, whole))
    assert {layer for layer, name in found.items() if name == "checkpoint-120"} == {layers_of(1)}
    assert {layer for layer, name in found.items() if name == "checkpoint-130"} == {layers_of(5)}
    assert not {"checkpoint-140", "checkpoint-160"} & set(found.values())


def test_a_base_of_the_users(tmp_path: Path) -> None:
    """By path or by its name in the run; flags that are not newer do not count."""
    run = folders(tmp_path / "run", 100, 120, 140)
    flags = log(tmp_path / "log", (100, {1, 2}), (120, {1}), (140, {3}))
    for base in (run / "checkpoint-120", "checkpoint-120"):
        recipe = assemble(flags, 140, run, whole, base)
        assert recipe.base == str(run / "checkpoint-120")
        assert recipe.takes == (Take(layers_of(3), str(run / "checkpoint-140")),)
    with pytest.raises(RecipeError, match="is of step 140, after step 130"):
        assemble(flags, 130, run, whole, "checkpoint-140")


def test_the_base_that_is_found(tmp_path: Path) -> None:
    """The newest save that flags everything; else a full checkpoint that the log does not mention; else none."""
    run = folders(tmp_path / "run", 100, 120, 140, 150)
    both = log(tmp_path / "both", (100, ALL), (120, ALL), (140, {1}))
    assert assemble(both, 145, run, whole).base == str(run / "checkpoint-120")
    unlogged = log(tmp_path / "log", (120, {1, 2}), (140, {0, 1, 2}))
    assert assemble(unlogged, 160, run, whole).base == str(run / "checkpoint-150")
    assert assemble(unlogged, 145, run, whole).base == str(run / "checkpoint-100")
    for sources in (
        lambda name: index(name, leave_out=(HEAD,)),
        lambda name: index(name, leave_out=("model.layers.2",)),
    ):
        with pytest.raises(RecipeError, match=r"no save at or below step 145 that flags everything.*--base"):
            assemble(unlogged, 145, run, sources)
    short = log(tmp_path / "short", (100, range(LAYERS)), (120, {1}), (140, {2}))
    with pytest.raises(RecipeError, match="flags everything"):
        assemble(short, 145, run, whole)


def test_dcp_folders(tmp_path: Path) -> None:
    """Are checkpoints of steps like any others."""
    run = folders(tmp_path / "run", 100, 120, name="step-{}")
    recipe = assemble(log(tmp_path / "log", (100, ALL), (120, {3})), 120, run, whole)
    assert recipe.takes == (Take(layers_of(3), str(run / "step-120")),)


def test_tied_embeddings(tmp_path: Path) -> None:
    """Are one unit under two numbers, whose layers come together."""
    run = folders(tmp_path / "run", 100, 120, 140)

    def tied(name: str) -> Index:
        return index(name, tied=True)

    for lines, step in (([(120, {HEAD_ID}), (140, {1})], 120), ([(120, {HEAD_ID}), (140, {HEAD_ID + 1})], 140)):
        found = sources_of(assemble(log(tmp_path / "log", (100, range(LAYERS + 2)), *lines), 140, run, tied))
        assert found[EMBED] == found[HEAD] == f"checkpoint-{step}"


def test_what_is_refused(tmp_path: Path) -> None:
    """Checkpoints that are gone or there twice, logs of other models, runs that are none."""
    run = folders(tmp_path / "run", 100, 140)
    gone = log(tmp_path / "gone", (100, ALL), (120, {1, 2}), (140, {2}))
    with pytest.raises(RecipeError, match=r"gone, line 2: model.layers.0 was saved at step 120, but .* --at\.$"):
        assemble(gone, 140, run, whole)
    superseded = log(tmp_path / "log", (100, ALL), (120, {1, 2}), (140, {1, 2}))
    assert assemble(superseded, 140, run, whole).takes
    other = log(tmp_path / "other", (100, ALL), (140, {LAYERS + 3}))
    with pytest.raises(RecipeError, match=f"line 2: unit {LAYERS + 3} is flagged, but the model has {LAYERS} layers"):
        assemble(other, 140, run, whole)
    folders(run, 140, name="step-{}")
    with pytest.raises(RecipeError, match=r"which may be .*checkpoint-140 or .*step-140; move one"):
        assemble(superseded, 140, run, whole)
    with pytest.raises(RecipeError, match="is no run: No such file"):
        assemble(superseded, 140, tmp_path / "nowhere", whole)


def test_real_dcp_checkpoints(tmp_path: Path) -> None:
    """From a log beside a run of small checkpoints, opened as a merge opens them."""
    import torch
    import torch.distributed.checkpoint as dcp

    run = tmp_path / "run"
    names = [layers_of(unit) for unit in ALL]
    for step in (100, 120):
        state = {"model": {f"{name}.weight": torch.full((2,), float(step)) for name in names}}
        dcp.save(state, checkpoint_id=run / f"step-{step}", no_dist=True)
    recipe = assemble(log(tmp_path / "log", (100, ALL), (120, {3})), 120, run, lambda name: open_source(name).index)
    assert recipe.takes == (Take(layers_of(3), str(run / "step-120")),)
