"""What becomes of moments where values are merged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from tailor_dcp import LayerwisePlanner, TrainState, forget, inspect, open_checkpoint
from tailor_dcp.merge import merge
from tailor_dcp.recipes.errors import RecipeError
from tests.support.hf_models import made
from tests.support.value_merges import merged

Trained = dict[str, torch.Tensor]


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        tokens = torch.randint(0, 64, (2, 8))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def training() -> tuple[Any, torch.optim.Optimizer]:
    model = made("llama")
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    others = [p for name, p in model.named_parameters() if "norm" not in name]
    return model, torch.optim.AdamW([{"params": others}, {"params": norms, "weight_decay": 0.0}], lr=1e-2)


def held(path: Path) -> Trained:
    """Return a checkpoint's tensors by key, read by our reader of metadata alone."""
    checkpoint = open_checkpoint(path)
    return {key: value for key in checkpoint if isinstance(value := checkpoint[key], torch.Tensor)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two checkpoints of one run, after two and after three steps."""
    folder = tmp_path_factory.mktemp("run")
    model, optimizer = training()
    paths = []
    for steps, name in ((2, "step-2"), (1, "step-3")):
        train(model, optimizer, steps)
        extra = {"step": int(name[-1])}
        dcp.save(TrainState(model, optimizer, extra=extra), checkpoint_id=folder / name)
        paths.append(str(folder / name))
    return paths


def average(run: list[str], weights: tuple[float, float] = (1, 3)) -> dict[str, Any]:
    models = [{"model": m, "parameters": {"weight": w}} for m, w in zip(run, weights, strict=True)]
    return {"merge_method": "linear", "models": models}


def test_moments_are_averaged_as_weights_are(run: list[str], tmp_path: Path) -> None:
    """All of them with the same weights; the largest step; and the training goes on from it."""
    merged(average(run), tmp_path / "out", "dcp", optimizer="average")
    one, other, out = held(Path(run[0])), held(Path(run[1])), held(tmp_path / "out")
    moments = [key for key in out if key.startswith("optim.state.")]
    assert len(moments) == 3 * sum(key.startswith("model.") for key in out)
    for key in out:
        if key.endswith(".step"):
            assert out[key] == 3
        elif key.startswith(("model.", "optim.state.")):
            want = (one[key].double() + 3 * other[key].double()) / 4
            torch.testing.assert_close(out[key].double(), want, rtol=1e-6, atol=1e-9)
    model, optimizer = training()
    train(model, optimizer, 1)
    extra = {"step": 0}
    forget()
    dcp.load(TrainState(model, optimizer, extra=extra), checkpoint_id=tmp_path / "out")
    assert extra["step"] == 2  # training's progress is the first model's
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    train(model, optimizer, 1)


def test_moments_of_one_source(run: list[str], tmp_path: Path) -> None:
    """Weights are merged, moments are one model's, and groups and progress the base's."""
    plan = {
        "merge_method": "slerp",
        "base_model": run[0],
        "models": [{"model": m} for m in run],
        "parameters": {"t": 0.3},
    }
    merged({**plan, "optimizer": run[1]}, tmp_path / "out", "dcp")
    want, out = held(Path(run[1])), held(tmp_path / "out")
    states = [key for key in want if key.startswith("optim.state.")]
    assert states and all(torch.equal(out[key], want[key]) for key in states)
    assert not torch.equal(out["model.lm_head.weight"], want["model.lm_head.weight"])
    assert open_checkpoint(tmp_path / "out")["train.step"] == 2


def test_moments_are_dropped(run: list[str], tmp_path: Path) -> None:
    """Nothing of the optimizer is left; progress is the first model's, and the record knows its step."""
    merged(average(run), tmp_path / "out", "dcp", optimizer="drop")
    assert all(key.startswith(("model.", "train.")) for key in open_checkpoint(tmp_path / "out"))
    assert open_checkpoint(tmp_path / "out")["train.step"] == 2
    assert inspect(tmp_path / "out").step == 2


def test_groups_are_the_leaders_where_another_model_has_others(run: list[str], tmp_path: Path) -> None:
    """A parameter is in the group that the leader has it in, whatever the model of its moments says."""
    model = made("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1)
    train(model, optimizer, 1)
    forget()
    dcp.save(TrainState(model, optimizer, extra={"step": 9}), checkpoint_id=tmp_path / "one-group")
    plan = average([run[0], str(tmp_path / "one-group")])
    merged(plan, tmp_path / "out", "dcp", optimizer=str(tmp_path / "one-group"))
    out, want = open_checkpoint(tmp_path / "out"), open_checkpoint(run[0])
    for key in ("params", "lr", "weight_decay"):
        found, wanted = ([c[f"optim.param_groups.{n}.{key}"] for n in range(2)] for c in (out, want))
        assert list(map(sorted, found)) == list(map(sorted, wanted)) if key == "params" else found == wanted
    assert out["optim.state.model.norm.weight.step"] == 1


def test_a_leader_that_does_not_train_what_has_moments(run: list[str], tmp_path: Path) -> None:
    """A moment without a param group would be lost when training goes on."""
    model = made("llama")
    model.model.norm.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, 1)
    forget()
    dcp.save(TrainState(model, optimizer), checkpoint_id=tmp_path / "frozen")
    plan = average([str(tmp_path / "frozen"), run[0]])
    with pytest.raises(RecipeError, match=r"frozen, from which the param groups come, does not train model\.norm\."):
        merged(plan, tmp_path / "out", "dcp", optimizer=run[0])


def test_state_under_numbers_is_not_lost_without_a_word(run: list[str], tmp_path: Path) -> None:
    """Nothing tells whose it is, so it can only be dropped, and that must be said."""
    model, optimizer = training()
    train(model, optimizer, 1)
    state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "epoch": 3}
    dcp.save(state, checkpoint_id=tmp_path / "numbered")
    plan = average([str(tmp_path / "numbered"), run[0]])
    for asked in (None, "average", run[0]):
        with pytest.raises(RecipeError, match=r"numbered keeps its optimizer's state under numbers.*optimizer: drop"):
            merged(plan, tmp_path / "out", "dcp", optimizer=asked)
    merged(plan, tmp_path / "out", "dcp", optimizer="drop")
    out = open_checkpoint(tmp_path / "out")
    assert all(key.startswith(("model.", "train.")) for key in out) and not any("optim" in key for key in out)
    assert out["train.epoch"] == 3


def test_a_mean_is_as_wide_as_the_widest(run: list[str], tmp_path: Path) -> None:
    """bf16 moments before fp32 ones must not round the mean."""
    model, optimizer = training()
    train(model, optimizer, 1)
    weights, optim = get_state_dict(model, optimizer)
    for kinds in optim["state"].values():
        kinds |= {kind: kinds[kind].bfloat16() for kind in ("exp_avg", "exp_avg_sq")}
    dcp.save({"model": weights, "optim": optim}, checkpoint_id=tmp_path / "bf16")
    merged(average([str(tmp_path / "bf16"), run[1]]), tmp_path / "out", "dcp", optimizer="average")
    key = "optim.state.lm_head.weight.exp_avg"
    out, one, other = (held(Path(p))[key] for p in (tmp_path / "out", tmp_path / "bf16", run[1]))
    assert out.dtype == torch.float32 and one.dtype == torch.bfloat16
    torch.testing.assert_close(out, (one.float() + 3 * other) / 4)


def test_what_is_stored_narrower_is_merged_and_written_in_trainings_dtype(run: list[str], tmp_path: Path) -> None:
    """So the training that goes on has its own dtypes, and nothing is rounded a second time."""
    model, optimizer = training()
    paths = []
    for step in (1, 2):
        train(model, optimizer, 1)
        paths.append(str(tmp_path / f"step-{step}"))
        planner = LayerwisePlanner("moments:every=1,weights=bf16,moments=bf16", base=None)
        dcp.save(TrainState(model, optimizer), checkpoint_id=paths[-1], planner=planner)
    merge({**average(paths), "optimizer": "average"}, tmp_path / "out")
    one, other, out = (held(Path(p)) for p in (*paths, tmp_path / "out"))
    for key in ("model.lm_head.weight", "optim.state.lm_head.weight.exp_avg"):
        assert one[key].dtype == torch.bfloat16 and out[key].dtype == torch.float32
        torch.testing.assert_close(out[key], (one[key].float() + 3 * other[key].float()) / 4)


def test_a_frankenmerge_keeps_them(run: list[str], tmp_path: Path) -> None:
    """Each layer's own moments come along, in the group that they had; a layer that is there twice has its own."""
    ranges = [(run[0], 0, 2), (run[1], 1, 2), (run[1], 1, 2)]
    slices = [{"sources": [{"model": m, "layer_range": [a, b]}]} for m, a, b in ranges]
    merged({"merge_method": "passthrough", "slices": slices}, tmp_path / "out", "dcp")
    one, other, out = held(Path(run[0])), held(Path(run[1])), held(tmp_path / "out")
    for kind in ("exp_avg", "exp_avg_sq", "step"):
        for source, layer, made_of in ((one, 0, 0), (one, 1, 1), (other, 2, 1), (other, 3, 1)):
            end = f"self_attn.q_proj.weight.{kind}"
            found = out[f"optim.state.model.layers.{layer}.{end}"]
            assert torch.equal(found, source[f"optim.state.model.layers.{made_of}.{end}"])
    groups = [open_checkpoint(tmp_path / "out")[f"optim.param_groups.{n}.params"] for n in range(2)]
    assert "model.layers.3.mlp.up_proj.weight" in groups[0]
    assert "model.layers.3.input_layernorm.weight" in groups[1] and "model.norm.weight" in groups[1]
    assert sorted(groups[0] + groups[1]) == sorted(k.removeprefix("model.") for k in out if k.startswith("model."))


TIES = {"merge_method": "ties", "parameters": {"weight": 1}}
REFUSED: dict[str, tuple[Mapping[str, Any], str | None]] = {
    r"has optimizer state, and the plan does not say .*; say optimizer: drop, average, .*step-2 or .*step-3": (
        {},
        None,
    ),
    r"step-2 has optimizer state, .*; say optimizer: drop, .*step-2 or .*step-3": (TIES, None),
    r"moments can be averaged where weights are, by the method 'linear', not by 'ties'": (TIES, "average"),
    r"only a passthrough without scale can keep moments": ({}, "keep"),
    r"optimizer: nobody names no model of the plan that has optimizer state": ({}, "nobody"),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_is_refused(run: list[str], tmp_path: Path, problem: str) -> None:
    """What becomes of moments is never guessed."""
    more, optimizer = REFUSED[problem]
    plan = {**average(run), **more, **({"base_model": run[0]} if more else {})}
    with pytest.raises(RecipeError, match=problem):
        merged(plan, tmp_path / "out", "dcp", optimizer=optimizer)
    assert not (tmp_path / "out").exists()


def test_weights_that_give_no_mean(run: list[str], tmp_path: Path) -> None:
    """A second moment must not become negative."""
    with pytest.raises(RecipeError, match="give no mean of moments"):
        merged(average(run, (2, -1)), tmp_path / "out", "dcp", optimizer="average")


def test_a_source_without_moments(run: list[str], tmp_path: Path) -> None:
    """There is no mean of what one model lacks."""
    made("llama").save_pretrained(tmp_path / "hf")
    with pytest.raises(RecipeError, match=r"exp_avg of .* is not in all models"):
        merged(average([run[0], str(tmp_path / "hf")]), tmp_path / "out", "dcp", optimizer="average")
    merged(average([str(tmp_path / "hf"), run[0]]), tmp_path / "out", "dcp", optimizer=run[0])
    assert any(key.startswith("optim.state.") for key in open_checkpoint(tmp_path / "out"))
