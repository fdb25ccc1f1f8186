"""Linked checkpoints: the same as ordinary ones in every way but that stock torch says how to load them."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from typer.testing import CliRunner

from tailor_dcp import LayerwisePlanner, LayerwiseReader, copy, inspect, materialize, merge, open_checkpoint, prune
from tailor_dcp.cli import app
from tailor_dcp.converters import (
    ConversionError,
    Options,
    convert,
    dcp_source,
    torch_file,
    zero3_target,
    zero_target,
)
from tailor_dcp.converters.cli import app as converter
from tailor_dcp.converters.zero_source import open_source
from tailor_dcp.errors import LoadError, TailorError, TailorWarning, UnreadableMetadataError
from tailor_dcp.load_planner import LayerwiseLoadPlanner
from tailor_dcp.metadata import safe_pickle
from tailor_dcp.raw_stretch import RAW
from tailor_dcp.tensors import Given, Zeros
from tests.support.fleet import Fleet
from tests.support.hf_models import FAMILIES, loaded, made
from tests.support.linked import blank
from tests.support.zero_samples import catalog, sample

pytestmark = pytest.mark.filterwarnings("ignore")
LINK = Options(link=True)


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors lie in files as large ones do; they are kept in memory only as that costs less."""
    monkeypatch.setattr(torch_file, "_SMALL", 0)


def both(source: Path, folder: Path, step: int = 5) -> tuple[Path, Path]:
    """Convert a source twice: as always, and linked. Each is a run of its own."""
    plain, linked = folder / "plain" / f"step-{step}", folder / "linked" / f"step-{step}"
    convert(source, plain, "dcp")
    convert(source, linked, "dcp", options=LINK)
    return plain, linked


def whole(folder: Path) -> dict[str, Any]:
    return dict(open_checkpoint(folder).items())


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


def read(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    target = blank(folder)
    dcp.load(target, storage_reader=LayerwiseReader(folder, **options))
    return target


def refused(folder: Path, target: dict[str, torch.Tensor], **options: Any) -> str:
    """Load what cannot be; return what is said, having seen that nothing was touched."""
    with pytest.raises(dcp.api.CheckpointException) as caught:
        dcp.load(target, storage_reader=LayerwiseReader(folder, **options))
    error = next(iter(caught.value.failures.values()))[0]
    assert isinstance(error, LoadError), error
    assert all(bool((value == 77).all()) for value in target.values())
    return str(error)


def raw_bytes(folder: Path) -> int:
    """Return the bytes that a checkpoint points to."""
    infos = pickle.loads((folder / ".metadata").read_bytes()).storage_data.values()
    return sum(info.length for info in infos if info.transform_descriptors)


# Equality ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "world"), [(3, 3), (2, 4), (1, 2), (3, 1)])
def test_zero(tmp_path: Path, stage: int, world: int) -> None:
    """All tensors and values; every way of reading gives what the ordinary conversion holds."""
    plain, linked = both(sample(tmp_path / "run", stage, world).parent, tmp_path)
    expected = whole(plain)
    same(whole(linked), expected)
    tensors = {key: value for key, value in expected.items() if isinstance(value, torch.Tensor)}
    for options in ({}, {"verify": True}, {"atomic": True, "threads": 1}):
        same(read(linked, **options), tensors)
    assert raw_bytes(linked) > 54_000
    convert(linked, tmp_path / "all.pt", "torch")
    convert(plain, tmp_path / "plain.pt", "torch")
    assert (tmp_path / "all.pt").read_bytes() == (tmp_path / "plain.pt").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    """Tied, renamed, joined and transposed weights; a folder comes back byte for byte."""
    made(family).save_pretrained(tmp_path / "model")
    plain, linked = both(tmp_path / "model", tmp_path)
    same(read(linked), whole(plain))
    assert inspect(linked).linked
    convert(linked, tmp_path / "back", "hf")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_joined_experts_are_pointed_to(tmp_path: Path) -> None:
    """Several stretches make up one tensor; nothing is written but the companions."""
    made("mixtral").save_pretrained(tmp_path / "model", max_shard_size=9000)
    done = convert(tmp_path / "model", tmp_path / "step-1", "dcp", options=LINK)
    assert done.linked == sum(tensor.numel() * 4 for tensor in loaded(tmp_path / "model")[1].values())
    assert not list((tmp_path / "step-1").glob("*.distcp"))
    assert (tmp_path / "step-1" / "hf" / "config.json").exists()


def test_pickled_weights_of_which_some_are_views(tmp_path: Path) -> None:
    """Transposed ones are written, ones that lie over each other pointed to once, tied ones share their bytes."""
    wide = torch.randn(60, 50)
    state = {
        "layers.0.plain": torch.randn(60, 50),
        "layers.1.turned": wide.t(),
        "layers.2.rows": wide[10:20],
        "layers.3.whole": wide,
        "layers.4.tied": wide,
    }
    (tmp_path / "model").mkdir()
    torch.save(state, tmp_path / "model" / "pytorch_model.bin")
    plain, linked = both(tmp_path / "model", tmp_path)
    same(read(linked), whole(plain))
    infos = {i.fqn: info for i, info in pickle.loads((linked / ".metadata").read_bytes()).storage_data.items()}
    assert not infos["model.layers.1.turned"].transform_descriptors
    assert infos["model.layers.0.plain"].transform_descriptors and infos["model.layers.3.whole"].transform_descriptors
    assert infos["model.layers.3.whole"] == infos["model.layers.4.tied"]
    note = convert(tmp_path / "model", tmp_path / "again", "dcp", options=LINK).notes
    assert any("layers.1.turned" in line and "were written" in line for line in note)
    materialize(linked, tmp_path / "copy")
    same(whole(tmp_path / "copy"), whole(plain))


def test_a_torch_save_file(tmp_path: Path) -> None:
    torch.save({"model": {"layers.0.w": torch.randn(30, 20)}, "step": 3}, tmp_path / "all.pt")
    plain, linked = both(tmp_path / "all.pt", tmp_path)
    same(whole(linked), whole(plain))


@pytest.mark.parametrize("stage", [3, 2])
def test_other_world_sizes(tmp_path: Path, stage: int, fleet: Fleet) -> None:
    """Three ranks' files, loaded on four ranks in rows and in columns."""
    plain, linked = both(sample(tmp_path / "run", stage, 3).parent, tmp_path)
    expected = whole(plain)
    for found in fleet.call("tests.support.linked:load_sharded", str(linked)):
        assert len(found) > 15
        same(found, {key: expected[key] for key in found})


def test_ranks_share_the_work(tmp_path: Path, fleet: Fleet) -> None:
    """What several write is what one writes: links are made once."""
    plain, _ = both(sample(tmp_path / "run", 3, 2).parent, tmp_path)
    fleet.call("tests.support.linked:convert_linked", str(tmp_path / "run"), str(tmp_path / "step-9"))
    same(whole(tmp_path / "step-9"), whole(plain))


# Stock torch ---------------------------------------------------------------------------------


def test_stock_torch_says_what_to_do(tmp_path: Path, stock_fleet: Fleet) -> None:
    """Its reader meets a transform that it does not know; what that is called is the way out. A copy it loads."""
    plain, linked = both(sample(tmp_path / "run").parent, tmp_path)
    with pytest.raises(dcp.api.CheckpointException, match="LayerwiseReader, or make a plain copy with `tailor mat"):
        dcp.load({"model.big": torch.zeros(64, 70)}, checkpoint_id=linked)
    done = materialize(linked, tmp_path / "copies" / "step-5")
    assert done.bytes == sum(path.stat().st_size for path in (tmp_path / "copies" / "step-5").glob("*.distcp"))
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in blank(plain).items()}
    copied = str(tmp_path / "copies" / "step-5")
    found = stock_fleet.one("tests.support.stock_loads:load", copied, shapes)
    same(found, {key: value for key, value in whole(plain).items() if isinstance(value, torch.Tensor)})
    assert not inspect(copied).linked
    read(Path(copied), verify=True)


# What comes after -------------------------------------------------------------------------------


def test_inspect(tmp_path: Path) -> None:
    _, linked = both(sample(tmp_path / "run").parent, tmp_path)
    found = inspect(linked)
    assert len(found.linked) == 4 and not found.missing
    assert all(name.startswith("carried/") for name in found.linked)
    assert found.step == 5 and found.written < found.live
    said = CliRunner().invoke(app, ["inspect", str(linked)]).output
    assert "LayerwiseReader" in said and "tailor materialize" in said


def test_a_run_is_copied_and_pruned(tmp_path: Path) -> None:
    """Its files are files as any others; the source may go."""
    plain, linked = both(sample(tmp_path / "run").parent, tmp_path)
    convert(tmp_path / "run", linked.with_name("step-6"), "dcp", options=LINK)
    shutil.rmtree(tmp_path / "run")
    copy(linked.parent, tmp_path / "moved")
    assert prune(tmp_path / "moved", keep_last=1).removed == ("step-5",)
    same(whole(tmp_path / "moved" / "step-6"), whole(plain))
    shutil.copytree(linked, tmp_path / "elsewhere" / "step-5")
    same(read(tmp_path / "elsewhere" / "step-5"), read(linked))


def test_merging(tmp_path: Path) -> None:
    """Layers of two sources by metadata alone; the result is linked as well, and can be made plain."""
    sample(tmp_path / "run")
    plain, linked = both(tmp_path / "run", tmp_path)
    other = {**catalog().weights, "b.weight": Given(torch.randn(3, 2, 5))}
    other["b.tied"] = other["b.weight"]
    zero3_target.write(replace(catalog(), weights=other), tmp_path / "two", tmp_path / "two", Options(world_size=3))
    plain_two, linked_two = both(tmp_path / "two", tmp_path, 6)

    def recipe(base: Path, second: Path) -> dict[str, Any]:
        return {"base": str(base), "layers": {"b": str(second)}}

    merge(recipe(plain, plain_two), tmp_path / "one" / "step-7")
    done = merge(recipe(linked, linked_two), tmp_path / "all" / "step-7")
    assert done.linked > 4 and inspect(done.path).linked
    same(whole(Path(done.path)), whole(tmp_path / "one" / "step-7"))
    merge(recipe(linked, linked_two), tmp_path / "all" / "step-8", materialize=True)
    assert not inspect(tmp_path / "all" / "step-8").linked
    same(whole(tmp_path / "all" / "step-8"), whole(tmp_path / "one" / "step-7"))
    damage(linked_two / inspect(linked_two).linked[-1])
    with pytest.raises(TailorError, match="has changed since"):
        merge(recipe(linked, linked_two), tmp_path / "all" / "step-9")
    assert not (tmp_path / "all" / "step-9").exists()


def test_layers_of_other_steps(tmp_path: Path) -> None:
    """The load planner takes raw stretches of one checkpoint into a load of another, linked or not."""
    _, linked = both(sample(tmp_path / "run").parent, tmp_path)
    weights = {**catalog().weights, "b.weight": Given(torch.randn(3, 2, 5))}
    torch.save({"model": {k: t.whole() for k, t in weights.items()}}, tmp_path / "all.pt")
    for step, options in ((6, Options()), (7, LINK)):
        convert(tmp_path / "all.pt", linked.with_name(f"step-{step}"), "dcp", options=options)
        for first, second in ((step, 5), (5, step)):
            folder = linked.with_name(f"step-{first}")
            target = {"model": {"b.weight": torch.zeros(3, 2, 5), "big": torch.zeros(64, 70)}}
            planner = LayerwiseLoadPlanner(folder, steps={"b": second})
            dcp.load(target, storage_reader=LayerwiseReader(folder), planner=planner)
            assert torch.equal(target["model"]["big"], open_checkpoint(folder)["model.big"])
            other = open_checkpoint(linked.with_name(f"step-{second}"))
            assert torch.equal(target["model"]["b.weight"], other["model.b.weight"])


@pytest.mark.parametrize("policy", ["parity", "moments:every=2"])
def test_a_save_does_not_carry_what_stock_could_not_load(tmp_path: Path, policy: str) -> None:
    """All is written, and a warning says why; the save after that carries again."""
    _, linked = both(sample(tmp_path / "run").parent, tmp_path)
    state = {key: value for key, value in whole(linked).items() if isinstance(value, torch.Tensor)}

    def save(step: int, base: Path) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            folder = linked.with_name(f"step-{step}")
            dcp.save(dict(state), checkpoint_id=folder, planner=LayerwisePlanner(policy, base=base), no_dist=True)
        return [str(w.message) for w in caught if issubclass(w.category, TailorWarning)]

    assert any("is linked to files" in line for line in save(6, linked))
    assert not inspect(linked.with_name("step-6")).linked
    target = blank(linked.with_name("step-6"))
    dcp.load(target, checkpoint_id=linked.with_name("step-6"))
    same(target, state)
    assert not save(7, linked.with_name("step-6"))
    assert {unit.origin_step for unit in inspect(linked.with_name("step-7")).units} == {6, 7}


@pytest.mark.parametrize("stage", [3, 2, 1])
def test_real_engines(tmp_path: Path, stage: int) -> None:
    """DeepSpeed saves; an engine resumes from the linked checkpoint through EngineState, and one from ZeRO files."""
    pytest.importorskip("deepspeed")
    from tests.support.zero_cases import check_same
    from tests.support.zero_engines import Setup, fleet

    setup = Setup(stage, 2, "fp32", 2, "odd")
    trained = setup.call("train_and_save", str(tmp_path / "run"))[0]
    plain, linked = both(tmp_path / "run", tmp_path, 2)
    same(whole(linked), whole(plain))
    told = fleet(2).call("tests.support.linked:resume", vars(setup), str(linked))[0]
    check_same(told["saved"], trained["saved"])
    assert told["losses"] == trained["losses"]
    assert any("is linked to files" in line for line in told["warned"])
    assert not inspect(linked.with_name("step-4")).linked
    convert(linked, tmp_path / "back", f"zero{stage}")
    found = setup.call("load_and_train", str(tmp_path / "back"))[0]
    check_same(found["saved"], trained["saved"])


# What cannot be ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "changes", "words"),
    [
        ("hf", {}, "--to dcp"),
        ("dcp", {"dtype": torch.bfloat16}, "--dtype"),
        ("dcp", {"keys": "torchtitan"}, "--keys torchtitan"),
    ],
)
def test_refusals(tmp_path: Path, to: str, changes: dict[str, Any], words: str) -> None:
    source = sample(tmp_path / "run").parent
    with pytest.raises(ConversionError, match=words):
        convert(source, tmp_path / "out", to, options=replace(LINK, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_sources_that_are_not_linked_to(tmp_path: Path) -> None:
    plain, _ = both(sample(tmp_path / "run").parent, tmp_path)
    with pytest.raises(ConversionError, match="tailor copy"):
        convert(plain, tmp_path / "out", "dcp", options=LINK)
    convert(plain, tmp_path / "universal", "universal")
    with pytest.raises(ConversionError, match="leave --link out"):
        convert(tmp_path / "universal", tmp_path / "out", "dcp", options=LINK)
    torch.save({"model": {"layers.0.w": torch.randn(30, 20).t()}}, tmp_path / "all.pt")
    with pytest.raises(ConversionError, match="nothing to link to"):
        convert(tmp_path / "all.pt", tmp_path / "out", "dcp", options=LINK)
    assert not (tmp_path / "out").exists()


def test_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left, and the sentence says what to leave out."""
    source = sample(tmp_path / "run").parent

    def link(*_: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(ConversionError, match=r"optim_states.pt.*EXDEV.*leave --link out|model_states.pt.*EXDEV"):
        convert(source, tmp_path / "out", "dcp", options=LINK)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def damage(path: Path) -> None:
    """Save something else of the same size to a file, as a later save of the training does."""
    with path.open("r+b") as stream:
        raw = stream.read()
        stream.seek(0)
        stream.write(bytes(byte ^ 1 for byte in raw))


@pytest.mark.parametrize("how", ["missing", "short", "changed", "longer"])
def test_a_source_that_is_not_as_it_was(tmp_path: Path, how: str) -> None:
    """Every way of reading says which file, layer and step, and a load has touched nothing."""
    _, linked = both(sample(tmp_path / "run").parent, tmp_path)
    target = blank(linked)
    name = next(name for name in inspect(linked).linked if "rank_1" in name and "optim" in name)
    path = linked / name
    if how == "missing":
        path.unlink()
    elif how == "short":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "changed":
        damage(next((tmp_path / "run").rglob(path.name)))
    else:
        path.write_bytes(path.read_bytes() + b"x")
    said = refused(linked, target)
    assert path.name in said and "layer" in said and "step 5" in said
    assert any(name in line for line in inspect(linked).missing)
    for act in (
        lambda: open_checkpoint(linked)["model.big"],
        lambda: convert(linked, tmp_path / "out.pt", "torch"),
        lambda: materialize(linked, tmp_path / "out"),
        lambda: merge({"base": str(linked)}, tmp_path / "out"),
    ):
        with pytest.raises(TailorError, match=path.name):
            act()
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_is_found_by_the_archives_own_sums(tmp_path: Path) -> None:
    """One that the look into a file misses; only ``verify`` reads everything."""
    draw = torch.randn(2000, 1000)
    torch.save({"model": {"layers.0.w": draw}}, tmp_path / "all.pt")
    convert(tmp_path / "all.pt", tmp_path / "step-1", "dcp", options=LINK)
    with (tmp_path / "all.pt").open("r+b") as stream:
        stream.seek(10_000)
        byte = stream.read(1)[0]
        stream.seek(10_000)
        stream.write(bytes([byte ^ 4]))
    key = "model.layers.0.w"
    target = {key: torch.full((2000, 1000), 77.0)}
    said = refused(tmp_path / "step-1", target, verify=True)
    assert "checksum differs" in said and "layers.0" in said


# Metadata from anybody --------------------------------------------------------------------------


def change(folder: Path, key: str, **told: Any) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn == key:
            metadata.storage_data[index] = replace(info, **told)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_hostile_metadata(tmp_path: Path) -> None:
    """A stretch outside of the run, of another length, over another, or of what is no tensor."""
    torch.save({"model": {f"layers.{i}.w": torch.randn(30, 20) for i in range(2)}, "step": 1}, tmp_path / "all.pt")
    _, linked = both(tmp_path / "all.pt", tmp_path)
    key = "model.layers.0.w"
    target = {"model.layers.1.w": torch.full((30, 20), 77.0), key: torch.full((30, 20), 77.0)}
    before = (linked / ".metadata").read_bytes()
    (tmp_path / "secret").write_bytes(b"x" * 10_000)

    change(linked, key, relative_path="../../secret", offset=0)
    assert "outside of its run" in refused(linked, target)
    with pytest.raises(LoadError, match="outside of its run"):
        open_checkpoint(linked)[key]
    with pytest.raises(UnreadableMetadataError, match="outside of the run"):
        materialize(linked, tmp_path / "out")

    for length in (2399, 2401, 0, 1 << 61):
        (linked / ".metadata").write_bytes(before)
        change(linked, key, length=length)
        assert "layers.0" in refused(linked, target)
        for act in (
            lambda: open_checkpoint(linked)[key],
            lambda: convert(linked, tmp_path / "out.pt", "torch"),
            lambda: materialize(linked, tmp_path / "out"),
        ):
            with pytest.raises(TailorError):
                act()

    (linked / ".metadata").write_bytes(before)
    offset = next(
        info.offset for index, info in pickle.loads(before).storage_data.items() if index.fqn == "model.layers.1.w"
    )
    change(linked, key, offset=offset + 4)
    with pytest.raises(UnreadableMetadataError, match="the same bytes"):
        materialize(linked, tmp_path / "out")

    (linked / ".metadata").write_bytes(before)
    metadata = pickle.loads(before)
    raw = next(info for info in metadata.storage_data.values() if info.transform_descriptors)
    metadata.storage_data[MetadataIndex("train.step")] = raw
    (linked / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(TailorError, match=r"train\.step"):
        open_checkpoint(linked)["train.step"]
    assert not (tmp_path / "out").exists()


def test_a_shape_of_any_size_takes_no_memory(tmp_path: Path) -> None:
    """A tensor of exabytes that lies in a small file is refused before memory is asked for."""
    torch.save({"model": {"layers.0.w": torch.randn(30, 20)}}, tmp_path / "all.pt")
    convert(tmp_path / "all.pt", tmp_path / "step-1", "dcp", options=LINK)
    metadata = pickle.loads((tmp_path / "step-1" / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["model.layers.0.w"]
    entry.size = entry.chunks[0].sizes = torch.Size([1 << 30, 1 << 28])
    (tmp_path / "step-1" / ".metadata").write_bytes(pickle.dumps(metadata))
    change(tmp_path / "step-1", "model.layers.0.w", length=1 << 60)
    for act in (
        lambda: open_checkpoint(tmp_path / "step-1")["model.layers.0.w"],
        lambda: convert(tmp_path / "step-1", tmp_path / "out.pt", "torch"),
        lambda: materialize(tmp_path / "step-1", tmp_path / "out"),
    ):
        with pytest.raises(TailorError):
            act()


# Size ---------------------------------------------------------------------------------------------


def huge(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Make a ZeRO-3 checkpoint of two ranks and 100 GB, all of it holes; return its bytes."""
    size = torch.Size([1_000_000, 4_200])
    weights = {f"layers.{i}.w": Zeros(size, torch.float32) for i in range(2)}
    state = {
        name: {
            "step": Given(torch.tensor(5.0)),
            **{kind: Zeros(size, torch.float32) for kind in ("exp_avg", "exp_avg_sq")},
        }
        for name in weights
    }
    groups = ({"lr": 0.1, "betas": (0.9, 0.99), "params": list(weights)},)
    made = replace(catalog(), weights=weights, state=state, groups=groups, buffers=frozenset(), frozen=frozenset())
    monkeypatch.setattr(zero_target, "fill", lambda *_: [])
    zero3_target.write(made, folder, folder, Options(world_size=2))
    return sum(path.stat().st_size for path in folder.rglob("*.pt"))


def bytes_read() -> int:
    """Return the bytes that this process has read in all its calls."""
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if line[:5] == "rchar").split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts the bytes of calls")
def test_100_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read but names and shapes, and what tells that a file is still the one it was."""
    assert huge(tmp_path / "run", monkeypatch) > 100_000_000_000
    place = open_source(tmp_path / "run", Options()).weights["layers.0.w"].pieces[1]  # type: ignore[attr-defined]
    with place.path.open("r+b") as stream:
        stream.seek(place.offset + 4 * (place.elements - 3))
        stream.write(torch.tensor([7.0, 8.0, 9.0]).numpy().tobytes())
    before = bytes_read()
    done = convert(tmp_path / "run", tmp_path / "step-5", "dcp", options=LINK)
    assert bytes_read() - before < 6_000_000
    assert done.linked > 100_000_000_000 and done.written < 100_000
    assert sum(path.stat().st_blocks for path in tmp_path.rglob("*") if path.is_file()) * 512 < 10_000_000
    weight = dcp_source.open_source(tmp_path / "step-5", Options()).weights["layers.0.w"]
    assert weight.read(weight.count - 4, weight.count).tolist() == [0, 7, 8, 9]
    assert inspect(tmp_path / "step-5").live > 100_000_000_000


# Reading .metadata ----------------------------------------------------------------------------------


@pytest.mark.parametrize("transforms", [RAW, list(RAW), ("a", "b"), ()])
def test_metadata_is_read_as_pickle_reads_it(tmp_path: Path, transforms: Any) -> None:
    """A place with transforms follows one without, and the other way round, thousands of times."""
    metadata = Metadata({}, {}, {})
    for number in range(5000):
        told = transforms if number % 7 else None
        metadata.storage_data[MetadataIndex(f"k{number % 9}", torch.Size([number]), number)] = _StorageInfo(
            f"f{number % 5}", number * 1000, 1000, told
        )
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert safe_pickle.read(tmp_path / ".metadata").storage_data == metadata.storage_data


def test_the_command(tmp_path: Path) -> None:
    sample(tmp_path / "run")
    words = [str(tmp_path / "run"), str(tmp_path / "step-5"), "--to", "dcp", "--link"]
    planned = CliRunner().invoke(converter, [*words, "--dry-run"]).output
    assert "linked" in planned and not (tmp_path / "step-5").exists()
    said = CliRunner().invoke(converter, words)
    assert said.exit_code == 0 and "linked" in said.output and "LayerwiseReader('step-5')" in said.output
