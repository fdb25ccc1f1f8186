"""torch.save files, in the nestings that trainings use, against what torch itself reads from both sides."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tailor_dcp import LayerwisePlanner
from tailor_dcp.converters import ConversionError, DamagedSourceError, Options, convert
from tailor_dcp.converters.filling import fill
from tailor_dcp.converters.torch_holes import Holes
from tailor_dcp.converters.torch_source import open_source
from tailor_dcp.tensors import Zeros
from tests.support.world import Model, Param, flat, load, save, state

MODEL = Model((Param("model.layers.0.w", (4, 3)), Param("model.layers.1.w", (5,)), Param("lm_head.w", (2, 2))))
pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_composite_becomes_one_file_with_every_value_of_its_origin(tmp_path: Path) -> None:
    """What torch.load gives equals what stock dcp.load gives, carried units included; the archive is sound."""
    for step in (10, 20, 30):
        save(None, MODEL, step, str(tmp_path / f"step-{step}"), "parity")
    convert(tmp_path / "step-30", tmp_path / "all.pt", "torch")
    for mmap in (False, True):
        converted = flat(torch.load(tmp_path / "all.pt", weights_only=True, mmap=mmap))
        for key, value in load(None, MODEL, str(tmp_path / "step-30")).items():
            assert torch.equal(torch.as_tensor(converted[key]), torch.as_tensor(value)), key
    assert zipfile.ZipFile(tmp_path / "all.pt").testzip() is None


def test_a_file_becomes_a_checkpoint_that_can_be_carried_from(tmp_path: Path) -> None:
    """Stock dcp.load reads it, and a later save with it as base writes less."""
    torch.save(state(MODEL, 10, None), tmp_path / "all.pt")
    convert(tmp_path / "all.pt", tmp_path / "step-10", "dcp")
    assert load(None, MODEL, str(tmp_path / "step-10"))["train.step"] == 10
    planner = LayerwisePlanner("parity", base=tmp_path / "step-10")
    dcp.save(state(MODEL, 20, None), checkpoint_id=tmp_path / "step-20", planner=planner)
    assert (tmp_path / "step-20" / "carried").exists()


class Net(nn.Module):
    """Tied, frozen and large enough to lie in the file as it is in memory."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(40, 30)
        self.layers = nn.ModuleList(nn.Linear(30, 30) for _ in range(2))
        self.norm = nn.BatchNorm1d(30)
        self.head = nn.Linear(30, 40, bias=False)
        self.head.weight = self.embed.weight


def trained(seed: int, steps: int) -> tuple[Net, torch.optim.Optimizer]:
    net = Net(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for step in range(steps):
        x = net.embed(torch.randint(40, (8,), generator=torch.Generator().manual_seed(step)))
        for layer in net.layers:
            x = layer(x).tanh()
        net.head(net.norm(x)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def whole(net: Net, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a training as most scripts save it, with the optimizer's numbers for names."""
    return {"epoch": 3, "state_dict": net.state_dict(), "optimizer": optimizer.state_dict(), "best": 0.5}


def test_a_scripts_file_with_a_numbered_optimizer(tmp_path: Path) -> None:
    """Its states get their parameters' names; torch's documented calls load them into a fresh training."""
    net, optimizer = trained(0, 3)
    torch.save(whole(net, optimizer), tmp_path / "last.pt")
    convert(tmp_path / "last.pt", tmp_path / "step-3", "dcp")
    fresh, other = trained(1, 1)
    model, optim = get_state_dict(fresh, other)
    target = {"model": model, "optim": optim, "train": {"epoch": 0, "best": 0.0}}
    dcp.load(target, checkpoint_id=tmp_path / "step-3")
    set_state_dict(fresh, other, model_state_dict=target["model"], optim_state_dict=target["optim"])
    assert target["train"] == {"epoch": 3, "best": 0.5}
    for name, value in net.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    for number, held in optimizer.state_dict()["state"].items():
        for kind, value in held.items():
            assert torch.equal(other.state_dict()["state"][number][kind], value), (number, kind)


def test_numbers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """An optimizer that was given the parameters in another order, or some of them."""
    net, optimizer = trained(0, 2)
    held = whole(net, optimizer)
    held["state_dict"] = OrderedDict(reversed(held["state_dict"].items()))
    torch.save(held, tmp_path / "reversed.pt")
    with pytest.raises(ConversionError, match="order and shapes do not fit"):
        convert(tmp_path / "reversed.pt", tmp_path / "out", "dcp")
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "alone.pt")
    with pytest.raises(ConversionError, match="no model"):
        convert(tmp_path / "alone.pt", tmp_path / "out", "dcp")
    convert(tmp_path / "reversed.pt", tmp_path / "out", "dcp", options=Options(weights_only=True))


@pytest.mark.parametrize("old", [False, True])
def test_a_bare_state_dict(tmp_path: Path, old: bool) -> None:
    """Nothing but tensors is a model; also in the format from before torch 1.6, and with tied weights."""
    net, _ = trained(0, 1)
    torch.save(net.state_dict(), tmp_path / "net.pt", _use_new_zipfile_serialization=not old)
    convert(tmp_path / "net.pt", tmp_path / "dcp", "dcp")
    target = {"model": Net(5).state_dict()}
    dcp.load(target, checkpoint_id=tmp_path / "dcp")
    for name, value in net.state_dict().items():
        assert torch.equal(target["model"][name], value), name
    torch.save({"a": torch.ones(1), "b": torch.zeros(2, 2)}, tmp_path / "ab.pt")
    convert(tmp_path / "ab.pt", tmp_path / "back.pt", "torch")
    assert torch.load(tmp_path / "back.pt", weights_only=True)["model"].keys() == {"a", "b"}


def test_what_no_contiguous_tensor_is_comes_through(tmp_path: Path) -> None:
    """Views, transposed ones, one element, none at all, and odd dtypes."""
    base = torch.randn(100, 200)
    held = {
        "layers.0.t": base.t(), "layers.0.view": base[10:20, 5:], "layers.1.one": torch.tensor(3.5),
        "layers.1.none": torch.zeros(0, 7), "layers.2.fp8": base.to(torch.float8_e5m2), "layers.2.flag": base > 0,
    }  # fmt: skip
    torch.save({"model": held}, tmp_path / "odd.pt")
    convert(tmp_path / "odd.pt", tmp_path / "step-1", "dcp")
    convert(tmp_path / "step-1", tmp_path / "back.pt", "torch")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    for name, value in held.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert raw(back[name]) == raw(value)


def test_tensors_beside_the_weights_keep_their_values_in_whatever_order_they_lie(tmp_path: Path) -> None:
    """Transposed, expanded, a part of another, two of one memory, conjugated; the archive stays sound."""
    base = torch.arange(12.0)
    held = {
        "transposed": base.view(4, 3).t(), "expanded": torch.arange(3.0).expand(500, 3), "part": base[5:9],
        "conjugated": (torch.ones(3, dtype=torch.complex64) * 1j).conj(), "strided": torch.arange(2000.0)[::2],
    }  # fmt: skip
    dcp.save({"model": {"layers.0.w": torch.ones(2)}, "train": {"x": {"y": (held,)}}}, checkpoint_id=tmp_path / "dcp")
    convert(tmp_path / "dcp", tmp_path / "a.pt", "torch")
    convert(tmp_path / "a.pt", tmp_path / "b.pt", "torch")
    for name in ("a.pt", "b.pt"):
        (back,) = torch.load(tmp_path / name, weights_only=True)["train"]["x"]["y"]
        for key, value in held.items():
            assert torch.equal(back[key], value), (name, key)
        assert zipfile.ZipFile(tmp_path / name).testzip() is None


def test_lists_that_hold_each_other_many_times_are_walked_through_once(tmp_path: Path) -> None:
    """Ten of them in each of sixty stand for 10 to the 60; torch.save writes them in a few bytes."""
    shared: Any = torch.arange(3.0).expand(2, 3)
    for _ in range(60):
        shared = [shared] * 10
    fill(Holes().save({"x": shared}, tmp_path / "a.pt"), lambda _: None)
    back = torch.load(tmp_path / "a.pt", weights_only=True)["x"]
    for _ in range(60):
        assert len({id(one) for one in back}) == 1
        back = back[0]
    assert back.tolist() == [[0.0, 1.0, 2.0]] * 2


@pytest.mark.parametrize("kind", ["sparse", "quantized", "nested"])
def test_odd_tensors_beside_the_weights_are_refused(tmp_path: Path, kind: str) -> None:
    made = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }[kind]()
    held = {"model": {"layers.0.w": torch.ones(2)}, "train": {"x": {"y": (made,)}}}
    dcp.save(held, checkpoint_id=tmp_path / "dcp")
    with pytest.raises(ConversionError, match=f"holds a .*{kind}.* tensor beside its weights"):
        convert(tmp_path / "dcp", tmp_path / "a.pt", "torch")
    assert not list(tmp_path.glob("*.pt"))


def raw(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, sentinel: str) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.sentinel,))


class Harmless:
    """A class that a user may trust."""


@pytest.mark.parametrize("how", ["code", "cut", "text", "list", "compressed"])
def test_hostile_and_damaged_files_are_one_sentence(tmp_path: Path, how: str) -> None:
    """Nothing that the file asks for is done, and nothing is written."""
    path, sentinel = tmp_path / "bad.pt", tmp_path / "ran"
    good = {"model": {"layers.0.w": torch.randn(100, 50), "layers.1.w": torch.randn(300, 50)}}
    torch.save([1, 2] if how == "list" else {**good, "x": Attack(str(sentinel))} if how == "code" else good, path)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-5000])
    elif how == "text":
        path.write_bytes(b"PK\x03\x04 and then nothing of the kind")
    elif how == "compressed":
        repack(path, zipfile.ZIP_DEFLATED)
    with pytest.raises(ConversionError) as caught:
        convert(path, tmp_path / "out", "dcp")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not sentinel.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pt"]
    if how in ("cut", "text", "compressed"):
        assert isinstance(caught.value, DamagedSourceError)


def repack(path: Path, kind: int, first: bytes = b"") -> None:
    """Write the archive anew: compressed, or with a record that none of its tensors uses before theirs."""
    with zipfile.ZipFile(path) as old:
        held = [(entry.filename, old.read(entry)) for entry in old.infolist()]
    with zipfile.ZipFile(path, "w", kind) as new:
        if first:
            new.writestr(held[0][0].split("/")[0] + "/data/99", first)
        for name, data in held:
            new.writestr(name, data)


@pytest.mark.parametrize("how", ["a storage", "a trusted object", "a record more"])
def test_records_that_are_no_tensors_do_not_shift_the_others(tmp_path: Path, how: str) -> None:
    """Each tensor is read from its own record, also where all are of one size and the first is another's.

    An archive that torch did not lay out itself is refused if that cannot be told.
    """
    one, two, three = (torch.full((4096,), float(number)) for number in (1, 2, 3))
    held: dict[str, Any] = {"model": {"layers.0.w": two, "layers.1.w": three}}
    if how == "a storage":
        held = {"s": one.untyped_storage(), **held}
    elif how == "a trusted object":
        kept = Harmless()
        kept.tensor = one  # type: ignore[attr-defined]
        held = {"x": kept, **held}
    torch.save(held, tmp_path / "a.pt")
    if how == "a record more":
        repack(tmp_path / "a.pt", zipfile.ZIP_STORED, bytes(4 * 4096))
        with pytest.raises(DamagedSourceError, match="outside of its records"):
            open_source(tmp_path / "a.pt", Options())
        return
    catalog = open_source(tmp_path / "a.pt", Options(allow=(f"{__name__}.Harmless",)))
    assert torch.equal(catalog.weights["layers.0.w"].whole(), two)
    assert torch.equal(catalog.weights["layers.1.w"].whole(), three)


def test_groups_in_an_order_of_their_own_are_not_guessed(tmp_path: Path) -> None:
    """Two parameters of one shape in two groups, the later one first: numbers do not tell which is which."""
    net = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [net[1].weight]}, {"params": [net[0].weight], "lr": 1e-5}], lr=1e-3)
    (net[0].weight.sum() + 2 * net[1].weight.sum()).backward()
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match="more than one way"):
        convert(tmp_path / "a.pt", tmp_path / "out", "dcp")


def test_lazy_signs_and_conjugates_are_resolved(tmp_path: Path) -> None:
    """torch keeps both as a bit beside the bytes."""
    number = torch.complex(torch.randn(900), torch.randn(900))
    held = {"layers.0.c": number.conj(), "layers.1.n": number.clone().conj().imag}
    torch.save({"model": held}, tmp_path / "a.pt")
    catalog = open_source(tmp_path / "a.pt", Options())
    for name, value in held.items():
        assert torch.equal(catalog.weights[name].whole(), value.resolve_conj().resolve_neg())


def test_a_trusted_class_is_admitted_by_name(tmp_path: Path) -> None:
    """Without --allow the sentence tells the name to give it."""
    torch.save({"model": {"layers.0.w": torch.ones(3)}, "x": Harmless()}, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match=r"--allow \S*Harmless"):
        convert(tmp_path / "a.pt", tmp_path / "out.pt", "torch")
    convert(tmp_path / "a.pt", tmp_path / "out", "dcp", options=Options(allow=(f"{__name__}.Harmless",)))
    assert (tmp_path / "out" / ".metadata").exists()


def test_files_larger_than_memory(tmp_path: Path) -> None:
    """Half a terabyte of zeros, on no disk block: made with room for its tensors, and opened with nothing read."""
    huge = Zeros(torch.Size([125_000, 1_000_000]), torch.float32)
    holes, path = Holes(), tmp_path / "huge.pt"
    small, scheduler = torch.arange(10.0), {"last_epoch": torch.tensor(4)}
    tree = {"model": {"layers.0.w": holes.make(huge), "layers.1.w": small}, "scheduler": scheduler}
    stretches = {stretch.tensor.size: stretch for stretch in holes.save(tree, path)}
    fill([stretch for size, stretch in stretches.items() if size != huge.size], lambda _: None)
    with path.open("r+b") as stream:
        stream.seek(stretches[huge.size].offset + 4 * 99_999_999_999)
        stream.write(torch.tensor([7.0]).numpy().tobytes())
    catalog = open_source(path, Options())
    assert catalog.weights["layers.0.w"].read(99_999_999_997, 100_000_000_000).tolist() == [0.0, 0.0, 7.0]
    assert torch.equal(catalog.weights["layers.1.w"].whole(), small)
    assert catalog.train["scheduler"]["last_epoch"].item() == 4
    assert path.stat().st_blocks * 512 < 10_000_000
