"""LayerwiseLoadPlanner: what it loads equals what stock dcp.load gives, what it does not load stays untouched."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_dcp import LayerwisePlanner
from tailor_dcp.errors import LoadError
from tailor_dcp.load_planner import LayerwiseLoadPlanner
from tests import test_laws
from tests.support.fleet import Fleet
from tests.support.runs import HEAD, L0, L1, L2, LAYERS, MODEL, Run, due, files, metadata
from tests.support.world import Model, Param, flat, keys, state
from tests.test_laws import POLICIES, models

# `unchanged` splits a layer's frozen weights from the rest; the names of whole layers are meant here.
WHOLE_LAYERS = [policy for policy in POLICIES if not policy.startswith("unchanged+")]
pytestmark = pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
FEW = settings(max_examples=settings().max_examples // 3)
MARK = 777
"""The step whose values the state has before a load; none is ever saved at it."""


def load_with(group: Any, model: Model, path: str, **options: Any) -> dict[str, Any]:
    """Load over the values of a step that was never saved and return everything, whole."""
    target = state(model, MARK, group)
    dcp.load(target, checkpoint_id=path, planner=LayerwiseLoadPlanner(path, **options), process_group=group)
    return flat(target)


def failing_load(group: Any, model: Model, path: str, only: int | None = None, **options: Any) -> tuple[str, bool]:
    """Return the error of a load, and whether it left everything as it was.

    With ``only``, the options are given on that rank alone.
    """
    target = state(model, MARK, group)
    mine = options if only is None or dist.get_rank(group) == only else {}
    try:
        dcp.load(target, checkpoint_id=path, planner=LayerwiseLoadPlanner(path, **mine), process_group=group)
    except dcp.api.CheckpointException as error:
        assert all(isinstance(wrapped[0], LoadError) for wrapped in error.failures.values()), error
        told = str(next(iter(error.failures.values()))[0])
    before = flat(state(model, MARK, group))
    untouched = all(torch.equal(torch.as_tensor(v), torch.as_tensor(before[k])) for k, v in flat(target).items())
    return told, untouched


def layer_of(model: Model, key: str) -> str | None:
    """Return a key's layer by this test's own rule, None for what belongs to none."""
    found = keys(model).get(key)
    return test_laws.layer_of(model, found[0]) if found else None


def same(a: Any, b: Any) -> bool:
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@FEW
@given(data=st.data())
def test_what_is_chosen_equals_a_stock_load_and_the_rest_stays(
    data: st.DataObject, tmp_path_factory: Any, fleet: Fleet, stock_fleet: Fleet
) -> None:
    """Any policy, any ranks: a random subset of layers, some of them as of other steps of the run."""
    run = tmp_path_factory.mktemp("run")
    model, policy = data.draw(models()), data.draw(st.sampled_from(sorted(WHOLE_LAYERS)))
    writer, carry = (
        data.draw(st.sampled_from(["stock", "layerwise"])),
        data.draw(st.sampled_from(["auto", "reference"])),
    )
    fleet.call("tests.support.world:forget")
    ranks, path = data.draw(st.integers(1, 4)), run / "step-30"
    # Loaded without ties: where two stored entries share a tensor, stock torch lets the later one win.
    bare = Model(model.params)
    for step in (10, 20, 30):
        args = (model, step, str(run / f"step-{step}"), policy)
        fleet.call("tests.support.world:save", *args, ranks=ranks, writer=writer, carry=carry)
    truth = {s: stock_fleet.one("tests.support.world:load", bare, str(run / f"step-{s}")) for s in (10, 20, 30)}
    names = sorted({test_laws.layer_of(bare, param) for param, _ in keys(model).values()})
    if data.draw(st.booleans(), label="all"):
        chosen, options = names, {}
    else:
        chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        options = {"layers": chosen}
    steps = data.draw(st.dictionaries(st.sampled_from(chosen), st.sampled_from([10, 20, 30])))
    before, ranks = flat(state(bare, MARK, None)), data.draw(st.integers(1, 4))
    for loaded in fleet.call("tests.test_load_planner:load_with", bare, str(path), ranks=ranks, steps=steps, **options):
        for key, value in loaded.items():
            layer = layer_of(bare, key)
            if layer in chosen or (layer is None and not options):
                assert same(value, truth[steps.get(layer, 30)][key]), key
            else:
                assert same(value, before[key]), key


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.save(100)
    run.save(200, due(L1))
    run.save(300, due(L2))
    return run


def loaded_steps(run: Run, step: int | Path, **options: Any) -> dict[str, int]:
    """Return the step of each layer's values after a load; ``MARK`` for what was left alone."""
    path = step if isinstance(step, Path) else run.path(step)
    loaded = load_with(None, run.model, str(path), **options)
    found: dict[str, set[int]] = {}
    for key, known in keys(run.model).items():
        steps = [s for s in (*run.steps, MARK) if same(loaded[key], state_value(run.model, key, s))]
        assert steps, f"{key} has a value of none of the steps"
        found.setdefault(known[0].fqn.rpartition(".")[0], set()).add(steps[0])
    assert all(len(steps) == 1 for steps in found.values()), f"a layer is torn: {found}"
    found["train"] = {loaded["train.step"]}
    return {layer: steps.pop() for layer, steps in found.items()}


def state_value(model: Model, key: str, step: int) -> Any:
    return flat(state(model, step, None))[key]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, {L0: 100, L1: 200, L2: 300, HEAD: 100, "train": 300}),
        ("model.layers.*", {L0: 100, L1: 200, L2: 300, HEAD: MARK, "train": MARK}),
        ("model.layers.{1,2}", {L0: MARK, L1: 200, L2: 300, HEAD: MARK, "train": MARK}),
        ([L1, "lm_*"], {L0: MARK, L1: 200, L2: MARK, HEAD: 100, "train": MARK}),
    ],
)
def test_layers_chooses_by_glob(run: Run, layers: Any, expected: dict[str, int]) -> None:
    """Weights and moments of what matches; with no choice, everything."""
    assert loaded_steps(run, 300, layers=layers) == expected


def test_steps_takes_layers_from_other_steps(run: Run) -> None:
    """As that step's checkpoint has them, whatever it carries itself; a layer's own name goes before a glob."""
    steps = {"model.layers.*": 100, L1: 200}
    assert loaded_steps(run, 300, steps=steps) == {L0: 100, L1: 200, L2: 100, HEAD: 100, "train": 300}
    assert loaded_steps(run, 100, steps={L1: 200, L2: 300, L0: 100}) == {
        L0: 100, L1: 200, L2: 300, HEAD: 100, "train": 100
    }  # fmt: skip


def test_steps_through_a_symbolic_link_and_in_a_moved_run(run: Run, tmp_path: Path) -> None:
    """The way to the other step is found from where the folder really is."""
    moved = run.folder.rename(tmp_path / "moved")
    link = tmp_path / "a" / "b"
    link.mkdir(parents=True)
    (link / "run").symlink_to(moved)
    assert loaded_steps(run, link / "run" / "step-300", steps={L1: 100})[L1] == 100


def test_steps_stays_in_its_series(tmp_path: Path) -> None:
    """Accelerate keeps several checkpoints a step; the other ones are another state."""
    run = Run(tmp_path / "run")
    for step in (100, 200):
        run.save(step, to=f"checkpoint-{step}/a", base=None)
        run.save(step + 1, to=f"checkpoint-{step}/b", base=None)
    assert loaded_steps(run, run.path("checkpoint-200/b"), steps={L0: 100}) == {
        L0: 101, L1: 201, L2: 201, HEAD: 201, "train": 201
    }  # fmt: skip


def test_steps_may_start_from_a_stock_checkpoint_and_from_a_name_without_a_step(run: Run) -> None:
    """Nothing but the names of folders is needed."""
    stock = run.stock(400)
    assert loaded_steps(run, stock, steps={L1: 200}) == {L0: 400, L1: 200, L2: 400, HEAD: 400, "train": 400}
    assert loaded_steps(run, 100, steps={L1: 400})[L1] == 400
    best = run.stock(500, to="best")
    assert loaded_steps(run, best, steps={L1: 200})[L1] == 200


def test_one_planner_can_be_used_again(run: Run) -> None:
    """Also with a reader that keeps its metadata."""

    class Keeping(dcp.FileSystemReader):
        kept: Any = None

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            self.kept = self.kept or super().read_metadata(*args, **kwargs)
            return self.kept

    planner = LayerwiseLoadPlanner(run.path(300), layers="model.*", steps={L2: 100}, rename={L1: L0})
    reader = Keeping(run.path(300))
    first, second, stock = (state(run.model, MARK, None) for _ in range(3))
    for target in (first, second):
        dcp.load(target, storage_reader=reader, planner=planner)
    assert flat(first).keys() == flat(second).keys()
    assert all(same(value, flat(second)[key]) for key, value in flat(first).items())
    dcp.load(stock, storage_reader=reader)
    assert all(same(value, flat(stock)[key]) for key, value in run.load(300).items())


def test_rename_fills_a_layer_of_the_callers_with_another_of_the_checkpoint(run: Run) -> None:
    """Left is the checkpoint's, right the caller's; weights and optimizer state; names alone are swapped too."""
    truth = run.load(300)
    loaded = load_with(None, run.model, str(run.path(300)), rename={L0: L2, L2: L0})
    for key in keys(run.model):
        swapped = key.replace(L0, "?").replace(L2, L0).replace("?", L2)
        assert same(loaded[key], truth[swapped]), key
    alone = load_with(None, run.model, str(run.path(300)), rename={L0: L2}, layers=L2, steps={L2: 200})
    for key in keys(run.model):
        before = state_value(run.model, key, MARK)
        assert same(alone[key], truth[key.replace(L2, L0)] if L2 in key else before), key


def test_rename_fills_layers_that_the_checkpoint_never_had(run: Run) -> None:
    """Prefixes of names are whole components: layer 1 is not layer 10."""
    deeper = Model((Param("blocks.1.w", (4, 3)), Param("blocks.10.w", (4, 3))))
    truth = run.load(300)
    rename = {"model.layers.1": "blocks.1", "model.layers.2": "blocks.10"}
    loaded = load_with(None, deeper, str(run.path(300)), rename=rename, layers="blocks.*")
    for kind in ("exp_avg", "exp_avg_sq", "step"):
        assert same(loaded[f"optim.state.blocks.10.w.{kind}"], truth[f"optim.state.{L2}.w.{kind}"])
    assert same(loaded["model.blocks.1.w"], truth[f"model.{L1}.w"])
    assert same(loaded["model.blocks.10.w"], truth[f"model.{L2}.w"])
    assert loaded["train.step"] == MARK


def test_a_flat_state_dict_works_as_a_nested_one(run: Run) -> None:
    """Also the ones that get_state_dict makes with flatten_optimizer_state_dict=True."""
    truth = run.load(300)
    mine = {key: state_value(run.model, key, MARK) for key in keys(run.model)}
    dcp.load(mine, checkpoint_id=run.path(300), planner=LayerwiseLoadPlanner(run.path(300), layers=L2))
    for key, value in mine.items():
        assert same(value, truth[key] if L2 in key else state_value(run.model, key, MARK))


def test_dtypes_differ_only_if_the_save_narrowed_them_or_the_caller_says_so(tmp_path: Path) -> None:
    """Stock DCP casts without a word."""
    run = Run(tmp_path / "run")
    path = run.save(100, "moments:every=2,weights=bf16,moments=bf16")
    wide = load_with(None, run.model, str(path))
    assert same(wide[f"model.{L0}.w"], state_value(run.model, f"model.{L0}.w", 100).bfloat16().float())
    key = f"model.{L0}.w"
    half = Model(tuple(Param(p.fqn, p.shape, dtype="float16") for p in MODEL.params))
    told, untouched = failing_load(None, half, str(path))
    assert untouched
    for word in (key, "torch.bfloat16", "torch.float16", "cast=True"):
        assert word in told
    cast = load_with(None, half, str(path), cast=True)
    assert same(cast[key], state_value(run.model, key, 100).bfloat16().half())


def test_after_a_mixed_load_the_next_save_writes_everything(run: Run) -> None:
    """The state is no longer what any checkpoint holds; after a whole load it is."""
    for number, (options, all_written) in enumerate(
        [({}, False), ({"layers": L0}, True), ({"steps": {L2: 100}}, True), ({"rename": {L0: L1}}, True), ({}, False)]
    ):
        load_with(None, run.model, str(run.path(300)), **options)
        path = run.save(1000 + number)
        assert all("carried" not in name for name in files(path)) == all_written, options


# Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "model.layer.*"}, ["layers=", "model.layer.*", "did you mean", L0]),
        ({"layers": "model.layers.{1,9}"}, ["model.layers.9", "did you mean"]),
        ({"steps": {"lm_haed": 100}}, ["steps=", "lm_haed", HEAD]),
        ({"steps": {L1: 100}, "layers": L0}, ["steps=", L1, "that is loaded"]),
        ({"steps": {L1: 150}}, ["no committed checkpoint", "150", "100, 200, 300"]),
        ({"steps": {"model.layers.*": 100, "*.1": 200}}, [L1, "100 or 200"]),
        ({"rename": {"model.layers.7": L1}}, ["rename=", "model.layers.7", "did you mean model.layers"]),
        ({"rename": {L1: "model.layers.7"}}, ["rename=", "model.layers.7", "did you mean model.layers"]),
        ({"rename": {L1: L0, L2: L0}}, [L0, "more than one"]),
        ({"rename": {HEAD: L0}}, [f"model.{L0}.w", "size", "(2, 3)", "(4, 3)"]),
    ],
)
def test_a_wrong_option_is_one_sentence_and_touches_nothing(run: Run, options: Any, words: list[str]) -> None:
    """It names what is close."""
    told, untouched = failing_load(None, run.model, str(run.path(300)), **options)
    assert untouched
    for word in words:
        assert word in told, told
    assert "\n" not in told


@pytest.mark.parametrize("options", [{"layers": []}, {"steps": {L0: "100"}}, {"steps": {L0: True}}])
def test_options_that_make_no_sense_are_refused_at_once(options: dict[str, Any]) -> None:
    """Before any load."""
    with pytest.raises(LoadError):
        LayerwiseLoadPlanner(**{"checkpoint": "run/step-1", **options})


def test_a_planner_made_for_another_folder_is_refused(run: Run) -> None:
    """It would look for the files in the wrong place."""
    with pytest.raises(dcp.api.CheckpointException, match=r"made for .*step-200.* but .*step-300"):
        dcp.load(run.state(0), checkpoint_id=run.path(300), planner=LayerwiseLoadPlanner(run.path(200)))


def _model_with(extra: Param) -> Model:
    return Model((*MODEL.params, extra))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (_model_with(Param(f"{L2}.v", (4, 3))), [f"model.{L2}.v", f"layer {L2}", f"model.{L2}.w", "take the key out"]),
        (Model((Param(f"{L0}.w", (4, 4)),)), [f"model.{L0}.w", "(4, 3)", "(4, 4)", "step 100"]),
    ],
)
def test_a_model_that_does_not_fit_is_an_error(run: Run, model: Model, words: list[str]) -> None:
    """Missing keys and other sizes, before anything is touched."""
    told, untouched = failing_load(None, model, str(run.path(300)))
    assert untouched
    for word in words:
        assert word in told, told


def test_a_tensor_and_an_object_do_not_fit(run: Run) -> None:
    """Either way round."""
    for mine, word in (({"train": {"step": torch.ones(1)}}, "is an object"), ({"train": {"rng": 5}}, "is a tensor")):
        with pytest.raises(dcp.api.CheckpointException, match=word):
            dcp.load(mine, checkpoint_id=run.path(300), planner=LayerwiseLoadPlanner(run.path(300)))


@pytest.mark.parametrize("how", ["gone", "short"])
@pytest.mark.parametrize("options", [{}, {"steps": {L1: 200}}])
def test_a_file_that_is_missing_or_short_stops_the_load_of_what_needs_it(run: Run, how: str, options: Any) -> None:
    """It names file, layer and step, before anything is touched; other layers can still be loaded."""
    for path in run.folder.glob("*/carried"):
        path.rename(path.with_name("away"))
    at = run.path(200)
    path = next(iter(at.glob("*.distcp")))
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes(10))
    step = 300 if options else 200
    told, untouched = failing_load(None, run.model, str(run.path(step)), layers=L1, **options)
    assert untouched
    for word in (path.name, f"layer {L1}", "step 200", "missing" if how == "gone" else "bytes"):
        assert word in told, told
    assert loaded_steps(run, 300, layers=L2)[L2] == 300


def test_a_file_outside_of_the_run_is_not_opened(run: Run, tmp_path: Path) -> None:
    """Neither of the checkpoint itself nor of another step."""
    plain = metadata(run.path(200))
    (own,) = run.path(200).glob("*.distcp")
    own.rename(tmp_path / "outside")
    for info in plain.storage_data.values():
        info.relative_path = "../../outside" if info.relative_path == own.name else info.relative_path
    (run.path(200) / ".metadata").write_bytes(pickle.dumps(plain))
    for step, options in ((200, {}), (300, {"steps": {L1: 200}})):
        told, untouched = failing_load(None, run.model, str(run.path(step)), **options)
        assert untouched
        assert "outside of its run" in told


def test_chunks_that_do_not_cover_a_tensor_are_an_error(run: Run) -> None:
    """Stock DCP leaves the rest as it is, without a word."""
    plain = metadata(run.path(300))
    plain.state_dict_metadata[f"model.{L0}.w"].chunks[0].sizes = torch.Size([2, 3])
    (run.path(300) / ".metadata").write_bytes(pickle.dumps(plain))
    told, untouched = failing_load(None, run.model, str(run.path(300)))
    assert untouched
    assert "6 of the 12 elements" in told


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def test_an_object_is_not_run(run: Run, tmp_path: Path) -> None:
    """The error names the entry and what it would have called."""
    path = run.save(400, extra={"bad": Attack(str(tmp_path / "attacked"))})
    with pytest.raises(dcp.api.CheckpointException, match=r"bad in .*asks for posix\.mkdir, .*was not run"):
        dcp.load({"bad": None}, checkpoint_id=path, planner=LayerwiseLoadPlanner(path))
    assert not (tmp_path / "attacked").exists()


def test_tied_parameters_come_from_one_step(tmp_path: Path) -> None:
    """They share one storage; whichever were read last would win."""
    params = (Param("embed.w", (4, 3)), Param(f"{L0}.w", (4, 3)), Param("lm_head.w", (4, 3), trained=False))
    run = Run(tmp_path / "run", Model(params, (("embed.w", "lm_head.w"),)))
    for step in (100, 200):
        run.save(step, "full")
    told, untouched = failing_load(None, run.model, str(run.path(200)), steps={"embed": 100})
    assert untouched
    for word in ("embed", "lm_head", "share one storage"):
        assert word in told
    loaded = load_with(None, run.model, str(run.path(200)), steps={"{embed,lm_head}": 100})
    assert same(loaded["model.lm_head.w"], state_value(run.model, "model.embed.w", 100))


# Ranks -------------------------------------------------------------------------------------


def test_an_error_on_one_rank_stops_all_of_them(run: Run, fleet: Fleet) -> None:
    """Before any has touched a tensor."""
    args = ("tests.test_load_planner:failing_load", run.model, str(run.path(300)))
    for told, untouched in fleet.call(*args, ranks=3, only=1, steps={L1: 150}):
        assert untouched
        assert "150" in told


def stages(group: Any, path: str, layers: Any) -> Any:
    """Save as in a pipeline, each rank with a layer of its own; load some; return what is loaded on each rank."""
    rank = dist.get_rank(group)
    mine = {"model": {f"layers.{rank}.w": torch.full((3,), float(rank))}}
    dcp.save(mine, checkpoint_id=path, planner=LayerwisePlanner("full"), process_group=group)
    mine["model"][f"layers.{rank}.w"].fill_(-1)
    try:
        dcp.load(mine, checkpoint_id=path, planner=LayerwiseLoadPlanner(path, layers=layers), process_group=group)
    except dcp.api.CheckpointException as error:
        return str(error.failures[0][0])
    return mine["model"][f"layers.{rank}.w"][0].item()


def test_a_glob_need_match_on_one_rank_only(tmp_path: Path, fleet: Fleet) -> None:
    """Stages of a pipeline have different layers; what matches on none of them is an error on all."""
    call: Callable[..., list[Any]] = fleet.call
    name = "tests.test_load_planner:stages"
    assert call(name, str(tmp_path / "step-1"), "layers.{0,2}", ranks=3) == [0, -1, 2]
    for told in call(name, str(tmp_path / "step-2"), "layers.{0,7}", ranks=3):
        assert "layers.7" in told
        assert "did you mean layers." in told


def load_into_nothing(group: Any, path: str, layers: str) -> dict[str, Any]:
    """Load into tensors on the meta device; return the values of those that have memory afterwards."""
    with torch.device("meta"):
        mine = {"model": {f"{layer}.w": torch.empty(4, 3) for layer in (L0, L1)}}
    with suppress(dcp.api.CheckpointException):
        dcp.load(mine, checkpoint_id=path, planner=LayerwiseLoadPlanner(path, layers=layers), process_group=group)
    return {key: value for key, value in mine["model"].items() if not value.is_meta}


def test_tensors_without_memory_get_some_only_if_they_are_loaded(run: Run, fleet: Fleet) -> None:
    """DCP gives memory to all of a state dict; what is not loaded would hold rubbish."""
    found = fleet.one("tests.test_load_planner:load_into_nothing", str(run.path(300)), L1)
    assert found.keys() == {f"{L1}.w"}
    assert same(found[f"{L1}.w"], state_value(run.model, f"model.{L1}.w", 200))
    for path in run.path(300).rglob("*.distcp"):
        path.unlink()
    assert fleet.one("tests.test_load_planner:load_into_nothing", str(run.path(300)), L1) == {}


def test_every_layer_of_the_run_is_named(run: Run) -> None:
    """The model that these tests use has the layers they think it has."""
    assert set(loaded_steps(run, 300)) == {*LAYERS, "train"}
