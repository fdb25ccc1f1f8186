"""Conversions as a whole: all or nothing, whatever goes wrong, by one process or several, within bounded memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tailor_dcp import LayerwisePlanner, inspect
from tailor_dcp.converters import ConversionError, Options, convert
from tailor_dcp.converters.cli import main
from tests.support.forks import killed_at
from tests.support.world import Model, Param, flat, load, state

MODEL = Model(
    (
        Param("model.embed_tokens.weight", (60, 7)),
        Param("model.layers.0.mlp.weight", (30, 80)),
        Param("model.layers.1.mlp.weight", (4, 3, 2)),
        Param("lm_head.weight", (60, 7)),
    )
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "step-10"
    dcp.save(state(MODEL, 10, None), checkpoint_id=folder, no_dist=True)
    return folder


class Ran(NamedTuple):
    """What a run of the command ended with."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run the command in this process, as starting torch for each run takes seconds."""

    def run(*arguments: Any) -> Ran:
        monkeypatch.setattr(sys, "argv", ["tailor-convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
            main()
        said = capsys.readouterr()
        return Ran(int(ended.value.code or 0), said.out, said.err)

    return run


# What the command line says ------------------------------------------------------------------


def test_the_closing_line_tells_time_and_memory(checkpoint: Path, tmp_path: Path, run: Any) -> None:
    """And in JSON, the same and more."""
    done = run(checkpoint, tmp_path / "all.pt", "--to", "torch")
    assert done.returncode == 0, done.stderr
    assert "peak memory" in done.stdout
    assert " s (" in done.stdout
    told = json.loads(run(checkpoint, tmp_path / "again.pt", "--to", "torch", "--json").stdout)
    assert told["written"] == (tmp_path / "again.pt").stat().st_size
    assert told["peak_memory"] > 10**7
    assert told["weights"] == 4
    assert told["kinds"]["exp_avg"] == 4 * (2 * 60 * 7 + 30 * 80 + 24)


def test_a_dry_run_writes_nothing(checkpoint: Path, tmp_path: Path, run: Any) -> None:
    """It tells what would be read and written."""
    done = run(checkpoint, tmp_path / "all.pt", "--to", "torch", "--dry-run", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert "nothing was written" in done.stdout
    told = json.loads(run(checkpoint, tmp_path / "o", "--to", "torch", "--dry-run", "--dtype", "bf16", "--json").stdout)
    elements = 2 * 60 * 7 + 30 * 80 + 24
    assert told["kinds"] == {"weight": 2 * elements, "exp_avg": 4 * elements, "exp_avg_sq": 4 * elements, "step": 16}
    assert told["read"] == 3 * 4 * elements + 16
    assert told["written"] == told["read"] - 2 * elements
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_weights_only_layers_and_dtype(checkpoint: Path, tmp_path: Path) -> None:
    """Each leaves out or changes what it names, and nothing else."""
    convert(checkpoint, tmp_path / "w.pt", "torch", options=Options(weights_only=True, dtype=torch.bfloat16))
    held = torch.load(tmp_path / "w.pt", weights_only=True)
    whole = flat(state(MODEL, 10, None))
    assert held.keys() == {"model"}
    for fqn, value in held["model"].items():
        assert torch.equal(value, whole[f"model.{fqn}"].bfloat16())
    convert(checkpoint, tmp_path / "l.pt", "torch", options=Options(layers="model.layers.{1,2}"))
    held = torch.load(tmp_path / "l.pt", weights_only=True)
    assert held["model"].keys() == held["optim"]["state"].keys() == {"model.layers.1.mlp.weight"}
    assert held["optim"]["param_groups"][0]["params"] == ["model.layers.1.mlp.weight"]
    with pytest.raises(ConversionError, match=r"model.layers.0"):
        convert(checkpoint, tmp_path / "n.pt", "torch", options=Options(layers="model.layer.0"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run/step-10", "run", "--to", "torch"), "exists already"),
        (("run/step-10", "run/step-10/inside", "--to", "dcp"), "inside of the source"),
        (("nowhere", "out", "--to", "dcp"), "nowhere"),
        (("run", "out", "--to", "dcp"), "--from"),
        (("run/step-10", "s3://bucket/out", "--to", "dcp"), "object store"),
        (("s3://bucket/step-10", "out", "--to", "hf"), "s3://bucket/step-10 is on an object store"),
        (("run/step-10", "out", "--to", "dcp", "--dtype", "fp7"), "fp7"),
        (("run/step-10", "out", "--to", "dcp", "--max-shard-size", "many"), "many"),
        (("run/step-10", "out", "--to", "dcp", "--allow", "no.Such"), "no.Such"),
    ],
)
def test_wrong_usage_is_one_sentence(
    checkpoint: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: str,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It says what is wrong, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["step-10"]


# Interrupted and failing ---------------------------------------------------------------------


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes: writing fails then, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("to", ["torch", "dcp"])
def test_a_disk_that_fills_up_leaves_nothing(checkpoint: Path, tmp_path: Path, to: str, run: Any) -> None:
    """One sentence, no result, and the source untouched; afterwards the same command works."""
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    with small_files(3000):
        done = run(checkpoint, tmp_path / "out", "--to", to)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "written" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert {path: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert run(checkpoint, tmp_path / "out", "--to", to).returncode == 0


@pytest.mark.parametrize("to", ["torch", "dcp"])
def test_killed_at_any_moment_it_is_absent_or_complete(checkpoint: Path, tmp_path: Path, to: str) -> None:
    """SIGKILL at each change of the disk; the next run starts over, and in the end succeeds."""
    moments = 1
    while killed_at(moments, tmp_path, partial(convert, checkpoint, tmp_path / f"out{moments}", to)):
        if (tmp_path / f"out{moments}").exists():
            complete(tmp_path / f"out{moments}", to)
        else:
            convert(checkpoint, tmp_path / f"out{moments}", to)
        moments += 1
    assert moments > 4
    complete(tmp_path / f"out{moments}", to)
    # The lock of a process that was killed is nobody's; the file stays until the next conversion of that name.
    assert all(path.name.endswith(".lock") for path in tmp_path.glob(".*"))


def complete(out: Path, to: str) -> None:
    loaded = load(None, MODEL, str(out)) if to == "dcp" else flat(torch.load(out, weights_only=True))
    for key, value in flat(state(MODEL, 10, None)).items():
        assert torch.equal(torch.as_tensor(loaded[key]), torch.as_tensor(value)), key


def test_two_conversions_do_not_write_one_result(checkpoint: Path, tmp_path: Path) -> None:
    """The second is refused while the first writes, and the first's result is whole."""
    said: list[str] = []

    def meanwhile(_: int) -> None:
        if not said:
            with pytest.raises(ConversionError, match="Another conversion") as caught:
                convert(checkpoint, tmp_path / "out", "dcp")
            said.append(str(caught.value))

    convert(checkpoint, tmp_path / "out", "dcp", options=Options(progress=meanwhile))
    assert said
    complete(tmp_path / "out", "dcp")


def test_what_is_converted_is_not_what_a_training_carries_from(checkpoint: Path, tmp_path: Path) -> None:
    """A save after a conversion into the same run writes everything: it does not descend from that."""
    convert(checkpoint, tmp_path / "new" / "step-0", "dcp")
    planner = LayerwisePlanner("parity")
    dcp.save(state(MODEL, 20, None), checkpoint_id=tmp_path / "new" / "step-20", planner=planner, no_dist=True)
    assert {unit.origin_step for unit in inspect(tmp_path / "new" / "step-20").units} == {20}


# Several ranks -------------------------------------------------------------------------------


def torchrun(size: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    words = [*launcher, "-m", "tailor_dcp.converters", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.filterwarnings("ignore")
def test_ranks_share_the_work(tmp_path: Path) -> None:
    """Two ranks write what one would, each a part of it; one of them speaks."""
    wide = Model((Param("model.layers.0.w", (3000, 1000)), Param("model.layers.1.w", (500, 1000))))
    dcp.save(state(wide, 10, None), checkpoint_id=tmp_path / "step-10", no_dist=True)
    done = torchrun(2, tmp_path / "step-10", tmp_path / "step-11", "--to", "dcp", "--json")
    assert json.loads(done.stdout)["written"] > 40_000_000, done.stderr
    loaded = load(None, wide, str(tmp_path / "step-11"))
    for key, value in flat(state(wide, 10, None)).items():
        assert torch.equal(torch.as_tensor(loaded[key]), torch.as_tensor(value)), key
    sizes: dict[str, int] = {}
    for path in (tmp_path / "step-11").glob("*.distcp"):
        rank = path.name.split("_")[2]
        sizes[rank] = sizes.get(rank, 0) + path.stat().st_size
    assert min(sizes["0"], sizes["1"]) > 10_000_000


@pytest.mark.filterwarnings("ignore")
def test_what_fails_on_one_rank_fails_on_all(checkpoint: Path, tmp_path: Path) -> None:
    """None waits for ever, and nothing is left."""
    data = next(checkpoint.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-5])
    done = torchrun(2, checkpoint, tmp_path / "out.pt", "--to", "torch")
    assert done.returncode != 0
    assert done.stderr.count("tailor-convert:") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# Memory --------------------------------------------------------------------------------------

_MEMORY = """
import sys
from tailor_dcp.converters import convert
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
import threading, time
peak, going = 0, True
def watch():
    global peak
    while going:
        peak = max(peak, anonymous())
        time.sleep(0.002)
convert(sys.argv[1], sys.argv[2] + ".small", sys.argv[3])
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
convert(sys.argv[4], sys.argv[2], sys.argv[3])
going = False
thread.join()
print(peak - before)
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["torch", "dcp"])
def test_memory_does_not_grow_with_the_checkpoint(checkpoint: Path, tmp_path: Path, to: str) -> None:
    """A tensor of 400 MB goes through windows of some megabytes."""
    large = {"model": {"layers.0.weight": torch.zeros(50_000, 2_000)}}
    dcp.save(large, checkpoint_id=tmp_path / "step-1", no_dist=True)
    del large
    words = [sys.executable, "-c", _MEMORY, str(checkpoint), str(tmp_path / "out"), to, str(tmp_path / "step-1")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 80_000_000
