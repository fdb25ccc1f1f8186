"""The planner: what may be carried, what a checkpoint is on disk, what is refused, and what ranks must agree on."""

from __future__ import annotations

import inspect
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from tailor_dcp import LayerwisePlanner
from tailor_dcp.errors import SaveRefusedError, TailorError
from tests.support.fleet import Fleet
from tests.support.runs import (
    HEAD,
    L0,
    L1,
    L2,
    LAYERS,
    MODEL,
    Run,
    due,
    files,
    heard_warnings,
    metadata,
    named,
    parent,
    record,
    written,
)
from tests.support.world import Model, Param, full_value, keys, state

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
    pytest.mark.filterwarnings("error::tailor_dcp.TailorWarning"),
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def refusal(function: Any, *args: Any, **kwargs: Any) -> str:
    """Return the reason why a save was refused; DCP's own exception is no Exception."""
    with pytest.raises(dcp.api.CheckpointException) as caught:
        function(*args, **kwargs)
    return "".join(f"{type(e[0]).__name__}: {e[0]}" for e in caught.value.failures.values())


# What may be carried ----------------------------------------------------------------------


def test_parameters_and_their_optimizer_states_are_carried(run: Run) -> None:
    """What is not due has, after a stock load, the bits of the step that wrote it."""
    run.save(100)
    folder = run.save(200, due(L1))
    assert run.origins(folder) == {L0: 100, L1: 200, L2: 100, HEAD: 100}


def test_whatever_is_no_parameter_is_written_in_every_save(run: Run) -> None:
    """A random generator's bytes, a tensor learning rate, param groups, a scheduler: none is ever stale."""
    others = {
        "scheduler": {"last_lr": torch.tensor([0.5]), "last_epoch": 1},
        "rng_state": torch.zeros(9, dtype=torch.uint8),
    }
    run.save(100, extra=others)
    others = {
        "scheduler": {"last_lr": torch.tensor([0.25]), "last_epoch": 2},
        "rng_state": torch.ones(9, dtype=torch.uint8),
    }
    folder = run.save(200, extra=others)
    assert written(folder) == {
        "optim.param_groups.0.lr",
        "optim.param_groups.0.params",
        "train.step",
        "train.rng",
        "scheduler.last_lr",
        "scheduler.last_epoch",
        "rng_state",
    }
    loaded = {"scheduler": {"last_lr": torch.zeros(1), "last_epoch": 0}, "rng_state": torch.zeros(9, dtype=torch.uint8)}
    dcp.load(loaded, checkpoint_id=folder)
    assert loaded["scheduler"] == {"last_lr": torch.tensor([0.25]), "last_epoch": 2}
    assert loaded["rng_state"].tolist() == [1] * 9
    assert run.load(folder)["lr"] == 200.0


def test_buffers_go_with_the_weights(tmp_path: Path) -> None:
    """A running mean is as old as the weights of its layer, not as its moments."""
    norm = (Param("layers.0.bn.weight", (3,)), Param("layers.0.bn.running_mean", (3,), trained=False))
    count = Param("layers.0.bn.num_batches_tracked", (), trained=False, dtype="int64")
    run = Run(tmp_path, Model((*norm, count, Param("layers.1.w", (3,)))))
    run.save(100)
    steps = run.steps_of(run.save(200, lambda request: [("layers.0", "weight")]))
    assert {steps[f"model.{p.fqn}"] for p in (*norm, count)} == {200}
    assert steps["optim.state.layers.0.bn.weight.exp_avg"] == 100
    assert steps["model.layers.1.w"] == 100


def test_adams_step_goes_with_the_moments(run: Run) -> None:
    """The counter is due with any moment of its layer, and never with the weights alone."""
    run.save(100)
    steps = run.steps_of(run.save(200, lambda request: [(L0, "weight"), (L1, "exp_avg")]))
    assert (steps[f"model.{L0}.w"], steps[f"optim.state.{L0}.w.step"]) == (200, 100)
    assert (steps[f"model.{L1}.w"], steps[f"optim.state.{L1}.w.step"]) == (100, 200)
    assert steps[f"optim.state.{L1}.w.exp_avg_sq"] == 100


def test_keys_stay_in_the_order_of_the_state_dict(run: Run) -> None:
    """Whether carried or written, a key stands where a stock save would have put it."""
    stock = list(metadata(run.stock(1, to="elsewhere/1")).state_dict_metadata)
    run.save(100)
    assert list(metadata(run.save(200, due(L1))).state_dict_metadata) == stock


def test_a_flat_state_dict_is_carried_alike(tmp_path: Path) -> None:
    """torchtitan's names, with no model. or optim. in front, are recognised by pattern."""

    def flat(step: int) -> dict[str, Any]:
        names = ("layers.0.wq.weight", "layers.1.wq.weight")
        moments = {f"state.{name}.exp_avg": torch.full((2,), float(step)) for name in names}
        return {name: torch.full((2,), float(step)) for name in names} | moments | {"train_state": torch.tensor(step)}

    for step in (1, 2):
        dcp.save(flat(step), checkpoint_id=tmp_path / f"step-{step}", planner=LayerwisePlanner(due("layers.1")))
    loaded = flat(0)
    dcp.load(loaded, checkpoint_id=tmp_path / "step-2")
    assert {key: int(value.max()) for key, value in loaded.items()} == {
        "layers.0.wq.weight": 1,
        "layers.1.wq.weight": 2,
        "state.layers.0.wq.weight.exp_avg": 1,
        "state.layers.1.wq.weight.exp_avg": 2,
        "train_state": 2,
    }


# The checkpoint on disk -------------------------------------------------------------------


def test_the_metadata_on_disk_is_a_plain_metadata(run: Run, stock_fleet: Fleet) -> None:
    """A process in which tailor_dcp cannot be imported unpickles and loads a composite."""
    run.save(100)
    folder = run.save(200, due(L1))
    assert type(metadata(folder)) is Metadata
    loaded = stock_fleet.one("tests.support.world:load", MODEL, str(folder))
    assert loaded["train.step"] == 200
    assert b"tailor_dcp" not in (folder / ".metadata").read_bytes()


def test_the_record_is_plain_builtins(run: Run) -> None:
    """Whatever reads the attribute ``tailor`` needs no class of anybody's."""

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return type(value) is dict and all(plain(k) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return type(value) is list and all(map(plain, value))
        return type(value) in (str, int, float, bool, type(None))

    run.save(100)
    assert plain(record(run.save(200, due(L1), full_every=7)))


def test_the_record_tells_where_everything_comes_from(run: Run) -> None:
    """Format, save id, parent, step, origin of each unit: all that later tools need, never told by a path."""
    first = record(run.save(100))
    told = record(run.save(200, due(L1)))
    assert told["format"] == 2
    assert told["step"] == 200
    assert len(told["save_id"]) == 32
    assert told["parent"][:3] == [first["save_id"], 100, "step-100"]
    origins = {
        (layer, kind): tuple(told["origins"][number][:3])
        for layer, kinds in told["units"].items()
        for kind, (number, _) in kinds.items()
    }
    new, old = (told["save_id"], 200, "step-200"), (first["save_id"], 100, "step-100")
    kinds = ("weight", "exp_avg", "exp_avg_sq", "step")
    assert origins == {(layer, kind): new if layer == L1 else old for layer in LAYERS for kind in kinds}
    assert told["units"][L1]["exp_avg"][1] == [f"optim.state.{L1}.w.exp_avg"]
    assert told["time"] > first["time"]


def test_a_renamed_checkpoint_still_knows_its_step(run: Run) -> None:
    """Nothing is parsed back out of a path: a folder called ``best`` is carried from as step 200."""
    run.save(100)
    run.save(200, due(L1)).rename(run.path("best"))
    run.load("best")
    told = record(run.save(300, base=run.path("best")))
    assert told["parent"][1] == 200
    assert run.origins(300) == {L0: 100, L1: 200, L2: 100, HEAD: 100}


def test_the_callers_metadata_is_complete_too(run: Run) -> None:
    """What dcp.save returns names the carried bytes as the file does, however often it is pickled."""
    run.save(100)
    planner = LayerwisePlanner(due(L1))
    returned = dcp.save(run.state(200), checkpoint_id=run.path(200), planner=planner)
    on_disk = metadata(run.path(200))
    assert returned.storage_data == on_disk.storage_data
    assert returned.__reduce__()[0] is Metadata
    assert returned.__reduce__()[2]["storage_data"] == on_disk.storage_data


def test_every_anchor_is_full(run: Run) -> None:
    """With full_every=3 the saves 0, 3, 6 write everything, whatever the policy says."""
    for step in range(5):
        run.save(step, due(L1), full_every=3)
    assert [run.origins(step)[L0] for step in range(5)] == [0, 0, 0, 3, 3]


def test_nothing_on_disk_is_touched_before_the_global_plan(run: Run) -> None:
    """A writer that refuses to overwrite raises before anything of the old checkpoint changed."""
    run.save(100)
    folder = run.save(200, due(L1))
    before = files(folder), (folder / ".metadata").read_bytes()
    reason = refusal(run.save, 201, to="step-200", writer=lambda path: FileSystemWriter(path, overwrite=False))
    assert "already exists" in reason
    assert (files(folder), (folder / ".metadata").read_bytes()) == before


def test_the_storage_meta_parameter_keeps_its_name() -> None:
    """DCP looks for a parameter of this name before it tells the planner which folder is written."""
    assert "storage_meta" in inspect.signature(LayerwisePlanner.set_up_planner).parameters


def test_asynchronous_saves_are_selective(run: Run) -> None:
    """In a thread of DCP's each save carries from the one before, once that is committed."""
    for step, layer in ((100, L0), (200, L1), (300, L2)):
        done = dcp.async_save(run.state(step), checkpoint_id=run.path(step), planner=LayerwisePlanner(due(layer)))
        done.result()
    assert run.origins(300) == {L0: 100, L1: 200, L2: 300, HEAD: 100}


def test_one_planner_serves_many_saves(run: Run) -> None:
    """A planner that was made before the first save knows of all later ones."""
    planner = LayerwisePlanner(due(L1))
    for step in (100, 200, 300):
        dcp.save(run.state(step), checkpoint_id=run.path(step), planner=planner)
    assert run.origins(300) == {L0: 100, L1: 300, L2: 100, HEAD: 100}


def test_object_stores_are_saved_to_like_folders(run: Run) -> None:
    """Through torch's own fsspec writer, without a word; its reader finds what is carried."""
    for step in (100, 200):
        address = f"memory://{run.folder.name}/step-{step}"
        with heard_warnings() as said:
            dcp.save(run.state(step), checkpoint_id=address, planner=LayerwisePlanner(due(L1)))
        assert not said
    loaded = state(MODEL, 0, None, empty=True)
    dcp.load(loaded, checkpoint_id=address)
    assert torch.equal(loaded["model"][f"{L0}.w"], full_value(f"model.{L0}.w", MODEL.params[0], "weight", 100))


def test_states_that_are_no_tensors_are_carried_with_their_parameter(tmp_path: Path) -> None:
    """Some optimizers count in Python; such a counter belongs to the moments as well."""

    def counted(step: int) -> dict[str, Any]:
        moments = {f"layers.{i}.w": {"exp_avg": torch.full((2,), float(step)), "step": step} for i in range(2)}
        return {"model": {name: torch.full((2,), float(step)) for name in moments}, "optim": {"state": moments}}

    for step in (1, 2):
        dcp.save(counted(step), checkpoint_id=tmp_path / f"step-{step}", planner=LayerwisePlanner(due("layers.1")))
    loaded = counted(0)
    dcp.load(loaded, checkpoint_id=tmp_path / "step-2")
    assert [kinds["step"] for kinds in loaded["optim"]["state"].values()] == [1, 2]


def test_any_dtype_and_shape_is_carried_bit_for_bit(tmp_path: Path) -> None:
    """Scalars, empty tensors, what is no usual float, and rows that lie in memory as columns."""
    dtypes = (torch.bool, torch.int8, torch.complex64, torch.float8_e4m3fn, torch.float64)
    sizes: tuple[tuple[int, ...], ...] = ((), (0, 3), (5, 2))

    def drawn(step: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        made = [(torch.randn(size, generator=generator) * 9).to(dtype) for size in sizes for dtype in dtypes]
        made += [tensor.t().contiguous().t() for tensor in made if tensor.dim() == 2]
        return {f"layers.{i}.w": tensor for i, tensor in enumerate(made)}

    for step in (1, 2):
        planner = LayerwisePlanner(due())
        dcp.save({"model": drawn(step)}, checkpoint_id=tmp_path / f"step-{step}", planner=planner)
    loaded = {"model": {name: torch.zeros_like(tensor) for name, tensor in drawn(0).items()}}
    dcp.load(loaded, checkpoint_id=tmp_path / "step-2")
    for name, tensor in drawn(1).items():
        got, want = (t.contiguous().reshape(-1).view(torch.uint8) for t in (loaded["model"][name], tensor))
        assert torch.equal(got, want), (name, tensor.dtype, tensor.shape)


# What is refused --------------------------------------------------------------------------


def test_plan_caching_is_refused() -> None:
    """DCP would write the first save's selection in all later ones."""
    with pytest.raises(SaveRefusedError, match="first save's selection"):
        LayerwisePlanner("full", enable_plan_caching=True)


def test_saving_without_collectives_is_refused(run: Run) -> None:
    """Every rank would decide alone; nothing is written, an earlier checkpoint there stays."""
    run.save(100)
    before = files(run.path(100))
    planner = LayerwisePlanner("full")
    # Without collectives DCP does not wrap what its ranks raise.
    with pytest.raises(SaveRefusedError, match="use_collectives=False is refused: every rank would decide alone"):
        dcp.save(run.state(101), checkpoint_id=run.path(100), planner=planner, use_collectives=False)
    assert files(run.path(100)) == before
    assert run.origins(100) == dict.fromkeys(LAYERS, 100)


def test_a_writer_that_keeps_only_what_is_due_is_refused(run: Run) -> None:
    """HuggingFaceStorageWriter is refused with the reason, and leaves no file, carried ones included."""
    run.save(100)
    reason = refusal(run.save, 200, writer=lambda path: HuggingFaceStorageWriter(str(path)))
    assert "as if they were everything" in reason
    assert files(run.path(200)) == set()
    assert parent(run.save(300, due(L1))) == "step-100"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"carry": "hardlink"}, "hardlink"),
        ({"full_every": 0}, "full_every=0"),
        ({"base": "memory://b/step-1"}, "no .metadata"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(options: dict[str, Any], word: str) -> None:
    """Before training starts, and naming what was given."""
    with pytest.raises(TailorError, match=word):
        LayerwisePlanner("full", **options)


def test_a_unit_that_does_not_exist_is_an_error(run: Run) -> None:
    """A policy's slip is told with the unit and a name that exists, and nothing is committed."""
    run.save(100)
    reason = refusal(run.save, 200, lambda request: [("model.layers.7", "weight")])
    assert reason.startswith("PolicyError") and "model.layers.7/weight" in reason and "model.layers.2/weight" in reason
    assert not (run.path(200) / ".metadata").exists()


class Half(torch.Tensor):
    """A tensor of which this process holds the first half only, as a sharded one may be without its other ranks."""

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([0]), torch.Size([self.numel() // 2]))

    def __create_write_items__(self, fqn: str, value: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        data = TensorWriteData(self._chunk(), properties, self.size())
        return [WriteItem(MetadataIndex(fqn, torch.Size([0])), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, index: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)[: self.numel() // 2]


def test_a_tensor_that_is_not_covered_is_an_error_in_one_process_too(tmp_path: Path) -> None:
    """DCP checks coverage only among several ranks; half a tensor alone would be saved as a whole one."""
    half = {"model": {"layers.0.w": torch.zeros(4).as_subclass(Half)}}
    reason = refusal(dcp.save, half, checkpoint_id=tmp_path / "step-1", planner=LayerwisePlanner("full"))
    assert "model.layers.0.w" in reason and "2 of its 4 elements" in reason
    assert files(tmp_path / "step-1") == set()


def test_a_refused_save_takes_back_what_it_carried(run: Run) -> None:
    """Links made for a save that ends in an error do not stay and pin earlier bytes."""
    run.save(100)
    refusal(run.save, 200, extra={"model2": {"layers.0.w": torch.zeros(4).as_subclass(Half)}})
    assert files(run.path(200)) == set()


# Names, steps, series ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["step-{}", "checkpoint-{}", "global_step{}", "step_{}", "step={}", "{}", "Checkpoint{}"]
)
def test_step_names_of_any_form_are_carried_between(run: Run, name: str) -> None:
    """What trainers call their folders tells the step."""
    run.save(100, to=name.format(100))
    folder = run.save(200, due(L1), to=name.format(200))
    assert record(folder)["step"] == 200
    assert run.origins(folder) == {L0: 100, L1: 200, L2: 100, HEAD: 100}


def test_a_name_without_a_step_is_written_as_a_whole_with_a_warning(run: Run) -> None:
    """``final`` says no step, so nothing is carried into it unasked."""
    run.save(100)
    with heard_warnings() as said:
        folder = run.save(200, to="final")
    assert len(said) == 1 and "final" in said[0] and "tells no step" in said[0]
    assert run.origins(folder) == dict.fromkeys(LAYERS, 200)


def test_a_name_without_a_step_is_fine_with_an_explicit_base(run: Run) -> None:
    """Who names the base gets what he asked for, without a warning."""
    folder = run.save(200, due(L1), to="final", base=run.save(100))
    assert run.origins(folder) == {L0: 100, L1: 200, L2: 100, HEAD: 100}


def test_a_series_has_ancestors_of_its_own(tmp_path: Path) -> None:
    """Accelerate's two folders, saved in turn, are each selective, also after both were loaded."""

    def part(name: str, step: int) -> dict[str, Any]:
        if name == "optimizer_0":
            return {"state": {f"layers.{i}.w": {"exp_avg": torch.full((2,), float(step))} for i in range(2)}}
        return {f"layers.{i}.w": torch.full((2,), float(step)) for i in range(2)}

    def save_both(step: int) -> None:
        for name, key in (("pytorch_model_fsdp_0", "model"), ("optimizer_0", "optimizer")):
            to = FileSystemWriter(tmp_path / f"checkpoint-{step}" / name)
            dcp.save({key: part(name, step)}, storage_writer=to, planner=LayerwisePlanner(due("layers.1")))

    def load_both(step: int) -> tuple[Any, Any]:
        weights, moments = {"model": part("", 0)}, {"optimizer": part("optimizer_0", 0)}
        dcp.load(weights, checkpoint_id=tmp_path / f"checkpoint-{step}" / "pytorch_model_fsdp_0")
        dcp.load(moments, checkpoint_id=tmp_path / f"checkpoint-{step}" / "optimizer_0")
        state = moments["optimizer"]["state"]
        return (
            [int(weights["model"][f"layers.{i}.w"][0]) for i in range(2)],
            [int(state[f"layers.{i}.w"]["exp_avg"][0]) for i in range(2)],
        )

    save_both(100)
    save_both(200)
    save_both(300)
    assert load_both(300) == ([100, 300], [100, 300])
    assert load_both(200) == ([100, 200], [100, 200])
    save_both(250)
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        assert parent(tmp_path / "checkpoint-250" / name) == f"checkpoint-200/{name}"
    assert load_both(250) == ([100, 250], [100, 250])


def test_a_relative_path_and_an_absolute_one_are_the_same_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's ``run/step-200`` finds what was saved under the full name."""
    run.save(100)
    monkeypatch.chdir(run.folder.parent)
    dcp.save(run.state(200), checkpoint_id="run/step-200", planner=LayerwisePlanner(due(L1)))
    assert parent(run.path(200)) == "step-100"


# What changed since -----------------------------------------------------------------------


def test_a_changed_shape_is_written_with_a_warning(tmp_path: Path) -> None:
    """A resized head is due whatever the policy says; training goes on."""
    Run(tmp_path).save(100)
    grown = Run(tmp_path, Model((*MODEL.params[:3], Param("lm_head.w", (5, 3)))))
    grown.steps.add(100)
    with heard_warnings() as said:
        folder = grown.save(200)
    assert len(said) == 1 and "lm_head.w was (2, 3) float32 and is (5, 3) float32" in said[0]
    assert grown.origins(folder) == {L0: 100, L1: 100, L2: 100, HEAD: 200}


def test_a_changed_source_dtype_is_written_with_a_warning(tmp_path: Path) -> None:
    """What was trained in another dtype is another value: it is not carried."""
    Run(tmp_path).save(100)
    half = Run(tmp_path, Model((*MODEL.params[:3], Param("lm_head.w", (2, 3), dtype="bfloat16"))))
    half.steps.add(100)
    with heard_warnings() as said:
        steps = half.steps_of(half.save(200))
    assert len(said) == 1 and "float32" in said[0] and "bfloat16" in said[0]
    assert (steps["model.lm_head.w"], steps[f"model.{L0}.w"]) == (200, 100)


def test_a_parameter_that_was_added_is_written(tmp_path: Path) -> None:
    """A new layer is due at once, and its arrival makes no other layer due."""
    small = Run(tmp_path, MODEL.without("lm_head.w"))
    small.save(100)
    grown = Run(tmp_path)
    grown.steps.add(100)
    folder = grown.save(200)
    assert grown.origins(folder) == {L0: 100, L1: 100, L2: 100, HEAD: 200}


def test_a_parameter_added_to_a_layer_makes_its_unit_due(tmp_path: Path) -> None:
    """A unit is of one step: the layer's old parameter is written along with the new one."""
    Run(tmp_path).save(100)
    grown = Run(tmp_path, Model((*MODEL.params, Param(f"{L0}.bias", (3,)))))
    grown.steps.add(100)
    assert grown.origins(grown.save(200)) == {L0: 200, L1: 100, L2: 100, HEAD: 100}


def test_a_parameter_that_was_removed_is_gone(tmp_path: Path) -> None:
    """The checkpoint has the keys of the state that is saved, not of its base."""
    Run(tmp_path).save(100)
    small = Run(tmp_path, MODEL.without("lm_head.w"))
    small.steps.add(100)
    folder = small.save(200)
    assert not any("lm_head" in key for key in metadata(folder).state_dict_metadata)
    assert small.origins(folder) == {L0: 100, L1: 100, L2: 100}


def test_a_state_without_parameters_is_written_with_a_warning(tmp_path: Path) -> None:
    """Who saves only counters is told that nothing can be carried, not stopped."""
    for step in (1, 2):
        with heard_warnings() as said:
            dcp.save({"epoch": step}, checkpoint_id=tmp_path / f"step-{step}", planner=LayerwisePlanner("parity"))
        assert len(said) == 1 and "No parameter was recognised" in said[0]


# Narrowing --------------------------------------------------------------------------------


def test_weights_are_stored_narrower_and_carried_so(tmp_path: Path) -> None:
    """bf16 weights have the bits of their origin step rounded, its float32 is on record, and no warning comes."""
    run = Run(tmp_path)
    run.save(100, "moments:every=2,weights=bf16")
    folder = run.save(200, "parity|filter:head=0,tail=0,every=99,aux=rest")
    told, stored = record(folder), metadata(folder).state_dict_metadata
    dtypes = {key: stored[key].properties.dtype for key in stored if hasattr(stored[key], "properties")}
    loaded = run.load(folder)
    for layer in LAYERS:
        key = f"model.{layer}.w"
        param, kind = keys(MODEL)[key]
        number = told["units"][layer]["weight"][0]
        origin = told["origins"][number][1]
        want = full_value(key, param, kind, origin)
        narrow = origin == 100
        assert dtypes[key] == (torch.bfloat16 if narrow else torch.float32)
        assert (told["narrowed"].get(key) == "torch.float32") is narrow
        assert torch.equal(loaded[key], want.bfloat16().float() if narrow else want)
    assert {told["origins"][kinds["weight"][0]][1] for kinds in told["units"].values()} == {100, 200}


def test_buffers_and_frozen_weights_are_not_narrowed(tmp_path: Path) -> None:
    """What training does not move must come back bit for bit, and counters must go on counting."""
    frozen = Param("layers.0.base.weight", (3, 3), trained=False)
    mean = Param("layers.0.bn.running_mean", (3,), trained=False)
    run = Run(tmp_path, Model((Param("layers.0.w", (3, 3)), frozen, mean)))
    stored = metadata(run.save(100, "moments:weights=bf16,moments=bf16")).state_dict_metadata
    dtypes = {key: stored[key].properties.dtype for key in keys(run.model)}
    assert dtypes == {
        "model.layers.0.w": torch.bfloat16,
        "optim.state.layers.0.w.exp_avg": torch.bfloat16,
        "optim.state.layers.0.w.exp_avg_sq": torch.bfloat16,
        "optim.state.layers.0.w.step": torch.float32,
        "model.layers.0.base.weight": torch.float32,
        "model.layers.0.bn.running_mean": torch.float32,
    }


# Ties -------------------------------------------------------------------------------------


def test_tied_weights_are_due_together(tmp_path: Path) -> None:
    """Parity deals layers 0 and 1 to different groups, but shared storage is one thing."""
    twin = Param(f"{L1}.w", (4, 3), trained=False)
    model = Model((MODEL.params[0], twin, MODEL.params[2], MODEL.params[3]), ((f"{L0}.w", f"{L1}.w"),))
    run = Run(tmp_path, model)
    for step in (100, 200, 300):
        folder = run.save(step, due(L1) if step == 300 else due(L0))
        loaded = run.load(folder)
        assert torch.equal(loaded[f"model.{L0}.w"], loaded[f"model.{L1}.w"])
    assert record(run.path(200))["ties"] == [[f"model.{L0}.w", f"model.{L1}.w"]]


def test_ties_are_remembered_when_staging_lost_them(tmp_path: Path) -> None:
    """A later save in which the copies no longer share memory still knows that they are one."""
    twin = Param(f"{L1}.w", (4, 3), trained=False)
    params = (MODEL.params[0], twin, MODEL.params[2], MODEL.params[3])
    Run(tmp_path, Model(params, ((f"{L0}.w", f"{L1}.w"),))).save(100)
    lost = Run(tmp_path, Model(params))
    folder = lost.save(200, due(L0))
    assert {f"model.{L0}.w", f"model.{L1}.w"} <= written(folder)
    assert record(folder)["ties"] == [[f"model.{L0}.w", f"model.{L1}.w"]]


def test_ties_are_found_on_whichever_rank_has_elements(fleet: Fleet, tmp_path: Path) -> None:
    """The coordinator's shards are empty and tell nothing; the last rank's tell it, with the plan."""
    names = [f"model.layers.{i}.w" for i in range(3)]
    # Without the tie, layer 1 alone would be due in the second save.
    for step, expected in ((1, set(names)), (2, set()), (3, set(names))):
        folder = tmp_path / f"step-{step}"
        fleet.call("tests.support.runs:save_tied", str(folder), step, "parity", True, ranks=2)
        assert record(folder)["ties"] == [names[:2]]
        assert written(folder) == expected
    untied = tmp_path / "other" / "step-1"
    fleet.call("tests.support.runs:save_tied", str(untied), 1, "parity", False, ranks=2)
    assert record(untied)["ties"] == []


def test_ties_that_staging_loses_are_remembered(tmp_path: Path) -> None:
    """A writer that stages for itself copies each tensor: the twins are no longer one memory, but still one."""
    twin = Param(f"{L1}.w", (4, 3), trained=False)
    model = Model((MODEL.params[0], twin, MODEL.params[2], MODEL.params[3]), ((f"{L0}.w", f"{L1}.w"),))
    run = Run(tmp_path, model)
    run.save(100)
    writer = FileSystemWriter(run.path(200))
    dcp.async_save(run.state(200), storage_writer=writer, planner=LayerwisePlanner(due(L0))).result()
    assert {f"model.{L0}.w", f"model.{L1}.w"} <= written(run.path(200))


# Several ranks ----------------------------------------------------------------------------


def test_ranks_may_hold_different_keys(fleet: Fleet, tmp_path: Path) -> None:
    """As in a pipeline: the coordinator decides about layers that it does not hold."""
    for step in (100, 200):
        fleet.call("tests.support.runs:save_stages", str(tmp_path / f"step-{step}"), step, ranks=3)
    found: dict[str, int] = {}
    for part in fleet.call("tests.support.runs:load_stages", str(tmp_path / "step-200"), 200, ranks=3):
        found |= part
    assert found == {f"layers.{i}.w": 200 if i % 2 else 100 for i in range(6)}


@pytest.mark.parametrize(
    ("sizes", "dtypes", "said"),
    [
        ([4, 4, 5], ["float32"] * 3, "(4,) torch.float32 on rank 0 but (5,) torch.float32 on rank 2"),
        ([4, 4], ["float32", "bfloat16"], "(4,) torch.float32 on rank 0 but (4,) torch.bfloat16 on rank 1"),
    ],
)
def test_ranks_that_disagree_about_a_tensor_are_an_error(
    fleet: Fleet, tmp_path: Path, sizes: list[int], dtypes: list[str], said: str
) -> None:
    """One of the two would be lost: the error names the key and both ranks, and reaches every rank."""
    path = tmp_path / "step-1"
    reasons = fleet.call("tests.support.runs:save_disagreeing", str(path), sizes, dtypes, ranks=len(sizes))
    assert all("model.layers.0.w" in reason and said in reason for reason in reasons)
    assert files(path) == set()


def test_all_ranks_must_save_with_this_planner(fleet: Fleet, tmp_path: Path) -> None:
    """A rank with a stock planner cannot say what it holds: refused, naming the rank, before anything is written."""
    path = tmp_path / "step-1"
    reasons = fleet.call("tests.support.runs:save_with_a_stock_rank", str(path), ranks=2)
    assert all("Rank 1 saves with another planner" in reason for reason in reasons)
    assert files(path) == set()


def test_another_world_size_carries_what_the_first_wrote(fleet: Fleet, tmp_path: Path) -> None:
    """Three ranks go on where two left off: each layer has its value of the step that wrote it."""
    sharded = Model(tuple(Param(p.fqn, p.shape, "shard") for p in MODEL.params))
    run = Run(tmp_path, sharded)
    run.steps |= {100, 200, 300}
    fleet.call("tests.support.world:forget")
    for step, ranks in ((100, 2), (200, 3), (300, 1)):
        fleet.call("tests.support.world:save", sharded, step, str(run.path(step)), "parity", ranks=ranks)
    assert run.origins(200)[L1] == 200 and run.origins(200)[L0] == 100
    assert run.origins(300)[L1] == 200 and run.origins(300)[L0] == 300
    assert all(name.startswith("__") or name.startswith("carried/") for name in named(run.path(300)))


def test_a_full_disk_in_a_writers_thread_is_no_commit(run: Run) -> None:
    """DCP's writers overlook a thread that fails; what is missing is found before the commit."""

    class Full(LayerwisePlanner):
        def resolve_data(self, write_item: WriteItem) -> Any:
            if threading.current_thread() is not threading.main_thread():
                raise OSError(28, "No space left on device")
            return super().resolve_data(write_item)

    run.save(100)
    # Enough in each file that both threads get some.
    large = {"model": {f"layers.{i}.w": torch.zeros(100_000) for i in range(20)}}
    planner, writer = Full("full"), FileSystemWriter(run.path(100), thread_count=2)
    threading.excepthook, before = lambda args: None, threading.excepthook
    try:
        reason = refusal(dcp.save, large, storage_writer=writer, planner=planner)
    finally:
        threading.excepthook = before
    assert "was not written" in reason
    assert run.origins(100) == dict.fromkeys(LAYERS, 100)


def test_without_a_policy_it_is_the_documented_one() -> None:
    """Moments every fifth save, all in bf16: what docs/policies.md has the numbers of."""
    assert str(LayerwisePlanner().policy) == "moments:weights=bf16,moments=bf16"
