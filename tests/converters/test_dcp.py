"""DCP checkpoints to and from other formats, against stock torch and the trainers that wrote them."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from tailor_dcp import LayerwisePlanner, inspect, materialize
from tailor_dcp.converters import ConversionError, Options, convert
from tailor_dcp.errors import TailorError
from tests.support.fleet import Fleet
from tests.support.meshes import DENSE
from tests.support.world import Model, Param, flat, load, state

MODEL = Model(
    (
        Param("model.embed_tokens.weight", (600, 70)),
        Param("model.layers.0.mlp.weight", (300, 80)),
        Param("model.layers.1.mlp.weight", (4, 3, 2), dtype="bfloat16"),
        Param("model.layers.1.count", (), trained=False, dtype="int64"),
        Param("lm_head.weight", (600, 70), trained=False),
    ),
    (("model.embed_tokens.weight", "lm_head.weight"),),
)


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key
        assert torch.as_tensor(value).dtype == torch.as_tensor(other[key]).dtype, key


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_goes_through_a_file_and_back(tmp_path: Path, stock_fleet: Fleet) -> None:
    """A composite, tied and odd tensors in it: stock torch loads from the result what it loads from the source."""
    for step in (10, 20):
        dcp.save(state(MODEL, step, None), checkpoint_id=tmp_path / f"step-{step}", planner=LayerwisePlanner("parity"))
    convert(tmp_path / "step-20", tmp_path / "all.pt", "torch")
    convert(tmp_path / "all.pt", tmp_path / "step-30", "dcp")
    source = stock_fleet.one("tests.support.world:load", MODEL, str(tmp_path / "step-20"))
    same(flat(torch.load(tmp_path / "all.pt", weights_only=True)), source)
    same(stock_fleet.one("tests.support.world:load", MODEL, str(tmp_path / "step-30")), source)
    same(load(None, MODEL, str(tmp_path / "step-30")), source)


@pytest.mark.filterwarnings("ignore")
def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    """Both names are in the checkpoint and in its record, and share their bytes; a copy keeps it so."""
    torch.save({"model": state(MODEL, 10, None)["model"]}, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "step-10", "dcp")
    materialize(tmp_path / "step-10", tmp_path / "copy")
    for folder in (tmp_path / "step-10", tmp_path / "copy"):
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        places = {
            index.fqn: (info.relative_path, info.offset, info.length) for index, info in metadata.storage_data.items()
        }
        assert places["model.lm_head.weight"] == places["model.model.embed_tokens.weight"]
        assert metadata.tailor["ties"] == [["model.model.embed_tokens.weight", "model.lm_head.weight"]]
        found = inspect(folder)
        assert found.pinned == 0
        assert found.live == sum(path.stat().st_size for path in folder.glob("*.distcp"))


@pytest.mark.filterwarnings("ignore")
def test_a_converted_checkpoint_is_carried_from(tmp_path: Path) -> None:
    """It is a save as any other: with it as base a policy writes what is due, and the rest is carried."""
    torch.save(state(MODEL, 10, None), tmp_path / "all.pt")
    convert(tmp_path / "all.pt", tmp_path / "step-10", "dcp")
    assert inspect(tmp_path / "step-10").step == 10
    planner = LayerwisePlanner("parity", base=tmp_path / "step-10")
    dcp.save(state(MODEL, 20, None), checkpoint_id=tmp_path / "step-20", planner=planner)
    assert {unit.origin_step for unit in inspect(tmp_path / "step-20").units} == {10, 20}


@pytest.mark.parametrize("layout", ["two-dimensional", "strided", "sharded-tensor"])
def test_chunks_of_columns_are_put_together(layout: str, fleet: Fleet, tmp_path: Path) -> None:
    """However ranks shared a tensor, each stretch of it is read as it is."""
    fleet.call("tests.support.world:forget")
    fleet.call("tests.support.meshes:save", layout, DENSE, 10, str(tmp_path / "step-10"))
    convert(tmp_path / "step-10", tmp_path / "all.pt", "torch")
    held = flat(torch.load(tmp_path / "all.pt", weights_only=True))
    for key, value in load(None, DENSE, str(tmp_path / "step-10")).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(torch.as_tensor(held[key]), value), key


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_lie_as_it_is_in_memory_is_read_the_stock_way(tmp_path: Path) -> None:
    """Transposed tensors, and large ones that are stored with all the strides they had."""
    wide = torch.randn(400, 300)
    model = {"layers.0.weight": wide.t(), "layers.1.weight": wide[:, ::2], "layers.2.weight": wide[10:20]}
    dcp.save({"model": model}, checkpoint_id=tmp_path / "step-1")
    convert(tmp_path / "step-1", tmp_path / "all.pt", "torch")
    held = torch.load(tmp_path / "all.pt", weights_only=True)["model"]
    for key, value in model.items():
        assert torch.equal(held[key], value)


# Other trainers' keys ------------------------------------------------------------------------


class Net(nn.Module):
    """Something to train."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 2)


def trained(seed: int, steps: int) -> tuple[Net, torch.optim.Optimizer]:
    net = Net(seed)
    heads = {"params": net.head.parameters(), "weight_decay": 0.5, "lr": 0.02}
    optimizer = torch.optim.AdamW([{"params": net.layers.parameters(), "weight_decay": 0.1}, heads], lr=0.01)
    for step in range(steps):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        for layer in net.layers:
            x = layer(x).tanh()
        net.head(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def titan_state(net: Net, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the keys of torchtitan's CheckpointManager: the model's at the top, a flattened optimizer beside."""
    model, optim = get_state_dict(net, optimizer, options=FLAT)
    return {
        **model,
        "optimizer": optim,
        "lr_scheduler": {"last_epoch": 3},
        "train_state": {"step": 3, "ntokens_seen": 9},
    }


def holds(path: Path, net: Net, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint in the layout's keys with torch's documented calls, and compare with what was trained."""
    fresh, other = trained(5, 1)
    model, optim = get_state_dict(fresh, other)
    target = {"model": model, "optim": optim}
    dcp.load(target, checkpoint_id=path)
    set_state_dict(fresh, other, model_state_dict=target["model"], optim_state_dict=target["optim"])
    equal(fresh, other, net, optimizer)


def equal(fresh: Net, other: torch.optim.Optimizer, net: Net, optimizer: torch.optim.Optimizer) -> None:
    for name, value in net.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    mine, theirs = other.state_dict(), optimizer.state_dict()
    assert [g["weight_decay"] for g in mine["param_groups"]] == [0.1, 0.5]
    assert [g["lr"] for g in mine["param_groups"]] == [0.01, 0.02]
    for number, held in theirs["state"].items():
        for kind, value in held.items():
            assert torch.equal(mine["state"][number][kind], value), (number, kind)


@pytest.mark.filterwarnings("ignore")
def test_torchtitans_keys(tmp_path: Path) -> None:
    """Brought to the layout, each param group with its own hyper-parameters, and back to what torchtitan loads."""
    net, optimizer = trained(0, 3)
    dcp.save(titan_state(net, optimizer), checkpoint_id=tmp_path / "step-3")
    convert(tmp_path / "step-3", tmp_path / "ours", "dcp")
    holds(tmp_path / "ours", net, optimizer)
    metadata = pickle.loads((tmp_path / "ours" / ".metadata").read_bytes()).state_dict_metadata
    assert {"train.step", "train.scheduler.last_epoch", "train.train_state.ntokens_seen"} <= metadata.keys()
    convert(tmp_path / "ours", tmp_path / "back", "dcp", options=Options(keys="torchtitan"))
    fresh, other = trained(5, 1)
    target = titan_state(fresh, other)
    target["lr_scheduler"], target["train_state"] = {"last_epoch": 0}, {"step": 0, "ntokens_seen": 0}
    dcp.load(target, checkpoint_id=tmp_path / "back")
    optim = target["optimizer"]
    set_state_dict(
        fresh, other, model_state_dict={k: target[k] for k in net.state_dict()}, optim_state_dict=optim, options=FLAT
    )
    equal(fresh, other, net, optimizer)
    assert target["train_state"] == {"step": 3, "ntokens_seen": 9}
    assert target["lr_scheduler"] == {"last_epoch": 3}


@pytest.mark.filterwarnings("ignore")
def test_a_stateful_app_and_plain_get_state_dict(tmp_path: Path) -> None:
    """The nestings of torch's tutorials are recognised: ``{"app": {"model", "optim"}}`` and without ``app``."""
    net, optimizer = trained(0, 3)
    model, optim = get_state_dict(net, optimizer)
    dcp.save({"app": {"model": model, "optim": optim}}, checkpoint_id=tmp_path / "app")
    dcp.save({"model": model, "optim": optim}, checkpoint_id=tmp_path / "plain")
    for name in ("app", "plain"):
        convert(tmp_path / name, tmp_path / f"{name}-ours", "dcp")
        holds(tmp_path / f"{name}-ours", net, optimizer)


@pytest.mark.filterwarnings("ignore")
def test_transformers_optimizer_folder(tmp_path: Path) -> None:
    """What transformers' own function saved is read, and its own function loads what is written."""
    from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed

    net, optimizer = trained(0, 3)
    save_optimizer_distributed(net, optimizer, str(tmp_path / "optimizer"))
    model, _ = get_state_dict(net, optimizer)
    convert(tmp_path / "optimizer", tmp_path / "ours", "dcp")
    fresh, other = trained(5, 1)
    _, optim = get_state_dict(fresh, other)
    target = {"optim": optim}
    dcp.load(target, checkpoint_id=tmp_path / "ours")
    set_state_dict(fresh, other, model_state_dict=model, optim_state_dict=target["optim"])
    equal(fresh, other, net, optimizer)
    dcp.save({"model": model, "optim": get_state_dict(net, optimizer)[1]}, checkpoint_id=tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "back", "dcp", options=Options(keys="transformers"))
    fresh, other = trained(5, 1)
    load_optimizer_distributed(fresh, other, str(tmp_path / "back" / "optimizer"))
    fresh.load_state_dict(net.state_dict())
    equal(fresh, other, net, optimizer)
    convert(tmp_path / "back", tmp_path / "again", "dcp")
    holds(tmp_path / "again", net, optimizer)


def accelerate(what: str, folder: Path, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).parents[1] / "support" / "accelerate_script.py"
    done = subprocess.run(
        [*command, str(script), what, str(folder), str(out)], capture_output=True, text=True, check=False
    )
    assert out.exists(), done.stderr
    held: dict[str, Any] = torch.load(out, weights_only=True)
    return held


@pytest.mark.filterwarnings("ignore")
def test_accelerates_two_folders(tmp_path: Path) -> None:
    """Accelerate's own functions save on two ranks; converted and converted back, they load the same."""
    saved = accelerate("save", tmp_path / "checkpoint-7", tmp_path / "saved.pt")
    convert(tmp_path / "checkpoint-7", tmp_path / "ours", "dcp")
    convert(tmp_path / "ours", tmp_path / "back", "dcp", options=Options(keys="accelerate"))
    loaded = accelerate("load", tmp_path / "back", tmp_path / "loaded.pt")
    for fqn, value in saved["model"].items():
        assert torch.equal(loaded["model"][fqn], value), fqn
    for fqn, kinds in saved["optim"]["state"].items():
        for kind, value in kinds.items():
            assert torch.equal(loaded["optim"]["state"][fqn][kind], value), (fqn, kind)
    assert [g["weight_decay"] for g in loaded["optim"]["param_groups"]] == [0.1, 0.01]
    shutil.copytree(tmp_path / "back" / "optimizer_0", tmp_path / "back" / "optimizer_1")
    with pytest.raises(ConversionError, match="several trainings"):
        convert(tmp_path / "back", tmp_path / "mixed", "dcp")
    (tmp_path / "checkpoint-7" / "random_states_0.pkl").symlink_to("/etc/passwd")
    with pytest.raises(ConversionError, match="outside"):
        convert(tmp_path / "checkpoint-7", tmp_path / "leak", "dcp")


@pytest.mark.filterwarnings("ignore")
def test_what_a_layout_has_no_place_for_is_said(tmp_path: Path) -> None:
    """Accelerate keeps progress in files of its own."""
    dcp.save(state(MODEL, 10, None), checkpoint_id=tmp_path / "step-10")
    done = convert(tmp_path / "step-10", tmp_path / "out", "dcp", options=Options(keys="accelerate"))
    assert any("train.step, train.rng" in note for note in done.notes)


@pytest.mark.filterwarnings("ignore")
def test_chunks_that_lie_over_each_other_are_refused(tmp_path: Path) -> None:
    """Their elements add up to the tensor's, and some of it would be read from nowhere."""
    dcp.save({"model": {"layers.0.w": torch.randn(8, 64)}}, checkpoint_id=tmp_path / "step-1")
    metadata = pickle.loads((tmp_path / "step-1" / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["model.layers.0.w"]
    (index, info), *_ = [pair for pair in metadata.storage_data.items() if pair[0].fqn == "model.layers.0.w"]
    del metadata.storage_data[index]
    entry.chunks = []
    for start in (0, 16):
        offsets = torch.Size([0, start])
        entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size([8, 32])))
        metadata.storage_data[MetadataIndex("model.layers.0.w", offsets)] = info
    (tmp_path / "step-1" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConversionError, match="over each other"):
        convert(tmp_path / "step-1", tmp_path / "out.pt", "torch")


@pytest.mark.filterwarnings("ignore")
def test_a_buffer_that_is_called_like_a_counter_stays_a_weight(tmp_path: Path) -> None:
    """What lies directly in a model is the model's."""
    model = {"layers.0.weight": torch.ones(3), "steps": torch.tensor([4.0])}
    dcp.save({"model": model, "train": {"steps": 7}}, checkpoint_id=tmp_path / "step-1")
    convert(tmp_path / "step-1", tmp_path / "out.pt", "torch")
    held = torch.load(tmp_path / "out.pt", weights_only=True)
    assert held["model"]["steps"].item() == 4
    assert held["train"] == {"steps": 7}


# Damaged and hostile -------------------------------------------------------------------------


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, sentinel: str) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.sentinel,))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["cut", "gone", "changed shape", "code", "outside"])
def test_a_damaged_or_hostile_checkpoint_is_one_clear_error(how: str, tmp_path: Path) -> None:
    """It names what is wrong; nothing is written or run, and the source stays as it was."""
    folder, sentinel = tmp_path / "step-10", tmp_path / "ran"
    held: dict[str, Any] = state(MODEL, 10, None)
    if how == "code":
        held["train"]["x"] = Attack(str(sentinel))
    dcp.save(held, checkpoint_id=folder)
    data = next(folder.glob("*.distcp"))
    if how == "cut":
        data.write_bytes(data.read_bytes()[:-100])
    elif how == "gone":
        data.unlink()
    elif how in ("changed shape", "outside"):
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        if how == "outside":
            for info in metadata.storage_data.values():
                info.relative_path = "../../../etc/passwd"
        else:
            metadata.state_dict_metadata["model.model.layers.0.mlp.weight"].size = torch.Size([301, 80])
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TailorError) as caught:
        convert(folder, tmp_path / "out.pt", "torch")
    assert "\n" not in str(caught.value)
    assert not sentinel.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"step-10"}
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_megatron_is_refused_by_name(tmp_path: Path) -> None:
    """Its tensors are several layers in one, so converting key by key would be wrong."""
    dcp.save(
        {"model": {"decoder.layers.mlp.weight": torch.ones(2, 3)}}, checkpoint_id=tmp_path / "iter_10", no_dist=True
    )
    torch.save({}, tmp_path / "iter_10" / "common.pt")
    with pytest.raises(ConversionError, match="Megatron"):
        convert(tmp_path / "iter_10", tmp_path / "out.pt", "torch", from_="dcp")
