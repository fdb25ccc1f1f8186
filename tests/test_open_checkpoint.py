"""open_checkpoint: one entry at a time, equal to what stock dcp.load gives; errors name the file and the layer."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_dcp.errors import LoadError, NoCheckpointError, TailorError
from tailor_dcp.open_checkpoint import open_checkpoint
from tests.support.fleet import Fleet
from tests.support.runs import HEAD, L0, L1, L2, MODEL, Run, due, metadata
from tests.support.world import Model, keys
from tests.test_laws import POLICIES, models

pytestmark = pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
FEW = settings(max_examples=settings().max_examples // 3)


@FEW
@given(data=st.data())
def test_every_entry_equals_what_stock_torch_loads(
    data: st.DataObject, tmp_path_factory: Any, fleet: Fleet, stock_fleet: Fleet
) -> None:
    """Any policy, any ranks, either writer: tensors, shapes and objects, each read by itself."""
    run = tmp_path_factory.mktemp("run")
    model, policy = data.draw(models()), data.draw(st.sampled_from(sorted(POLICIES)))
    writer, carry = (
        data.draw(st.sampled_from(["stock", "layerwise"])),
        data.draw(st.sampled_from(["auto", "reference"])),
    )
    fleet.call("tests.support.world:forget")
    ranks, steps = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    for step in range(10, 10 * steps + 1, 10):
        path = run / f"step-{step}"
        args = (model, step, str(path), policy)
        fleet.call("tests.support.world:save", *args, ranks=ranks, writer=writer, carry=carry)
    # Into a model without ties: where two stored entries share a tensor, stock torch lets the later one win.
    truth = stock_fleet.one("tests.support.world:load", Model(model.params), str(path))
    opened = open_checkpoint(path)
    for key in data.draw(st.permutations(sorted(keys(model)))):
        loaded = opened[key]
        assert (loaded.shape, loaded.dtype) == (opened.shape(key), opened.dtype(key))
        assert torch.equal(loaded.to(truth[key].dtype), truth[key]), key
    assert opened["optim.param_groups.0.lr"] == truth["lr"]
    assert opened["train.step"] == truth["train.step"] == opened.step
    assert torch.equal(opened["train.rng"], truth["train.rng"])
    assert set(opened) == set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.save(100)
    run.save(200, due(L1))
    return run


def test_it_is_a_lazy_read_only_mapping(run: Run) -> None:
    """Length, keys, membership and repr read no data file; nothing can be set."""
    for file in run.folder.rglob("*.distcp"):
        file.unlink()
    opened = open_checkpoint(run.path(200))
    assert set(opened.keys()) == set(metadata(run.path(200)).state_dict_metadata) == set(opened)
    assert len(opened) == len(list(opened))
    assert "train.step" in opened
    assert "train.stop" not in opened
    assert opened.layers == (L0, L1, L2, HEAD)
    assert opened.shape(f"model.{L0}.w") == (4, 3)
    assert opened.dtype(f"model.{L0}.w") is torch.float32
    assert opened.get("no such key") is None
    assert "step-200" in repr(opened)
    assert opened != open_checkpoint(run.path(200))  # as equal mappings would be, had their values been read
    with pytest.raises(TypeError):
        opened["train.step"] = 1  # type: ignore[index]


def test_it_reads_only_the_bytes_of_what_is_asked(run: Run) -> None:
    """Every other byte of the files may be rubbish."""
    key, path = f"model.{L1}.w", run.path(200)
    whole = run.load(200)[key]
    places = {i.fqn: info for i, info in metadata(path).storage_data.items()}
    for name in {info.relative_path for info in places.values()}:
        content = bytearray(os.urandom((path / name).stat().st_size))
        if name == places[key].relative_path:
            start, end = places[key].offset, places[key].offset + places[key].length
            content[start:end] = (path / name).read_bytes()[start:end]
        (path / name).write_bytes(content)
    opened = open_checkpoint(path)
    assert torch.equal(opened[key], whole)
    with pytest.raises(LoadError, match=f"{L0}.*step 100.*damaged|damaged"):
        opened[f"model.{L0}.w"]


def test_origin_is_one_step_or_one_for_each_kind(run: Run) -> None:
    """Carried layers tell their earlier step; a layer whose kinds differ tells each."""
    opened = open_checkpoint(run.path(200))
    assert (opened.origin(L0), opened.origin(L1)) == (100, 200)
    run.save(300, lambda request: [u.unit for u in request.units if u.unit == (L2, "weight")])
    later = open_checkpoint(run.path(300))
    assert later.origin(L2) == {"weight": 300, "exp_avg": 100, "exp_avg_sq": 100, "step": 100}
    assert (later.origin(L2, "weight"), later.origin(L2, "exp_avg")) == (300, 100)


def test_a_stock_checkpoint_can_be_opened_too(run: Run) -> None:
    """Layers are found from the names; all of them come from its own step."""
    opened = open_checkpoint(run.stock(400))
    assert opened.layers == (L0, L1, L2, HEAD)
    assert opened.origin(HEAD) == 400 == opened.step


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda c: c["model.model.layers.0.v"], "'model.model.layers.0.w'|model.model.layers.0.w"),
        (lambda c: c.shape("nothing like it"), "did you mean"),
        (lambda c: c.origin("model.layers.7"), "did you mean model.layers"),
        (lambda c: c.origin(L0, "momentum"), "exp_avg"),
    ],
)
def test_a_wrong_name_is_a_key_error_of_one_sentence(run: Run, ask: Callable[[Any], Any], words: str) -> None:
    """It is what a mapping raises, and still a sentence that names what is close."""
    with pytest.raises(KeyError, match=words) as caught:
        ask(open_checkpoint(run.path(200)))
    assert isinstance(caught.value, TailorError)
    assert str(run.path(200)) in str(caught.value)
    assert not str(caught.value).startswith(("'", '"'))


def test_an_object_has_neither_shape_nor_dtype(run: Run) -> None:
    """The error says how to read it."""
    with pytest.raises(LoadError, match="not a tensor"):
        open_checkpoint(run.path(200)).shape("train.step")


def test_a_folder_that_is_no_checkpoint_is_refused(run: Run) -> None:
    """It says so, as everywhere."""
    with pytest.raises(NoCheckpointError):
        open_checkpoint(run.folder)


@pytest.mark.parametrize("how", ["gone", "short", "folder"])
def test_a_file_that_is_missing_or_short_is_named_with_what_it_holds(run: Run, how: str) -> None:
    """File, layer, and the step that the bytes come from."""
    path, key = run.path(200), f"model.{L0}.w"
    (name,) = {info.relative_path for i, info in metadata(path).storage_data.items() if i.fqn == key}
    size = (path / name).stat().st_size
    (path / name).unlink()
    if how == "short":
        (path / name).write_bytes(bytes(size // 20))
    elif how == "folder":
        (path / name).mkdir()
    with pytest.raises(LoadError) as caught:
        open_checkpoint(path)[key]
    for word in (name, f"layer {L0}", "step 100", "bytes" if how == "short" else "missing"):
        assert word in str(caught.value)


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    plain = metadata(folder)
    change(plain)
    (folder / ".metadata").write_bytes(pickle.dumps(plain))


@pytest.mark.parametrize("way", ["dots", "absolute", "link"])
def test_a_file_outside_of_the_run_is_not_opened(run: Run, tmp_path: Path, way: str) -> None:
    """Neither by .., nor by an absolute path, nor through a symbolic link."""
    path = run.path(200)
    (own,) = path.glob("*.distcp")
    outside = tmp_path / "outside.distcp"
    own.rename(outside)
    (path / "link.distcp").symlink_to(outside)
    name = {"dots": "../../outside.distcp", "absolute": str(outside), "link": "link.distcp"}[way]

    def point_outside(plain: Any) -> None:
        for info in plain.storage_data.values():
            info.relative_path = name if info.relative_path == own.name else info.relative_path

    edit(path, point_outside)
    opened = open_checkpoint(path)
    with pytest.raises(LoadError, match="outside of its run"):
        opened["train.step"]
    assert opened[f"model.{L0}.w"].shape == (4, 3)


def _huge(plain: Any) -> None:
    plain.state_dict_metadata[f"model.{L0}.w"].size = torch.Size([1 << 40, 3])


def _torn(plain: Any) -> None:
    entry = plain.state_dict_metadata[f"model.{L0}.w"]
    entry.chunks[0].sizes = torch.Size([2, 3])


def _nowhere(plain: Any) -> None:
    plain.storage_data = {i: info for i, info in plain.storage_data.items() if i.fqn != f"model.{L0}.w"}


def _retyped(plain: Any) -> None:
    entry = plain.state_dict_metadata[f"model.{L0}.w"]
    object.__setattr__(entry.properties, "dtype", torch.int32)


@pytest.mark.parametrize("damage", [_huge, _torn, _nowhere, _retyped])
def test_metadata_that_does_not_fit_the_bytes_is_an_error(run: Run, damage: Callable[[Any], None]) -> None:
    """Claims are checked against what is stored, before memory is asked for."""
    edit(run.path(200), damage)
    with pytest.raises(LoadError, match=f"damaged.*layer {L0}"):
        open_checkpoint(run.path(200))[f"model.{L0}.w"]


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def test_an_object_is_not_run(run: Run, tmp_path: Path) -> None:
    """The entry and what it would have called are named; everything else can be read."""
    path = run.save(300, extra={"bad": Attack(str(tmp_path / "attacked"))})
    opened = open_checkpoint(path)
    with pytest.raises(LoadError, match=r"bad in .*asks for posix\.mkdir, .*was not run"):
        opened["bad"]
    assert not (tmp_path / "attacked").exists()
    assert torch.equal(opened[f"model.{HEAD}.w"], run.load(300)[f"model.{HEAD}.w"])
    assert len(keys(MODEL)) < len(opened)


@pytest.mark.filterwarnings("ignore")  # torch calls its own quantization outdated
def test_a_quantized_tensor_is_refused_with_a_sentence(tmp_path: Path) -> None:
    tensor = torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 0, torch.qint8)
    dcp.save({"model": {"w": tensor}}, checkpoint_id=str(tmp_path / "step-1"))
    with pytest.raises(LoadError, match="is quantized"):
        open_checkpoint(tmp_path / "step-1")["model.w"]
