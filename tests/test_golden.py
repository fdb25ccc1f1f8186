"""Golden checkpoints: what any version of this package, or of torch, has written loads for ever, bit for bit.

``tests/golden/write.py`` wrote them. What they must load as was noted beside them by the program that wrote them.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tarfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tailor_dcp import (
    LayerwiseLoadPlanner,
    LayerwisePlanner,
    LayerwiseReader,
    TailorWarning,
    inspect,
    materialize,
    open_checkpoint,
    verify,
)
from tailor_dcp.base import open_base
from tailor_dcp.inspection import unit_records
from tailor_dcp.policies import Unchanged, parse_policy
from tests.golden import write

FOLDER = Path(write.__file__).parent
ARCHIVES = sorted(FOLDER.glob("*.tar.xz"))


class Golden(NamedTuple):
    """One checkpoint: who wrote it, in which run, and what it is called."""

    writer: str
    run: str
    name: str

    def __str__(self) -> str:
        return "-".join(self)

    @property
    def linked(self) -> bool:
        """Whether its tensors lie in another program's files, which torch's own reader cannot read."""
        return self.run == "linked"

    @property
    def newest(self) -> bool:
        """Whether it is the last of its run, which has something of all others."""
        return self.name == max(g.name for g in CHECKPOINTS if g[:2] == self[:2])

    @property
    def nameless(self) -> bool:
        """Whether it tells of no save by its id, as torch noted none then."""
        return self.writer.startswith(("stock-2.1.", "stock-2.2.", "stock-2.3."))

    @property
    def made_of_its_step(self) -> bool:
        """Whether each of its values follows from a step and a key."""
        return self.writer.startswith("format") and self.run not in ("fsdp2", "converted", "linked")


def _found() -> list[Golden]:
    found = []
    for archive in ARCHIVES:
        with tarfile.open(archive) as tar:
            names = [Path(name) for name in tar.getnames() if name.startswith(f"{write.EXPECTED}/")]
        found += [Golden(archive.name.removesuffix(".tar.xz"), *name.stem.split(".")) for name in names]
    return found


CHECKPOINTS = _found()
every = pytest.mark.parametrize("golden", CHECKPOINTS, ids=str)
readable = pytest.mark.parametrize("golden", [g for g in CHECKPOINTS if not g.linked], ids=str)
newest = pytest.mark.parametrize("golden", [g for g in CHECKPOINTS if g.newest], ids=str)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All archives, unpacked; no test writes there."""
    root = tmp_path_factory.mktemp("golden")
    for archive in ARCHIVES:
        with tarfile.open(archive) as tar:
            tar.extractall(root / archive.name.removesuffix(".tar.xz"), filter="data")
    return root


class Case(NamedTuple):
    """A checkpoint on the disk, and what it must load as."""

    path: Path
    values: dict[str, Any]

    def wrong(self, found: dict[str, Any]) -> list[str]:
        """Return the keys whose values are not what they must be."""
        assert found.keys() == self.values.keys()
        return [key for key, value in self.values.items() if not write.same(found[key], value)]


@pytest.fixture
def case(golden: Golden, unpacked: Path) -> Case:
    """The checkpoint that is asked for."""
    root = unpacked / golden.writer
    return Case(
        root / golden.run / golden.name,
        write.load_values(root / write.EXPECTED / f"{golden.run}.{golden.name}.npz"),
    )


def test_no_archive_was_changed() -> None:
    """A golden checkpoint that is written anew shows what today's code writes, not what was written then."""
    sums = dict(line.split("  ")[::-1] for line in (FOLDER / write.SUMS).read_text().splitlines())
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in ARCHIVES} == sums


def test_every_format_and_every_torch_that_could_be_had_is_there() -> None:
    """Where one is missing, nothing would tell."""
    writers = {golden.writer for golden in CHECKPOINTS}
    torches = {f"stock-2.{minor}" for minor in range(1, 15)}
    assert {"format-1-first", "format-1", "format-2", "format-2-digest"} <= writers
    assert torches <= {writer.rpartition(".")[0] for writer in writers}
    assert {golden.run for golden in CHECKPOINTS if golden.writer == "format-2"} == {r.__name__ for r in write.RUNS}


def test_the_documentation_names_every_key_of_the_record(unpacked: Path) -> None:
    """Those that are written today, and no other."""
    table = (FOLDER.parents[1] / "docs" / "format.md").read_text().partition("## The record")[2].partition("## ")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    newest = unpacked / "format-2-digest" / "layerwise" / "step-30"
    assert set(dcp.FileSystemReader(newest).read_metadata().tailor) == named  # type: ignore[attr-defined]


@readable
def test_stock_torch_loads_it(case: Case) -> None:
    """Torch alone, which knows nothing of this package."""
    state = write.blank(case.values)
    write.stock_load(state, case.path)
    assert case.wrong(state) == []


@every
def test_the_reader_loads_it(case: Case) -> None:
    """All checksums that it has are compared before."""
    state = write.blank(case.values)
    dcp.load(state, storage_reader=LayerwiseReader(case.path, verify=True, atomic=True), no_dist=True)
    assert case.wrong(state) == []


@readable
def test_the_load_planner_loads_it(case: Case) -> None:
    """With torch's own reader below it."""
    state = write.blank(case.values)
    dcp.load(state, checkpoint_id=case.path, planner=LayerwiseLoadPlanner(case.path), no_dist=True)
    assert case.wrong(state) == []


@every
def test_it_opens(case: Case) -> None:
    """As a mapping, in the dtypes that it is stored in."""
    opened = open_checkpoint(case.path)
    found = {key: opened[key] for key in opened}
    narrowed = open_base(case.path).record
    for key in narrowed.narrowed if narrowed else ():
        assert found[key].dtype is torch.bfloat16
        found[key] = found[key].to(case.values[key].dtype)
    assert case.wrong(found) == []


@every
def test_it_is_inspected(golden: Golden, case: Case) -> None:
    """Nothing is missing, and what it says of itself is so."""
    found = inspect(case.path)
    assert found.missing == ()
    assert f"step-{found.step}" == golden.name
    assert (found.policy is None) is golden.writer.startswith("stock")
    assert bool(found.linked) is golden.linked
    assert found.units


@every
def test_it_is_verified(golden: Golden, case: Case) -> None:
    """Whatever an older version noted no checksum of is called unverifiable, but nothing is called damaged."""
    found = verify(case.path)
    assert found.damaged == ()
    if golden.writer == "format-2-digest" and golden.run in ("layerwise", "reference", "unchanged", "drift", "fsdp2"):
        assert found.state == "good"


@pytest.mark.parametrize("golden", [g for g in CHECKPOINTS if g.made_of_its_step], ids=str)
def test_its_record_tells_the_step_of_every_value(case: Case) -> None:
    """The training that wrote it can be run again, so what each unit held at its origin is known."""
    units = unit_records(open_base(case.path))
    for held in units.values():
        then = write.flat(write.train_state(held.origin.step))
        for key in held.keys:
            assert write.rounds_to(then[key], case.values[key]), key
    assert {key for held in units.values() for key in held.keys} == {
        key for key in case.values if key.startswith(("model.", "optim.state."))
    }


@pytest.mark.parametrize("golden", [g for g in CHECKPOINTS if g.newest and not g.linked | g.nameless], ids=str)
def test_it_is_carried_from(golden: Golden, case: Case, tmp_path: Path) -> None:
    """As the base of a save whose policy finds nothing due: the units have its values, the rest is written."""
    run = tmp_path / "run"
    shutil.copytree(case.path.parent, run)
    base, target = run / case.path.name, run / "step-1000"
    state = write.blank(case.values)
    nothing = parse_policy(lambda request: ())
    # Units are cut otherwise where fingerprints are taken, and a unit is carried as a whole.
    planner = LayerwisePlanner(Unchanged(nothing) if golden.run == "unchanged" else nothing, base=base)
    dcp.save(state, checkpoint_id=target, planner=planner, no_dist=True)
    loaded = write.blank(case.values)
    write.stock_load(loaded, target)
    units = unit_records(open_base(base))
    carried = {key for held in units.values() for key in held.keys}
    assert carried
    assert {key for key in loaded if write.same(loaded[key], case.values[key])} >= carried
    assert all(write.same(loaded[key], state[key]) for key in loaded.keys() - carried)
    assert {unit: held.origin[:2] for unit, held in unit_records(open_base(target)).items()} == {
        unit: held.origin[:2] for unit, held in units.items()
    }


@pytest.mark.parametrize("golden", [g for g in CHECKPOINTS if g.nameless], ids=str)
def test_what_has_no_save_id_is_not_carried_from(case: Case, tmp_path: Path) -> None:
    """Nobody could tell later which save it was: everything is written, and a warning says why."""
    run = tmp_path / "run"
    shutil.copytree(case.path.parent, run)
    state = write.blank(case.values)
    planner = LayerwisePlanner(lambda request: (), base=run / case.path.name)
    with pytest.warns(TailorWarning, match=r"torch before 2\.4 wrote it, without a save id"):
        dcp.save(state, checkpoint_id=run / "step-1000", planner=planner, no_dist=True)
    loaded = write.blank(write.blank(case.values))
    write.stock_load(loaded, run / "step-1000")
    assert all(write.same(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("golden", [g for g in CHECKPOINTS if g.linked], ids=str)
def test_what_is_linked_says_how_it_is_read(case: Case, tmp_path: Path) -> None:
    """Torch's own reader stops with the way out; a save that carries from it writes what is linked."""
    with pytest.raises(BaseException, match="tailor materialize"):
        write.stock_load(write.blank(case.values), case.path)
    run = tmp_path / "run"
    shutil.copytree(case.path.parent, run)
    state = write.blank(case.values)
    with pytest.warns(TailorWarning):
        planner = LayerwisePlanner(lambda request: (), base=run / case.path.name)
        dcp.save(state, checkpoint_id=run / "step-1000", planner=planner, no_dist=True)
    loaded = write.blank(case.values)
    write.stock_load(loaded, run / "step-1000")
    linked = open_base(case.path).linked
    assert linked
    assert all(write.same(loaded[key], state[key]) for key in linked)


@newest
def test_it_is_materialized(case: Case, tmp_path: Path) -> None:
    """Into a checkpoint that torch alone loads, whatever it was."""
    materialize(case.path, tmp_path / "step-1", no_dist=True)
    state = write.blank(case.values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write.stock_load(state, tmp_path / "step-1")
    assert case.wrong(state) == []
