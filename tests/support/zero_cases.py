"""One case of the grid: a real engine's checkpoint is read, converted through DCP and back, and resumed from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tailor_dcp.converters.convert import convert
from tailor_dcp.converters.options import Options
from tailor_dcp.converters.zero_source import open_source
from tests.support.zero_engines import Setup

STAGES, WORLDS, DTYPES, GROUPS = (3, 2, 1), (1, 2, 4), ("bf16", "fp32"), (1, 2)


def case(stage: int, world: int, dtype: str, groups: int, family: str) -> Setup:
    """Return a case; what the grid has no dimension for goes with those that it has."""
    return Setup(
        stage, world, dtype, groups, family,
        sub_group_size=300 if groups == 2 else 10**9,
        round_robin=stage < 3 and world == 4,
    )  # fmt: skip


COVERING = (
    case(3, 1, "bf16", 1, "llama"),
    case(2, 1, "fp32", 2, "tied_llama"),
    case(1, 1, "fp32", 1, "odd"),
    case(1, 1, "fp32", 2, "gpt2"),
    case(3, 2, "fp32", 2, "odd"),
    case(3, 2, "bf16", 1, "tied_llama"),
    case(2, 2, "fp32", 1, "gpt2"),
    case(1, 2, "fp32", 2, "llama"),
    case(3, 4, "bf16", 2, "gpt2"),
    case(2, 4, "bf16", 1, "odd"),
    case(2, 4, "fp32", 2, "llama"),
    case(1, 4, "bf16", 2, "tied_llama"),
)
"""Every two values of two dimensions come together in one of these."""


def name_of(setup: Setup) -> str:
    """Return a short name."""
    return f"zero{setup.stage}-{setup.world}ranks-{setup.dtype}-{setup.groups}groups-{setup.family}"


def check_case(setup: Setup, folder: Path) -> None:
    """Run a case in an empty folder.

    Raises:
        AssertionError: telling what differs.
    """
    source, back = folder / "run", folder / "back"
    trained = setup.call("train_and_save", str(source))
    check_reading(setup, source, trained[0]["saved"])
    convert(source, folder / "step-2", "dcp", "zero")
    convert(folder / "step-2", back, f"zero{setup.stage}", "dcp")
    # DeepSpeed itself, loading what it saved, is not always bit-equal to the run that was not interrupted.
    expected = setup.call("load_and_train", str(source))
    found = setup.call("load_and_train", str(back))
    assert [rank["losses"] for rank in found] == [rank["losses"] for rank in expected]
    check_same(found[0]["saved"], trained[0]["saved"])
    check_same(found[0]["after"], expected[0]["after"])
    decays = [group["weight_decay"] for group in found[0]["saved"]["groups"]]
    assert decays == ([0.05] if setup.groups == 1 else [0.1, 0.0])


def check_reading(setup: Setup, source: Path, live: dict[str, Any]) -> None:
    """Hold what is read against DeepSpeed's own zero_to_fp32 and the live engine."""
    catalog = open_source(source, Options())
    theirs = setup.call("consolidated", str(source))[0]
    missing = catalog.weights.keys() - theirs.keys()
    # Its ZeRO-1 leaves frozen parameters out.
    assert theirs.keys() <= catalog.weights.keys() and missing <= (catalog.frozen if setup.stage == 1 else set())
    for name, expected in theirs.items():
        assert np.array_equal(catalog.weights[name].whole().float().numpy(), expected), name
    for name, weight in live["weights"].items():
        assert np.array_equal(catalog.weights[name].whole().numpy(), weight), name
        for kind in ("exp_avg", "exp_avg_sq"):
            assert np.array_equal(catalog.state[name][kind].whole().numpy(), live[kind][name]), (name, kind)
        assert float(catalog.state[name]["step"].whole()) == live["steps"][0]
    assert catalog.state.keys() == live["weights"].keys()
    for name in catalog.buffers:
        assert np.array_equal(catalog.weights[name].whole().numpy(), live["buffers"][name]), name
    groups = [{k: v for k, v in group.items() if k != "params"} for group in catalog.groups]
    assert groups == live["groups"] and catalog.train["scheduler"] == live["scheduler"]


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare two engines' states, bit for bit.

    Raises:
        AssertionError: telling what differs.
    """
    assert found.keys() == expected.keys()
    for part, values in expected.items():
        if part in ("steps", "groups", "counters", "scheduler"):
            assert found[part] == values, part
            continue
        assert found[part].keys() == values.keys(), part
        for name, value in values.items():
            assert np.array_equal(found[part][name], value), (part, name)
