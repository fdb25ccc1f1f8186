"""Real ZeRO-3 engines resume from what LLMTailor plans and flag logs put together, as from a reference made by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tailor_dcp.merge import merge
from tailor_dcp.merging.index import Index
from tailor_dcp.merging.sources import open_source
from tailor_dcp.recipes.flags import assemble, read_flags
from tests.support import partial_checkpoints as runs
from tests.support.partial_checkpoints import LAYERS, unit_of
from tests.support.zero_engines import close_fleets

pytest.importorskip("deepspeed")
STEPS = 20


class Run(NamedTuple):
    """A real run with full checkpoints at three steps."""

    folder: Path
    tied: bool
    per_layer: bool
    dtype: str

    @property
    def setup(self) -> tuple[Any, ...]:
        return self.tied, self.per_layer, self.dtype

    def at(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    @property
    def names(self) -> list[str]:
        return list(load_file(self.at(4) / "model.safetensors"))


CASES = [
    pytest.param((False, True, "bf16"), id="untied-groups_per_layer-bf16"),
    pytest.param((True, True, "fp32"), id="tied-groups_per_layer-fp32", marks=pytest.mark.long),
    pytest.param((True, False, "bf16"), id="tied-two_groups-bf16", marks=pytest.mark.long),
]


@pytest.fixture(scope="module", autouse=True)
def _fleets_end() -> Iterator[None]:
    yield
    close_fleets()


@pytest.fixture(scope="module", params=CASES)
def run(request: Any, tmp_path_factory: Any) -> Iterator[Run]:
    made = Run(tmp_path_factory.mktemp("run") / "full", *request.param)
    runs.call("train_run", str(made.folder), [4, 6, 9], *made.setup)
    yield made
    runs.call("forget")


def _index(name: str) -> Index:
    return open_source(name, as_catalog=True).index


def _check(run: Run, merged: Path, chosen: Mapping[str, Path], newest: Path, tmp_path: Path) -> None:
    """Hold 20 steps from a merged checkpoint against 20 from one that DeepSpeed saved of what was set by hand."""
    by_hand = tmp_path / "by hand"
    runs.call("by_hand", str(run.folder), {n: str(path) for n, path in chosen.items()}, str(newest), str(by_hand))
    expected = runs.call("resume", str(run.folder), str(by_hand), *run.setup, STEPS)
    found = runs.call("resume", str(run.folder), str(merged), *run.setup, STEPS)
    assert len(found[0]["losses"]) == STEPS
    assert [rank["losses"] for rank in found] == [rank["losses"] for rank in expected]
    for moment in ("loaded", "after"):
        for kind, values in expected[0][moment].items():
            _same(found[0][moment][kind], values, f"{moment} {kind}")
    unmerged = runs.call("resume", str(run.folder), str(newest), *run.setup, 2)
    assert unmerged[0]["losses"] != found[0]["losses"][:2]  # so that losses tell something


def _same(found: Any, expected: Any, what: str) -> None:
    if isinstance(expected, dict) and all(isinstance(value, np.ndarray) for value in expected.values()):
        assert found.keys() == expected.keys(), what
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, f"{what} {name}")
    else:
        assert found == expected, what


def _plan(path: Path, run: Run, models: Mapping[int, Path]) -> Path:
    """Write LLMTailor's plan for the checkpoint of each unit, in the form that its examples have."""
    spans = [(0, 0, 0), *((unit, unit - 1, unit) for unit in range(1, LAYERS + 1))]
    spans += [(unit, unit, unit) for unit in models if unit > LAYERS]
    lines = ["slices:"]
    for unit, start, stop in spans:
        lines += ["  - sources:", f"      - model: {models[unit]}", f"        layer_range: [{start}, {stop}]"]
    lines += ["", "post_weights:", "  - name: lm_head.weight", f"    model: {models[LAYERS + 1]}"]
    lines += ["  - name: model.norm.weight", f"    model: {models[0]}", "", "pre_weights:"]
    embeddings = models[LAYERS + 1 if run.tied else LAYERS + 2]
    lines += ["  - name: model.embed_tokens.weight", f"    model: {embeddings}"]
    path.write_text("\n".join([*lines, "", "merge_method: passthrough", "dtype: bfloat16", ""]))
    return path


def test_a_plan_by_parity(run: Run, tmp_path: Path) -> None:
    """Half of the units from an older checkpoint: losses, weights, moments, steps, groups and counters are the same."""
    models = {unit: run.at(9 if unit % 2 else 4) for unit in range(LAYERS + (2 if run.tied else 3))}
    merge(_plan(tmp_path / "plan.yml", run, models), tmp_path / "merged", to="zero3")
    chosen = {name: models[unit_of(name, run.tied)] for name in run.names}
    _check(run, tmp_path / "merged", chosen, run.at(9), tmp_path)


def test_a_flag_log(run: Run, tmp_path: Path) -> None:
    """Partial checkpoints of some units each, put together over the full one that they started from."""
    if not run.per_layer:
        pytest.skip("StreamCheck has a group for each layer")
    head = LAYERS + 1
    flags = {4: set(range(LAYERS + 3)), 6: {0, 1, 2, head}, 9: {2, 4, head + 1 - run.tied}}
    partial = tmp_path / "run"
    runs.cut(run.at(4), partial / "checkpoint-4", flags[4], run.tied)
    for step in (6, 9):
        runs.cut(run.at(step), partial / f"checkpoint-{step}", flags[step], run.tied)
    log = runs.write_log(tmp_path / "logs" / "flags.jsonl", flags.items())
    merge(assemble(read_flags(log), 9, partial, _index), tmp_path / "merged", to="zero3")
    newest = {unit: step for step, units in flags.items() for unit in units}
    chosen = {name: run.at(newest[unit_of(name, run.tied)]) for name in run.names}
    assert {path.name for path in chosen.values()} == {"checkpoint-4", "checkpoint-6", "checkpoint-9"}
    _check(run, tmp_path / "merged", chosen, run.at(9), tmp_path)


def test_a_flag_log_to_dcp(run: Run, tmp_path: Path) -> None:
    """Has all param groups, those of the newest checkpoint with its learning rates; ZeRO-3 made of it is the same."""
    if not run.per_layer:
        pytest.skip("StreamCheck has a group for each layer")
    partial = tmp_path / "run"
    runs.cut(run.at(4), partial / "checkpoint-4", range(LAYERS + 3), run.tied)
    runs.cut(run.at(9), partial / "checkpoint-9", {0, 3}, run.tied)
    log = runs.write_log(tmp_path / "flags.jsonl", [(4, range(LAYERS + 3)), (9, {0, 3})])
    recipe = assemble(read_flags(log), 9, partial, _index)
    merge(recipe, tmp_path / "step-9")
    merge(recipe, tmp_path / "merged", to="zero3")
    found = open_source(str(tmp_path / "step-9"), as_catalog=True).catalog
    expected = open_source(str(run.at(9))).catalog
    assert found is not None and expected is not None
    assert [dict(group) for group in found.groups] == [dict(group) for group in expected.groups]
    again = open_source(str(tmp_path / "merged")).catalog
    assert again is not None and again.tensors.keys() == found.tensors.keys() == expected.tensors.keys()
    for key, tensor in again.tensors.items():
        assert torch.equal(tensor.whole(), found.tensors[key].whole()), key
