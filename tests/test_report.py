"""What a report tells, against stock loads, the file system and sums done by hand; and its page in a real browser."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from tailor_dcp import LayerwisePlanner, LayerwiseWriter, forget, prune, report
from tailor_dcp.cli import app, main
from tailor_dcp.errors import NoCheckpointError
from tailor_dcp.policies import Drift, Parity, parse_policy
from tailor_dcp.policies.words import in_words
from tailor_dcp.report import NoTensorsError, PolicyView, Report, SaveView, UnitHistory
from tailor_dcp.report_charts import text
from tailor_dcp.report_file import NoPlaceError, write_page
from tailor_dcp.report_maps import shade, shades
from tailor_dcp.report_page import page
from tests.support.runs import L0, L1, L2, LAYERS, Run, due, files, metadata
from tests.support.world import Model, Param, full_value, keys

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
    pytest.mark.filterwarnings("ignore::tailor_dcp.TailorWarning"),
]


def disk(*folders: Path) -> int:
    """Return the bytes of data files as the file system has them, each once."""
    status = [path.stat() for folder in folders for path in folder.rglob("*.distcp")]
    return sum({(s.st_dev, s.st_ino): s.st_size for s in status}.values())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that went back: 100, 200, 300, then from 200 on again to 250 and 260."""
    forget()
    run = Run(tmp_path_factory.mktemp("report") / "run")
    run.save(100, "parity")
    run.save(200, due(L1), writer=LayerwiseWriter)
    run.save(300, due(L0, L2))
    run.load(200)
    run.save(250, due(L0))
    run.save(260, "moments:every=2,weights=bf16", writer=LayerwiseWriter)
    return run


@pytest.fixture(scope="module")
def found(run: Run) -> Report:
    return report(run.folder)


# What is found -----------------------------------------------------------------------------


def test_origins_are_what_stock_loads_tell(run: Run, found: Report) -> None:
    """Each tensor's value, loaded by torch alone, is that of the step which the report names."""
    assert [save.name for save in found.saves] == ["step-100", "step-200", "step-300", "step-250", "step-260"]
    for number, step in enumerate((100, 200, 300, 250)):
        origins = run.steps_of(step)
        for unit in found.units:
            key = f"model.{unit.layer}.w" if unit.kind == "weight" else f"optim.state.{unit.layer}.w.{unit.kind}"
            assert unit.origins[number] == origins[key]
            assert (unit.saves[number] == 0) == (origins[key] == step)
    fresh = {unit.layer: unit.origins[-1] for unit in found.units if unit.kind == "weight"}
    assert fresh == dict.fromkeys(LAYERS, 260)
    assert {unit.layer for unit in found.units} == set(LAYERS)
    assert found.kinds[0] == "weight"


def test_staleness_by_hand(found: Report) -> None:
    """Step 250 has layer 0 from 250, layer 1 from 200, the rest from 100: 12, 12, 12 and 6 elements."""
    mean, most = found.saves[3].behind["weight"]
    assert most == 150
    assert mean == pytest.approx((12 * 0 + 12 * 50 + 12 * 150 + 6 * 150) / 42)


def test_a_run_that_went_back_says_so(found: Report) -> None:
    assert found.backwards == (("step-250", "step-300"),)
    assert [save.left for save in found.saves] == [False, False, True, False, False]
    assert found.saves[3].parent == "step-200"


def test_bytes_and_disk_are_the_file_systems(run: Run, found: Report, tmp_path: Path) -> None:
    folders = [run.folder / save.name for save in found.saves]
    assert found.disk == disk(*folders)
    for save, folder in zip(found.saves, folders, strict=True):
        own = {index for index, info in metadata(folder).storage_data.items() if "/" not in info.relative_path}
        assert save.written == sum(metadata(folder).storage_data[index].length for index in own)
        assert save.metadata == (folder / ".metadata").stat().st_size
        assert save.alone + save.shared + save.dead == disk(folder)
    # What removing a checkpoint frees: removed from a copy that keeps the links.
    for number, folder in enumerate(folders):
        copied = tmp_path / str(number)
        subprocess.run(["cp", "-a", run.folder, copied], check=True)
        shutil.rmtree(copied / folder.name)
        assert disk(copied) == found.disk - found.saves[number].frees


def test_a_full_save_counts_as_one(run: Run, found: Report) -> None:
    """The first save wrote everything, so it is what a full save takes; narrower weights do not make that less."""
    assert found.saves[0].written == found.saves[0].full
    assert [save.full for save in found.saves] == pytest.approx([found.saves[0].full] * 5, rel=0.01)
    assert found.written == sum(save.written for save in found.saves)
    assert found.written < found.full


def test_dead_bytes_are_those_that_no_checkpoint_names(tmp_path: Path) -> None:
    """With a stock writer one live unit pins its whole file once the older folder is gone."""
    run = Run(tmp_path / "run")
    for step in (100, 200, 300):
        run.save(step, due(L1))
    shutil.rmtree(run.path(100))
    found = report(run.folder)
    assert found.dead > 0
    read: dict[int, dict[int, int]] = {}
    sizes = {}
    for step in (200, 300):
        for info in metadata(run.path(step)).storage_data.values():
            status = (run.path(step) / info.relative_path).stat()
            read.setdefault(status.st_ino, {})[info.offset] = info.length
            sizes[status.st_ino] = status.st_size
    assert found.dead == sum(sizes[inode] - sum(blobs.values()) for inode, blobs in read.items())


SMALL = Model(tuple(Param(f"{layer}.w", (2, 2)) for layer in LAYERS))
"""Sketches of tensors this small have all their elements."""


def by_hand(unit: UnitHistory, now: int, before: int) -> float:
    """Return the relative change of a layer of the little world between two steps."""
    key = f"model.{unit.layer}.w" if unit.kind == "weight" else f"optim.state.{unit.layer}.w.{unit.kind}"
    param, kind = keys(SMALL)[key]
    a, b = (full_value(key, param, kind, step).double().numpy() for step in (before, now))
    return float(np.linalg.norm(b - a) / np.linalg.norm(a))


def test_drift_from_tensors_and_from_sketches(tmp_path: Path) -> None:
    """Both against norms by hand, of what was written anew and of nothing else."""
    run = Run(tmp_path / "run", SMALL)
    policy = Drift(threshold=1.2, max_stale=2)
    for step in (100, 200, 300, 400):
        run.save(step, policy)
    run.load(200)  # what comes next is compared with this, not with what lies before it in time or number
    run.save(350, policy)
    sketched, compared = report(run.folder), report(run.folder, drift=True)
    assert (sketched.drift_from, compared.drift_from) == ("sketches", "tensors")
    seen = Counter[bool]()
    for unit, other in zip(sketched.units, compared.units, strict=True):
        for number, parent in enumerate((None, 0, 1, 2, 1)):
            before = unit.origins[parent] if parent is not None else None
            now = unit.origins[number]
            anew = before is not None and now is not None and now != before
            seen[anew] += 1
            for drift in (unit.drift[number], other.drift[number]):
                if anew:
                    assert drift == pytest.approx(by_hand(unit, now or 0, before or 0), rel=1e-6)
                else:
                    assert drift is None
    assert min(seen.values()) > 0


def test_a_run_without_records(tmp_path: Path) -> None:
    """Stock saves count as what they are: full, and fresh."""
    run = Run(tmp_path / "run")
    for step in (1, 2, 3):
        run.stock(step)
    found = report(run.folder, tmp_path / "report.html")
    assert found.written == found.full
    assert found.dead == 0
    assert [view.policy for view in found.policies] == [None]
    assert all(age == 0 for unit in found.units for age in unit.saves)
    assert found.drift_from is None
    shown = (tmp_path / "report.html").read_text()
    assert "torch&#x27;s own planner" in shown
    assert "Nothing lags behind" in shown
    assert "0.0 % of the bytes were not written" in shown


def test_what_else_lies_in_a_run(run: Run, tmp_path: Path) -> None:
    """What is not committed, pruned, unreadable, without a step or cut off is named, and the rest told as ever."""
    folder = tmp_path / "run"
    subprocess.run(["cp", "-a", run.folder, folder], check=True)
    (folder / "step-400").mkdir()
    (folder / "step-400" / "__0_0.distcp").write_bytes(bytes(777))
    (folder / "step-500").mkdir()
    subprocess.run(["cp", "-a", folder / "step-100", folder / "best"], check=True)
    (folder / "logs").mkdir()
    (folder / "step-450").mkdir()
    (folder / "step-450" / ".metadata").write_bytes(b"no pickle")
    lost = next(iter(sorted(files(folder / "step-260"))))
    (folder / "step-260" / lost).unlink()
    found = report(folder)
    assert {(o.name, o.why.partition(":")[0].partition(",")[0]) for o in found.others} == {
        ("step-400", "not committed"),
        ("step-500", "empty"),
        ("best", "committed"),
    }
    assert next(other.bytes for other in found.others if other.name == "step-400") == 777
    assert [name for name, _ in found.unreadable] == ["step-450"]
    assert found.saves[-1].missing == (lost,)
    assert len(found.saves) == 5
    shown = page(found)
    assert "step-400 (777 B): not committed" in shown
    assert "step-450 cannot be read" in shown
    assert "step-260 cannot be loaded" in shown


def test_pruned_folders_that_still_hold_files(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    for step in (100, 200):
        run.save(step, due(L1), carry="reference")
    prune(run.folder, keep_last=1)
    (other,) = report(run.folder).others
    assert other.name == "step-100"
    assert other.why.startswith("pruned")


def test_series_are_told_apart(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    for step in (100, 200):
        run.stock(step, to=f"checkpoint-{step}/optimizer_0")
    with pytest.raises(NoCheckpointError, match="--series optimizer_0"):
        report(run.folder)
    assert [save.step for save in report(run.folder, series="optimizer_0").saves] == [100, 200]


def test_a_run_on_an_object_store() -> None:
    """Sizes are those of its objects; nothing is copied there, so a checkpoint refers to those of earlier ones."""
    store, run = fsspec.filesystem("memory"), Run(Path("unused"))
    for step in (100, 200):
        writer = LayerwiseWriter(f"memory://report/run/step-{step}")
        dcp.save(run.state(step), storage_writer=writer, planner=LayerwisePlanner(due(L1)))
    store.pipe("/report/run/step-300/__0_0.distcp", bytes(55))
    found = report("memory://report/run")
    committed = [path for path in store.find("/report/run") if path.endswith(".distcp") and "step-300" not in path]
    assert found.disk == sum(store.size(path) for path in committed)
    assert [(other.name, other.bytes) for other in found.others] == [("step-300", 55)]
    assert found.saves[1].shared > 0
    with pytest.raises(NoTensorsError, match="copy the run here first"):
        report("memory://report/run", drift=True)
    store.rm("/report", recursive=True)


def test_nothing_outside_of_the_run_is_looked_at(run: Run, tmp_path: Path) -> None:
    """A checkpoint that names a file elsewhere does not learn whether it is there, let alone how large it is."""
    folder = tmp_path / "run"
    subprocess.run(["cp", "-a", run.folder, folder], check=True)
    (tmp_path / "secret").write_bytes(bytes(10**6))
    told = metadata(folder / "step-260")
    for info in told.storage_data.values():
        info.relative_path = "../../secret"
    (folder / "step-260" / ".metadata").unlink()
    (folder / "step-260" / ".metadata").write_bytes(pickle.dumps(told))
    last = report(folder).saves[-1]
    assert last.outside == ("../../secret",)
    assert last.alone + last.shared + last.dead == 0


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("full", "everything in every save"),
        ("parity:groups=3", "layers in 3 groups, one group a save"),
        ("filter:head=1,tail=0,every=4,aux=rest", "the first layer in every save, the rest in every fourth save"),
        ("moments:every=5,weights=bf16", "written in every fifth save; stored are weights in bf16"),
        ("unchanged+full", "bit for bit what was last saved"),
        ("drift:threshold=0.02,states=0.5,max_stale=7", "more than 2 % (50 % for the optimizer state)"),
        ("budget:fraction=0.25,max_stale=8", "as much as fits into 25 % of a full save"),
        ("parity|filter:every=10", "what any of these asks for"),
        ("merge", "put together by a merge"),
        ("somebodys:x=1", "a policy of its own, somebodys:x=1"),
        ("drift:threshold=much", "does not know, drift:threshold=much"),
    ],
)
def test_policies_in_words(policy: str, words: str) -> None:
    assert words in in_words(policy)


def test_words_import_no_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record may name any policy; that of another package is not even looked for."""
    from tailor_dcp.policies import plugins

    monkeypatch.setattr(plugins.PLUGINS.__class__, "find", lambda *_: pytest.fail("looked for"))
    assert in_words("evil:now=1|unchanged+worse") == "a policy of its own, evil:now=1|unchanged+worse"
    assert parse_policy("parity") == Parity()


# The page ----------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """The tags and attributes of a page, and its texts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def synthetic(
    layers: int, saves: int, name: str = "layers", policy: str | None = "parity", every: int = 5, most: int = 0
) -> Report:
    """Return a report of a run that there never was."""
    views = tuple(
        SaveView(
            f"step-{i}", i, 1e9 + i, 1.5, 60.0 if i else None, policy, "link", None, 10**9, 3 * 10**9, 10**8, 10**9, 5,
            10**8, 10**5, {"weight": (0.0, 0), "exp_avg": (1.5, 4)}, False, (), (),
        )
        for i in range(saves)
    )  # fmt: skip
    units = tuple(
        UnitHistory(
            f"{name}.{n}", kind, 1000,
            tuple(i - (i + n) % every for i in range(saves)),
            tuple(most or (i + n) % every for i in range(saves)),
            tuple(1e-3 * (1 + (i * n) % 97) if (i + n) % every == 0 else None for i in range(saves)),
        )
        for n in range(layers)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    )  # fmt: skip
    policies = (PolicyView(policy, in_words(policy or "full"), "step-0", f"step-{saves - 1}", saves),)
    return Report("/runs/one", "", "sketches", views, units, policies, (), (), (), 10**10, 10**6)


@given(evil=st.text(min_size=1, max_size=40))
@settings(max_examples=15)
def test_no_name_changes_what_a_page_is(evil: str) -> None:
    """Whatever layers, kinds, policies and folders are called, the page has the same tags, and reads as text."""
    _holds(evil)


@pytest.mark.parametrize(
    "evil",
    [
        "</title></svg><script>document.title='owned'</script>",
        '"><img src=x onerror=alert(1)>',
        "' onmouseover='alert(1)",
        "<!--",
        "]]><b>",
        "&lt;script&gt;",
        "\ud800\x00\x1b\u202e",
    ],
)
def test_names_that_attack(evil: str) -> None:
    _holds(evil)


def _holds(evil: str) -> None:
    pages = []
    for name in (evil, "benign"):
        base = synthetic(2, 3)
        pages.append(
            page(
                replace(
                    base,
                    run=f"/runs/{name}",
                    series=name,
                    saves=tuple(
                        replace(s, name=name, policy=name, missing=(name,), outside=(name,)) for s in base.saves
                    ),
                    units=tuple(replace(u, layer=name + u.layer, kind=u.kind + name) for u in base.units),
                    policies=(PolicyView(name, name, name, name, 3),),
                    backwards=((name, name),),
                    unreadable=((name, name),),
                )
            )
        )
    hostile, benign = (Parsed(source) for source in pages)
    assert hostile.tags == benign.tags
    assert hostile.links == ["data:,"]
    pages[0].encode()  # what cannot be written would be found too late
    if evil.isascii() and evil.isprintable() and "\\" not in evil:
        assert any(evil.strip("/") in told for told in hostile.texts) or "/" in evil


def test_text_is_inert() -> None:
    assert text("<a href='x'>&\"\u202e\x00") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;\ufffd\ufffd"


def test_a_page_loads_nothing_and_runs_nothing() -> None:
    parsed = Parsed(source := page(synthetic(3, 4)))
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "iframe", "img", "object", "embed", "base", "form", "audio", "video"}
    assert not any(name.startswith("on") or name == "style" for _, names in parsed.tags for name in names)
    assert "default-src 'none'" in source
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import", source)


def test_every_cell_can_be_read(found: Report) -> None:
    """Each cell of a small map says in words what it is, and tables say the same without any picture."""
    source = page(found)
    assert "model.layers.1, step 300, left behind: values of step 200, 1 save, 100 steps old" in source
    assert "model.layers.1, step 200: written in this save" in source
    assert source.count('role="img" aria-label="') == source.count("<svg ")
    assert '<th scope="row">step-300 (left behind)</th>' in source
    assert "The step whose values each layer has" in source


@pytest.mark.parametrize(("layers", "saves", "most"), [(100, 200, 3.0), (210, 410, 6.0)])
def test_the_size_is_bounded(layers: int, saves: int, most: float) -> None:
    """100 layers and 200 checkpoints one to one; what is larger shares rows and columns, and says so."""
    source = page(synthetic(layers, saves))
    assert len(source.encode()) < most * 1e6
    assert ("2 checkpoints share a column" in source) == (saves == 410)
    assert ("2 layers share a row" in source) == (layers == 210)


@given(most=st.integers(1, 2**62), data=st.data())
def test_the_key_says_what_each_shade_means(most: int, data: st.DataObject) -> None:
    age = data.draw(st.integers(1, most))
    meanings = dict(shades(most))
    low, _, high = re.sub(r" saves? old|,", "", meanings[shade(age, most)]).partition(" to ")
    assert int(low) <= age <= int(high or low)
    assert meanings[shade(0, most)] == "written in this save"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("time", 1e300),
        ("time", float("nan")),
        ("seconds", float("inf")),
        ("step", 10**4000),
        ("index", -(10**4000)),
        ("policy", "</style><b>"),
    ],
)
def test_absurd_records_are_drawn(run: Run, tmp_path: Path, field: str, value: object) -> None:
    """A record may say anything; the page shows the rest all the same, and JSON stays JSON."""
    folder = tmp_path / "run"
    subprocess.run(["cp", "-a", run.folder, folder], check=True)
    told = metadata(folder / "step-260")
    told.tailor[field] = value
    (folder / "step-260" / ".metadata").unlink()
    (folder / "step-260" / ".metadata").write_bytes(pickle.dumps(told))
    found = report(folder, tmp_path / "report.html")
    assert len(found.saves) + len(found.unreadable) == 5
    json.dumps(found.to_dict(), allow_nan=False)
    assert Parsed((tmp_path / "report.html").read_text()).tags[-1][0] == "code"


# The file ----------------------------------------------------------------------------------


def test_only_a_report_is_written_over(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    with pytest.raises(NoPlaceError, match="is no report"):
        report(run.folder, other)
    with pytest.raises(NoPlaceError, match="is a folder"):
        report(run.folder, tmp_path)
    with pytest.raises(NoPlaceError, match="does not exist"):
        report(run.folder, tmp_path / "none" / "report.html")
    with pytest.raises(NoPlaceError, match="is no report"):
        report(run.folder, run.path(100) / ".metadata")
    assert other.read_text() == "mine"
    target = tmp_path / "report.html"
    report(run.folder, target)
    first = target.stat().st_ino
    report(run.folder, target)
    assert target.stat().st_ino != first  # another file took its place
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "report.html"]


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    """The disk says no in the midst of it: here, a limit on the size of files."""
    target = tmp_path / "report.html"
    write_page("<!doctype html>old", target)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(NoPlaceError, match="cannot be written"):
            write_page("<!doctype html>" + "x" * 10_000, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_text() == "<!doctype html>old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_command(run: Run, found: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["report", str(run.folder), "--json"])
    assert shown.exit_code == 0
    assert json.loads(shown.output) == json.loads(json.dumps(found.to_dict()))
    assert not list(tmp_path.iterdir())
    shown = CliRunner().invoke(app, ["report", str(run.folder)])
    assert shown.exit_code == 0
    assert "report.html: 5 checkpoints" in shown.output
    assert (tmp_path / "report.html").read_text() == page(found)


def test_errors_are_one_sentence(tmp_path: Path, run: Run, monkeypatch: Any, capsys: Any) -> None:
    for where in (tmp_path, tmp_path / "none", run.path(100)):
        monkeypatch.setattr("sys.argv", ["tailor", "report", str(where), "-o", str(tmp_path / "r.html")])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("tailor: ")
        assert said.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


# In a browser ------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="No Chromium is installed: `make browser` does that on Debian.")


class Shown:
    """A page as headless Chromium shows it."""

    def __init__(self, source: Path, scratch: Path, *options: str) -> None:
        assert BROWSER is not None
        self.picture = scratch / "picture.png"
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--enable-logging=stderr", f"--user-data-dir={scratch / 'profile'}", "--no-first-run", *options,
        ]  # fmt: skip
        done = subprocess.run(
            [*command, source.as_uri()],
            capture_output=True,
            check=True,
            timeout=60,
            env={**os.environ, "HOME": str(scratch)},
        )
        self.dom = done.stdout.decode()
        self.console = [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]


def pixels(path: Path) -> Counter[tuple[int, ...]]:
    image = Image.open(path).convert("RGB")
    return Counter({colour: count for count, colour in image.getcolors(1 << 24)})


@browser
def test_it_renders_in_light_and_dark(run: Run, tmp_path: Path) -> None:
    """Colours of both themes as the style has them, hardly a pixel of the other; the console stays silent."""
    out = tmp_path / "report.html"
    found = report(run.folder, out, drift=True)
    written = len([age for unit in found.units if unit.kind == "weight" for age in unit.saves if age == 0])
    for scheme, page_colour, fresh in (
        (1, (0xF5, 0xF5, 0xF2), (0x1C, 0x6C, 0xB0)),
        (0, (0x14, 0x17, 0x1A), (0x4A, 0x9D, 0xE0)),
    ):
        picture = tmp_path / "picture.png"
        shown = Shown(
            out, tmp_path, f"--screenshot={picture}", "--window-size=1280,2400",
            f"--blink-settings=preferredColorScheme={scheme}",
        )  # fmt: skip
        assert shown.console == []
        seen = pixels(picture)
        assert seen.most_common(2)[0][1] > 1280 * 2400 / 5
        assert page_colour in dict(seen.most_common(2))
        assert seen[fresh] > written * 300  # each such cell is 17 pixels high and much wider


@browser
def test_names_that_attack_in_a_browser(tmp_path: Path) -> None:
    """A layer's name from a real checkpoint stays text: no script runs, no element appears, the title is ours."""
    script = "document['title']='owned'"
    evil = f"</title></svg><script>{script}</script><img src=x onerror={script}>"
    run = tmp_path / "run"
    for step in (1, 2):
        state = {"model": {f"{evil}.weight": torch.ones(3) * step, "layers.1.weight": torch.ones(2)}}
        dcp.save(state, checkpoint_id=run / f"step-{step}", planner=LayerwisePlanner("parity"))
    out = tmp_path / "report.html"
    found = report(run, out)
    assert any("<script>" in unit.layer for unit in found.units)
    shown = Shown(out, tmp_path, "--dump-dom")
    parsed = Parsed(shown.dom)
    assert parsed.tags.count(("title", ())) == Parsed(out.read_text()).tags.count(("title", ()))
    assert not {"script", "img"} & {tag for tag, _ in parsed.tags}
    assert "<title>run: checkpoints</title>" in shown.dom
    assert shown.console == []


@browser
def test_a_large_page_renders(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_page(page(synthetic(100, 200)), out)
    shown = Shown(out, tmp_path, "--dump-dom")
    assert shown.console == []
    assert shown.dom.rstrip().endswith("</html>")
    assert shown.dom.count("<svg") == 8


@browser
def test_a_page_with_an_error_would_be_noticed(tmp_path: Path) -> None:
    """The check of the checks: a script that fails, and one that the page's policy forbids."""
    broken = tmp_path / "broken.html"
    broken.write_text("<!doctype html><script>throw new Error('seen')</script>")
    assert any("seen" in line for line in Shown(broken, tmp_path, "--dump-dom").console)
    broken.write_text(page(synthetic(2, 2)).replace("</main>", "<script>document.title='owned'</script></main>"))
    shown = Shown(broken, tmp_path, "--dump-dom")
    assert any("Content Security Policy" in line for line in shown.console)
    assert "<title>one: checkpoints</title>" in shown.dom
