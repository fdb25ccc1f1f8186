from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tailor_dcp.policies
from tailor_dcp.errors import PolicyError
from tailor_dcp.policies import Full, Parity, parse_policy
from tailor_dcp.policies.plugins import GROUP, PLUGINS

THIRD_PARTY = Path(__file__).parents[1] / "third_party_policy"
LIBRARY = Path(tailor_dcp.policies.__file__).parents[2]

ASK = """
import json, sys
from tailor_dcp.errors import PolicyError
from tailor_dcp.policies import SaveRequest, UnitInfo, parse_policy

answers = []
for text in json.loads(sys.argv[1]):
    try:
        policy = parse_policy(text)
    except PolicyError as error:
        answers.append(str(error))
        continue
    units = (UnitInfo("lm_head", "weight", 8, age=1),)
    due = [len(list(policy.select(SaveRequest(None, index, units)))) for index in range(4)]
    answers.append([type(policy).__module__, str(policy), parse_policy(str(policy)) == policy, due])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that the third party's package is really installed into."""
    # Building leaves files beside the source, so a copy of it is built.
    source = shutil.copytree(THIRD_PARTY, tmp_path_factory.mktemp("build") / "package")
    target = tmp_path_factory.mktemp("site")
    quiet = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    install = [sys.executable, "-m", "pip", "install", *quiet, "--target", str(target), str(source)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def _ask(site, *texts):
    path = os.pathsep.join([str(site), str(LIBRARY)])
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(texts)],
        capture_output=True,
        text=True,
        check=False,
        cwd=site,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_installed_package_brings_its_policy(site):
    texts = [
        "every_other",
        "every_other : offset = 1",
        "every_other:offset=1|parity",
        "every_othr",
        "every_other:offst=1",
        "every_other:offset=x",
        "every_other:offset=2",
    ]
    plain, odd, either, misspelt, no_option, bad, refused = _ask(site, *texts)
    assert plain == ["every_other", "every_other", True, [1, 0, 1, 0]]
    assert odd == ["every_other", "every_other:offset=1", True, [0, 1, 0, 1]]
    assert either[1:3] == ["every_other:offset=1|parity", True]
    assert "did you mean 'every_other'?" in misspelt
    assert "every_other, filter, full, moments, parity" in misspelt
    assert "no option 'offst' (did you mean 'offset'?)" in no_option
    assert "offset='x' of the policy 'every_other' is not allowed" in bad
    assert "'every_other' refuses its options (offset must be 0 or 1)" in refused


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """Put packages on the path that offer policies: what pip would leave there, without pip."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(distribution, module, source, **entries):
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)
        info = tmp_path / f"{distribution}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        lines = [f"{name} = {value}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]))

    yield install
    for module in [m for m, found in sys.modules.items() if str(tmp_path) in str(getattr(found, "__file__", ""))]:
        del sys.modules[module]


POLICY = """
from dataclasses import dataclass
from tailor_dcp.policies import Policy

@dataclass(frozen=True)
class Some(Policy):
    name = {name!r}
    must: int
    def select(self, request):
        return []
"""


def test_a_required_option(offer):
    offer("good", "good_policy", POLICY.format(name="some"), some="good_policy:Some")
    assert parse_policy("some:must=3").must == 3
    with pytest.raises(PolicyError, match="needs its option must; its options are must"):
        parse_policy("some")


@pytest.mark.parametrize(
    ("source", "value", "reason"),
    [
        ("import no_such_module", "broken:Some", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise ValueError('two\\nlines')", "broken:Some", "ValueError: two lines"),
        ("", "broken:Missing", "AttributeError"),
        ("def Some(request): return []", "broken:Some", "not a subclass of tailor_dcp.policies.Policy"),
        ("class Some: pass", "broken:Some", "not a subclass of tailor_dcp.policies.Policy"),
        (POLICY.format(name="other"), "broken:Some", "its class calls itself 'other'"),
        (POLICY.format(name=""), "broken:Some", "its class calls itself ''"),
        (
            POLICY.format(name="bad").replace("@dataclass(frozen=True)", ""),
            "broken:Some",
            "not a dataclass",
        ),
    ],
)
def test_a_broken_package_is_named(offer, source, value, reason):
    offer("broken-package", "broken", source, bad=value)
    with pytest.raises(PolicyError) as caught:
        parse_policy("bad")
    message = str(caught.value)
    for part in ("'bad'", "broken-package 1.5", f"entry point {value!r}", reason):
        assert part in message
    assert "\n" not in message
    assert message.endswith(".")


def test_a_broken_package_is_no_bother_to_others(offer):
    """It is only imported when it is asked for."""
    offer("broken-package", "broken", "raise SystemExit", bad="broken:Some")
    assert parse_policy("parity") == Parity()
    with pytest.raises(PolicyError, match=r"known ones are .*bad"):
        parse_policy("bbb")


def test_a_class_that_lacks_select(offer):
    source = POLICY.format(name="lazy").partition("    must")[0]
    offer("lazy", "lazy_policy", source, lazy="lazy_policy:Some")
    with pytest.raises(PolicyError, match=r"'lazy' refuses its options \(.*abstract"):
        parse_policy("lazy")


def test_two_packages_with_one_name(offer):
    offer("good", "good_policy", POLICY.format(name="some"), some="good_policy:Some")
    offer("better", "better_policy", POLICY.format(name="some"), some="better_policy:Some")
    with pytest.raises(PolicyError, match=r"offered by better 1\.5 .* and good 1\.5"):
        parse_policy("some:must=1")


def test_ours_cannot_be_replaced(offer):
    offer("rogue", "rogue_policy", POLICY.format(name="full"), full="rogue_policy:Some")
    assert parse_policy("full") == Full()


def test_names_and_unknown_names(offer):
    offer("good", "good_policy", POLICY.format(name="some"), some="good_policy:Some")
    assert "some" in PLUGINS.names()
    assert PLUGINS.find("nonesuch") is None
