"""Methods by name, requests that do not fit, and methods of other packages."""

from __future__ import annotations

import sys
import textwrap
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from method_runs import ours

import tailor_dcp.methods
from tailor_dcp.methods import REQUIRED, Method, Parameter, Request, merge_method, method_named, method_names
from tailor_dcp.methods.plugins import GROUP
from tailor_dcp.recipes.errors import RecipeError

NAMES = [
    "passthrough",
    "linear",
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "model_stock",
    "sce",
    "nearswap",
    "arcee_fusion",
]


def test_all_names():
    assert set(NAMES) <= set(method_names())
    for name in NAMES:
        assert method_named(name).name == name
    project = tomllib.loads((Path(tailor_dcp.methods.__file__).parents[2] / "pyproject.toml").read_text())
    assert set(project["project"]["entry-points"][GROUP]) == set(NAMES)
    assert {entry.name for entry in entry_points(group=GROUP) if entry.load() is method_named(entry.name)} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_mergekits(name):
    from mergekit import merge_methods
    from mergekit.merge_methods.base import MISSING

    spec, method = merge_methods.get(name).spec, method_named(name)
    scopes = dict.fromkeys(method.parameters, "shared")
    scopes |= {p: "input" if p.of_base else "non_base" for p in method.model_parameters}
    told = {
        p.name: (p.scope.value, REQUIRED if p.default is MISSING else p.default, getattr(p.value_type, "__name__", ""))
        for p in spec.parameters
    }
    mine = {p.name: (scope, p.default, p.type.__name__) for p, scope in scopes.items()}
    if name == "passthrough":
        told["scale"] = ("input", None, "float")  # Optional[float]
    assert mine == told
    contract = spec.contract
    assert (method.base == "needed") == (contract.base == "required")
    for count in range(1, 6):
        for base in (None, *range(count)):
            if contract.base == "ignored" and base is not None:
                continue
            want = _fits(contract.validate_ids, list(range(count)), base)
            assert _fits(method.check, count, base is not None) == want


def _fits(check, *arguments):
    try:
        check(*arguments)
    except ValueError:
        return False
    return True


def test_unknown_names():
    with pytest.raises(RecipeError, match=r"no merge method 'dare_tie'; did you mean 'dare_ties'"):
        method_named("dare_tie")


@pytest.mark.parametrize(
    ("name", "count", "base", "message"),
    [
        ("ties", 2, None, "'ties' needs a base model"),
        ("slerp", 3, 0, "'slerp' takes exactly 2 models, not 3"),
        ("model_stock", 2, 0, "'model_stock' takes at least 3 models, not 2"),
        ("passthrough", 2, None, "'passthrough' takes exactly 1 model, not 2"),
        ("nuslerp", 2, 0, "'nuslerp' takes exactly 2 models besides the base model, not 1"),
        ("nuslerp", 4, 0, "'nuslerp' takes at most 3 models, not 4"),
    ],
)
def test_too_many_or_too_few(name, count, base, message):
    with pytest.raises(RecipeError, match=message):
        ours(name, [torch.zeros(2)] * count, base)


def test_parameters_that_are_missing_or_none():
    tensors = [torch.zeros(2)] * 2
    with pytest.raises(RecipeError, match=r"'ties' needs the parameter 'weight' for layer\.weight of model 2"):
        ours("ties", tensors, 0)
    with pytest.raises(RecipeError, match=r"'slerp' needs the parameter 't' for layer\.weight"):
        ours("slerp", tensors, 0)
    with pytest.raises(RecipeError, match=r"add up to 0.*normalize: false"):
        ours("linear", tensors, None, [{"weight": 1}, {"weight": -1}])
    with pytest.raises(RecipeError, match="smaller epsilon"):
        ours("della", tensors, 0, [{}, {"weight": 1, "density": 0.9, "epsilon": 0.2}])


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (float, [1, 0.5, -2], ["1", None, float("nan"), float("inf"), True, [1]]),
        (int, [3, 3.0], [3.5, "3", True, None, float("nan")]),
        (bool, [True, 0, 1.0], [2, 0.5, "yes", None]),
    ],
)
def test_values_of_parameters(kind, good, bad):
    for value in good:
        assert Parameter("p", type=kind).read(value) == value
        assert type(Parameter("p", type=kind).read(value)) is kind
    for value in bad:
        with pytest.raises(RecipeError, match="The parameter 'p' is "):
            Parameter("p", type=kind).read(value)
    assert Parameter("p", None).read(None) is None


def test_tensors_that_do_not_fit():
    each = [{"weight": 1}] * 2
    with pytest.raises(RecipeError, match=r"layer\.weight has the shapes \(2,\) and \(3,\)"):
        ours("linear", [torch.zeros(2), torch.zeros(3)], None, each)


@pytest.mark.parametrize("name", ["linear", "passthrough", "ties"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int8])
def test_what_is_not_of_floating_point_is_kept(name, dtype):
    tensor = torch.tensor([1, 0]).to(dtype)
    tensors = [tensor.clone() for _ in range(1 if name == "passthrough" else 2)]
    each = [{"scale": 3} if name == "passthrough" else {"weight": 1} for _ in tensors]
    result = ours(name, tensors, 0, each)
    assert result.dtype == tensor.dtype
    assert torch.equal(result, tensor)
    if len(tensors) > 1:
        for other in (torch.zeros_like(tensor), tensor.float()):
            with pytest.raises(RecipeError, match=r"layer\.weight is not of floating point .* differs between them"):
                ours(name, [tensor, other], 0, each)


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """Put packages on the path that offer methods: what pip would leave there, without pip."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(distribution, module, source, entries):
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{distribution}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(entries)

    yield install
    for module in [m for m, found in sys.modules.items() if str(tmp_path) in str(getattr(found, "__file__", ""))]:
        del sys.modules[module]


def _entry(line):
    return f"[{GROUP}]\n{line}\n"


def test_the_method_of_the_documentation_is_whole(offer):
    blocks = [textwrap.dedent(part) for part in tailor_dcp.methods.__doc__.split("\n\n")]
    start = next(i for i, part in enumerate(blocks) if part.startswith("import torch"))
    source, entry = "\n\n".join(blocks[start : start + 2]), next(b for b in blocks if b.startswith("[project.entry"))
    line = entry.splitlines()[1].replace('"', "")
    offer("medians", "median", source, _entry(line))
    assert "median" in method_names()
    assert "median" not in sys.modules
    tensors = [torch.tensor([0.0, 5.0]), torch.tensor([1.0, 1.0]), torch.tensor([9.0, 2.0])]
    assert ours("median", tensors).tolist() == [1.0, 2.0]
    assert ours("median", tensors, once={"blend": 0.5}).tolist() == [0.5, 3.5]
    with pytest.raises(RecipeError, match="'median' takes at least 3 models, not 2"):
        ours("median", tensors[:2])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("", "AttributeError"),
        ("def some(request): return None", "it is not a tailor_dcp.methods.Method"),
        ("from tailor_dcp.methods import Method\nsome = Method('other', print, '')", "it calls itself 'other'"),
    ],
)
def test_a_broken_package_is_named_and_bothers_nobody(offer, source, reason):
    offer("broken-package", "broken", source, _entry("bad = broken:some"))
    assert method_named("linear").name == "linear"
    with pytest.raises(RecipeError, match="did you mean 'bad'"):
        method_named("baad")
    with pytest.raises(RecipeError) as caught:
        method_named("bad")
    message = str(caught.value)
    for part in ("'bad'", "broken-package 1.5", "entry point 'broken:some'", reason):
        assert part in message
    assert "\n" not in message
    assert message.endswith(".")


SOME = "from tailor_dcp.methods import Method\nsome = Method({name!r}, print, '')"


def test_ours_cannot_be_replaced_nor_others_be_doubled(offer):
    offer("rogue", "rogue", SOME.format(name="linear"), _entry("linear = rogue:some"))
    offer("first", "first", SOME.format(name="some"), _entry("some = first:some"))
    offer("second", "second", SOME.format(name="some"), _entry("some = second:some"))
    assert method_named("linear").merge is not print
    with pytest.raises(RecipeError, match=r"offered by first 1\.5 .* and second 1\.5"):
        method_named("some")


def test_a_method_that_makes_something_else():
    @merge_method(paper="")
    def wrong(request: Request) -> torch.Tensor:
        return request.tensors[0][:1]

    assert isinstance(wrong, Method)
    with pytest.raises(RecipeError, match=r"'wrong' makes a tensor of shape \(1,\) .* of layer, .* shape \(2,\)"):
        wrong.merge(Request("layer", (tailor_dcp.methods.Input(torch.zeros(2), {}),), None, {}, 0))
