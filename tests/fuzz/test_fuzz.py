"""Every input that was kept does what any may do, and what libFuzzer finds in a moment does so, too."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch

from tailor_dcp.errors import TailorError
from tests.fuzz import scratch
from tests.fuzz.mutators.archives import archive, archives, records_in
from tests.fuzz.mutators.pickles import instructions, pickles
from tests.fuzz.mutators.trees import jsons
from tests.fuzz.registry import TARGETS
from tests.fuzz.runner import REGRESSIONS, kept
from tests.fuzz.target import FindingError, Target, judge, target_named

_REPLAYED = 150  # of a corpus; `make fuzz` begins with all of it
_RUNS = 250
_FIND_SPEC = importlib.util.find_spec


@pytest.fixture(autouse=True)
def _no_files_left() -> Iterator[None]:
    yield
    scratch.remove()


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_the_corpus(name: str) -> None:
    """Is taken or refused in a sentence, by the parser and by what it is compared with."""
    target = target_named(name)
    files = kept(name)
    assert files, f"{name} has no corpus: python -m tests.fuzz --target {name} --keep"
    step = max(1, len(files) // _REPLAYED)
    verdicts = [judge(target, data) for _, data in files[::step]]
    verdicts += [judge(target, data) for data in target.seeds()]
    assert "accepted" in verdicts  # or nothing was compared


@pytest.mark.parametrize("path", sorted(REGRESSIONS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
@pytest.mark.filterwarnings("ignore")
def test_what_was_found_once(path: Path) -> None:
    """Is mended."""
    judge(target_named(path.parent.name), path.read_bytes())


@pytest.mark.filterwarnings("ignore")
def test_mergekit_takes_the_plans_that_are_taken() -> None:
    """Those of the corpus, and some that are changed from them."""
    config = pytest.importorskip("mergekit.config")
    target, random = target_named("mergekit_plan"), Random(0)
    honest = [*target.seeds(), *(data for _, data in kept("mergekit_plan"))]
    changed = [target.mutate(random.choice(honest), random) for _ in range(2000)] if target.mutate else []
    taken = [data for data in (*honest, *changed) if judge(target, data) == "accepted"]
    assert len(taken) > 20  # or hardly anything was compared
    for data in taken:
        config.MergeConfiguration.model_validate(json.loads(data))


@pytest.mark.skipif(_FIND_SPEC("atheris") is None, reason="needs atheris: pip install -e '.[fuzz]'")
def test_a_short_run(tmp_path: Path) -> None:
    """Guided by coverage, from the corpus on: no finding, no crash."""
    code = [sys.executable, "-m", "tests.fuzz", "--runs", str(_RUNS), "--work", str(tmp_path)]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    found = [path.read_text(errors="replace")[-2000:] for path in tmp_path.glob("*/findings/*.txt")]
    assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *found])
    assert all(name in done.stdout for name in TARGETS)


def test_findings_are_told() -> None:
    """Any exception that is no ``TailorError`` is one, and so is one without a sentence."""

    def raises(error: BaseException) -> Target:
        def parse(data: bytes) -> None:
            raise error

        return Target(parse, lambda: [])

    assert judge(raises(TailorError("why")), b"") == "refused"
    for error in (ValueError("x"), MemoryError(), RecursionError(), AssertionError("differs"), TailorError(" ")):
        with pytest.raises(FindingError):
            judge(raises(error), b"")


def test_mutators_keep_the_form() -> None:
    """What is changed is still of its format, and often another input."""
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, stream)
    whole, random = stream.getvalue(), Random(0)
    made = [archives(pickles())(whole, random) for _ in range(50)]
    sound = [data for data in made if records_in(data) and zipfile.ZipFile(io.BytesIO(data)).testzip() is None]
    assert len(sound) > 30
    assert len(set(made)) > 30
    pickled = dict(records_in(whole) or ())[b"archive/data.pkl"]
    assert b"".join(instructions(pickled)) == pickled
    assert records_in(archive([(b"a", b"b")])) == ((b"a", b"b"),)
    changed = {jsons(["k"])(b'{"k": [1, 2]}', random) for _ in range(50)}
    assert len(changed) > 20
