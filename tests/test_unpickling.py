"""Unpickling: what training states hold comes back, what the user names as well, and nothing else does."""

from __future__ import annotations

import argparse
import datetime
import io
import json
import pickle
import random
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import tailor_dcp.cli
from tailor_dcp import LayerwiseLoadPlanner, LayerwiseReader, TailorError, diff, open_checkpoint
from tailor_dcp.converters import cli as convert_cli
from tailor_dcp.converters.convert import convert
from tailor_dcp.converters.options import Options
from tailor_dcp.unpickling import NotAllowedError, allowed, asked_for, load, refusal
from tests.attacks.ground import archive
from tests.support.runs import Run


class Phase(Enum):
    """A class of a training script."""

    WARM = "warm"
    COLD = "cold"


class Position:
    """Another one."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Position) and self.at == other.at

    __hash__ = None  # type: ignore[assignment]


PHASE = f"{__name__}.Phase"


def through(value: Any, *names: str | type) -> Any:
    """Save and load."""
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return load(stream, allowed(names))


def same(a: Any, b: Any) -> bool:
    """Tell whether two values are equal, down to the types of numpy's arrays."""
    if isinstance(a, np.ndarray | torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and bool((a == b).all()) and a.shape == b.shape
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


STATES: dict[str, Callable[[], Any]] = {
    "generators as transformers' Trainer saves them": lambda: {
        "python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state(),
    },
    "generators as Accelerate saves them": lambda: {
        "step": 3, "random_state": random.getstate(), "numpy_random_seed": np.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(), "torch_cuda_manual_seed": [],
    },
    "new generators of numpy": lambda: [
        np.random.default_rng(0).bit_generator.state, np.random.get_state(legacy=False),
        np.random.Generator(np.random.Philox(1)).bit_generator.state,
    ],
    "a scheduler": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(
        torch.optim.SGD([torch.ones(1)], 0.1), 10
    ).state_dict(),
    "a client state of DeepSpeed": lambda: {
        "ds_config": {"zero_optimization": {"stage": 3}}, "ds_version": "0.19.2", "seen": {1, 2}, "at": (1, None),
        "loss": np.float32(0.5), "best": np.float64(0.25), "count": np.int64(7), "done": np.bool_(True),
    },
    "arguments": lambda: argparse.Namespace(lr=0.1, layers=[1, 2], out=PurePosixPath("a/b")),
    "times": lambda: [
        datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC), datetime.date(2026, 1, 2), datetime.time(3, 4),
        datetime.timedelta(hours=1), datetime.timezone(datetime.timedelta(hours=2)),
    ],
    "containers": lambda: OrderedDict(a=[1, (2, {"b": {3}})], c=frozenset({4}), d=range(3), e=slice(1, 2)),
    "bytes": lambda: [b"", b"\xff\x00", "", "\u00e4"],
    "paths": lambda: [Path("/a/b"), PurePosixPath("c")],
    "an empty object": lambda: types.SimpleNamespace(a=1, b=np.arange(3)),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_what_training_states_hold_needs_no_permission(name: str) -> None:
    value = STATES[name]()
    if isinstance(value, types.SimpleNamespace):
        assert same(vars(through(value)), vars(value))
    else:
        assert same(through(value), value)


numbers = st.one_of(
    arrays.boolean_dtypes(),
    arrays.integer_dtypes(endianness="?"),
    arrays.unsigned_integer_dtypes(endianness="?"),
    arrays.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    arrays.complex_number_dtypes(endianness="?", sizes=(64, 128)),
    arrays.unicode_string_dtypes(endianness="?", max_len=5),
    arrays.byte_string_dtypes(max_len=5),
)


@given(
    numbers.flatmap(lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=0, min_side=0, max_side=4))),
    st.booleans(),
    st.sampled_from(["alone", "nested", "twice"]),
)
def test_arrays_come_back_as_numpy_would_have_them(array: Any, turned: bool, where: str) -> None:
    array = np.asfortranarray(array) if turned else array
    forms = {"alone": array, "nested": {"a": [(1, {"b": array})]}, "twice": [array, array]}
    value: Any = forms[where]
    back = through(value)
    found = back if where == "alone" else back["a"][0][1]["b"] if where == "nested" else back[0]
    array = pickle.loads(pickle.dumps(array, 2))  # which turns the bytes of numbers round
    assert type(found) is np.ndarray
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert found.tobytes() == array.tobytes()
    assert found.flags.writeable


@given(numbers.flatmap(arrays.from_dtype))
def test_scalars_come_back(value: Any) -> None:
    back = through([np.asarray(value)[()]])[0]
    assert type(back) is type(np.asarray(value)[()])
    assert np.asarray(back).tobytes() == np.asarray(value).astype(np.asarray(back).dtype).tobytes()


def test_what_holds_itself_is_refused() -> None:
    held: list[Any] = []
    held.append({"again": held})
    with pytest.raises(pickle.UnpicklingError, match="holds itself"):
        through(held)


def test_arrays_of_numpy_1_come_back() -> None:
    data = pickle.dumps([np.arange(3), np.float32(2)], 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert same(load(io.BytesIO(archive(data))), [np.arange(3), np.float32(2)])


@pytest.mark.parametrize(
    "value", [np.array([None]), np.zeros(2, [("a", "f4")]), np.datetime64("2026-01-01"), np.ma.masked_array([1])]
)
def test_other_arrays_are_refused(value: Any) -> None:
    with pytest.raises(pickle.UnpicklingError):
        through(value)


# --- Classes that the user names ---


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with a value of a class of the training script's."""
    return Run(tmp_path / "run").save(200, extra={"phase": Phase.COLD, "position": Position(7)})


NAMES = [PHASE, f"{__name__}.Position"]


def _through_the_mapping(path: Path, allow: list[str]) -> Any:
    held = open_checkpoint(path, allow=allow)
    return held["phase"], held["position"]


def _through_a_load(**how: Any) -> Callable[[Path, list[str]], Any]:
    def run(path: Path, allow: list[str]) -> Any:
        target: dict[str, Any] = {"phase": None, "position": None}
        planner = LayerwiseLoadPlanner(path, allow=allow) if how["planner"] else None
        reader = LayerwiseReader(path, allow=() if how["planner"] else allow) if how["reader"] else None
        dcp.load(target, checkpoint_id=None if reader else path, planner=planner, storage_reader=reader)
        return target["phase"], target["position"]

    return run


WAYS = {
    "open_checkpoint": _through_the_mapping,
    "planner": _through_a_load(planner=True, reader=False),
    "reader": _through_a_load(planner=False, reader=True),
    "planner and reader": _through_a_load(planner=True, reader=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_class_that_is_named_is_loaded(checkpoint: Path, way: str) -> None:
    assert WAYS[way](checkpoint, NAMES) == (Phase.COLD, Position(7))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("names", [[], NAMES[1:]])
def test_a_class_that_is_not_named_is_refused_by_name(checkpoint: Path, way: str, names: list[str]) -> None:
    """The sentence has the entry, the class, and both ways to admit it."""
    with pytest.raises((TailorError, dcp.api.CheckpointException)) as caught:
        WAYS[way](checkpoint, names)
    said = str(caught.value)
    assert "phase in " in said
    assert f"holds an object of {PHASE}, which could run code and was not loaded" in said
    assert f'admit it with --allow {PHASE}, in Python with allow=["{PHASE}"].' in said


def test_a_reader_that_refuses_has_touched_no_tensor(tmp_path: Path) -> None:
    path = Run(tmp_path / "run").save(200, extra={"phase": Phase.COLD})
    target = {**Run(tmp_path / "run").state(1), "phase": None}
    before = {key: tensor.clone() for key, tensor in target["model"].items()}
    for planner in (None, LayerwiseLoadPlanner(path)):
        with pytest.raises(dcp.api.CheckpointException, match="Phase"):
            dcp.load(target, storage_reader=LayerwiseReader(path), planner=planner)
        assert all(torch.equal(before[key], tensor) for key, tensor in target["model"].items())


def test_a_planner_with_a_form_of_its_own_is_left_alone(tmp_path: Path) -> None:
    """What it takes over need not be what torch.save writes."""
    path = Run(tmp_path / "run").save(200, extra={"phase": Phase.COLD})
    taken = []

    class Own(dcp.DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            taken.append(read_item.dest_index.fqn)

    dcp.load({"phase": None}, storage_reader=LayerwiseReader(path), planner=Own())
    assert taken == ["phase"]


def _called(main: Callable[[], None], *arguments: object) -> tuple[int, str, str]:
    """Return a command's exit code, and what it printed."""
    told, out, err = [sys.argv[0], *map(str, arguments)], io.StringIO(), io.StringIO()
    code = 0
    with patch.object(sys, "argv", told), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, out.getvalue(), err.getvalue()


def test_the_commands_take_the_option(checkpoint: Path, tmp_path: Path) -> None:
    """Without it exit code 2 and one sentence; with it the work is done."""
    options = [part for name in NAMES for part in ("--allow", name)]
    asked = (checkpoint, tmp_path / "out", "--to", "torch")
    code, _, error = _called(convert_cli.main, *asked)
    assert code == 2
    assert f"--allow {PHASE}" in error
    assert "Traceback" not in error
    code, _, error = _called(convert_cli.main, *asked, *options)
    assert code == 0, error
    code, told, error = _called(tailor_dcp.cli.main, "diff", checkpoint, tmp_path / "out", "--json", *options)
    assert code == 0, error
    assert all(unit["relative"] == 0 for unit in json.loads(told)["units"])


def test_a_conversion_carries_what_was_allowed(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "out.pt", "torch", options=Options(allow=tuple(NAMES)))
    with torch.serialization.safe_globals([Phase, Position]):
        assert torch.load(tmp_path / "out.pt", weights_only=True)["train"]["phase"] is Phase.COLD
    with pytest.raises(TailorError, match="Phase"):
        diff(checkpoint, checkpoint)
    assert diff(checkpoint, checkpoint, allow=tuple(NAMES)).units


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("os.system", "is a builtin_function_or_method and no class"),
        ("builtins.eval", "and no class"),
        ("torch.load", "is a function and no class"),
        ("torch.float32", "and no class"),
        ("no.such.Class", "there is no such class to import"),
        ("torch.no_such_class", "there is no such class to import"),
        ("Phase", "there is no such class to import"),
        ("", "there is no such class to import"),
        ("../x", "there is no such class to import"),
        ("a\x1b[2J.b", r"a\\x1b\[2J.b: there is no such class"),
    ],
)
def test_only_classes_can_be_allowed(name: str, why: str) -> None:
    for call in (
        allowed,
        lambda names: LayerwiseReader("x", allow=names),
        lambda names: LayerwiseLoadPlanner("x", allow=names),
    ):
        with pytest.raises(NotAllowedError, match=why):
            call([name])


def test_classes_are_taken_as_such_and_inner_ones_by_name() -> None:
    assert allowed([Phase]) == allowed([PHASE]) == allowed(Phase) == allowed(PHASE) == ((Phase, PHASE),)
    assert allowed(["argparse.ArgumentParser"])[0][0] is argparse.ArgumentParser


def test_nothing_is_imported_that_only_a_file_names() -> None:
    """The module runs code when it is imported."""
    data = archive(b"\x80\x02cantigravity\nfly\n.")
    with pytest.raises(pickle.UnpicklingError) as caught:
        load(io.BytesIO(data))
    assert "antigravity" not in sys.modules
    assert asked_for(caught.value) == "antigravity.fly"


@pytest.mark.parametrize("name", ["posix.system", "builtins.eval", "subprocess.Popen", "importlib.import_module"])
def test_nobody_is_advised_to_allow_an_attack(name: str) -> None:
    assert "--allow" not in refusal(name)
    assert "was not run. Do not load this file" in refusal(name)
    module, _, attribute = name.rpartition(".")
    with pytest.raises(pickle.UnpicklingError) as caught:
        load(io.BytesIO(archive(f"\x80\x02c{module}\n{attribute}\n.".encode("latin1"))))
    assert asked_for(caught.value) == name


def test_a_name_that_is_none_is_no_advice() -> None:
    assert "--allow" not in refusal("this file is safe; run --allow os.system.x")
    assert "\x1b" not in refusal("a\x1b[2J.b")


# --- One table for the whole process ---


def test_what_others_have_admitted_stays(tmp_path: Path) -> None:
    """Torch's own context takes away what it finds there already."""
    with torch.serialization.safe_globals([Phase]):
        before = set(torch.serialization.get_safe_globals())
        assert through(Phase.COLD, PHASE) is Phase.COLD
        assert set(torch.serialization.get_safe_globals()) == before
    assert Phase not in torch.serialization.get_safe_globals()


def test_threads_see_only_what_was_allowed_to_them() -> None:
    """A load with permission in one thread lets nothing into another's."""
    stream = io.BytesIO()
    torch.save([Phase.COLD] * 50, stream)
    data, wrong, stop = stream.getvalue(), [], threading.Event()

    def run(names: list[str]) -> None:
        while not stop.is_set():
            try:
                load(io.BytesIO(data), allowed(names))
                good = bool(names)
            except pickle.UnpicklingError:
                good = not names
            if not good:
                wrong.append(names)

    threads = [threading.Thread(target=run, args=(names,)) for names in ([PHASE], [], [PHASE], [])]
    for thread in threads:
        thread.start()
    threading.Event().wait(1)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not [one for one in torch.serialization.get_safe_globals() if "Phase" in str(one)]


def test_other_threads_loads_by_torch_see_nothing_of_it() -> None:
    """What stock torch refuses it refuses also while a load of ours is at work, and numpy's arrays are numpy's."""
    data, array, said = io.BytesIO(), io.BytesIO(), []
    torch.save(Phase.COLD, data)
    torch.save(np.arange(3), array)

    def stock() -> None:
        for stream in (data, array):
            try:
                said.append(torch.load(io.BytesIO(stream.getvalue()), weights_only=True))
            except pickle.UnpicklingError as error:
                said.append(type(error))

    class Meanwhile(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if not said:
                thread = threading.Thread(target=stock)
                thread.start()
                thread.join()
            return super().read(size)

    assert load(Meanwhile(data.getvalue()), allowed([PHASE])) is Phase.COLD
    assert len(said) == 2
    assert all(isinstance(one, type) and issubclass(one, pickle.UnpicklingError) for one in said)


def test_why_it_is_refused_is_said_without_the_advice_to_unpickle_everything(tmp_path: Path) -> None:
    where = tmp_path / "step-1"
    dcp.save({"train": {"day": np.datetime64("2026-01-01")}}, checkpoint_id=str(where))
    with pytest.raises(TailorError) as refused:
        open_checkpoint(where)["train.day"]
    assert "a numpy dtype is of neither numbers nor text" in str(refused.value)
    assert "weights_only" not in str(refused.value)
