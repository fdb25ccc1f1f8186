"""Damaged and hostile ZeRO checkpoints: one clear error, nothing written, nothing run, the source untouched."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.converters.convert import convert
from tailor_dcp.converters.options import Options
from tailor_dcp.converters.zero_source import open_source
from tailor_dcp.errors import ConversionError, DamagedSourceError, TailorError
from tests.support.zero_samples import TARGETS, edit, sample

MODEL = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
OPTIM = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
Change = Callable[[dict[str, Any]], Any]


def _fails(
    run: Path, words: str, kind: type[ConversionError] = DamagedSourceError, options: Options | None = None
) -> str:
    """Convert to each target's family; return what was said."""
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for to in ("dcp", "zero2", "torch"):
        with pytest.raises(kind, match=words) as caught:
            convert(run, run.parent / "out", to, "zero", options)
        assert not list(run.parent.glob("*out*"))
        assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    return str(caught.value)


@pytest.mark.parametrize(("stage", "name"), [(3, OPTIM), (3, MODEL), (2, OPTIM), (1, OPTIM)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_rank_file(tmp_path: Path, stage: int, name: str, rank: int) -> None:
    """Is named, be it the first or one in the middle."""
    folder = sample(tmp_path / "run", stage, 3)
    (folder / name.format(rank)).unlink()
    assert name.format(rank) in _fails(tmp_path / "run", "lacks")


@pytest.mark.parametrize("stage", [3, 2])
def test_the_last_ranks_files_missing(tmp_path: Path, stage: int) -> None:
    """Which no gap in the numbers tells of; the number of partitions does."""
    folder = sample(tmp_path / "run", stage, 3)
    for path in folder.glob("*rank_2_*"):
        path.unlink()
    _fails(tmp_path / "run", "of a run of 3 ranks .* has the files of 2")


def test_the_models_file_missing(tmp_path: Path) -> None:
    """ZeRO-2 has but one."""
    folder = sample(tmp_path / "run", 2)
    (folder / "mp_rank_00_model_states.pt").unlink()
    _fails(tmp_path / "run", r"lacks mp_rank_00_model_states\.pt")


@pytest.mark.parametrize("stage", [3, 2, 1])
def test_an_optimizer_file_of_another_step(tmp_path: Path, stage: int) -> None:
    """Told by the optimizer's own count."""

    def older(tree: dict[str, Any]) -> None:
        zero = tree["optimizer_state_dict"]
        states = zero["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]["state"]
        for state in states.values():
            state["step"] = state["step"] - 1

    folder = sample(tmp_path / "run", stage)
    edit(folder / OPTIM.format(1), older)
    _fails(tmp_path / "run", r"rank_1_.* is of another step than .*rank_0_.* \(step 4\.0 and 5\.0\)")


def test_a_model_file_of_another_step(tmp_path: Path) -> None:
    """Told by the engine's count."""
    folder = sample(tmp_path / "run")
    edit(folder / MODEL.format(1), lambda tree: tree.update(global_steps=4))
    _fails(tmp_path / "run", "of another step .*global_steps 4 and 5")


def test_other_learning_rates(tmp_path: Path) -> None:
    """Two ranks never have these at one step."""
    folder = sample(tmp_path / "run", 2)
    groups = lambda tree: tree["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]  # noqa: E731
    edit(folder / OPTIM.format(1), lambda tree: groups(tree)[0].update(lr=0.5))
    _fails(tmp_path / "run", "other param groups")


@pytest.mark.parametrize("stage", [3, 2])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.97, 0.999])
def test_a_truncated_file(tmp_path: Path, stage: int, keep: float) -> None:
    """Wherever it ends."""
    folder = sample(tmp_path / "run", stage)
    path = folder / OPTIM.format(1)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    _fails(tmp_path / "run", "rank_1_mp_rank_00_optim_states.pt is damaged")


@pytest.mark.parametrize(("stage", "count"), [(3, 4), (3, None), (3, "2"), (2, [4, 4]), (1, [2, 4])])
def test_a_wrong_partition_count(tmp_path: Path, stage: int, count: Any) -> None:
    """Told before anything is made of the flat buffers."""
    folder = sample(tmp_path / "run", stage)
    edit(folder / OPTIM.format(1), lambda tree: tree["optimizer_state_dict"].update(partition_count=count))
    _fails(tmp_path / "run", "partition_count")


def test_a_wrong_world_size(tmp_path: Path) -> None:
    """In the model's file."""
    folder = sample(tmp_path / "run")
    edit(folder / MODEL.format(0), lambda tree: tree.update(dp_world_size=4))
    _fails(tmp_path / "run", "of a run of 4 ranks")


@pytest.mark.parametrize(
    ("stage", "name"), [(3, "fp32_flat_groups"), (2, "single_partition_of_fp32_groups"), (1, "exp_avg")]
)
@pytest.mark.parametrize("less", [1, -1])
def test_flats_of_a_wrong_length(tmp_path: Path, stage: int, name: str, less: int) -> None:
    """Of weights, and of moments; too short and too long."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:-1].clone() if less > 0 else torch.cat([tensor, tensor[:1]])

    def change(tree: dict[str, Any]) -> None:
        zero = tree["optimizer_state_dict"]
        if name == "exp_avg":
            state = zero["base_optimizer_state"]["state"][0]
            state[name] = cut(state[name])
        else:
            zero[name][0] = cut(zero[name][0])

    folder = sample(tmp_path / "run", stage)
    edit(folder / OPTIM.format(1), change)
    _fails(tmp_path / "run", "elements of flat group 0")


def _renamed(tree: dict[str, Any]) -> None:
    tree["param_shapes"][0]["other"] = tree["param_shapes"][0].pop("a.weight")


def _reshaped(tree: dict[str, Any]) -> None:
    tree["param_shapes"][0]["a.weight"] = torch.Size([5, 7])


def _reordered(tree: dict[str, Any]) -> None:
    tree["param_shapes"][0].move_to_end("a.weight")


@pytest.mark.parametrize("change", [_renamed, _reshaped, _reordered])
def test_ranks_disagree_about_the_parameters(tmp_path: Path, change: Change) -> None:
    """In name, shape or order."""
    folder = sample(tmp_path / "run")
    edit(folder / MODEL.format(1), change)
    _fails(tmp_path / "run", "param_shapes")


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (MODEL, lambda tree: tree.pop("module"), "has no 'module'"),
        (MODEL, lambda tree: tree.update(param_shapes={}), "has no 'param_shapes'"),
        (MODEL, lambda tree: tree.update(param_shapes=[[]]), "has no 'param_shapes'"),
        (MODEL, lambda tree: tree["param_shapes"].append({}), "3 groups of parameters"),
        (MODEL, lambda tree: tree["frozen_param_fragments"].clear(), "has no 'frozen'"),
        (OPTIM, lambda tree: tree.pop("optimizer_state_dict"), "has no 'optimizer_state_dict'"),
        (OPTIM, lambda tree: tree["optimizer_state_dict"].pop("zero_stage"), "does not tell its stage"),
        (OPTIM, lambda tree: tree["optimizer_state_dict"].pop("fp32_flat_groups"), "has no 'fp32_flat_groups'"),
        (OPTIM, lambda tree: tree["optimizer_state_dict"].update(fp32_flat_groups=["x", "y"]), "else than tensors"),
    ],
)
def test_entries_that_are_missing_or_others(tmp_path: Path, file: str, change: Change, words: str) -> None:
    """Each is named, with its file."""
    folder = sample(tmp_path / "run")
    for rank in range(2):
        edit(folder / file.format(rank), change)
    _fails(tmp_path / "run", words)


def test_groups_of_other_parameters(tmp_path: Path) -> None:
    """Param groups refer to flat buffers by number."""

    def change(tree: dict[str, Any]) -> None:
        tree["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"][0]["params"] = [7]

    folder = sample(tmp_path / "run")
    for rank in range(2):
        edit(folder / OPTIM.format(rank), change)
    _fails(tmp_path / "run", "param groups of other parameters")


def test_two_saves_in_one_folder(tmp_path: Path) -> None:
    """One of a bf16 run and one of an fp32 run: nothing tells which is meant."""
    folder = sample(tmp_path / "run")
    (folder / f"bf16_{OPTIM.format(0)}").write_bytes((folder / OPTIM.format(0)).read_bytes())
    _fails(tmp_path / "run", "two files of rank 0")


def test_files_of_two_stages(tmp_path: Path) -> None:
    """A rank's file of another run."""
    folder, other = sample(tmp_path / "run"), sample(tmp_path / "other", 2)
    (folder / OPTIM.format(1)).write_bytes((other / OPTIM.format(1)).read_bytes())
    _fails(tmp_path / "run", "is of ZeRO-2")


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._mark),)


class Client:
    """A class of the training script."""


CLIENT = f"{Client.__module__}.Client"


@pytest.mark.parametrize("file", [MODEL, OPTIM])
@pytest.mark.parametrize("allow", [(), (CLIENT,)])
def test_a_pickle_that_runs_code(tmp_path: Path, file: str, allow: tuple[str, ...]) -> None:
    """It is not run, also where another class is admitted."""
    folder = sample(tmp_path / "run")
    mark = tmp_path / "mark"
    tree = torch.load(folder / MODEL.format(1), weights_only=True)
    torch.save({**tree, "evil": Evil(mark), "client": Client()}, folder / file.format(1))
    said = _fails(tmp_path / "run", r"posix\.mkdir|Client", ConversionError, Options(allow=allow))
    assert not mark.exists() and file.format(1) in said
    (folder / file.format(1)).write_bytes(pickle.dumps(Evil(mark), 2))
    _fails(tmp_path / "run", "posix.mkdir|its pickle is not", ConversionError, Options(allow=allow))
    assert not mark.exists()


def test_an_unknown_class_is_named_and_can_be_admitted(tmp_path: Path) -> None:
    """Client state may hold anything."""
    folder = sample(tmp_path / "run")
    for rank in range(2):
        edit(folder / MODEL.format(rank), lambda tree: tree.update(mine=Client()))
    said = _fails(tmp_path / "run", CLIENT, ConversionError)
    assert f"--allow {CLIENT}" in said
    catalog = open_source(tmp_path / "run", Options(allow=(CLIENT,)))
    assert isinstance(catalog.train["mine"], Client)


@pytest.mark.parametrize("latest", ["../other/global_step5", "/etc", "global_step9", "..", ""])
def test_a_latest_that_leads_elsewhere(tmp_path: Path, latest: str) -> None:
    """Or to nothing."""
    sample(tmp_path / "run")
    sample(tmp_path / "other")
    (tmp_path / "run" / "latest").write_text(latest)
    if latest == "global_step9":
        _fails(tmp_path / "run", "has no checkpoint 'global_step9'", ConversionError)
    else:
        assert open_source(tmp_path / "run", Options()).train["step"] == 5  # the only one there is


@pytest.mark.parametrize("tag", ["../other/global_step5", "/etc", "..", "nothing"])
def test_a_tag_that_leads_elsewhere(tmp_path: Path, tag: str) -> None:
    """Is refused."""
    sample(tmp_path / "run")
    sample(tmp_path / "other")
    _fails(tmp_path / "run", "has no checkpoint", ConversionError, Options(tag=tag))


def test_a_source_that_ends_while_it_is_read(tmp_path: Path) -> None:
    """After it was found to be sound: nothing is left of the result."""
    folder = sample(tmp_path / "run")
    catalog = open_source(tmp_path / "run", Options())
    with (folder / OPTIM.format(1)).open("r+b") as stream:
        stream.truncate(2000)
    with pytest.raises(DamagedSourceError, match="ends before"):
        catalog.weights["big"].whole()


JUNK = (None, "x", -1, 10**30, 0.5, [], {}, [[]], {"x": []}, torch.zeros(2, 2), torch.tensor(3), ("a", 1), True)


def _places(tree: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value in nested containers."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield (*way, key)
        yield from _places(value, (*way, key))


def _replaced(tree: Any, way: tuple[Any, ...], junk: Any) -> None:
    for key in way[:-1]:
        tree = tree[key]
    tree[way[-1]] = junk


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A checkpoint of each stage, to be copied."""
    folder = tmp_path_factory.mktemp("runs")
    return {stage: sample(folder / str(stage), stage).parent for stage in (3, 2, 1)}


@given(st.sampled_from([3, 2, 1]), st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(JUNK), st.booleans())
def test_any_value_may_be_anything(
    runs: dict[int, Path], stage: int, file: int, place: int, junk: Any, everywhere: bool
) -> None:
    """It is read, or refused in one sentence; never a traceback from inside."""
    with tempfile.TemporaryDirectory() as folder:
        run = shutil.copytree(runs[stage], Path(folder) / "run")
        files = sorted((run / "global_step5").iterdir())
        chosen = files[file % len(files)]
        kind = chosen.name[-15:]

        def change(tree: dict[str, Any]) -> None:
            ways = list(_places(tree))
            _replaced(tree, ways[place % len(ways)], junk)

        for path in [p for p in files if p.name.endswith(kind)] if everywhere else [chosen]:
            edit(path, change)
        try:
            catalog = open_source(run, Options())
            for tensor in catalog.tensors.values():
                assert tensor.whole().shape == tensor.size
            TARGETS[3].write(catalog, Path(folder) / "out", Path(folder) / "out", Options())
        except TailorError as error:
            assert "\n" not in str(error)
