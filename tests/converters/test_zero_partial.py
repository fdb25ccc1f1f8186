"""StreamCheck's partial checkpoints: what is in them is read, and what is not is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tailor_dcp.converters.convert import convert
from tailor_dcp.converters.options import Options
from tailor_dcp.converters.zero_source import open_source
from tailor_dcp.errors import ConversionError, DamagedSourceError
from tailor_dcp.formats import formats
from tests.support import partial_checkpoints as runs
from tests.support.partial_checkpoints import LAYERS, unit_of
from tests.support.zero_samples import edit, sample

pytest.importorskip("deepspeed")
OPTIM = "*optim_states.pt"


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.long)], ids=["untied", "tied"])
def full(request: Any, tmp_path_factory: Any) -> Iterator[tuple[Path, bool]]:
    """A full checkpoint of a real engine with a param group for each layer."""
    run = tmp_path_factory.mktemp("run")
    runs.call("train_run", str(run), [2], request.param, True, "bf16")
    runs.call("forget")
    yield run / "checkpoint-2", request.param


@pytest.mark.parametrize("units", [{0, 1, 3}, {0}, {LAYERS + 1}, {2, LAYERS, LAYERS + 1}])
def test_what_is_there_is_read(full: tuple[Path, bool], tmp_path: Path, units: set[int]) -> None:
    """Weights, moments, steps and groups of the saved units, as the full checkpoint has them; nothing of others."""
    whole, tied = full
    found = formats().open(runs.cut(whole, tmp_path / "checkpoint-2", units, tied))
    expected = open_source(whole, Options())
    names = {name for name in expected.weights if unit_of(name, tied) in units}
    assert found.weights.keys() == found.state.keys() | found.ties.keys() == names
    assert set(load_file(tmp_path / "checkpoint-2" / "model.safetensors")) == names - {"lm_head.weight"} | (
        set() if tied else {"lm_head.weight"} & names
    )
    for key, tensor in found.tensors.items():
        assert torch.equal(tensor.whole(), expected.tensors[key].whole()), key
    assert found.ties == {alias: name for alias, name in expected.ties.items() if alias in names}
    groups = [dict(group) for group in expected.groups if {*group["params"]} & names]
    assert [dict(group) for group in found.groups] == groups and found.train == expected.train
    layers = {unit_of(name, tied) for name in names}
    assert len(found.notes) == 1 and not expected.notes
    assert f"is a partial checkpoint, of {len(layers)} of {LAYERS + (2 if tied else 3)} layers" in found.notes[0]


def test_groups_in_another_order(full: tuple[Path, bool], tmp_path: Path) -> None:
    """A group is found by its number, not by its place."""
    whole, tied = full
    folder = runs.cut(whole, tmp_path / "checkpoint-2", {0, 2, 3}, tied)

    def turn(tree: dict[str, Any]) -> None:
        zero = tree["optimizer_state_dict"]
        zero["fp32_flat_groups"].reverse()
        zero["optimizer_state_dict"]["param_groups"].reverse()

    for path in folder.rglob(OPTIM):
        edit(path, turn)
    found, expected = open_source(folder, Options()), open_source(whole, Options())
    for key, tensor in found.tensors.items():
        assert torch.equal(tensor.whole(), expected.tensors[key].whole()), key


def test_converting(full: tuple[Path, bool], tmp_path: Path) -> None:
    """A DCP checkpoint of what is there, with the note."""
    whole, tied = full
    folder = runs.cut(whole, tmp_path / "checkpoint-2", {0, 1}, tied)
    done = convert(folder, tmp_path / "step-2", "dcp")
    assert done.layers == 2 and any("is a partial checkpoint" in note for note in done.notes)
    found = formats().open(tmp_path / "step-2")
    assert {unit_of(name) for name in found.weights} == {0, 1}
    assert sum(len(group["params"]) for group in found.groups) == len(found.state)


def _lacks_a_state(zero: dict[str, Any]) -> None:
    zero["optimizer_state_dict"]["state"][2] = zero["optimizer_state_dict"]["state"].pop(0)


def _lacks_a_group(zero: dict[str, Any]) -> None:
    del zero["optimizer_state_dict"]["param_groups"][0]


def _has_a_number_twice(zero: dict[str, Any]) -> None:
    zero["optimizer_state_dict"]["param_groups"][0]["params"] = [1]


def _has_a_number_beyond(zero: dict[str, Any]) -> None:
    zero["optimizer_state_dict"]["param_groups"][0]["params"] = [99]
    zero["optimizer_state_dict"]["state"][99] = zero["optimizer_state_dict"]["state"].pop(0)


def _has_another_number(zero: dict[str, Any]) -> None:
    zero["optimizer_state_dict"]["param_groups"][0]["params"] = [LAYERS + 1]
    zero["optimizer_state_dict"]["state"][LAYERS + 1] = zero["optimizer_state_dict"]["state"].pop(0)


def _has_words(zero: dict[str, Any]) -> None:
    zero["optimizer_state_dict"]["param_groups"][0]["params"] = ["0"]


def _is_empty(zero: dict[str, Any]) -> None:
    zero["optimizer_state_dict"].update(state={}, param_groups=[])
    zero["fp32_flat_groups"] = []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_lacks_a_state, "groups of parameters and"),
        (_lacks_a_group, "param groups of other parameters"),
        (_has_a_number_twice, "param groups of other parameters"),
        (_has_a_number_beyond, "param groups of other parameters"),
        (_has_another_number, "elements of flat group"),
        (_has_words, "param groups of other parameters"),
        (_is_empty, "groups of parameters and"),
    ],
)
def test_damaged_ones(full: tuple[Path, bool], tmp_path: Path, change: Any, words: str) -> None:
    """Whose numbers do not fit each other."""
    whole, tied = full
    folder = runs.cut(whole, tmp_path / "checkpoint-2", {0, 1}, tied)
    for path in folder.rglob(OPTIM):
        edit(path, lambda tree: change(tree["optimizer_state_dict"]))
    with pytest.raises(DamagedSourceError, match=words):
        open_source(folder, Options())


def test_ranks_of_different_saves(full: tuple[Path, bool], tmp_path: Path) -> None:
    """Each with other units, though as many."""
    whole, tied = full
    folder, other = (runs.cut(whole, tmp_path / str(n), {0, n}, tied) for n in (1, 2))
    path = next(folder.rglob(f"*rank_1_*{OPTIM[1:]}"))
    shutil.copy(next(other.rglob(path.name)), path)
    with pytest.raises(DamagedSourceError, match="flat groups"):
        open_source(folder, Options())


# Which checkpoint of a folder is meant --------------------------------------------------------------------------


def _folder(tmp_path: Path, name: str, *tags: str, latest: str | None = None) -> Path:
    """Make a Trainer's folder with checkpoints under some tags, that of the first being of another world size."""
    folder = tmp_path / name
    for number, tag in enumerate(tags):
        sample(tmp_path / tag, world=2 + number, tag=tag)
        shutil.copytree(tmp_path / tag / tag, folder / tag)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 5}))
    if latest:
        (folder / "latest").write_text(latest)
    return folder


@pytest.mark.parametrize(
    ("tags", "latest", "expected"),
    [
        (("global_step200",), None, "global_step200"),
        (("global_step199",), None, "global_step199"),
        (("global_step200",), "global_step300", "global_step200"),
        (("global_step199",), "global_step300", "global_step199"),
        (("global_step100", "global_step200"), "global_step100", "global_step200"),
        (("global_step199", "global_step200"), None, "global_step200"),
        (("global_step150",), None, "global_step150"),
        (("global_step100", "global_step150"), "global_step150", "global_step150"),
    ],
)
def test_the_folder_tells_the_step(tmp_path: Path, tags: tuple[str, ...], latest: str | None, expected: str) -> None:
    """As LLMTailor has it: that of the folder's number, or one less; only then what ``latest`` names."""
    found = open_source(_folder(tmp_path, "checkpoint-200", *tags, latest=latest), Options())
    assert found.train["zero"]["world_size"] == 2 + tags.index(expected)


def test_a_tag_is_obeyed(tmp_path: Path) -> None:
    """Whatever the folder is called; and other folders go by ``latest``."""
    folder = _folder(tmp_path, "checkpoint-200", "global_step200", "global_step100", latest="global_step200")
    assert open_source(folder, Options(tag="global_step100")).train["zero"]["world_size"] == 3
    other = folder.rename(tmp_path / "output")
    (other / "latest").write_text("global_step100")
    assert open_source(other, Options()).train["zero"]["world_size"] == 3
    (other / "latest").unlink()
    with pytest.raises(ConversionError, match="--tag"):
        open_source(other, Options())
