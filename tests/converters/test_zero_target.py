"""Writing ZeRO checkpoints for other ranks, stages and dtypes; real engines load what was written."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tailor_dcp import rank_state
from tailor_dcp.converters.convert import convert
from tailor_dcp.converters.options import Options
from tailor_dcp.converters.zero_source import open_source
from tailor_dcp.errors import ConversionError
from tailor_dcp.tensors import Given
from tests.support.zero_cases import check_same
from tests.support.zero_engines import Setup
from tests.support.zero_samples import TARGETS, catalog, sample

pytest.importorskip("deepspeed")

MOVED = [
    Setup(3, 2, "bf16", 2, "odd", sub_group_size=300),
    Setup(3, 4, "fp32", 1, "tied_llama"),
    Setup(2, 2, "bf16", 2, "gpt2"),
    Setup(2, 4, "bf16", 2, "odd", round_robin=True),
    Setup(1, 4, "fp32", 1, "odd"),
    Setup(1, 2, "bf16", 2, "tied_llama", round_robin=True),
]


@pytest.mark.parametrize("setup", MOVED, ids=lambda s: f"zero{s.stage}-{s.world}ranks-{s.family}")
def test_to_another_world_size_and_back(setup: Setup, tmp_path: Path) -> None:
    """A real engine of the other size loads it and saves it again; two steps later all is the same, bit for bit."""
    other = 4 if setup.world == 2 else 2
    moved = replace(setup, world=other)
    trained = setup.call("train_and_save", str(tmp_path / "run"))[0]
    to = f"zero{setup.stage}"
    convert(tmp_path / "run", tmp_path / "moved", to, "zero", Options(world_size=other))
    moved.call("load_and_save", str(tmp_path / "moved"), str(tmp_path / "resaved"))
    convert(tmp_path / "resaved", tmp_path / "back", to, "zero", Options(world_size=setup.world))
    expected = setup.call("load_and_train", str(tmp_path / "run"))
    found = setup.call("load_and_train", str(tmp_path / "back"))
    check_same(_less(found[0]["saved"], "counters"), _less(trained["saved"], "counters"))
    check_same(_less(found[0]["after"], "counters"), _less(expected[0]["after"], "counters"))
    assert [rank["losses"] for rank in found] == [rank["losses"] for rank in expected]


def _less(state: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3), (1, 3), (3, 1)])
def test_to_another_stage(before: int, after: int, tmp_path: Path) -> None:
    """An engine of the other stage has the same weights, moments and groups, in the same order."""
    setup = Setup(before, 2, groups=2, family="odd")
    trained = setup.call("train_and_save", str(tmp_path / "run"))[0]["saved"]
    convert(tmp_path / "run", tmp_path / "step-2", "dcp", "zero")
    convert(tmp_path / "step-2", tmp_path / "out", f"zero{after}", "dcp")
    found = replace(setup, stage=after).call("load_and_train", str(tmp_path / "out"), further=1)[0]["saved"]
    check_same(found, trained)


def test_to_another_dtype(tmp_path: Path) -> None:
    """--dtype is what the engine computes in; the masters stay as they were."""
    for stage in (3, 2):
        run, out = tmp_path / f"run{stage}", tmp_path / f"out{stage}"
        setup = Setup(stage, 2, "fp32", family="odd")
        trained = setup.call("train_and_save", str(run))[0]["saved"]
        convert(run, out, f"zero{stage}", "zero", Options(dtype=torch.bfloat16))
        assert (out / "global_step2" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").exists()
        found = replace(setup, dtype="bf16").call("load_and_train", str(out), further=1)[0]["saved"]
        check_same(_less(found, "buffers"), _less(trained, "buffers"))
        assert open_source(out, Options()).train["zero"]["dtype"] == "bf16"


@pytest.mark.parametrize("size", [1, 250, 10**9 - 1])
def test_other_sub_groups(size: int, tmp_path: Path) -> None:
    """For an engine that has this sub_group_size; without the option it is the source's."""
    setup = Setup(3, 2, groups=2, family="odd", sub_group_size=120)
    trained = setup.call("train_and_save", str(tmp_path / "run"))[0]["saved"]
    convert(tmp_path / "run", tmp_path / "out", "zero3", "zero", Options(sub_group_size=size))
    found = replace(setup, sub_group_size=size).call("load_and_train", str(tmp_path / "out"), further=1)[0]["saved"]
    assert set(found["steps"]) == set(trained["steps"])
    check_same(_less(found, "steps"), _less(trained, "steps"))


@pytest.mark.parametrize("stage", [2, 1])
def test_aligned_parameters_and_gradients_dealt_round(stage: int, tmp_path: Path) -> None:
    """As the source's configuration has it, at another number of ranks, too."""
    setup = Setup(stage, 2, groups=2, family="odd", round_robin=True, options=(("parameter_alignment", True),))
    trained = setup.call("train_and_save", str(tmp_path / "run"))[0]["saved"]
    convert(tmp_path / "run", tmp_path / "out", f"zero{stage}", "zero", Options(world_size=4))
    found = replace(setup, world=4).call("load_and_train", str(tmp_path / "out"), further=1)[0]["saved"]
    check_same(_less(found, "counters"), _less(trained, "counters"))


@pytest.mark.parametrize("stage", [3, *(pytest.param(stage, marks=pytest.mark.long) for stage in (2, 1))])
def test_weights_only(stage: int, tmp_path: Path) -> None:
    """The optimizer starts at zero, which is said; an engine trains on from there."""
    setup = Setup(stage, 2, family="llama")
    trained = setup.call("train_and_save", str(tmp_path / "run"))[0]["saved"]
    options = Options(weights_only=True, world_size=2, dtype=torch.bfloat16)
    done = convert(tmp_path / "run", tmp_path / "out", f"zero{stage}", "zero", options)
    assert any("starts at zero" in note for note in done.notes)
    found = setup.call("load_and_train", str(tmp_path / "out"), further=2, load_lr_scheduler_states=False)[0]
    check_same({"weights": found["saved"]["weights"]}, {"weights": trained["weights"]})
    assert not any(value.any() for value in found["saved"]["exp_avg"].values())
    assert set(found["saved"]["steps"]) == {0.0} and set(found["after"]["steps"]) == {2.0}


@pytest.mark.parametrize("setup", [Setup(3, 2, family="odd"), Setup(2, 4, family="gpt2", round_robin=True)])
def test_deepspeeds_own_converter_reads_it(setup: Setup, tmp_path: Path) -> None:
    """zero_to_fp32 finds the same in what it is converted to as in what DeepSpeed saved."""
    setup.call("train_and_save", str(tmp_path / "run"), further=0)
    convert(tmp_path / "run", tmp_path / "out", f"zero{setup.stage}", "zero")
    expected, found = (setup.call("consolidated", str(tmp_path / name))[0] for name in ("run", "out"))
    check_same({"weights": found}, {"weights": expected})


def test_deepspeeds_classes(tmp_path: Path) -> None:
    """Are its own where it is installed; here they are stand-ins under its names."""
    for stage, member in ((3, "weights"), (2, "gradients"), (1, "optimizer_states")):
        folder = sample(tmp_path / str(stage), stage)
        path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        found = Setup(3, 1).call("classes_in", str(path))[0]
        assert found["zero_stage"].startswith("deepspeed.runtime.zero.config.ZeroStageEnum ")
        assert f"'_name_': '{member}'" in found["zero_stage"]
        assert found["loss_scaler"].startswith("deepspeed.runtime.fp16.loss_scaler.LossScaler")
        if stage < 3:
            assert found["fragment"].startswith("deepspeed.utils.tensor_fragment.fragment_address {'numel':")


def test_a_loss_scale_that_adapts(tmp_path: Path) -> None:
    """fp16 needs a GPU to train, but its files can be held against DeepSpeed's classes; twice, with the counters."""
    folder = sample(tmp_path / "run", 2, dtype=torch.float16)
    name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    found = Setup(3, 1).call("classes_in", str(folder / name))[0]
    assert found["loss_scaler"].startswith("deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler {'cur_scale': 65536.0")
    zero = open_source(tmp_path / "run", Options()).train["zero"]
    assert (zero["loss_scale"], zero["last_overflow_iter"], zero["dtype"]) == (2.0**16, -1, "fp16")
    train = {**catalog().train, "zero": {**zero, "loss_scale": 8.0, "cur_iter": 7}}
    TARGETS[3].write(catalog(train=train), tmp_path / "out", tmp_path / "out", Options())
    again = open_source(tmp_path / "out", Options()).train["zero"]
    assert (again["loss_scale"], again["cur_iter"], again["dtype"], again["world_size"]) == (8.0, 7, "fp16", 2)


@pytest.mark.parametrize("stage", [3, 2, 1])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_files_are_sound_archives_and_padding_is_zero(stage: int, world: int, tmp_path: Path) -> None:
    """Every checksum fits, though files were made before their contents."""
    folder = sample(tmp_path / "run", stage, world)
    for path in folder.iterdir():
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None, path
    catalogs = catalog(), open_source(tmp_path / "run", Options())
    total = 0.0
    for name in catalogs[0].state:
        for kind in ("exp_avg", "exp_avg_sq"):
            assert catalogs[0].state[name][kind].whole().equal(catalogs[1].state[name][kind].whole())
            total += float(catalogs[0].state[name][kind].whole().double().abs().sum())
    found = 0.0
    for path in folder.glob("*optim_states.pt"):
        from tailor_dcp.converters.zero_contents import OptimFile

        file = OptimFile(path, Options())
        for number in range(len(file.weights)):
            found += sum(float(t.whole().double().abs().sum()) for t in file.state(number)[0].values())
    assert found == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("stage", [3, 2, 1])
def test_everything_comes_back(stage: int, tmp_path: Path) -> None:
    """Names, ties, groups, what is trained and what not, the training's own entries."""
    first = catalog()
    rng = rank_state.pack([rank_state.rng_state(), rank_state.rng_state()])
    train = {**first.train, "rng": rng, "dataloader": b"position", "token": "x", "client": {"step": 3}}
    TARGETS[stage].write(replace(first, train=train), tmp_path / "run", tmp_path / "run", Options(world_size=3))
    again = open_source(tmp_path / "run", Options())
    assert list(again.weights) == list(first.weights)
    for name, tensor in first.weights.items():
        assert again.weights[name].whole().equal(tensor.whole()), name
    assert again.ties == first.ties == {"b.tied": "b.weight"}
    assert again.buffers == first.buffers and again.frozen == first.frozen
    assert [dict(group) for group in again.groups] == [dict(group) for group in first.groups]
    kept = {name: value for name, value in again.train.items() if name != "zero"}
    assert kept == {name: value for name, value in train.items() if name != "token"}


def test_layers_at_different_steps(tmp_path: Path) -> None:
    """ZeRO has one count for all; the newest is written, and it is said."""
    states = {name: dict(kinds) for name, kinds in catalog().state.items()}
    states["big"]["step"] = Given(torch.tensor(3.0))
    notes = TARGETS[2].write(catalog(state=states), tmp_path / "run", tmp_path / "run", Options())
    assert any("big is at step 3 and a.weight at step 5" in note for note in notes)
    assert float(open_source(tmp_path / "run", Options()).state["big"]["step"].whole()) == 5


def test_states_of_some_parameters_only(tmp_path: Path) -> None:
    """Those that were never stepped have moments of zero."""
    states = {name: kinds for name, kinds in catalog().state.items() if name != "one"}
    TARGETS[3].write(catalog(state=states), tmp_path / "run", tmp_path / "run", Options())
    again = open_source(tmp_path / "run", Options())
    assert not again.state["one"]["exp_avg"].whole().any() and again.state["a.bias"]["exp_avg"].whole().any()


def test_narrow_weights_and_moments_become_fp32(tmp_path: Path) -> None:
    """As a composite may hold them; every value stays."""
    first = catalog()
    weights = {n: Given(t.whole().bfloat16()) if n != "table" else t for n, t in first.stored.items()}
    states = {n: {k: Given(t.whole().bfloat16()) for k, t in held.items()} for n, held in first.state.items()}
    TARGETS[3].write(
        replace(first, weights=weights, state=states), tmp_path / "r", tmp_path / "r", Options(world_size=2)
    )
    again = open_source(tmp_path / "r", Options())
    assert again.weights["big"].whole().equal(weights["big"].whole().float())
    assert again.state["big"]["exp_avg"].whole().equal(states["big"]["exp_avg"].whole().float())
    assert again.train["zero"]["dtype"] == "bf16"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state": {"big": {"exp_avg_sq_row": Given(torch.zeros(64))}}}, "exp_avg_sq_row of big has the size"),
        ({"groups": ({"lr": 1.0, "params": ["other"]},)}, "has other in its optimizer, but no weight"),
        ({"groups": ({"lr": 1.0, "params": ["frozen"]},)}, "no trained parameters"),
    ],
)
def test_what_cannot_be_written(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Is refused by name, before anything is written."""
    with pytest.raises(ConversionError, match=words):
        TARGETS[3].write(catalog(**changes), tmp_path / "run", tmp_path / "run", Options())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [Options(world_size=0), Options(sub_group_size=0)])
def test_numbers_that_make_no_sense(options: Options, tmp_path: Path) -> None:
    """Are refused before anything is written."""
    with pytest.raises(ConversionError, match="must be at least 1"):
        TARGETS[3].write(catalog(), tmp_path / "run", tmp_path / "run", options)
    assert not (tmp_path / "run").exists()


def test_a_state_that_is_two_things(tmp_path: Path) -> None:
    """A moment of one parameter, a single number of another."""
    states = {name: dict(kinds) for name, kinds in catalog().state.items()}
    states["big"]["exp_avg"] = Given(torch.tensor(3.0))
    with pytest.raises(ConversionError, match="exp_avg has a value for each element of some parameters"):
        TARGETS[3].write(catalog(state=states), tmp_path / "run", tmp_path / "run", Options())


@pytest.mark.parametrize("tag", ["../x", "a/b", ".."])
def test_a_tag_that_is_no_name(tag: str, tmp_path: Path) -> None:
    """It would be written elsewhere."""
    with pytest.raises(ConversionError, match="is no name of a folder"):
        TARGETS[3].write(catalog(), tmp_path / "run", tmp_path / "run", Options(tag=tag))
    assert not list(tmp_path.iterdir())


def test_what_is_neither_trained_nor_known(tmp_path: Path) -> None:
    """Is taken for a frozen parameter, unless its name or dtype is a buffer's; ZeRO-3 needs to know, so it is said."""
    first = catalog(buffers=frozenset(), frozen=frozenset())
    more = {**first.weights, "norm.running_mean": Given(torch.zeros(3))}
    notes = TARGETS[3].write(replace(first, weights=more), tmp_path / "run", tmp_path / "run", Options())
    assert any("frozen are not trained" in note for note in notes)
    again = open_source(tmp_path / "run", Options())
    assert again.buffers == {"table", "norm.running_mean"} and again.frozen == {"frozen"}


@pytest.mark.parametrize("limit", [3_000, 30_000])
def test_a_disk_that_fills_up(limit: int, tmp_path: Path) -> None:
    """One clear error and no result, where the file is made and where it is filled."""
    sample(tmp_path / "run")
    script = (
        "import resource; from tailor_dcp.converters.convert import convert\n"
        "from tailor_dcp.errors import ConversionError\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"try: convert({str(tmp_path / 'run')!r}, {str(tmp_path / 'out')!r}, 'zero3')\n"
        "except ConversionError as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "cannot be written" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("to", ["dcp", "zero3", "zero2"])
def test_two_processes_share_the_work(to: str, tmp_path: Path) -> None:
    """As under torchrun; what they write is what one writes."""
    sample(tmp_path / "run", 3, 3)
    convert(tmp_path / "run", tmp_path / "one", to, "zero")
    said = Setup(3, 2).call("convert_together", str(tmp_path / "run"), str(tmp_path / "two"), to)
    assert said[0] == said[1]
    if to != "dcp":
        files = [p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()]
        assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
        assert len(files) == (7 if to == "zero3" else 5)
        return
    convert(tmp_path / "two", tmp_path / "back", "zero3", "dcp")
    again, first = (open_source(tmp_path / name, Options()) for name in ("back", "run"))
    assert all(np.array_equal(again.weights[n].whole(), t.whole()) for n, t in first.weights.items())
