"""A merged checkpoint of a real training resumes in FSDP2 as one does that was put together by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tailor_dcp.merge import merge
from tests.support.fleet import Fleet

WORK = "tests.support.merge_training"
LAYERS, EARLY, LATE, FURTHER = 3, 4, 8, 20


@pytest.fixture(scope="module")
def run(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two full checkpoints of two ranks, saved with torch alone."""
    folder = tmp_path_factory.mktemp("fsdp") / "run"
    fleet.call(f"{WORK}:save_steps", LAYERS, str(folder), (EARLY, LATE), ranks=2)
    return folder


def whole(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint in one piece, as torch's own converter has it."""
    file = checkpoint.with_name(f"{checkpoint.name}.pt")
    if not file.exists():
        dcp_to_torch_save(checkpoint, file)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


def by_hand(run: Path, fills: dict[int, int], early: dict[str, set[int]]) -> dict[str, Any]:
    """Put a state together.

    Args:
        run: where the two checkpoints are.
        fills: for each layer of the result, the one that fills it.
        early: for weights and for moments, the layers of the result that come from the earlier one.
    """
    old, new = whole(run / f"step-{EARLY}"), whole(run / f"step-{LATE}")

    def called(name: str, layer: int) -> str:
        return name.replace(f"model.layers.{fills[layer]}.", f"model.layers.{layer}.")

    def taken(part: Any, kind: str) -> dict[str, Any]:
        found = {name: value for name, value in part(new).items() if ".layers." not in name}
        for layer, origin in fills.items():
            source = old if layer in early[kind] else new
            inside = f"model.layers.{origin}."
            found |= {called(name, layer): value for name, value in part(source).items() if name.startswith(inside)}
        return found

    groups = []
    for group in new["optim"]["param_groups"]:
        names = [name for name in group["params"] if ".layers." not in name]
        for layer, origin in fills.items():
            names += [called(name, layer) for name in group["params"] if name.startswith(f"model.layers.{origin}.")]
        groups.append({**group, "params": names})
    state = taken(lambda state: state["optim"]["state"], "moments")
    return {
        "model": taken(lambda state: state["model"], "weights"),
        "optim": {"state": state, "param_groups": groups},
    }


CASES: dict[str, tuple[dict[int, int], dict[str, set[int]], dict[str, Any]]] = {
    "two layers of the earlier step": (
        {0: 0, 1: 1, 2: 2},
        {"weights": {0, 2}, "moments": {0, 2}},
        {"layers": {"model.layers.{0,2}": "early"}},
    ),
    "weights of one, moments of another": (
        {0: 0, 1: 1, 2: 2},
        {"weights": {1}, "moments": {2}},
        {
            "layers": {
                "model.layers.1": {"from": "early", "kinds": ["weight"]},
                "model.layers.2": {"from": "early", "kinds": ["exp_avg", "exp_avg_sq"]},
            }
        },
    ),
    "deeper by a layer": (
        {0: 0, 1: 1, 2: 1, 3: 2},
        {"weights": {2}, "moments": {2}},
        {
            "layers": {"model.layers.2": "early"},
            "rename": {"model.layers.1": ["model.layers.1", "model.layers.2"], "model.layers.2": "model.layers.3"},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_goes_on_as_what_was_put_together_by_hand(fleet: Fleet, run: Path, tmp_path: Path, case: str) -> None:
    """Twenty losses and the end of the training, bit for bit; moments, counters and param groups included."""
    fills, early, recipe = CASES[case]
    out, file = tmp_path / "merged", tmp_path / "by-hand.pt"

    def named(what: Any) -> Any:
        if isinstance(what, dict):
            return {key: named(value) for key, value in what.items()}
        return str(run / f"step-{EARLY}") if what == "early" else what

    merge({"base": str(run / f"step-{LATE}"), **named(recipe)}, out)
    torch.save(by_hand(run, fills, early), file)
    found = fleet.call(f"{WORK}:go_on", len(fills), str(out), LATE, FURTHER, ranks=2)
    wanted = fleet.call(f"{WORK}:go_on_by_hand", len(fills), str(file), LATE, FURTHER, ranks=2)
    for (losses, end), (losses_by_hand, end_by_hand) in zip(found, wanted, strict=True):
        assert losses == losses_by_hand
        assert end.keys() == end_by_hand.keys()
        assert [key for key, value in end.items() if not _same(value, end_by_hand[key])] == []
    steps = {key: value.item() for key, value in found[0][1].items() if key.endswith(".step")}
    old = {key for key, value in steps.items() if value == EARLY + FURTHER}
    assert {int(key.split(".layers.")[1].split(".")[0]) for key in old} == early["moments"]
    assert {value for key, value in steps.items() if key not in old} == {LATE + FURTHER}


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)
