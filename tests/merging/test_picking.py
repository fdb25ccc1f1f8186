"""Doing a merge: no data file is opened, nothing half made is left, and other formats take part."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tailor_dcp import LayerwisePlanner, inspect, latest, lineage
from tailor_dcp.catalog import Catalog
from tailor_dcp.formats import formats
from tailor_dcp.locks import Lock
from tailor_dcp.merge import merge
from tailor_dcp.merging import assemble
from tailor_dcp.merging.catalogs import Repeated
from tailor_dcp.metadata.record import Sums
from tailor_dcp.prune import prune
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.writer import LayerwiseWriter
from tests.support.forks import killed_at
from tests.support.hf_models import made
from tests.support.merges import Net, differing, loaded, save, tree
from tests.support.runs import record, unheard
from tests.support.training import Training

pytestmark = pytest.mark.filterwarnings("ignore::tailor_dcp.TailorWarning")

NET = Net(3)
L0, L1, L2 = (f"model.layers.{n}" for n in range(3))
RENAME = {L1: [L1, "model.layers.3"]}
_ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with unheard():
        for step in (100, 200):
            save(tmp_path / "run", NET, step, "full")
    return tmp_path / "run"


def recipe(run: Path, **rest: Any) -> dict[str, Any]:
    return {"base": str(run / "step-200"), "layers": {L1: str(run / "step-100")}, **rest}


def expected(run: Path) -> dict[str, Any]:
    old = loaded(run / "step-100", NET)
    return loaded(run / "step-200", NET) | {key: value for key, value in old.items() if f"{L1}." in key}


# What is opened ---------------------------------------------------------------------------

WATCHED = """
import json, sys
from tailor_dcp.merge import merge
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
found = []
for recipe, out in json.loads(sys.argv[1]):
    opened.clear()
    merge(recipe, out)
    found.append([path for path in opened if ".distcp" in path])
print(json.dumps(found))
"""


def opened(folder: Path, *recipes: dict[str, Any]) -> list[list[str]]:
    """Return the data files that merges open, as Python tells it; strace must have seen no others."""
    asked = json.dumps([[recipe, str(folder / str(number))] for number, recipe in enumerate(recipes)])
    trace = folder / "trace.txt"
    strace = ["strace", "-f", "-qq", "-e", "trace=open,openat,openat2", "-o", str(trace)]
    command = [*(strace if shutil.which("strace") else []), sys.executable, "-c", WATCHED, asked]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT, env=environment).stdout
    found: list[list[str]] = json.loads(told)
    if trace.exists():
        calls = [line for line in trace.read_text().splitlines() if ".distcp" in line and "= -1" not in line]
        assert len(calls) == sum(map(len, found))
    return found


def test_no_data_file_is_opened_to_pick_layers_and_one_to_rename_them(run: Path, tmp_path: Path) -> None:
    """Renaming reads the param groups' lists of names, each once, and writes new ones to a file of its own."""
    picked, renamed = opened(tmp_path, recipe(run), recipe(run, rename=RENAME))
    assert picked == []
    found = list(map(Path, renamed))
    assert len([path for path in found if path.name.endswith("_values.distcp")]) == 1
    read = [path for path in found if not path.name.endswith("_values.distcp")]
    where = dcp.FileSystemReader(run / "step-200").read_metadata().storage_data
    groups = {info.relative_path for index, info in where.items() if index.fqn.endswith(".params")}
    assert {path.name for path in read} <= groups
    assert {path.parent for path in read} == {run / "step-200"}
    assert len(read) <= len(NET.groups())


# Half made ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"materialize": True}], ids=["linked", "copied"])
def test_killed_at_any_change_it_is_absent_or_whole(run: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """And no source is changed; the next merge goes over what was left."""
    before, out, n, whole = tree(run), tmp_path / "results" / "step-300", 1, 0
    wanted = expected(run)
    while killed_at(n, tmp_path, lambda: merge(recipe(run), out, **options)):
        assert tree(run) == before
        named = [path for path in tmp_path.glob("results/*") if not path.name.startswith(".")]
        assert named in ([], [out])
        if out.exists():
            assert differing(loaded(out, NET), wanted) == []
            whole += 1
            shutil.rmtree(out)
        n += 1
    assert n > 10, "too few moments were tried"
    assert tree(run) == before
    assert differing(loaded(out, NET), wanted) == []
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_nothing_can_be_linked_it_asks_for_a_copy(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(RecipeError, match="--materialize") as refused:
        merge(recipe(run), tmp_path / "out")
    assert str(refused.value).startswith(f"{tmp_path / 'out'} cannot be made of links (")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    merge(recipe(run), tmp_path / "out", materialize=True)
    assert differing(loaded(tmp_path / "out", NET), expected(run)) == []


@pytest.mark.parametrize("call", ["link", "fsync", "rename"])
def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = tree(run)
    with monkeypatch.context() as patched:
        if call == "rename":
            patched.setattr(Path, call, fail)
        else:
            patched.setattr(os, call, fail)
        with pytest.raises(RecipeError, match="cannot be written: No space left on device"):
            merge(recipe(run), tmp_path / "new" / "deep" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert tree(run) == before


def test_a_name_that_is_taken_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("there", "dangling", "run"):
        with pytest.raises(RecipeError, match="exists already"):
            merge(recipe(run), tmp_path / name)


@pytest.mark.parametrize("place", ["run/step-200/merged", "run/step-100/a/b", "link/merged"])
def test_nothing_is_written_into_a_source(run: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(run / "step-100")
    before = tree(run)
    with pytest.raises(RecipeError, match="lies inside of the source"):
        merge(recipe(run), tmp_path / place)
    assert tree(run) == before


def test_a_file_that_is_missing_or_short_is_found_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    file = next((run / "step-100").glob("*.distcp"))
    content = file.read_bytes()
    for change in (file.unlink, lambda: file.write_bytes(content[:100])):
        change()
        with pytest.raises(RecipeError, match=r"is missing|bytes where") as refused:
            merge(recipe(run), tmp_path / "new" / "out")
        assert str(file) in str(refused.value)
        assert not (tmp_path / "new").exists()


def test_two_merges_into_one_folder_do_not_meet(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused; the first goes on and is whole."""
    out, inside, go_on, failures = tmp_path / "out", threading.Event(), threading.Event(), []
    real = assemble.commit

    def slow(*arguments: Any) -> None:
        inside.set()
        assert go_on.wait(30)
        real(*arguments)

    def first() -> None:
        try:
            merge(recipe(run), out)
        except BaseException as error:
            failures.append(error)

    monkeypatch.setattr(assemble, "commit", slow)
    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(30)
    with pytest.raises(RecipeError, match="Another merge is making"):
        merge(recipe(run), out)
    go_on.set()
    thread.join()
    assert failures == []
    assert differing(loaded(out, NET), expected(run)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_a_lock_whose_file_was_just_removed_keeps_nobody_out(tmp_path: Path) -> None:
    """Whoever opened the file before it was removed takes the new one."""
    a, b = (Lock(tmp_path / "lock", RecipeError("busy")) for _ in range(2))
    a.take()
    with pytest.raises(RecipeError, match="busy"):
        b.take()
    assert not b.taken
    a.release()
    b.take()
    assert b.taken
    with pytest.raises(RecipeError, match="busy"):
        a.take()
    b.release()
    assert not (tmp_path / "lock").exists()


# Training goes on ---------------------------------------------------------------------------


def test_training_goes_on_from_a_merged_checkpoint_and_carries_from_it(tmp_path: Path) -> None:
    """The token in it is one of its sources', of which the state does not descend: laws 1 and 3."""
    run = tmp_path / "run"
    training = Training(1)
    for step in (100, 200):
        training.steps(2)
        training.save(run / f"step-{step}", "full")
    out = run / "step-250"
    merge({"base": str(run / "step-200"), "layers": {"layers.1": str(run / "step-100")}}, out)
    lineage.forget()
    resumed = Training(2)
    resumed.load(out)
    held = {name: value.clone() for name, value in resumed.weights().items()}
    for name, value in held.items():
        step = 100 if name.startswith("layers.1.") else 200
        size = {f"model.{name}": torch.zeros_like(value)}
        with unheard():
            dcp.load(size, checkpoint_id=run / f"step-{step}")
        assert torch.equal(size[f"model.{name}"], value), name
    resumed.step()
    resumed.save(run / "step-300", "parity")
    resumed.step()
    resumed.save(run / "step-400", "parity")
    told = record(run / "step-300")
    assert told["parent"][2] == "step-250"
    origins = {unit.layer: unit.origin_step for unit in inspect(run / "step-300").units if unit.kind == "weight"}
    carried = {layer for layer, step in origins.items() if step != 300}
    assert carried
    assert all(origins[layer] == (100 if layer == "layers.1" else 200) for layer in carried)
    again = {f"model.{name}": torch.zeros_like(value) for name, value in held.items()}
    with unheard():
        dcp.load(again, checkpoint_id=run / "step-300")
    for name, value in held.items():
        if any(name.startswith(f"{layer}.") for layer in carried):
            assert torch.equal(again[f"model.{name}"], value), name


def test_a_run_with_a_merge_in_it_is_kept_in_order(run: Path) -> None:
    """It is the newest; pruning its sources breaks it as little as removing their folders does."""
    out = run / "step-250"
    merge(recipe(run), out)
    wanted = expected(run)
    assert latest(run) == out
    pruning = prune(run, keep_last=1)
    assert pruning.kept == ("step-250",)
    assert sorted(path.name for path in run.iterdir()) == ["step-250"]
    assert differing(loaded(out, NET), wanted) == []
    assert inspect(out).missing == ()


def test_checkpoints_of_our_writer_keep_their_checksums(tmp_path: Path) -> None:
    from tests.support.merges import state_of

    with unheard():
        for step in (100, 200):
            folder = tmp_path / "run" / f"step-{step}"
            dcp.save(state_of(NET, step), storage_writer=LayerwiseWriter(folder), planner=LayerwisePlanner("full"))
    out = tmp_path / "out"
    merge(recipe(tmp_path / "run", rename=RENAME), out)
    crcs = record(out)["crcs"]
    where = dcp.FileSystemReader(out).read_metadata().storage_data
    assert all(info.offset in Sums(crcs[info.relative_path]) for info in where.values())
    from tailor_dcp.materialize import materialize

    assert materialize(out, tmp_path / "copy").checked == len({(i.relative_path, i.offset) for i in where.values()})


# Other formats ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two little Llamas: as a Hugging Face folder, and as DCP with an optimizer and the files of the former."""
    from tests.support.hf_models import made

    folder = tmp_path_factory.mktemp("llamas")
    for number, name in enumerate(("hf", "trained")):
        torch.manual_seed(number)
        model = made("llama")
        model.save_pretrained(folder / name)
    catalog = formats().open(folder / "trained")
    kinds = ("exp_avg", "exp_avg_sq")
    state = {fqn: {kind: Repeated(tensor) for kind in kinds} for fqn, tensor in catalog.weights.items()}
    groups = ({"lr": 0.1, "params": list(catalog.weights)},)
    held = Catalog(**{**vars(catalog), "state": state, "groups": groups, "train": {"step": 7}})
    formats().write(held, folder / "dcp" / "step-7", "dcp")
    formats().write(held, folder / "zero" / "checkpoint-7", "zero3", world_size=2)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return a Hugging Face folder's weights, as safetensors itself reads them."""
    from safetensors.torch import load_file

    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def mixed(llamas: Path, layer: str) -> dict[str, torch.Tensor]:
    """Return the trained Llama's weights with one layer of the other."""
    other = weights_of(llamas / "hf")
    return weights_of(llamas / "trained") | {key: value for key, value in other.items() if f"{layer}." in key}


def in_result(folder: Path, names: dict[str, torch.Tensor], prefix: str = "model.") -> dict[str, torch.Tensor]:
    target = {f"{prefix}{name}": torch.zeros_like(value, dtype=torch.float32) for name, value in names.items()}
    with unheard():
        dcp.load(target, checkpoint_id=folder)
    return {key.removeprefix(prefix): value for key, value in target.items()}


@pytest.mark.parametrize("base", ["dcp/step-7", "zero/checkpoint-7"])
def test_weights_of_a_hugging_face_folder_go_into_a_checkpoint(llamas: Path, tmp_path: Path, base: str) -> None:
    """Of a DCP or a ZeRO checkpoint with its optimizer, which stays."""
    take = {"from": str(llamas / "hf"), "kinds": ["weight"]}
    merge({"base": str(llamas / base), "layers": {L0: take}}, tmp_path / "step-8")
    wanted = mixed(llamas, L0)
    found = in_result(tmp_path / "step-8", wanted)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name].float())] == []
    trained = weights_of(llamas / "trained")
    states = {f"{name}.exp_avg": value for name, value in trained.items()}
    assert (
        differing(in_result(tmp_path / "step-8", states, "optim.state."), {k: v.float() for k, v in states.items()})
        == []
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-8"]
    with pytest.raises(RecipeError, match=r"kinds: \[weight\]"):
        merge({"base": str(llamas / base), "layers": {L0: str(llamas / "hf")}}, tmp_path / "refused")


@pytest.mark.parametrize("base", ["dcp/step-7", "zero/checkpoint-7", "trained"])
def test_a_hugging_face_folder_comes_of_any_base(llamas: Path, tmp_path: Path, base: str) -> None:
    """It has no moments, so nobody has to say what becomes of them."""
    from tests.support.hf_models import loaded as loaded_model

    merge({"base": str(llamas / base), "layers": {L0: str(llamas / "hf")}}, tmp_path / "out", to="hf")
    wanted = mixed(llamas, L0)
    found = weights_of(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name].float(), wanted[name].float())] == []
    if (llamas / base / "hf").exists() or base == "trained":  # a ZeRO checkpoint has no files of the model's
        loaded_model(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_deeper_model_becomes_a_hugging_face_folder(llamas: Path, tmp_path: Path) -> None:
    """Straight away, and by way of a composite, whose two copies of a layer are not one tied one."""
    from tests.support.hf_models import loaded as loaded_model

    rename = {L1: [L1, L2]}
    merge({"base": str(llamas / "dcp" / "step-7"), "rename": rename}, tmp_path / "straight", to="hf")
    merge({"base": str(llamas / "dcp" / "step-7"), "rename": rename}, tmp_path / "composite")
    merge({"base": str(tmp_path / "composite")}, tmp_path / "by-composite", to="hf")
    trained = weights_of(llamas / "trained")
    wanted = trained | {key.replace(L1, L2): value for key, value in trained.items() if f"{L1}." in key}
    for name in ("straight", "by-composite"):
        found = weights_of(tmp_path / name)
        assert found.keys() == wanted.keys(), name
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
        model, _ = loaded_model(tmp_path / name)
        assert model.config.num_hidden_layers == 3


def test_what_cannot_be_written_is_refused(llamas: Path, tmp_path: Path) -> None:
    given: list[tuple[dict[str, Any], str]] = [
        ({"to": "torch"}, "use dcp, hf, zero3, zero2 or zero1"),
        ({"to": "hf", "materialize": True}, "--materialize is for DCP results"),
    ]
    for options, said in given:
        with pytest.raises(RecipeError, match=said):
            merge({"base": str(llamas / "hf")}, tmp_path / "out", **options)
    with pytest.raises(RecipeError, match="--materialize"):
        merge({"base": str(llamas / "hf")}, "memory://bucket/out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_adapters_of_another_strength_are_not_put_together(tmp_path: Path, to: str) -> None:
    """A layer's factors mean what its adapter's configuration says, and the result has the base's."""
    peft = pytest.importorskip("peft")
    for name, alpha in (("a", 8), ("b", 8), ("c", 16)):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_alpha=alpha)
        peft.get_peft_model(made("llama"), config).save_pretrained(tmp_path / name)
    layer = f"base_model.model.{L1}"
    merge({"base": str(tmp_path / "a"), "layers": {layer: str(tmp_path / "b")}}, tmp_path / "fine", to=to)
    with pytest.raises(RecipeError, match=r"a and .*c differ in lora_alpha \(8 and 16\)"):
        merge({"base": str(tmp_path / "a"), "layers": {layer: str(tmp_path / "c")}}, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()
