"""``tailor inspect``: what people and machines see, and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tailor_dcp.cli import main
from tests.support.runs import L1, LAYERS, Run, due, metadata, named, record

pytestmark = pytest.mark.filterwarnings("error::tailor_dcp.TailorWarning")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.save(100)
    run.save(200, due(L1))
    return run


@pytest.fixture
def tailor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line in this process and return exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tailor", *map(str, arguments)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


def test_names_are_no_markup(tmp_path: Path, tailor) -> None:
    """Of layers and of the optimizer's states: whoever wrote a checkpoint chose them."""
    for kind in ("[/]", "[red]x[/red]", "[/bold]"):
        folder = tmp_path / kind.replace("/", "")
        weights = {"layers.[/].w": torch.ones(2)}
        dcp.save({"model": weights, "optim": {"state": {"layers.[/].w": {kind: torch.ones(2)}}}}, checkpoint_id=folder)
        code, out, err = tailor("inspect", folder)
        assert (code, err) == (0, "")
        assert kind in out
        assert "layers.[/]" in out


def test_the_table_shows_layers_origins_and_files(run: Run, tailor) -> None:
    """Per layer and kind: where it comes from, and below what it costs."""
    code, out, err = tailor("inspect", run.path(200))
    assert (code, err) == (0, "")
    assert all(layer in out for layer in LAYERS)
    for word in (
        "exp_avg_sq",
        "float32",
        "100 steps",
        "carries    from step-100 by link",
        record(run.path(200))["policy"],
    ):
        assert word in out
    assert "resuming   here finds weight up to 100 steps old" in out
    assert "resuming   here loses nothing" in tailor("inspect", run.path(100))[1]


def test_json_is_for_machines(run: Run, tailor) -> None:
    """One object on stdout, with the numbers that os.stat and the metadata have."""
    code, out, err = tailor("inspect", run.path(200), "--json")
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert (told["step"], told["parent"], told["missing"]) == (200, "step-100", [])
    assert told["live"] == sum(info.length for info in metadata(run.path(200)).storage_data.values())
    (own,) = (name for name in named(run.path(200)) if "/" not in name)
    assert told["written"] == (run.path(200) / own).stat().st_size
    assert {unit["layer"] for unit in told["units"]} == {*LAYERS, "(training state)"}


def test_a_missing_file_is_exit_code_1(run: Run, tailor) -> None:
    """The checked thing is bad; the file is named, for people and for machines."""
    (old,) = (name for name in named(run.path(200)) if "/" in name)
    (run.path(200) / old).unlink()
    code, out, _ = tailor("inspect", run.path(200))
    assert code == 1 and f"MISSING    {old}" in out
    code, out, _ = tailor("inspect", run.path(200), "--json")
    assert code == 1 and json.loads(out)["missing"] == [old]


def test_an_unreadable_checkpoint_is_exit_code_2(run: Run, tailor) -> None:
    """One sentence on stderr that names the file, and never a traceback."""
    (run.path(200) / ".metadata").write_bytes(b"damaged")
    code, out, err = tailor("inspect", run.path(200))
    assert (code, out) == (2, "")
    assert err.startswith("tailor: ") and str(run.path(200) / ".metadata") in err and err.count("\n") == 1


def test_a_run_in_place_of_a_checkpoint_is_exit_code_2(run: Run, tailor) -> None:
    """The way out is its newest checkpoint."""
    code, _, err = tailor("inspect", run.folder)
    assert code == 2 and str(run.path(200)) in err


def test_wrong_usage_is_exit_code_2(tailor) -> None:
    """No such option, no checkpoint named."""
    assert tailor("inspect", "--nonsense", "x")[0] == 2
    assert tailor("inspect")[0] == 2


def test_a_warning_is_one_line_too(run: Run, tailor) -> None:
    """What the library warns of reaches people without a file name and a line number."""
    run.load(100)
    run.save(150)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = tailor("inspect", run.folder)
    assert code == 2
    assert all(line.startswith("tailor: ") for line in err.strip().splitlines()) and "step-150" in err


def test_names_with_brackets_are_shown_as_they_are(tmp_path: Path, tailor) -> None:
    """They are no markup."""
    run = Run(tmp_path / "run[bold]")
    run.save(100)
    code, out, _ = tailor("inspect", run.path(100))
    assert code == 0 and "run[bold]" in out.replace("\n", "")


def test_the_installed_command_is_this_one(run: Run) -> None:
    """Once for real: a process of its own, its exit code and its JSON."""
    command = Path(sys.executable).with_name("tailor")
    done = subprocess.run([command, "inspect", run.path(200), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["step"] == 200


@pytest.mark.parametrize(
    "verb", [("inspect",), ("diff", "memory://x"), ("merge", "--base"), ("prune", "--keep-last", "1")]
)
def test_a_store_that_cannot_be_reached_is_one_sentence(verb: tuple[str, ...], tailor, monkeypatch) -> None:
    """Whatever its library raises, such as of credentials that are missing."""
    from fsspec.implementations.memory import MemoryFileSystem

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("Unable to locate credentials")

    monkeypatch.setattr(MemoryFileSystem, "info", refused)
    command, *options = verb
    last = ["memory://out/merged"] if command == "merge" else []
    code, out, err = tailor(command, *options, "memory://away/run/step-1", *last)
    assert (code, out) == (2, "") and err.startswith("tailor: ") and err.count("\n") == 1
    assert "Unable to locate credentials" in err or (command == "prune" and "memory://away/run/step-1 is" in err)
