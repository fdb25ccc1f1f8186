"""``tailor merge``: the short form, what it prints, and how it ends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tailor_dcp.cli import app, main
from tests.support.merges import Net, differing, loaded, save
from tests.support.runs import unheard

NET = Net(3)
L0, L1, L2 = (f"model.layers.{n}" for n in range(3))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three steps, in a folder whose name has a sign of equality, which is also the current one."""
    folder = tmp_path / "lr=3" / "run"
    with unheard():
        for step in (100, 200, 300):
            save(folder, NET, step, "full")
    monkeypatch.chdir(folder.parent)
    return folder


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str | Path
) -> tuple[int, str, str]:
    """Run the command as it is installed; return its exit code and what it says."""
    monkeypatch.setattr("sys.argv", ["tailor", "merge", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def tailor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    return lambda *words: call(capsys, monkeypatch, *words)


def expected(run: Path, steps: dict[str, int]) -> dict[str, object]:
    """Return the newest step with some layers of others."""
    found = loaded(run / "step-300", NET)
    for layer, step in steps.items():
        old = loaded(run / f"step-{step}", NET)
        found |= {key: value for key, value in old.items() if f"{layer}." in key and "param_groups" not in key}
    return found


def test_a_recipe_is_done(run: Path, tailor) -> None:  # type: ignore[no-untyped-def]
    Path("r.yaml").write_text(f"base: run/step-300\nlayers:\n  {L1}: run@100\n")
    code, out, err = tailor("r.yaml", "out")
    assert (code, err) == (0, "")
    form = (
        r"\S+/out \(dcp\): 6 layers from 2 sources, \S+ k?B of tensors, \S+ k?B written, 2 files linked; \d+\.\d\d s, "
        r"peak memory \S+ [MG]B\n"
    )
    assert re.fullmatch(form, out), out
    assert differing(loaded(run.parent / "out", NET), expected(run, {L1: 100})) == []


def test_the_short_form_takes_paths_with_a_sign_of_equality(run: Path, tailor) -> None:  # type: ignore[no-untyped-def]
    code, _, err = tailor(
        "--base",
        run / "step-300",
        "--take",
        f"model.layers.[01]={run / 'step-100'}",
        "--take",
        f"{L1}={run}@200",
        "out",
    )
    assert (code, err) == (0, "")
    assert differing(loaded(run.parent / "out", NET), expected(run, {L0: 100, L1: 200})) == []


def test_every_option_of_the_short_form_has_its_effect(run: Path, tailor) -> None:  # type: ignore[no-untyped-def]
    code, out, err = tailor(
        "--base", "run@300", "--rename", f"{L2}={L2}", "--rename", f"{L2}=model.layers.3", "--drop", "lm_head",
        "--train", "run@200", "--optimizer", "drop", "--max-stale-steps", "200", "--json", "--materialize", "out",
    )  # fmt: skip
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["path"] == str(run.parent / "out")
    assert told["layers"] == 6
    assert told["linked"] == 0
    assert told["sources"] == ["run@300", "run@200"]
    assert told["written"] >= told["live"] > 0
    assert told["seconds"] > 0
    assert told["peak_memory"] > 1 << 20
    code, out, _ = tailor("--base", "out", "again", "--json")
    assert code == 0
    assert json.loads(out)["linked"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["out"], "Give a recipe and the folder to make"),
        (["a", "b", "out"], "Give a recipe and the folder to make"),
        (["none.yaml", "out"], "none.yaml cannot be read"),
        (
            ["--base", "run@300", "--take", "lm_head", "out"],
            "--take 'lm_head' makes no sense; write it as LAYERS=SOURCE.",
        ),
        (["--base", "run@300", "--take", "=run@100", "out"], "write it as LAYERS=SOURCE."),
        (["--base", "run@300", "--rename", "a=", "out"], "write it as OLD=NEW."),
        (["--base", "run@300", "r.yaml", "out"], "With --base there is no recipe file, so 'r.yaml' has no meaning"),
        (["--take", "lm_head=run@100", "r.yaml", "out"], "--take has no meaning with a recipe's file"),
        (["--base", "run@300", "run"], "exists already"),
        (["--base", "run@400", "out"], "run has no checkpoint of step 400; it has 100, 200 or 300"),
        (["--base", "run", "out"], "run is a run, not a checkpoint; say run@300"),
        (["--base", "run@300", "--to", "torch", "out"], "'torch' is nothing that a merge can write"),
        (["--base", "run@300", "--to", "hf", "--materialize", "out"], "--materialize is for DCP results"),
        (["--base", "run@300", "--max-stale-steps", "50", "--take", f"{L1}=run@100", "out"], "200 steps older"),
        (["--base", "run@300", "run/step-300/out"], "lies inside of the source run@300"),
        (["--base", "run@300", "--world-size", "2", "out"], "A world size is for ZeRO results alone"),
        (["--base", "a" * 5000, "out"], "is no path (File name too long)"),
        (["--base", "run@300", "--drop", "{a,b}" * 40, "out"], "stands for more than 10000 names"),
        (["--method", "linear", "--models", "run@300", "out"], "--models takes the models and then the folder"),
        (["--method", "linear", "--models", "a", "b", "--set", "x=[", "out"], "--set x=[ is no value"),
        (["--method", "slerp", "--base", "a", "--models", "a", "b", "out"], "needs 't'; give it with --set t=VALUE"),
        (["--method", "ties", "--models", "a", "b", "out"], "give it with --base MODEL"),
        (["--flags", "f.jsonl", "run", "out"], "Write --flags LOG --at STEP RUN OUT"),
        (["--flags", "none.jsonl", "--at", "3", "run", "out"], "none.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_exit_code_2(  # type: ignore[no-untyped-def]
    run: Path, tailor, words: list[str], said: str
) -> None:
    before = sorted(run.parent.rglob("*"))
    code, out, err = tailor(*words)
    assert (code, out) == (2, "")
    assert err.startswith("tailor: ")
    assert said in err
    assert err.count("\n") == 1
    assert sorted(run.parent.rglob("*")) == before


def test_the_line_of_a_recipes_fault_is_told(run: Path, tailor) -> None:  # type: ignore[no-untyped-def]
    Path("r.yaml").write_text(f"base: run/step-300\nlayers:\n  {L1}:\n    frm: run@100\n")
    code, _, err = tailor("r.yaml", "out")
    assert code == 2
    assert err.startswith("tailor: r.yaml, line 4: the key 'frm' is unknown; did you mean 'from'?")


def test_help_tells_of_every_form(tailor) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = tailor("--help")
    assert code == 0
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    for option in (
        "--base",
        "--take",
        "--rename",
        "--drop",
        "--train",
        "--optimizer",
        "--to",
        "--materialize",
        "--json",
    ):
        assert option in words
    assert "RECIPE" in words
    assert app.info.help
