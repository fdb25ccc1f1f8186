"""Layer-wise saves of states that are laid out as large trainings lay them out, loaded by torch alone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tailor_dcp import LayerwisePlanner
from tests.support.fleet import Fleet
from tests.support.meshes import DENSE, EXPERTS
from tests.support.world import Model, keys
from tests.test_laws import Saved, check, origin

STEPS = (10, 20, 30)


def verify(run: Path, model: Model, loads: Any, stock_fleet: Fleet) -> None:
    """Hold each checkpoint to the law, and make sure that it was not simply written as a whole."""
    for number, step in enumerate(STEPS):
        saved = Saved(run / f"step-{step}", step, model, "parity", list(STEPS[: number + 1]))
        record = stock_fleet.one("tests.support.world:record", str(saved.path))
        plain = stock_fleet.call("tests.support.world:load", model, str(saved.path), ranks=1 + number % 2)
        merged: dict[str, Any] = {}
        for part in loads(str(saved.path)):
            merged |= part
        for loaded in (*plain, merged):
            check(saved, loaded, record)
        origins = {origin(key, plain[0][key], p, kind, saved) for key, (p, kind) in keys(model).items()}
        assert origins == set(STEPS[max(0, number - 1) : number + 1])


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ("two-dimensional", DENSE),
        ("strided", DENSE),
        ("hybrid", DENSE),
        ("sharded-tensor", DENSE),
        ("pipeline", DENSE),
        ("expert-parallel", EXPERTS),
    ],
)
def test_layouts(layout: str, model: Model, fleet: Fleet, stock_fleet: Fleet, tmp_path: Path) -> None:
    """However ranks share the tensors, every unit comes back bit for bit as it was at one save, half of them new."""
    fleet.call("tests.support.world:forget")
    for step in STEPS:
        fleet.call("tests.support.meshes:save", layout, model, step, str(tmp_path / f"step-{step}"))
    verify(tmp_path, model, lambda path: fleet.call("tests.support.meshes:load", layout, model, path), stock_fleet)


def test_the_mesh_may_change_between_saves(fleet: Fleet, stock_fleet: Fleet, tmp_path: Path) -> None:
    """What was saved on four ranks in two dimensions is carried into saves on another mesh and on fewer ranks."""
    fleet.call("tests.support.world:forget")
    for step, (layout, ranks) in zip(
        STEPS, [("two-dimensional", 4), ("one-dimensional", 2), ("strided", 4)], strict=True
    ):
        fleet.call("tests.support.meshes:save", layout, DENSE, step, str(tmp_path / f"step-{step}"), ranks=ranks)
    verify(tmp_path, DENSE, lambda path: fleet.call("tests.support.meshes:load", "hybrid", DENSE, path), stock_fleet)


def test_fsdp1_saves_plain_dicts_that_fsdp1_and_a_single_process_load(
    fleet: Fleet, stock_fleet: Fleet, tmp_path: Path
) -> None:
    """The sharded tensors of flat parameters: each layer comes back bit for bit, all of it of one step."""
    fleet.call("tests.support.world:forget")
    seen = [bits(s) for s in fleet.call("tests.support.meshes:save_flat", str(tmp_path), STEPS, ranks=2)[0]]
    assert set(seen[0]) > {("embed.weight", "weight"), ("layers.2.bias", "exp_avg_sq"), ("head.weight", "step")}
    chosen = set()
    for number, step in enumerate(STEPS):
        path = str(tmp_path / f"step-{step}")
        again = stock_fleet.call("tests.support.meshes:load_flat", path, wrapped=True, ranks=2)[0]
        alone = stock_fleet.one("tests.support.meshes:load_flat", path, wrapped=False)
        assert bits(again) == bits(alone)
        chosen |= {(number, age) for age in ages(bits(alone), seen[: number + 1])}
    assert chosen == {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)}


# Optimizers ---------------------------------------------------------------------------------


class EightBit(torch.optim.Optimizer):
    """Momentum in bytes, with a scale of its own and a table of values that all parameters share."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.table = torch.linspace(-1, 1, 256)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load; torch casts every state of a float parameter to floats."""
        super().load_state_dict(state_dict)
        for own in self.state.values():
            own["state1"], own["qmap1"] = own["state1"].to(torch.uint8), self.table

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    code = torch.full(p.shape, 128, dtype=torch.uint8)
                    self.state[p] = {"step": 0, "state1": code, "qmap1": self.table, "absmax1": torch.ones(1)}
                own = self.state[p]
                own["step"] += 1
                momentum = 0.9 * own["qmap1"][own["state1"].long()] * own["absmax1"] + p.grad
                own["absmax1"] = momentum.abs().max().reshape(1)
                own["state1"] = ((momentum / own["absmax1"] + 1) * 127.5).round().to(torch.uint8)
                p.sub_(group["lr"] * momentum)


def _muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    hidden = [p for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() == 2]
    rest = [p for name, p in model.named_parameters() if not (name.startswith("layers.") and p.dim() == 2)]
    return [torch.optim.Muon(hidden, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]


OPTIMIZERS: dict[str, Any] = {
    "muon": _muon,
    "adafactor": lambda model: [torch.optim.Adafactor(model.parameters(), lr=0.02)],
    "eight bits": lambda model: [EightBit(model.parameters(), lr=0.02)],
}
KINDS = {
    "muon": {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"},
    "adafactor": {"row_var", "col_var", "variance", "step"},
    "eight bits": {"state1", "qmap1", "absmax1", "step"},
}


class Training:
    """A model of four blocks whose every step is drawn from its number alone."""

    def __init__(self, optimizer: str) -> None:
        torch.manual_seed(0)
        self.model: Any = nn.Module()
        self.model.embed = nn.Embedding(8, 6)
        self.model.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.model.head = nn.Linear(6, 8)
        self.optimizers = OPTIMIZERS[optimizer](self.model)

    def train(self, step: int, idle: tuple[int, ...] = ()) -> None:
        x = self.model.embed(torch.randint(8, (16,), generator=torch.Generator().manual_seed(step)))
        for layer in self.model.layers:
            x = x + layer(x).tanh()
        self.model.head(x).square().mean().backward()
        for layer in idle:
            self.model.layers[layer].zero_grad()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        model, optim = get_state_dict(self.model, self.optimizers)
        return {"model": model, "optim": optim}

    def resume(self, path: Path) -> None:
        held = self.state()
        dcp.load(held, checkpoint_id=path)
        set_state_dict(self.model, self.optimizers, model_state_dict=held["model"], optim_state_dict=held["optim"])


def bits(state: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """Return each weight's and each optimizer state's bytes, by layer, parameter and kind."""
    found: dict[tuple[str, str], Any] = {(fqn, "weight"): tensor for fqn, tensor in state["model"].items()}
    found |= {(fqn, kind): v for fqn, kinds in state["optim"]["state"].items() for kind, v in kinds.items()}
    return {key: v.numpy().tobytes() if isinstance(v, torch.Tensor) else v for key, v in found.items()}


def ages(got: dict[tuple[str, str], Any], seen: list[dict[tuple[str, str], Any]]) -> set[int]:
    """Return how many saves back the layers lie; each must be, in all its parts, that of one of the last two."""
    assert got.keys() == seen[-1].keys()
    found = set()
    for layer in ("embed", "layers.0", "layers.1", "layers.2", "layers.3", "head"):
        mine = {key: value for key, value in got.items() if key[0].startswith(f"{layer}.")}
        fitting = [age for age, old in enumerate(reversed(seen[-2:])) if mine.items() <= old.items()]
        assert mine, layer
        assert fitting, f"{layer} is that of no save"
        found.add(fitting[0])
    return found


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_other_optimizers_states_stay_with_their_layer(optimizer: str, tmp_path: Path) -> None:
    """A resumed layer has its weights and all its optimizer states from one save, bit for bit."""
    training, seen, chosen = Training(optimizer), [], set()
    for step in (1, 2, 3):
        training.train(step)
        seen.append(copy.deepcopy(bits(training.state())))
        dcp.save(training.state(), checkpoint_id=tmp_path / f"step-{step}", planner=LayerwisePlanner("parity"))
        resumed = Training(optimizer)
        resumed.train(99)  # so that there are states to load into
        resumed.resume(tmp_path / f"step-{step}")
        got = bits(resumed.state())
        assert {kind for _, kind in got} == KINDS[optimizer] | {"weight"}
        chosen |= {(step, age) for age in ages(got, seen)}
    assert chosen == {(1, 0), (2, 0), (2, 1), (3, 0), (3, 1)}


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_other_optimizers_go_on_as_if_nothing_had_happened(optimizer: str, tmp_path: Path) -> None:
    """What is carried because it did not change resumes bit-equal to a training that never stopped."""
    training = Training(optimizer)
    idle: dict[int, tuple[int, ...]] = {1: (), 2: (1, 3), 3: (1,), 4: (2,)}
    for step in (1, 2, 3):
        training.train(step, idle[step])
        planner = LayerwisePlanner("unchanged+full")
        dcp.save(training.state(), checkpoint_id=tmp_path / f"step-{step}", planner=planner)
    resumed = Training(optimizer)
    resumed.train(99)
    resumed.resume(tmp_path / "step-3")
    for going in (training, resumed):
        going.train(4, idle[4])
    assert bits(resumed.state()) == bits(training.state())
    blobs = pickle.loads((tmp_path / "step-3" / ".metadata").read_bytes()).storage_data
    files = {index.fqn: info.relative_path for index, info in blobs.items()}
    assert {i for i in range(4) if files[f"model.layers.{i}.weight"].startswith("carried")} == {1}


# Subclasses of tensors -----------------------------------------------------------------------


class Scaled(torch.Tensor):
    """Quantized weights as torchao makes them: bytes and a scale that look like one float tensor."""

    data_: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, data_: torch.Tensor, scale: torch.Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, data_.shape, dtype=torch.float32)

    def __init__(self, data_: torch.Tensor, scale: torch.Tensor) -> None:
        self.data_, self.scale = data_, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], meta: Any, size: Any, stride: Any) -> Scaled:
        return cls(inner["data_"], inner["scale"])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Scaled, (self.data_, self.scale)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        name = func.overloadpacket.__name__
        if name in ("detach", "clone", "alias", "view", "_to_copy"):
            copied = torch.clone if name == "clone" else torch.Tensor.detach
            return Scaled(copied(args[0].data_), copied(args[0].scale))
        if name == "copy_":
            args[0].data_.copy_(args[1].data_)
            args[0].scale.copy_(args[1].scale)
            return args[0]
        if name == "is_pinned":
            return False
        raise NotImplementedError(name)


def quantized(step: int) -> dict[str, Any]:
    """Return a state of quantized weights, one of them under two names, and plain ones of eight bits."""
    drawn = torch.Generator().manual_seed(step)
    model: dict[str, Any] = {}
    for i in range(4):
        data = torch.randint(255, (4, 4), generator=drawn).to(torch.uint8)
        model[f"layers.{i}.weight"] = Scaled(data, torch.rand(1, generator=drawn))
        model[f"layers.{i}.bias"] = torch.randn(6, generator=drawn).to(torch.float8_e4m3fn)
    model["head.weight"] = model["layers.0.weight"].detach()
    return {"model": model}


def of_save(tensor: torch.Tensor, key: str, steps: tuple[int, ...]) -> int:
    """Tell the save whose bits these are."""

    def raw(value: torch.Tensor) -> tuple[Any, ...]:
        parts = (value.data_, value.scale) if isinstance(value, Scaled) else (value.view(torch.uint8),)
        return tuple(part.tolist() for part in parts)

    return next(step for step in steps if raw(tensor) == raw(quantized(step)["model"][key]))


@pytest.mark.parametrize("policy", ["parity", "unchanged+parity", "unchanged+full"])
def test_tensors_that_wrap_others(policy: str, tmp_path: Path) -> None:
    """Each layer has the bits of one save, two names of one weight agree, and what cannot be compared is written."""
    with torch.serialization.safe_globals([Scaled]):
        for step in (1, 2, 3):
            dcp.save(quantized(step), checkpoint_id=tmp_path / f"step-{step}", planner=LayerwisePlanner(policy))
            loaded = quantized(0)
            loaded["model"]["head.weight"] = quantized(0)["model"]["head.weight"]  # in memory of its own
            dcp.load(loaded, checkpoint_id=tmp_path / f"step-{step}")
            came = {key: of_save(value, key, (step, step - 1)) for key, value in loaded["model"].items()}
            assert came["head.weight"] == came["layers.0.weight"]
            assert all(came[f"layers.{i}.weight"] == came[f"layers.{i}.bias"] for i in range(4))
            new = 1 if step == 1 or policy.endswith("full") else 2
            assert len(set(came.values())) == new


# What has its say on every rank ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "why"), [("uncollected", "use_collectives=False"), ("hugging face", "FileSystemWriter")]
)
def test_every_rank_hears_why_a_save_is_refused(how: str, why: str, fleet: Fleet, tmp_path: Path) -> None:
    """A refusal gives its reason on each rank and leaves no file."""
    fleet.call("tests.support.world:forget")
    fleet.call("tests.support.meshes:save", "hybrid", DENSE, 10, str(tmp_path / "step-10"))
    said = fleet.call("tests.support.meshes:save_with", 20, str(tmp_path / "step-20"), how)
    assert all(why in words for words in said), said
    assert [path for path in (tmp_path / "step-20").rglob("*") if path.is_file()] == []


def test_one_rank_alone_may_save_beside_a_process_group(fleet: Fleet, stock_fleet: Fleet, tmp_path: Path) -> None:
    """With ``no_dist=True`` a process carries from what it saved itself, whatever groups it is in."""
    fleet.call("tests.support.world:forget")
    for step in STEPS:
        assert fleet.one("tests.support.meshes:save_with", step, str(tmp_path / f"step-{step}"), "alone") == ""
    verify(tmp_path, DENSE, lambda path: fleet.call("tests.support.world:load", DENSE, path), stock_fleet)
