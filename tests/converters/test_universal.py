"""DeepSpeed universal checkpoints both ways, against real engines and DeepSpeed's own converter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tailor_dcp.catalog import Catalog
from tailor_dcp.converters import universal_source, universal_target, zero_source
from tailor_dcp.converters.convert import convert
from tailor_dcp.converters.options import Options
from tailor_dcp.errors import ConversionError, DamagedSourceError
from tailor_dcp.tensors import Given
from tests.support.zero_engines import Setup, fleet

pytest.importorskip("deepspeed")
ZERO3 = Setup(stage=3, dtype="fp32", groups=2)
ZERO2 = replace(ZERO3, stage=2)
ROBIN = replace(ZERO2, world=4, round_robin=True)
ODD = replace(ZERO3, family="odd", dtype="bf16", sub_group_size=300)
KINDS = ("weights", "exp_avg", "exp_avg_sq")


def call(setup: Setup, function: str, *args: Any) -> Any:
    """Call a function of tests.support.universal on all workers of a setup; return what the first one did."""
    return fleet(setup.world).call(f"tests.support.universal:{function}", asdict(setup), *args)[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One training of a setup each, and what DeepSpeed and we make of its checkpoint."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def run(setup: Setup) -> tuple[dict[str, Any], Path]:
        place = folder / str(len(done))
        if setup not in done:
            state = setup.call("train_and_save", str(place / "zero"))[0]
            made = convert(place / "zero", place / "ours", "universal", "zero")
            call(setup, "to_universal", str(place / "zero" / "global_step2"), str(place / "theirs" / "global_step2"))
            done[setup] = {**state, "notes": made.notes}, place
        return done[setup]

    return run


def compared(found: Catalog, expected: Catalog) -> None:
    """Assert that two catalogs are of the same training."""
    assert found.weights.keys() == expected.weights.keys()
    assert found.ties == expected.ties
    assert found.state.keys() == expected.state.keys()
    assert (found.buffers, found.frozen) == (expected.buffers, expected.frozen)
    for name, tensor in expected.tensors.items():
        held = found.tensors[name]
        assert held.dtype == tensor.dtype, name
        assert torch.equal(held.whole(), tensor.whole()), name
    assert [str(group) for group in found.groups] == [str(group) for group in expected.groups]
    zero, others = ({n: v for n, v in c.train["zero"].items() if n != "ds_config"} for c in (found, expected))
    assert zero == others
    rest, other = ({n: v for n, v in c.train.items() if n != "zero"} for c in (found, expected))
    assert rest == other


READ = {
    "3": ZERO3,
    "2": ZERO2,
    "3-odd": ODD,
    "2-odd": replace(ZERO2, family="odd"),
    "1-tied": replace(ZERO2, family="tied_llama", stage=1, dtype="bf16"),
    "2-robin": ROBIN,
}
BOTH = [(name, which) for name in READ for which in ("ours", "theirs") if (name, which) != ("2-robin", "theirs")]


@pytest.mark.parametrize(("name", "which"), BOTH)
def test_what_it_is_read_as(runs: Any, name: str, which: str) -> None:
    """The same as the ZeRO checkpoint that it was made of, whoever made it; moments as the live engine had them."""
    state, place = runs(READ[name])
    found = universal_source.open_source(place / which, Options())
    compared(found, zero_source.open_source(place / "zero", Options()))
    for fqn, array in state["saved"]["exp_avg"].items():
        assert np.array_equal(found.state[fqn]["exp_avg"].whole().numpy(), array)
    assert universal_source.recognise(place / which)
    assert not zero_source.recognise(place / which)


def test_what_deepspeed_mixes_up(runs: Any) -> None:
    """With round_robin_gradients its converter puts weights under other names; such a folder is refused."""
    state, place = runs(ROBIN)
    (folder,) = (place / "theirs").glob("*/zero")
    theirs = {n: torch.load(folder / n / "fp32.pt", weights_only=False)["param"] for n in state["saved"]["weights"]}
    wrong = [n for n, array in state["saved"]["weights"].items() if not np.array_equal(theirs[n].detach(), array)]
    assert len(wrong) > len(theirs) / 2
    with pytest.raises(ConversionError, match="round_robin_gradients"):
        universal_source.open_source(place / "theirs", Options())
    # Its loading does the same the other way round, which is why the option must be off then, and we say so.
    mixed = call(ROBIN, "load_and_train", str(place / "ours"))["saved"]["weights"]
    assert any(not np.array_equal(mixed[n], array) for n, array in state["saved"]["weights"].items())
    right = call(replace(ROBIN, round_robin=False), "load_and_train", str(place / "ours"))["saved"]["weights"]
    assert all(np.array_equal(right[n], array) for n, array in state["saved"]["weights"].items())
    assert any("round_robin_gradients" in note for note in state["notes"])


@pytest.mark.parametrize("stage", [3, 2, 1])
@pytest.mark.parametrize("setup", [ZERO3, ZERO2], ids=["of ZeRO-3", "of ZeRO-2"])
def test_an_engine_of_any_stage_loads_it(runs: Any, setup: Setup, stage: int) -> None:
    """Weights, moments, steps and each param group's own hyper-parameters, bit for bit."""
    state, place = runs(setup)
    loaded = call(replace(setup, stage=stage), "load_and_train", str(place / "ours"))
    for kind in KINDS:
        assert all(np.array_equal(array, loaded["saved"][kind][n]) for n, array in state["saved"][kind].items())
    assert set(loaded["saved"]["steps"]) == {2.0}
    assert loaded["saved"]["scheduler"] == state["saved"]["scheduler"]
    decays = [[group[name] for name in ("lr", "weight_decay")] for group in state["saved"]["groups"]]
    assert [[group[name] for name in ("lr", "weight_decay")] for group in loaded["saved"]["groups"]] == decays
    assert loaded["saved"]["counters"] == state["saved"]["counters"]
    assert np.allclose(loaded["losses"], state["losses"], rtol=0, atol=2e-5)
    if stage < 3:  # ZeRO-3 sums in another order
        assert loaded["losses"] == state["losses"]


def test_what_deepspeed_itself_loses(runs: Any) -> None:
    """The reason for leaving out what differs: a ZeRO-3 engine gives all groups the values of the first."""
    state, place = runs(ZERO3)
    loaded = call(ZERO3, "load_and_train", str(place / "theirs"))
    assert [group["weight_decay"] for group in state["saved"]["groups"]] == [0.1, 0.0]
    assert [group["weight_decay"] for group in loaded["saved"]["groups"]] == [0.1, 0.1]
    assert any("differ in weight_decay" in note for note in state["notes"])


@pytest.mark.parametrize("setup", [ZERO3, ZERO2], ids=["ZeRO-3", "ZeRO-2"])
def test_at_another_world_size(runs: Any, setup: Setup) -> None:
    """Four ranks go on where two were, as exactly as with DeepSpeed's own files."""
    state, place = runs(setup)
    wide = replace(setup, world=4)
    ours = call(wide, "load_and_train", str(place / "ours"))
    for kind in KINDS:
        assert all(np.array_equal(array, ours["saved"][kind][n]) for n, array in state["saved"][kind].items())
    assert abs(ours["losses"][0] - state["losses"][0]) < 1e-5
    if setup.stage == 2:  # ZeRO-3's has lost a weight decay by then
        theirs = call(wide, "load_and_train", str(place / "theirs"))
        assert ours["losses"] == theirs["losses"]
        assert all(np.array_equal(ours["after"]["weights"][n], a) for n, a in theirs["after"]["weights"].items())


def test_through_a_dcp_checkpoint(runs: Any, tmp_path: Path) -> None:
    """And out of it again: the same tensors under the same names."""
    _, place = runs(ODD)
    convert(place / "ours", tmp_path / "dcp", "dcp")
    convert(tmp_path / "dcp", tmp_path / "out", "universal", "dcp")
    compared(
        universal_source.open_source(tmp_path / "out", Options()),
        universal_source.open_source(place / "ours", Options()),
    )


def test_two_processes_share_the_work(runs: Any, tmp_path: Path) -> None:
    """As under torchrun; what they write is what one writes."""
    _, place = runs(ODD)
    said = ODD.call("convert_together", str(place / "zero"), str(tmp_path / "two"), "universal")
    assert said[0] == said[1]
    files = [path.relative_to(place / "ours") for path in (place / "ours").rglob("*") if path.is_file()]
    assert all((tmp_path / "two" / file).read_bytes() == (place / "ours" / file).read_bytes() for file in files)
    assert len(files) > 20


def test_its_size(runs: Any) -> None:
    """There is no second copy of anything in it; DeepSpeed's has all of rank 0's buffers once more."""
    _, place = runs(ODD)
    (copy,) = (place / "theirs").rglob("optimizer_state.pt")
    (ours,) = (place / "ours").rglob("optimizer_state.pt")
    assert any(t.numel() > 100 for t in torch.load(copy, weights_only=False)["fp32_flat_groups"])
    assert not [t for t in tensors_in(torch.load(ours, weights_only=False)) if t.numel() > 1]


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors of nested containers."""
    if isinstance(tree, torch.Tensor):
        yield tree
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from tensors_in(value)


def given(steps: dict[str, float], **kinds: Any) -> Catalog:
    """Return a catalog of one group of parameters of two elements."""
    weights = {name: Given(torch.arange(2.0)) for name in steps}
    made = {k: Given(v) for k, v in (kinds or {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}).items()}
    state = {name: {"step": Given(torch.tensor(step)), **made} for name, step in steps.items()}
    group = {"lr": 0.1, "betas": (0.9, 0.99), "params": list(steps)}
    return Catalog(Path("here"), "test", weights=weights, state=state, groups=(group,))


def test_uneven_steps(tmp_path: Path) -> None:
    """DeepSpeed asserts that they are equal within a group: the newest is written for all, and that is said."""
    notes = universal_target.write(given({"a": 3.0, "b": 5.0}), tmp_path, tmp_path, Options())
    found = universal_source.open_source(tmp_path, Options())
    assert [float(kinds["step"].whole()) for kinds in found.state.values()] == [5.0, 5.0]
    assert any("a is at step 3 and others of its group at 5" in note for note in notes)


def test_an_optimizer_that_is_not_adams(tmp_path: Path) -> None:
    """Is written with what it has, and with the warning that ZeRO-3 does not load it."""
    catalog = given({"a": 3.0}, momentum_buffer=torch.ones(2))
    notes = universal_target.write(catalog, tmp_path, tmp_path, Options(tag="mine"))
    assert (tmp_path / "latest_universal").read_text() == "mine"
    assert (tmp_path / "mine" / "zero" / "a" / "momentum_buffer.pt").is_file()
    assert any("not Adam's" in note for note in notes)


@pytest.mark.parametrize(("name", "tag"), [("a/b", None), ("..", None), ("a.\ud800", None), ("a", "../b"), ("a", "..")])
def test_names_that_lead_elsewhere_are_not_written(tmp_path: Path, name: str, tag: str | None) -> None:
    """Neither a parameter's nor the tag."""
    with pytest.raises(ConversionError, match="is no name"):
        universal_target.write(given({name: 1.0}), tmp_path, tmp_path, Options(tag=tag))


class Evil:
    """An object whose pickle runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A sound checkpoint of two parameters."""
    universal_target.write(given({"a": 1.0, "b": 1.0}), tmp_path / "run", tmp_path / "run", Options(tag="t"))
    return tmp_path / "run"


def opens(folder: Path) -> Catalog:
    return universal_source.open_source(folder, Options())


def test_a_sound_one(sound: Path) -> None:
    """The folder itself can be named, too."""
    assert opens(sound).weights.keys() == opens(sound / "t").weights.keys() == {"a", "b"}


@pytest.mark.parametrize("name", ["a/fp32.pt", "b/exp_avg.pt", "a/step.pt", "optimizer_state.pt"])
def test_a_file_that_runs_code(sound: Path, tmp_path: Path, name: str) -> None:
    """Is refused, and nothing was run."""
    torch.save({"param": Evil(tmp_path / "ran")}, sound / "t" / "zero" / name)
    with pytest.raises(ConversionError, match=r"\w+\.system"):
        opens(sound)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a/fp32.pt", "b/exp_avg.pt", "a/step.pt", "optimizer_state.pt"])
def test_a_file_that_is_cut_off(sound: Path, name: str) -> None:
    """Is refused with its name."""
    file = sound / "t" / "zero" / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DamagedSourceError, match=file.name):
        opens(sound)


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("fp32.pt", torch.ones(3)),
        ("fp32.pt", {"param": torch.ones(1)}),
        ("exp_avg.pt", {"param": 1}),
        ("exp_avg.pt", [1]),
        ("step.pt", "many"),
        ("step.pt", torch.ones(2)),
    ],
)
def test_a_file_of_something_else(sound: Path, name: str, tree: Any) -> None:
    """Is refused with its name."""
    torch.save(tree, sound / "t" / "zero" / "a" / name)
    with pytest.raises(DamagedSourceError, match=name):
        opens(sound)


def test_a_missing_parameter(sound: Path) -> None:
    """Is named."""
    (sound / "t" / "zero" / "b" / "fp32.pt").unlink()
    with pytest.raises(DamagedSourceError, match=r"zero/b has no fp32\.pt"):
        opens(sound)


@pytest.mark.parametrize("name", ["../../secret", "/etc", ".."])
def test_a_parameter_outside_of_its_folder(sound: Path, name: str) -> None:
    """Is refused: its name comes from a file that may be anybody's."""
    path = sound / "t" / "mp_rank_00_model_states.pt"
    tree = torch.load(path)
    torch.save({**tree, "param_shapes": [{name: torch.Size([2])}]}, path)
    with pytest.raises(DamagedSourceError, match="outside of its folder"):
        opens(sound)


def test_experts_and_tensor_parallelism_are_refused(sound: Path) -> None:
    """By name."""
    torch.save({"param": torch.ones(2), "is_expert_param": True}, sound / "t" / "zero" / "a" / "fp32.pt")
    with pytest.raises(ConversionError, match="experts"):
        opens(sound)
    shutil.copy(sound / "t" / "mp_rank_00_model_states.pt", sound / "t" / "mp_rank_01_model_states.pt")
    with pytest.raises(ConversionError, match="tensor parallelism"):
        opens(sound)


def test_a_missing_rank(runs: Any, tmp_path: Path) -> None:
    """DeepSpeed's of ZeRO-3 needs the files of all ranks, as frozen parameters are spread over them."""
    _, place = runs(ODD)
    folder = shutil.copytree(place / "theirs", tmp_path / "run")
    next(folder.rglob("zero_pp_rank_1_*")).unlink()
    with pytest.raises(DamagedSourceError, match="zero_pp_rank_1"):
        opens(folder)


def test_no_checkpoint(tmp_path: Path) -> None:
    """What there is not is said."""
    assert not universal_source.recognise(tmp_path)
    with pytest.raises(ConversionError, match="neither"):
        opens(tmp_path)
    (tmp_path / "latest_universal").write_text("../elsewhere")
    with pytest.raises(ConversionError, match="no universal checkpoint"):
        opens(tmp_path)
