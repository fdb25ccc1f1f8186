"""Ancestors: only what the training state descends from is carried from, whatever else lies in the run."""

from __future__ import annotations

import logging
import logging.config
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from tailor_dcp import LayerwisePlanner, forget, lineage
from tailor_dcp.lineage import Ancestor, Token, extend
from tests.support.fleet import Fleet
from tests.support.runs import HEAD, L0, L1, L2, LAYERS, MODEL, Run, due, heard_warnings, parent, record, unheard
from tests.support.world import Model, state

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
    pytest.mark.filterwarnings("error::tailor_dcp.TailorWarning"),
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def whole(step: int) -> dict[str, int]:
    return dict.fromkeys(LAYERS, step)


# Timelines --------------------------------------------------------------------------------


def test_after_going_back_nothing_abandoned_is_carried(run: Run) -> None:
    """Back at step 100 by a stock load of a plain dict, steps 120 and 200 beside it are another timeline's."""
    run.save(100)
    run.save(120, due(L0, L1))
    run.save(200, due(L2, HEAD))
    run.load(100)
    folder = run.save(150, due(L1))
    assert parent(folder) == "step-100"
    assert run.origins(folder) == {L0: 100, L1: 150, L2: 100, HEAD: 100}


def test_a_step_that_is_saved_again_is_carried_from_anew(run: Run) -> None:
    """The abandoned 200 is replaced by the new timeline's: 250 carries the new one's bytes."""
    run.save(100)
    run.save(200, due(L0))
    run.load(100)
    run.save(150, due(L1))
    run.save(201, due(L2), to="step-200")
    folder = run.save(250, due(HEAD))
    assert run.origins(folder) == {L0: 100, L1: 150, L2: 201, HEAD: 250}


def test_a_step_that_stock_overwrote_is_no_ancestor_any_more(run: Run) -> None:
    """The folder is the same but the save is not: 250 carries from 150, whose bytes are still its own."""
    run.save(100)
    run.save(150, due(L1))
    run.save(200, due(L0))
    run.stock(201, to="step-200")
    folder = run.save(250, due(HEAD))
    assert parent(folder) == "step-150"
    assert run.origins(folder) == {L0: 100, L1: 150, L2: 100, HEAD: 250}


def test_a_loaded_checkpoint_that_was_saved_again_meanwhile_is_no_ancestor(run: Run) -> None:
    """A stock load tells no save id; that .metadata is another file by now is seen all the same."""
    run.save(100)
    run.load(100)
    with unheard():
        Run(run.folder).stock(101, to="step-100")
    with heard_warnings() as said:
        folder = run.save(200, due(L1))
    assert len(said) == 1 and "is written as a whole" in said[0]
    assert run.origins(folder) == whole(200)


def test_a_save_that_failed_is_never_carried_from(run: Run) -> None:
    """Its folder may hold data files, but it was not committed: the next save carries from the one before."""

    class Failing(FileSystemWriter):
        def finish(self, *args: Any, **kwargs: Any) -> None:
            raise OSError("the machine was switched off")

    run.save(100)
    with pytest.raises(dcp.api.CheckpointException):
        run.save(200, due(L1), writer=Failing)
    folder = run.save(300, due(L2))
    assert parent(folder) == "step-100"
    assert run.origins(folder) == {L0: 100, L1: 100, L2: 300, HEAD: 100}


def test_a_save_in_flight_is_never_carried_from(run: Run) -> None:
    """While step 200 is still being written by DCP's thread, step 300 carries from step 100."""
    run.save(100)
    go_on, writing = threading.Event(), threading.Event()

    class Slow(FileSystemWriter):
        def finish(self, *args: Any, **kwargs: Any) -> None:
            writing.set()
            assert go_on.wait(60)
            super().finish(*args, **kwargs)

    saving = threading.Thread(target=run.save, args=(200, due(L1)), kwargs={"writer": Slow})
    saving.start()
    assert writing.wait(60)
    folder = run.save(300, due(L2))
    go_on.set()
    saving.join()
    assert parent(folder) == "step-100"
    assert run.origins(folder) == {L0: 100, L1: 100, L2: 300, HEAD: 100}
    assert run.origins(200) == {L0: 100, L1: 200, L2: 100, HEAD: 100}


def test_an_asynchronous_save_that_a_load_overtakes_is_no_ancestor(run: Run) -> None:
    """Step 200 is planned while the trainer goes back to 100: what is saved next descends from 100 alone."""
    run.save(100)
    planning, go_on = threading.Event(), threading.Event()

    class Slow(LayerwisePlanner):
        def create_local_plan(self) -> Any:
            planning.set()
            assert go_on.wait(60)
            return super().create_local_plan()

    saved = dcp.async_save(run.state(200), checkpoint_id=run.path(200), planner=Slow(due(L1)))
    assert planning.wait(60)
    run.load(100)
    go_on.set()
    saved.result()
    folder = run.save(150, due(L2))
    assert parent(folder) == "step-100"
    assert run.origins(folder) == {L0: 100, L1: 100, L2: 150, HEAD: 100}


def test_a_deleted_ancestor_is_passed_over(run: Run) -> None:
    """Retention may have removed the newest: the one before it serves as well."""
    run.save(100)
    run.save(200, due(L1))
    shutil.rmtree(run.path(200))
    assert run.origins(run.save(300, due(L2))) == {L0: 100, L1: 100, L2: 300, HEAD: 100}


def test_runs_do_not_mix(tmp_path: Path) -> None:
    """Two models trained by one process, each in its run, know nothing of each other's checkpoints."""
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    one.save(100)
    two.save(200)
    assert one.origins(one.save(300, due(L1))) == {L0: 100, L1: 300, L2: 100, HEAD: 100}
    assert two.origins(two.save(400, due(L1))) == {L0: 200, L1: 400, L2: 200, HEAD: 200}


@given(data=st.data())
def test_only_ancestors_are_carried_from(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Saves, loads, repeated steps, stock saves, forgetting in any order: no checkpoint mixes timelines."""
    run = Run(tmp_path_factory.mktemp("run"))
    forget()
    # By this test's own reckoning: what each folder holds, when it was saved, and by which planner.
    held: dict[int, dict[str, int]] = {}
    when: dict[int, int] = {}
    ours: set[int] = set()
    line: list[tuple[int, int]] = []  # what the training state descends from, oldest first: folder and time
    for clock in range(1, data.draw(st.integers(2, 7)) + 1):
        step = data.draw(st.sampled_from([10, 20, 30, 40]))
        action = data.draw(st.sampled_from(["save", "save", "save", "load", "stock", "forget"]))
        if action == "load" and step in held:
            run.load(step)
            # A stock planner's checkpoint is an ancestor too, but not one to carry from.
            line = [(step, clock_of)] if (clock_of := when[step]) in ours else []
        elif action == "forget":
            forget()
            line = []
        elif action == "stock":
            run.stock(clock, to=f"step-{step}")
            held[step], when[step] = whole(clock), clock
        elif action == "save":
            layers = data.draw(st.sets(st.sampled_from(LAYERS), max_size=2))
            base = next((folder for folder, time in reversed(line) if when[folder] == time), step)
            with heard_warnings():
                run.save(clock, due(*layers), to=f"step-{step}")
            fresh = LAYERS if base == step else layers
            held[step] = {layer: clock if layer in fresh else held[base][layer] for layer in LAYERS}
            when[step] = clock
            ours.add(clock)
            line.append((step, clock))
    for step, expected in held.items():
        assert run.origins(step) == expected


# Processes --------------------------------------------------------------------------------

_RESTART = """
import sys
from pathlib import Path
import torch.distributed.checkpoint as dcp
from tailor_dcp import LayerwisePlanner
from tests.support.runs import L1, L2, MODEL, due
from tests.support.world import state

run = Path(sys.argv[1])
dcp.save(state(MODEL, 300, None), checkpoint_id=run / "step-300", planner=LayerwisePlanner(due(L2)))
plain = state(MODEL, 0, None, empty=True)
dcp.load(plain, checkpoint_id=run / "step-200")
dcp.save(state(MODEL, 250, None), checkpoint_id=run / "step-250", planner=LayerwisePlanner(due(L2)))
"""


def test_a_new_process(run: Run) -> None:
    """One that loads nothing descends from nothing; after a stock load its first save is selective."""
    run.save(100)
    run.save(200, due(L1))
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-W", "ignore", "-c", _RESTART, run.folder], check=True, cwd=root)
    run.steps |= {250, 300}
    assert run.origins(300) == whole(300)
    assert run.origins(250) == {L0: 100, L1: 200, L2: 250, HEAD: 100}


def test_another_processs_own_memory_is_never_consulted(run: Run, fleet: Fleet) -> None:
    """A pickled planner brings what its trainer knew; what the process it lands in saved by itself does not count."""
    run.save(100)
    pickled = pickle.dumps(LayerwisePlanner("parity"))
    fleet.call("tests.support.world:save", MODEL, 200, str(run.path(200)), "full", ranks=1)
    fleet.call("tests.support.runs:save_with", pickled, str(run.path(300)), 300, ranks=1)
    assert parent(run.path(300)) == "step-100"


# Loads ------------------------------------------------------------------------------------


def test_any_load_resets(run: Run, tmp_path: Path) -> None:
    """Something of another run was loaded: perhaps into this model, so nothing is carried until the next save."""
    run.save(100)
    Run(tmp_path / "other").stock(7)
    Run(tmp_path / "other").load(7)
    assert run.origins(run.save(200, due(L1))) == whole(200)
    assert run.origins(run.save(300, due(L1))) == {L0: 200, L1: 300, L2: 200, HEAD: 200}


@pytest.mark.parametrize("fault", ["read", "missing key"])
def test_a_load_that_fails_resets(run: Run, fault: str) -> None:
    """Whatever a failed load left in the tensors is no checkpoint's state."""

    class Reader(FileSystemReader):
        def read_data(self, *args: Any) -> Any:
            raise OSError("the disk is gone")

    run.save(100)
    target = state(MODEL, 0, None, empty=True)
    if fault == "missing key":
        target["model"]["model.layers.9.w"] = torch.zeros(2)
    reader = Reader(run.path(100)) if fault == "read" else FileSystemReader(run.path(100))
    with pytest.raises(dcp.api.CheckpointException):
        dcp.load(target, storage_reader=reader)
    assert run.origins(run.save(200, due(L1))) == whole(200)


def test_a_load_that_fails_on_another_rank_resets(fleet: Fleet, tmp_path: Path) -> None:
    """The coordinator read its part well, but the last rank holds half of two states."""
    run = Run(tmp_path)
    run.steps |= {100, 200, 300}
    options: dict[str, Any] = {"ranks": 2}
    fleet.call("tests.support.world:forget")
    fleet.call("tests.support.world:save", MODEL, 100, str(run.path(100)), "parity", **options)
    fleet.call("tests.support.world:save", MODEL, 200, str(run.path(200)), "parity", **options)
    assert fleet.call("tests.support.runs:load_failing_on_one_rank", str(run.path(100)), **options) == [True, True]
    fleet.call("tests.support.world:save", MODEL, 300, str(run.path(300)), "parity", **options)
    assert run.origins(300) == whole(300)


def test_forget_writes_everything(run: Run) -> None:
    """After weights were set by other means, nothing is an ancestor any more."""
    run.save(100)
    forget()
    folder = run.save(200, due(L1))
    assert run.origins(folder) == whole(200)
    assert record(folder)["parent"] is None


def test_the_deprecated_load_is_seen_too(run: Run) -> None:
    """Older scripts call load_state_dict; it changes the training state all the same."""
    run.save(100)
    run.save(200, due(L1))
    with pytest.warns(FutureWarning):
        dcp.load_state_dict(state(MODEL, 0, None, empty=True), FileSystemReader(run.path(100)), no_dist=True)
    assert parent(run.save(150, due(L2))) == "step-100"


# Logging ----------------------------------------------------------------------------------


@pytest.fixture
def _logging_restored() -> Any:
    yield
    logging.disable(logging.NOTSET)
    lineage.dcp_events._logger().disabled = False


@pytest.mark.usefixtures("_logging_restored")
def test_a_script_that_configures_logging_is_heard_all_the_same(run: Run) -> None:
    """dictConfig disables all loggers that it does not know, DCP's among them; saves stay selective."""
    run.save(100)
    run.save(200, due(*LAYERS))
    logging.config.dictConfig({"version": 1})
    run.load(100)
    assert run.origins(run.save(150, due(L1))) == {L0: 100, L1: 150, L2: 100, HEAD: 100}


@pytest.mark.usefixtures("_logging_restored")
def test_with_logging_off_nothing_is_trusted(run: Run) -> None:
    """Where loads go unseen everything is written, with a warning."""
    run.save(100)
    logging.disable(logging.CRITICAL)
    with heard_warnings() as said:
        folder = run.save(200, due(L1))
    assert len(said) == 1 and "Logging is switched off" in said[0]
    assert run.origins(folder) == whole(200)


@pytest.mark.usefixtures("_logging_restored")
def test_logging_that_was_off_during_a_load_only_is_not_trusted_either(run: Run) -> None:
    """Libraries silence logging around noisy calls; step 200 is no ancestor of what was loaded meanwhile."""
    run.save(100)
    run.save(200, due(*LAYERS))
    logging.disable(logging.CRITICAL)
    run.load(100)
    logging.disable(logging.NOTSET)
    assert run.origins(run.save(150, due(L1))) == whole(150)
    assert run.origins(run.save(160, due(L1))) == {L0: 150, L1: 160, L2: 150, HEAD: 150}


@pytest.mark.usefixtures("_logging_restored")
def test_an_explicit_base_needs_no_logging(run: Run) -> None:
    """What the user names is carried from without a warning."""
    base = run.save(100)
    logging.disable(logging.CRITICAL)
    folder = run.save(200, due(L1), base=base)
    logging.disable(logging.NOTSET)
    assert run.origins(folder) == {L0: 100, L1: 200, L2: 100, HEAD: 100}


# Arithmetic -------------------------------------------------------------------------------

ancestors = st.builds(
    Ancestor, st.sampled_from(["/run/step-1", "/run/step-2", "/r/3"]), st.sampled_from(["a", "b", "c"])
)


@given(st.lists(ancestors, max_size=30))
def test_a_chain_is_short_and_newest_first(saves: list[Ancestor]) -> None:
    """The last eight different ancestors, each once, the latest in front."""
    chain: tuple[Ancestor, ...] = ()
    for save in saves:
        chain = extend(chain, save)
    newest_first = list(dict.fromkeys(reversed(saves)))
    assert list(chain) == newest_first[:8]


@given(st.text(), st.none() | st.text(), st.lists(ancestors, max_size=8))
def test_a_token_comes_back_as_it_was(save_id: str, folder: str | None, chain: list[Ancestor]) -> None:
    """It travels as one JSON string."""
    token = Token(save_id, folder, tuple(chain))
    assert Token.from_json(token.to_json()) == token


@given(st.none() | st.integers() | st.text() | st.sampled_from(['{"save_id": 1}', "[]", '{"ancestors": [1]}', "null"]))
def test_a_damaged_token_is_none(text: object) -> None:
    """It only costs a full save."""
    assert Token.from_json(text) is None


def test_an_id_is_claimed_once() -> None:
    """A state dict that is saved twice brings the same token twice; each save has an id of its own."""
    wanted = lineage.new_save_id()
    assert lineage.claim(wanted) == wanted
    assert lineage.claim(wanted) != wanted


def test_the_model_of_these_tests_has_the_layers_they_count(run: Run) -> None:
    """Three numbered layers and a head, each with weight, two moments and a counter."""
    units = record(run.save(1))["units"]
    assert {layer: set(kinds) for layer, kinds in units.items()} == {
        layer: {"weight", "exp_avg", "exp_avg_sq", "step"} for layer in LAYERS
    }
    assert isinstance(run.model, Model)
