"""Runs of which any two checkpoints can be merged, and what must come of it, told without the code under test.

A plan says for each layer of the result which layer of which checkpoint fills it. The recipe is derived from the
plan, and so is what loading the result must give: what stock ``dcp.load`` gives of the checkpoints themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from tailor_dcp import LayerwisePlanner
from tests.support.runs import unheard
from tests.support.world import MOMENTS, full_value

STACK = "model.layers"
ENDS = ("model.embed_tokens", "model.norm", "lm_head")


@dataclass(frozen=True)
class Net:
    """A model of numbered layers with two parameters each, between an embedding and a head.

    Attributes:
        layers: how many.
        tied: whether the head is the embedding.
        frozen: numbers of layers that are not trained.
        flat: whether its optimizer's state is saved flattened.
    """

    layers: int = 3
    tied: bool = False
    frozen: frozenset[int] = frozenset()
    flat: bool = False

    @property
    def names(self) -> list[str]:
        """The names of all layers."""
        return [ENDS[0], *(f"{STACK}.{n}" for n in range(self.layers)), *ENDS[1:]]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter by its name."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (6, 3)}
        for n in range(self.layers):
            found |= {f"{STACK}.{n}.mlp.weight": (4, 3), f"{STACK}.{n}.norm.weight": (3,)}
        return found | {"model.norm.weight": (3,), "lm_head.weight": (6, 3)}

    def trained(self, fqn: str) -> bool:
        """Tell whether the optimizer has state of a parameter. A tied one it knows by its first name."""
        if self.tied and fqn == "lm_head.weight":
            return False
        return not any(layer_of(fqn) == f"{STACK}.{n}" for n in self.frozen)

    def groups(self) -> list[list[str]]:
        """The param groups: what decays and what does not."""
        known = [fqn for fqn in self.shapes() if not (self.tied and fqn == "lm_head.weight")]
        return [[fqn for fqn in known if "norm" not in fqn], [fqn for fqn in known if "norm" in fqn]]


def layer_of(fqn: str) -> str:
    """Return the layer of a parameter of these models."""
    parts = fqn.split(".")
    return ".".join(parts[:3] if parts[:2] == ["model", "layers"] else parts[:-1])


def key_of(fqn: str, kind: str) -> str:
    """Return the key of a parameter's tensor; it is the same in both layouts."""
    return f"model.{fqn}" if kind == "weight" else f"optim.state.{fqn}.{kind}"


def state_of(net: Net, step: int, blank: bool = False) -> dict[str, Any]:
    """Return the training state at a step, or zeros to load into."""

    def make(fqn: str, kind: str) -> torch.Tensor:
        from tests.support.world import Param

        made = full_value(key_of(fqn, kind), Param(fqn, net.shapes()[fqn]), kind, step)
        return torch.zeros_like(made) if blank else made

    weights = {fqn: make(fqn, "weight") for fqn in net.shapes()}
    if net.tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    moments = {fqn: {kind: make(fqn, kind) for kind in (*MOMENTS, "step")} for fqn in net.shapes() if net.trained(fqn)}
    rate = 0.0 if blank else step / 1000
    optim: dict[str, Any]
    if net.flat:
        optim = {f"state.{fqn}.{kind}": t for fqn, kinds in moments.items() for kind, t in kinds.items()}
        for number, group in enumerate(net.groups()):
            optim |= {f"param_groups.{fqn}.lr": rate + number for fqn in group}
    else:
        groups = [{"lr": rate + number, "params": [] if blank else group} for number, group in enumerate(net.groups())]
        optim = {"state": moments, "param_groups": groups}
    train = {"step": 0 if blank else step, "rng": torch.full((16,), 0 if blank else step % 251, dtype=torch.uint8)}
    return {"model": weights, "optim": optim, "train": train}


def save(run: Path, net: Net, step: int, policy: Any, carry: str = "link") -> str:
    """Save a step of a run, with torch alone if there is no policy; return its folder."""
    folder = run / f"step-{step}"
    planner = None if policy is None else LayerwisePlanner(policy, carry=carry)  # type: ignore[arg-type]
    dcp.save(state_of(net, step), checkpoint_id=folder, planner=planner)
    return str(folder)


def loaded(folder: str | Path, net: Net) -> dict[str, Any]:
    """Load a checkpoint with torch alone into zeros of a model; return everything by key."""
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    target = state_of(net, 0, blank=True)
    with unheard():
        dcp.load(target, checkpoint_id=folder)
    return flatten_state_dict(target)[0]


@dataclass
class Plan:
    """What a merge shall give.

    Attributes:
        net: the model of the result.
        base: the base's folder.
        models: each source's model by folder, the base's included.
        weights: for each layer of the result, the source and the layer in it that its weights come from.
        moments: for each layer of the result, the source of its moments.
        train: the source of the rest.
    """

    net: Net
    base: str
    models: dict[str, Net]
    weights: dict[str, tuple[str, str]]
    moments: dict[str, str] = field(default_factory=dict)
    train: str | None = None

    def recipe(self, glob: bool = False) -> dict[str, Any]:
        """Return the recipe, every layer named by itself, or those of the commonest source by a glob."""
        layers: dict[str, Any] = {}
        rename: dict[str, list[str]] = {}
        for layer, (source, origin) in self.weights.items():
            rename.setdefault(origin, []).append(layer)
            of_moments = self.moments[layer]
            takes = []
            if source == of_moments:
                takes = [] if source == self.base else [{"from": source}]
            else:
                takes = [{"from": source, "kinds": ["weight"]}, {"from": of_moments, "kinds": list(MOMENTS)}]
                takes = [take for take in takes if take["from"] != self.base]
            if takes:
                layers[layer] = takes if len(takes) > 1 else takes[0]
        if glob:
            layers = self._globbed(layers)
        found: dict[str, Any] = {
            "base": self.base,
            "layers": layers,
            "rename": {old: new for old, new in rename.items() if new != [old]},
            "drop": [name for name in self.models[self.base].names if name not in self.net.names],
        }
        if self.train is not None:
            found["train"] = self.train
        return found

    def _globbed(self, layers: dict[str, Any]) -> dict[str, Any]:
        """Return the same with a glob for the numbered layers, and names for those that it does not mean."""
        stack = [name for name in self.net.names if name.startswith(STACK)]
        first = layers.get(stack[0])
        takes = [layers.get(name, {"from": self.base}) for name in stack]
        if first is None or any(not isinstance(take, dict) or "kinds" in take for take in takes):
            return layers  # what a layer's own name does not speak of would come from the glob
        # A * adds no layer: what only the source has keeps its name.
        there = [name for name in stack if name in self.models[self.base].names]
        rest = {name: take for name, take in layers.items() if name not in there or take != first}
        for name in stack:
            if name not in layers:
                rest[name] = {"from": self.base}
        return {f"{STACK}.*": first, **rest}

    def expected(self) -> dict[str, Any]:
        """Return what loading the result must give, by key."""
        of_source = {source: loaded(source, net) for source, net in self.models.items()}
        rest = of_source[self.train or self.base]
        found: dict[str, Any] = {key: value for key, value in rest.items() if key.startswith("train.")}
        for fqn in self.net.shapes():
            layer = layer_of(fqn)
            source, origin = self.weights[layer]
            old = origin + fqn[len(layer) :]
            found[key_of(fqn, "weight")] = of_source[source][key_of(old, "weight")]
            for kind in (*MOMENTS, "step") if self.net.trained(fqn) else ():
                found[key_of(fqn, kind)] = of_source[self.moments[layer]][key_of(old, kind)]
        return found | self._groups(rest)

    def _groups(self, rest: dict[str, Any]) -> dict[str, Any]:
        """Return the param groups: each parameter in the one of what fills it."""
        trained = self.models[self.train or self.base]
        number = {fqn: n for n, group in enumerate(trained.groups()) for fqn in group}
        result: list[list[str]] = [[] for _ in trained.groups()]
        for fqn in self.net.shapes():
            layer = layer_of(fqn)
            old = self.weights[layer][1] + fqn[len(layer) :]
            known = next((name for name in (old, fqn) if name in number), None)
            if known is not None:
                result[number[known]].append(fqn)
        if self.net.flat:
            rates = {fqn: n for n, group in enumerate(result) for fqn in group}
            told = next(value for key, value in rest.items() if key.endswith("embed_tokens.weight.lr"))
            return {f"optim.param_groups.{fqn}.lr": told + n for fqn, n in rates.items()}
        found: dict[str, Any] = {}
        for n, group in enumerate(result):
            found[f"optim.param_groups.{n}.params"] = group
            found[f"optim.param_groups.{n}.lr"] = rest[f"optim.param_groups.{n}.lr"]
        return found


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the keys that are not the same in both, bit for bit; lists of names may be in any order."""
    return [key for key in sorted(found.keys() | expected.keys()) if not _same(found.get(key), expected.get(key))]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(set(map(str, a))) and sorted(map(str, a)) == sorted(map(str, b))
    return bool(a == b)


def tree(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return each file below a folder with its mode, size and content, to see whether anything was changed."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mode, path.stat().st_size, path.read_bytes())
        for path in _files(folder)
    }


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
