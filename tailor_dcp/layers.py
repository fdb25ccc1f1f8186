"""From names to units: which layer a tensor belongs to, and what it is for its parameter.

Everything here is decided from the names alone. There is no table of architectures to keep up with, and what
the names do not settle is left out: an entry that is not recognised is written in every save, which costs
bytes, while an entry recognised by mistake would bring back stale state without a word.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from typing import NamedTuple

from tailor_dcp.errors import PolicyError
from tailor_dcp.units import WEIGHT, Unit

Path = tuple[str | int, ...]
"""Where a value sits in the nested state dict, as ``flatten_state_dict`` reports it."""

ROOT = "(root)"
"""The layer of parameters that the root module itself owns."""

# --- names of layers -------------------------------------------------------------------------------------

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NUMBER = re.compile(r"(?:^|\.)([0-9]+)(?=\.|$)")
_MOST_DIGITS = 18  # Python refuses to make a number of thousands of them, and no stack has so many layers
_EXPERT = re.compile(r"(?:^|\.)(?:\w+_)?experts?\.[0-9]+(?=\.|$)")
# What adapters and parametrizations put between a module and its parameters. An adapter always wraps a
# module, so its names count from the second component on; torch can parametrize the root module as well.
_INFIX = re.compile(
    r"\.(?:base_layer|lora_\w+|modules_to_save|original_module|token_adapter|trainable_tokens_\w+|ia3_l\w*"
    r"|hada_\w+|lokr_\w+|b?oft_\w+|hra_u|vera_lambda_\w+|vblora_\w+|fourierft_\w+|ln_tuning_layers)(?=\.|$)"
    r"|(?:^|\.)parametrizations\."
)


@lru_cache(maxsize=1 << 16)
def strip_wrappers(fqn: str) -> str:
    """Remove what DDP, FSDP, ``torch.compile`` and activation checkpointing add to a name.

    Args:
        fqn: a parameter's or buffer's name, for example ``module._orig_mod.layers.0.weight``.

    Returns:
        The name in the unwrapped model, ``layers.0.weight``.
    """
    bare = _WRAPPERS.sub("", fqn)
    while bare.startswith("module."):
        bare = bare[len("module.") :]
    return bare


@lru_cache(maxsize=64)
def _compiled(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise PolicyError(f"The layer pattern {pattern!r} is not a regular expression: {error}.") from error
    return tuple(compiled)


def _matched(fqn: str, patterns: tuple[str, ...]) -> str:
    """Return the layer that the user's patterns name, or an empty string."""
    for pattern in _compiled(patterns):
        if match := pattern.match(fqn):
            text = match.groupdict().get("layer") or match[0]
            if name := text.rstrip("."):
                return name
    return ""


def _module_path(fqn: str) -> str:
    """Return the module that owns a parameter, adapters and parametrizations counted as part of it."""
    if infix := _INFIX.search(fqn):
        return fqn[: infix.start()]
    return fqn.rpartition(".")[0]


@lru_cache(maxsize=1 << 16)
def _layer(fqn: str, patterns: tuple[str, ...], experts: bool) -> str:
    fqn = strip_wrappers(fqn)
    if patterns and (name := _matched(fqn, patterns)):
        return name
    module = _module_path(fqn)
    block = (_EXPERT.search(module) if experts else None) or _NUMBER.search(module)
    return module[: block.end()] if block else module or ROOT


# --- the layout of a state dict --------------------------------------------------------------------------

# States that only an optimizer has, so that they identify one whatever it is called.
_MOMENT = re.compile(
    r"(?:max_)?exp_avg(?:_\w+)?|exp_inf|momentum_buffer|square_avg|acc_delta|grad_avg|(?:row|col)_var"
    r"|(?:state|absmax|qmap)\d|master_param"
)
# Other things have such names too: they count only where an optimizer is named.
_GENERIC = re.compile(r"sum|ax|mu|eta|prev|step_size|mu_product|variance|momentum|[mvzhs]|RMS")


class _Role(Enum):
    """What a component of a path says about everything below it."""

    STALE = auto()  # never carried, whatever it holds
    OPTIMIZER = auto()
    MODEL = auto()
    PROGRESS = auto()  # the training loop's own, although a model may be kept inside
    OTHER = auto()


def _words(*words: str, parts: str = "(?!)") -> re.Pattern[str]:
    """Compile an alternative of whole words, and of parts that are telling anywhere within a word."""
    return re.compile(rf"(?<![a-z])(?:{'|'.join(words)})(?![a-z])|{parts}")


_STALE = "rng|random|seeds?|lr|sched|scaler|loss(?:es)?|metrics?"
_STALE_STORE = "grads?|gradients?|stats|config|args|hparams|history|logs?"
_STALE_PARTS = "scheduler|loader|sampler|dataset|param_group"
_LOOP = "train|trainer|training|steps?|epochs?|iters?|iterations?|progress"
_MODEL = (
    "models?|modules?|nets?|networks?|ema|actor|critic|policy|student|teacher|backbone|discriminator|unet|vae"
    "|transformer|^state_dict$"
)
_ROLES = (
    (_Role.STALE, _words(_STALE, _STALE_STORE, parts=_STALE_PARTS)),
    (_Role.OPTIMIZER, _words("opts?", parts="optim")),
    (_Role.MODEL, _words(_MODEL)),
    (_Role.PROGRESS, _words(_LOOP)),
)
# Within an FQN: what tells a training loop's or an averaging's tensor from a frozen parameter or a buffer.
# Parameters with optimizer state are not asked.
_TRAINING = _words(
    _STALE, _LOOP, "opts?|state|generator|decay|updates?|counts?|averaged", parts=f"{_STALE_PARTS}|optim"
)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def _snake(name: str) -> str:
    return _CAMEL.sub("_", name).lower()


@lru_cache(maxsize=1 << 12)
def _role(component: str) -> _Role:
    return next((role for role, words in _ROLES if words.search(_snake(component))), _Role.OTHER)


def _looks_like_parameter(fqn: str) -> bool:
    return fqn.endswith((".weight", ".bias")) or _NUMBER.search(fqn.rpartition(".")[0]) is not None


def _roles(path: Path) -> list[_Role]:
    return [_role(str(part)) for part in path]


@lru_cache(maxsize=1 << 12)
def _holds_optimizer(home: Path) -> bool | None:
    """Say whether ``state`` below this path is an optimizer's; None if the states have to show it."""
    roles = _roles(home)
    if _Role.STALE in roles:
        return False
    if _Role.OPTIMIZER in roles:
        return True
    # Below a model, "state" is a module that happens to be called so.
    return False if _Role.PROGRESS in roles or roles[-1:] == [_Role.MODEL] else None


_CLOSED, _OPEN = -1, 0


@lru_cache(maxsize=1 << 12)
def _model_start(namespace: Path) -> int:
    """Return where FQNs start below a namespace named like a model; else ``_CLOSED`` or ``_OPEN``."""
    roles = _roles(namespace)
    if _Role.STALE in roles or _Role.OPTIMIZER in roles:
        return _CLOSED
    start = max((i + 1 for i, role in enumerate(roles) if role is _Role.MODEL), default=_OPEN)
    if _Role.PROGRESS in roles[start:]:
        return _CLOSED
    while start and start < len(namespace) and isinstance(namespace[start], int):
        start += 1  # one of several models in a list
    return start


class _State(NamedTuple):
    """A value that may be an optimizer's state of a parameter. Flat layouts keep the kind within the FQN."""

    home: Path
    fqn: str
    kind: str
    sure: bool


def _state_readings(path: Path) -> Iterator[_State]:
    """Yield each way to read a path as ``<home>.state.<fqn>.<kind>``."""
    if "state" in path:
        for i, part in enumerate(path[:-2]):
            fqn, home = path[i + 1], path[:i]
            if part == "state" and isinstance(fqn, str) and (sure := _holds_optimizer(home)) is not False:
                yield _State(home, fqn, ".".join(map(str, path[i + 2 :])), bool(sure))
    last = path[-1]
    if not isinstance(last, str) or "state." not in last:
        return
    before, _, rest = f".{last}".partition(".state.")
    head = before[1:]
    # Further in, "state" is a module unless an optimizer is named right before it.
    if rest and (not head or _role(head.rpartition(".")[2]) is _Role.OPTIMIZER):
        home = path[:-1] + tuple(head.split(".") if head else ())
        if (sure := _holds_optimizer(home)) is not False:
            yield _State(home, rest, "", bool(sure))


def _as_state(path: Path) -> _State | None:
    """Return how to read a path as optimizer state: as a named optimizer's, else the innermost way."""
    readings = list(_state_readings(path))
    return next((reading for reading in readings if reading.sure), readings[-1] if readings else None)


def _split(state: _State, weights: Collection[str]) -> _State:
    """Separate FQN and kind: behind a known weight if there is one, else at the last dot."""
    fqn = strip_wrappers(state.fqn)
    if state.kind:
        return state._replace(fqn=fqn)
    dots = [dot.start() for dot in re.finditer(r"\.", fqn)][::-1]
    end = next((dot for dot in dots if fqn[:dot] in weights), dots[0] if dots else 0)
    return state._replace(fqn=fqn[:end], kind=fqn[end + 1 :])


def _optimizer_states(states: Mapping[str, _State], weights: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return (FQN, kind) of those candidates that are optimizer states of a parameter."""
    split = {key: _split(state, weights) for key, state in states.items()}
    # A parameter nobody knows (the optimizer is alone in its folder) is recognised by one state that is named
    # like a moment; its other states then come with it. ``step`` alone could be anyone's.
    moments = {
        (state.home, state.fqn)
        for state in split.values()
        if _MOMENT.fullmatch(state.kind) or (state.sure and _GENERIC.fullmatch(state.kind))
    }

    def accepted(state: _State) -> bool:
        # A bare number is an optimizer's own numbering of its parameters; nothing ties it to a layer.
        if not state.fqn or state.fqn.isdecimal():
            return False
        known = state.fqn in weights
        evident = (state.home, state.fqn) in moments or (state.sure and known)
        return evident and (known or "." not in state.kind)

    return {key: (state.fqn, state.kind) for key, state in split.items() if accepted(state)}


class _Named(NamedTuple):
    """A tensor that may be a weight, with its name in its namespace and from the model's name on."""

    key: str
    short: str
    full: str


def _namespaces(paths: Mapping[str, Path], keys: Iterable[str]) -> dict[Path, list[_Named]]:
    """Group what may be weights by the mapping that they are in."""
    groups: dict[Path, list[_Named]] = {}
    for key in keys:
        path = paths[key]
        last, start = path[-1], _model_start(path[:-1])
        if start == _CLOSED or not isinstance(last, str) or last.endswith("_extra_state"):
            continue
        short = full = strip_wrappers(last)
        if 0 < start < len(path) - 1:
            full = strip_wrappers(".".join(map(str, path[start:])))
        groups.setdefault(path[:-1], []).append(_Named(key, short, full))
    return groups


def _weights(groups: Mapping[Path, list[_Named]], trained: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, FQN) of each parameter or buffer of a model."""
    for namespace, group in groups.items():
        if _model_start(namespace) == _OPEN:
            names = _model_among_others(group, trained, top=not namespace)
        else:
            short = any(name.short in trained for name in group)
            names = ((name.key, name.short if short else name.full, True) for name in group)
        for key, fqn, named in names:
            if fqn in trained or (named and "." in fqn) or not _TRAINING.search(_snake(fqn)):
                yield key, fqn


def _model_among_others(group: list[_Named], trained: Collection[str], *, top: bool) -> Iterator[tuple[str, str, bool]]:
    """Find a model whose names stand beside values of any sort, as at a flat state dict's top level."""
    parts = {name: name.short.partition(".") for name in group}
    roots = {head for name, (head, _, _) in parts.items() if name.short in trained}
    # "model.<fqn>" as one component: somebody joined namespace and FQN before the save.
    joined = {head for head, _, rest in parts.values() if rest in trained and _role(head) is _Role.MODEL} - roots
    for (key, fqn, _), (head, _, rest) in parts.items():
        if head in joined:
            yield key, rest, True
        elif head in roots or ((top or roots) and _looks_like_parameter(fqn)):
            yield key, fqn, False


# --- the public face -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """A value that may be carried from an earlier checkpoint.

    Attributes:
        key: its key in the flattened state dict.
        fqn: the parameter's or buffer's name in the unwrapped model; weight and moments have the same.
        unit: the layer and the kind.
    """

    key: str
    fqn: str
    unit: Unit


@dataclass(frozen=True)
class LayerMap:
    r"""How parameters are grouped into layers.

    Attributes:
        patterns: regular expressions, tried in order at the start of an FQN before anything else; the
            group ``layer`` if it takes part, else the whole match, names the layer. For example
            ``(r"(?P<layer>model\.layers\.[0-3])\.",)``.
        experts: make each expert that is stored as parameters of its own a layer of its own.

    Raises:
        PolicyError: a pattern is not a regular expression.
    """

    patterns: tuple[str, ...] = ()
    experts: bool = False

    def __post_init__(self) -> None:
        given: object = self.patterns  # a single string is an easy slip, and a sequence of letters as well
        patterns = (given,) if isinstance(given, str) else tuple(self.patterns)
        object.__setattr__(self, "patterns", patterns)
        _compiled(patterns)

    def layer(self, fqn: str) -> str:
        """Return the layer of a parameter or buffer: the outermost numbered block, else its module."""
        return _layer(fqn, self.patterns, self.experts)

    @staticmethod
    def position(layer: str) -> tuple[str, int] | None:
        """Return a layer's stack and number there, ``("model.layers", 12)``; None outside of stacks."""
        number = _NUMBER.search(layer)
        return (layer[: number.start()], int(number[1])) if number and len(number[1]) <= _MOST_DIGITS else None

    def classify(self, paths: Mapping[str, Path], tensors: Collection[str]) -> dict[str, Entry]:
        """Recognise parameters, buffers and per-parameter optimizer states.

        Args:
            paths: each key of the flattened state dict with the path of its value, as the second result
                of ``flatten_state_dict`` has it.
            tensors: the keys whose values are tensors.

        Returns:
            What may be carried, in the order of ``paths``. Anything else must be written in every save.
        """
        states = {key: state for key, path in paths.items() if (state := _as_state(path))}
        tensors = frozenset(tensors)
        others = _namespaces(paths, (key for key in paths if key in tensors and key not in states))
        known = {fqn for group in others.values() for name in group for fqn in (name.short, name.full)}
        found = _optimizer_states(states, known)
        trained_fqns = {fqn for fqn, _ in found.values()}
        # What only looked like optimizer state may be a weight of a module that is called "state".
        names = _namespaces(paths, (key for key in paths if key in tensors and key not in found))
        found.update((key, (fqn, WEIGHT)) for key, fqn in _weights(names, trained_fqns))
        return {
            key: Entry(key, fqn, Unit(self.layer(fqn), kind))
            for key in paths
            if key in found
            for fqn, kind in (found[key],)
        }


def trained(entries: Mapping[str, Entry]) -> set[str]:
    """Return the keys of those weights that an optimizer keeps state for.

    Args:
        entries: what ``LayerMap.classify`` returned.
    """
    stateful = {entry.fqn for entry in entries.values() if entry.unit.kind != WEIGHT}
    return {key for key, entry in entries.items() if entry.unit.kind == WEIGHT and entry.fqn in stateful}
