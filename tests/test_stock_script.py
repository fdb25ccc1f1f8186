"""A script that knows torch alone, changed by nothing but ``planner=`` in its save."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from tailor_dcp import inspect

STEPS, EVERY = 24, 4

SCRIPT = '''
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class AppState(Stateful):
    """What is saved: DCP calls these two by itself."""

    def __init__(self, model, optimizer):
        self.model = model
        self.optimizer = optimizer

    def state_dict(self):
        model_state_dict, optimizer_state_dict = get_state_dict(self.model, self.optimizer)
        return {"model": model_state_dict, "optim": optimizer_state_dict}

    def load_state_dict(self, state_dict):
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optim"],
        )


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), nn.Dropout(0.1))
            for _ in range(4)
        )
        self.head = nn.Linear(16, 32)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def main(run, steps, every):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = Model()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    done = 0
    checkpoints = {int(path.parent.name[5:]): path.parent for path in run.glob("step-*/.metadata")}
    if checkpoints:
        done = max(checkpoints)
        state_dict = {"app": AppState(model, optimizer)}
        dcp.load(state_dict=state_dict, checkpoint_id=checkpoints[done])

    for step in range(done + 1, steps + 1):
        torch.manual_seed(1000 * step + rank)
        tokens = torch.randint(32, (4, 9))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss.detach_(), dist.ReduceOp.AVG)
        if rank == 0:
            print(json.dumps({"step": step, "loss": loss.item(), "pid": os.getpid()}), flush=True)
        if step % every == 0:
            state_dict = {"app": AppState(model, optimizer)}
            dcp.save(state_dict, checkpoint_id=run / f"step-{step}")

    final = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(final, run / "final.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
'''


def with_planner(policy: str) -> str:
    """Return the script with a planner in its save."""
    save = 'dcp.save(state_dict, checkpoint_id=run / f"step-{step}")'
    assert SCRIPT.count(save) == 1
    changed = SCRIPT.replace(save, f'{save[:-1]}, planner=LayerwisePlanner("{policy}"))')
    return f"from tailor_dcp import LayerwisePlanner\n{changed}"


Losses = dict[int, float]


@dataclass
class Run:
    """A run of the script: its folder, the loss at each step, and what it ended with."""

    folder: Path
    losses: Losses
    final: dict[str, Any]


class Scripts:
    """Runs scripts under torchrun, two ranks each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.without_us = folder / "without_us"
        self.without_us.mkdir()
        (self.without_us / "tailor_dcp.py").write_text("raise ImportError('this machine has only torch')\n")

    def run(self, text: str, run: Path, stock: bool = False, kill_at: int | None = None) -> Losses:
        """Run a script, with ``stock`` where importing tailor_dcp fails; kill its first rank at a step."""
        script, errors = self.folder / "train.py", self.folder / "stderr"
        script.write_text(text)
        run.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if stock:
            environment["PYTHONPATH"] = str(self.without_us)
        losses: Losses = {}
        with (
            errors.open("w") as stderr,
            subprocess.Popen(
                [*command, str(run), str(STEPS), str(EVERY)], env=environment, stdout=subprocess.PIPE, stderr=stderr
            ) as torchrun,
        ):
            assert torchrun.stdout is not None
            for line in torchrun.stdout:
                said = json.loads(line)
                losses[said["step"]] = said["loss"]
                if said["step"] == kill_at:
                    os.kill(said["pid"], signal.SIGKILL)
        # Not the exit code: gloo's threads sometimes abort a process that has done all its work and only exits.
        assert (run / "final.pt").exists() is (kill_at is None), errors.read_text()
        return losses

    def finish(self, text: str, run: Path, stock: bool = False) -> Run:
        """Run a script to its end."""
        losses = self.run(text, run, stock)
        model, optimizer = torch.load(run / "final.pt", weights_only=True)
        (run / "final.pt").unlink()
        return Run(run, losses, flatten_state_dict({"model": model, "optim": optimizer})[0])


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Scripts:
    """Somewhere to run scripts."""
    return Scripts(tmp_path_factory.mktemp("scripts"))


@pytest.fixture(scope="module")
def stock(scripts: Scripts) -> Run:
    """The script as it is, never interrupted, where there is no tailor_dcp."""
    run = scripts.finish(SCRIPT, scripts.folder / "stock", stock=True)
    assert len(run.losses) == STEPS
    return run


@pytest.fixture(scope="module")
def killed(scripts: Scripts) -> Losses:
    """The losses of a run that saved in full through our planner, until one of its ranks was killed."""
    return scripts.run(with_planner("full"), scripts.folder / "run", kill_at=EVERY + 2)


@pytest.fixture(scope="module")
def resumed(scripts: Scripts, killed: Losses) -> Run:
    """The same run, resumed by the script's own code and then saved layer by layer."""
    return scripts.finish(with_planner("parity"), scripts.folder / "run")


def test_a_run_that_was_killed_goes_on_as_the_stock_run_did(stock: Run, killed: Losses, resumed: Run) -> None:
    """Saved in full through our planner and resumed by the script's own code, it loses not a bit."""
    assert 0 < len(killed) < STEPS
    assert 0 < len(resumed.losses) <= STEPS - EVERY
    assert killed.keys() | resumed.losses.keys() == stock.losses.keys()
    assert {**stock.losses, **killed} == stock.losses
    assert {**stock.losses, **resumed.losses} == stock.losses
    assert differing(resumed.final, stock.final) == []


def test_every_save_of_the_resumed_run_writes_what_is_due_alone(stock: Run, resumed: Run) -> None:
    """The first one too: it carries from the checkpoint that the script loaded."""
    saves = {step: inspect(resumed.folder / f"step-{step}") for step in range(EVERY, STEPS + 1, EVERY)}
    layerwise = [step for step, found in saves.items() if found.policy == "parity"]
    assert layerwise == list(range(min(layerwise), STEPS + 1, EVERY))
    assert len(layerwise) > 1
    for step in layerwise:
        assert {unit.origin_step for unit in saves[step].units} == {step, step - EVERY}
        assert size(resumed.folder / f"step-{step}") < 0.7 * size(stock.folder / f"step-{step}")


def test_what_was_saved_in_part_is_resumed_whole_without_this_package(
    scripts: Scripts, stock: Run, resumed: Run
) -> None:
    """Each tensor has the value of one of the two last saves, bit for bit, and layers are not torn."""
    # The newest checkpoint is of the last step, so this loads it, trains nothing, and writes what it has.
    loaded = scripts.finish(SCRIPT, resumed.folder, stock=True)
    assert loaded.losses == {}
    last, before = (whole(stock.folder / f"step-{step}") for step in (STEPS, STEPS - EVERY))
    fresh = set(loaded.final) - set(differing(loaded.final, last))
    stale = set(loaded.final) - set(differing(loaded.final, before))
    assert fresh | stale == set(loaded.final)
    layers = [{key for key in loaded.final if f".layers.{layer}." in key} for layer in range(4)]
    assert [len(keys) for keys in layers] == [6 * 4] * 4
    assert {keys <= fresh for keys in layers} == {True, False}
    assert all(keys <= fresh or keys <= stale for keys in layers)


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return the keys whose values are not equal, bit for bit."""
    return [key for key in a | b if not equal(a.get(key), b.get(key))]


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def size(checkpoint: Path) -> int:
    """Return the bytes that a save wrote to data files; what it carries lies in a folder of its own."""
    return sum(path.stat().st_size for path in checkpoint.glob("*.distcp"))


def whole(checkpoint: Path) -> dict[str, Any]:
    """Return all of a checkpoint as torch's own converter reads it."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(checkpoint, checkpoint / "whole.pt")
    return flatten_state_dict(torch.load(checkpoint / "whole.pt", weights_only=False)["app"])[0]
