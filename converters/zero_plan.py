"""What a ZeRO checkpoint that is to be written will be like: ranks, dtype, param groups, who is trained and who not."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tailor_dcp import rank_state
from tailor_dcp.catalog import STEP, Catalog
from tailor_dcp.errors import ConversionError
from tailor_dcp.tensors import Readable

from .options import DTYPES, Options

PARAMS = "params"
_SUB_GROUP = 10**9  # elements; DeepSpeed's default
_ADAM = ("exp_avg", "exp_avg_sq")
_BUFFERS = (
    "running_mean", "running_var", "num_batches_tracked", "inv_freq", "original_inv_freq", "position_ids",
    "masked_bias", "cos_cached", "sin_cached", "e_score_correction_bias",
)  # fmt: skip
"""Names that modules give to their buffers; what else is not trained is taken for a frozen parameter."""


@dataclass(frozen=True)
class Group:
    """A param group.

    Attributes:
        names: its trained parameters, in their order.
        values: its hyper-parameters.
    """

    names: tuple[str, ...]
    values: Mapping[str, Any]

    @property
    def plain_steps(self) -> bool:
        """Whether its optimizer counts steps as plain numbers: DeepSpeed's own do, torch's have tensors."""
        return "bias_correction" in self.values


@dataclass(frozen=True)
class ZeroPlan:
    """All that is decided before anything is written.

    Attributes:
        catalog: what is written.
        stage: the stage of ZeRO.
        world: how many ranks it is written for.
        dtype: what the engine's module computes in.
        sub_group_size: of ZeRO-3.
        groups: the param groups.
        frozen: parameters that are not trained, tied ones once.
        buffers: persistent buffers.
        shared: the other names of tied parameters, and the name that each is stored under.
        kinds: optimizer states with a value for each element.
        singles: those with a single value; ``step`` is one.
        config: DeepSpeed's configuration.
        notes: what the user should know.
    """

    catalog: Catalog
    stage: int
    world: int
    dtype: torch.dtype
    sub_group_size: int
    groups: tuple[Group, ...]
    frozen: tuple[str, ...]
    buffers: tuple[str, ...]
    shared: Mapping[str, str]
    kinds: tuple[str, ...]
    singles: tuple[str, ...]
    config: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def zero(self) -> Mapping[str, Any]:
        """What the source knew of DeepSpeed."""
        return zero_of(self.catalog)

    @property
    def zero_config(self) -> Mapping[str, Any]:
        """The part of the configuration that is about ZeRO."""
        found: Mapping[str, Any] = self.config["zero_optimization"]
        return found

    @property
    def step(self) -> int:
        """How many steps were made: the training's count, or else the optimizer's."""
        told = self.catalog.train.get("step")
        if isinstance(told, torch.Tensor):
            told = told.item()
        if isinstance(told, int | float):
            return int(told)
        counted = (kinds[STEP].whole().item() for kinds in self.catalog.state.values() if STEP in kinds)
        return int(max(counted, default=0))

    def weight(self, name: str) -> Readable:
        """Return a weight."""
        return self.catalog.weights[name]

    def counts(self, names: Iterable[str]) -> list[tuple[str, int]]:
        """Return the numbers of elements of parameters."""
        return [(name, self.weight(name).count) for name in names]


def zero_of(catalog: Catalog) -> Mapping[str, Any]:
    """Return what a catalog knows of DeepSpeed: an engine's counters, and what was in a ZeRO checkpoint's files."""
    zero = catalog.train.get("zero")
    return zero if isinstance(zero, Mapping) else {}


def plan_of(catalog: Catalog, options: Options, stage: int) -> ZeroPlan:
    """Decide what is written.

    Args:
        catalog: what there is.
        options: ranks, dtype, the size of sub-groups; what is not given is taken from the source.
        stage: the stage of ZeRO.

    Raises:
        ConversionError: there are no trained parameters, or their optimizer has states that ZeRO cannot keep.
    """
    zero = zero_of(catalog)
    dtype = options.dtype or _dtype(catalog, zero)
    world = _world(catalog, zero) if options.world_size is None else options.world_size
    given, frozen, buffers = _roles(catalog, zero)
    groups, notes = _groups(catalog, given)
    trained = [name for group in groups for name in group.names]
    kinds, singles = _kinds(catalog, trained, groups)
    if not catalog.state and kinds:
        notes += ("The source has no optimizer state, so the optimizer starts at zero: moments 0, step 0.",)
    told = zero.get("sub_group_size")
    # An engine with the source's own configuration will load it, if nothing else is said.
    size = (told if isinstance(told, int) else _SUB_GROUP) if options.sub_group_size is None else options.sub_group_size
    if size < 1 or world < 1:
        raise ConversionError(f"--world-size {world} and --sub-group-size {size} must be at least 1.")
    return ZeroPlan(
        catalog=catalog,
        stage=stage,
        world=world,
        dtype=dtype,
        sub_group_size=size,
        groups=groups,
        frozen=frozen,
        buffers=buffers,
        shared=_shared(catalog, trained, buffers),
        kinds=kinds,
        singles=singles,
        config=_config(zero, world, stage, size, dtype),
        notes=notes + _taken_for_frozen(catalog, zero, frozen, stage),
    )


def _world(catalog: Catalog, zero: Mapping[str, Any]) -> int:
    """Return how many ranks the source had: as it says, or as many as it has generators of; else 1."""
    world = zero.get("world_size")
    if isinstance(world, int) and world > 0:
        return world
    rng = catalog.train.get("rng")
    return max(1, len(rank_state.unpack(rng, "train.rng"))) if isinstance(rng, bytes) and rng else 1


def _dtype(catalog: Catalog, zero: Mapping[str, Any]) -> torch.dtype:
    """Return what the source's engine computed in; else what all the weights have."""
    if zero.get("dtype") in DTYPES:
        return DTYPES[zero["dtype"]]
    found = {
        t.dtype for name, t in catalog.weights.items() if t.dtype.is_floating_point and name not in catalog.buffers
    }
    return found.pop() if len(found) == 1 and found <= set(DTYPES.values()) else torch.float32


# Who is trained -----------------------------------------------------------------------------------------


def _roles(catalog: Catalog, zero: Mapping[str, Any]) -> tuple[list[list[str]], tuple[str, ...], tuple[str, ...]]:
    """Return the trained parameters of each group, the frozen ones, and buffers; each tied one once.

    Raises:
        ConversionError: nothing is trained, or a group names what is not there.
    """
    buffers = set(catalog.buffers) | (set(zero.get("buffers") or ()) & set(catalog.weights))
    frozen = set(catalog.frozen) | (set(zero.get("frozen") or ()) & set(catalog.weights))
    if not buffers:
        buffers = {n for n, t in catalog.weights.items() if not t.dtype.is_floating_point or _is_buffer(n)} - frozen
    given = [list(group[PARAMS]) for group in catalog.groups] or [list(catalog.state) or list(catalog.stored)]
    untrained = frozen | buffers
    seen: set[int] = set()
    trained: list[list[str]] = []
    for names in given:
        trained.append([])
        for name in names:
            if name not in catalog.weights:
                raise ConversionError(
                    f"{catalog.source} has {name} in its optimizer, but no weight of that name; convert a checkpoint "
                    f"that holds the whole model."
                )
            weight = catalog.weights[name]
            if name in untrained or id(weight) in seen or not weight.count:
                continue
            seen.add(id(weight))
            trained[-1].append(name)
    if not any(trained):
        raise ConversionError(f"{catalog.source} has no trained parameters, which a ZeRO checkpoint is of.")
    rest = {n: t for n, t in catalog.weights.items() if id(t) not in seen and n not in buffers}
    once = {id(tensor): name for name, tensor in reversed(rest.items())}
    return (
        trained,
        tuple(n for n, t in rest.items() if once[id(t)] == n),
        tuple(n for n in catalog.weights if n in buffers),
    )


def _is_buffer(name: str) -> bool:
    return name.rpartition(".")[2] in _BUFFERS


def _taken_for_frozen(catalog: Catalog, zero: Mapping[str, Any], frozen: Sequence[str], stage: int) -> tuple[str, ...]:
    known = set(catalog.frozen) | set(zero.get("frozen") or ())
    taken = [name for name in frozen if name not in known and catalog.weights[name].count]
    if not taken or stage < 3 or catalog.buffers or "buffers" in zero:
        return ()
    more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
    return (
        f"{taken[0]}{more} are not trained and were taken for frozen parameters; if they are buffers of the model, "
        f"DeepSpeed will say so on loading.",
    )


def _shared(catalog: Catalog, trained: Iterable[str], buffers: Iterable[str]) -> dict[str, str]:
    """Return the other names of tied parameters, and the trained one, or else the first, of each."""
    skipped = set(buffers)
    names = [name for name in catalog.weights if name not in skipped]
    stored: dict[int, str] = {}
    for name in [*trained, *names]:
        stored.setdefault(id(catalog.weights[name]), name)
    return {n: first for n in names if (first := stored[id(catalog.weights[n])]) != n}


# The optimizer ------------------------------------------------------------------------------------------


def _groups(catalog: Catalog, given: Sequence[Sequence[str]]) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """Return the param groups; AdamW's own hyper-parameters where the source tells none."""
    values: list[Mapping[str, Any]] = [
        {name: value for name, value in group.items() if name != PARAMS} for group in catalog.groups
    ] or [{}]
    notes: tuple[str, ...] = ()
    if any("lr" not in held for held in values):
        notes = (
            "The source tells no hyper-parameters, so those of AdamW are written (lr 0.001, …); load with "
            "load_optimizer_states=False, or set lr and weight_decay after loading.",
        )
        values = [{**_adam_defaults(), **held} for held in values]
    return tuple(Group(tuple(n), v) for n, v in zip(given, values, strict=True) if n), notes


def _adam_defaults() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0]
    return {name: value for name, value in group.items() if name != PARAMS}


def _kinds(
    catalog: Catalog, trained: Sequence[str], groups: Sequence[Group]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the optimizer states with a value for each element, and those with a single one.

    Raises:
        ConversionError: a state is neither.
    """
    if not catalog.state:
        return (_ADAM, (STEP,)) if all("betas" in group.values for group in groups) else ((), ())
    spread: dict[str, None] = {}
    single: dict[str, None] = {}
    for name in trained:
        for kind, tensor in catalog.state.get(name, {}).items():
            if kind != STEP and tensor.size == catalog.weights[name].size:
                spread[kind] = None
            elif tensor.count == 1:
                single[kind] = None
            else:
                raise ConversionError(
                    f"{kind} of {name} has the size {tuple(tensor.size)}, not that of its weight, and cannot lie in "
                    f"ZeRO's flat buffers; convert with --weights-only."
                )
    both = next((kind for kind in single if kind in spread), None)
    if both:
        raise ConversionError(
            f"{both} has a value for each element of some parameters and a single one of others, which ZeRO cannot "
            f"keep; convert with --weights-only."
        )
    return tuple(spread), tuple(single)


# Configuration ------------------------------------------------------------------------------------------


def _config(zero: Mapping[str, Any], world: int, stage: int, size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the source's configuration, changed to what is written."""
    told = zero.get("ds_config")
    try:
        config = json.loads(told) if isinstance(told, str) else dict(told or {})
    except ValueError:
        config = {}
    config = config if isinstance(config, dict) else {}
    if world != zero.get("world_size"):
        config.pop("train_batch_size", None)  # follows from the others, and from the number of ranks
    held = config.get("zero_optimization")
    config["zero_optimization"] = {**(held if isinstance(held, dict) else {}), "stage": stage}
    if stage == 3:
        config["zero_optimization"]["sub_group_size"] = size
    config.pop("bfloat16", None)
    for name, narrow in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        section = config.get(name) if isinstance(config.get(name), dict) else {}
        if dtype == narrow:
            config[name] = {**(section or {}), "enabled": True}
        elif section:
            config[name] = {**section, "enabled": False}
    return config
