"""What transformers knows of a model: the names of its parameters, which are tied, and how files differ from them.

transformers changes weights when it loads them: it renames them, adds or drops a prefix, joins the experts of a layer.
A checkpoint that a live run loads must have the model's own names, and a folder for ``from_pretrained`` the files'. So
its own code for both is run, on a model without memory and on tensors that know only where their elements come from.

Nothing of the source is executed for it: the classes are those of the installed transformers, never remote code, and
a configuration that would have something downloaded is left alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tailor_dcp.errors import ConversionError
from tailor_dcp.tensors import Readable

from .lazy_tensors import LazyTensor, lazy

_IGNORED = ("attn_implementation", "experts_implementation", "auto_map", "quantization", "distributed", "tp_plan")
"""Parts of keys of a configuration that say how to run a model; some would fetch code for it."""
_FETCHING = ("backbone", "timm", "pretrained")
"""Parts of keys whose models fetch weights of others when they are made."""
_MOST_LAYERS = 4096


@dataclass(frozen=True)
class Named:
    """Tensors by the names that they shall have.

    Attributes:
        tensors: the tensors.
        joined: how many of them are not simply one tensor under another name.
        unknown: names that the model does not know; they are among the tensors as they were.
        missing: names of the model for which there is no tensor.
    """

    tensors: Mapping[str, Readable]
    joined: int = 0
    unknown: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


class HfModel:
    """A class of transformers with a configuration, without memory for its weights.

    Attributes:
        parameters: the parameters' names, tied ones under their first only, in the order of ``named_parameters``.
        buffers: the names of buffers.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        # Loading puts other tensors into the model, which no longer are one where they are tied.
        self.parameters = tuple(name for name, _ in model.named_parameters())
        self.buffers = frozenset(name for name, _ in model.named_buffers())

    @property
    def name(self) -> str:
        """The class's name."""
        return type(self._model).__name__

    @property
    def ties(self) -> dict[str, str]:
        """Tied parameters, and for each the name under which its weight is stored."""
        found: dict[str, str] = self._model.get_expanded_tied_weights_keys(all_submodels=True)
        return found

    @property
    def undecayed(self) -> frozenset[str]:
        """The parameters that the Trainer gives no weight decay."""
        names = _transformers("trainer").Trainer.get_decay_parameter_names(None, self._model)
        return frozenset(self.parameters) - frozenset(names)

    def live(self, stored: Mapping[str, Readable]) -> Named:
        """Return a folder's tensors by the names and in the shapes of ``from_pretrained(...).state_dict()``.

        Raises:
            Exception: transformers cannot load them, or not without touching their elements.
        """
        mapping = _transformers("conversion_mapping").get_model_conversion_mapping(self._model)
        config = _transformers("modeling_utils").LoadStateDictConfig(weight_mapping=mapping)
        given = {name: lazy(name, tensor) for name, tensor in stored.items()}
        load = _transformers("core_model_loading").convert_and_load_state_dict_in_model
        with _quiet():
            info, _ = load(self._model, given, config)
        if info.conversion_errors:
            raise ConversionError(f"{next(iter(info.conversion_errors))} cannot be made of what is in the files.")
        state = self._model.state_dict()
        found = {name: value for name, value in state.items() if isinstance(value, LazyTensor)}
        tensors = {name: value.readable for name, value in found.items()}
        for target, source in self.ties.items():
            if (target in tensors) != (source in tensors):
                here, there = (source, target) if source in tensors else (target, source)
                tensors[there] = tensors[here]
        used = frozenset[str]().union(*(value.names for value in found.values()))
        unknown = tuple(name for name in stored if name not in used)
        return Named(
            {name: tensors[name] for name in state if name in tensors}
            | {name: stored[name] for name in unknown if name not in tensors},
            sum(value.readable is not stored.get(next(iter(value.names))) for value in found.values()),
            unknown,
            tuple(name for name in state if name not in tensors),
        )

    def filed(self, live: Mapping[str, Readable]) -> dict[str, Readable]:
        """Return a model's tensors as ``save_pretrained`` stores them; those that it does not know as they are.

        Raises:
            Exception: transformers cannot convert them, or not without touching their elements.
        """
        revert = _transformers("core_model_loading").revert_weight_conversion
        known = self._model.state_dict()
        given = {name: lazy(name, tensor) for name, tensor in live.items() if name in known}
        with _quiet():
            made: Mapping[str, LazyTensor] = revert(self._model, given)
        others = {name: tensor for name, tensor in live.items() if name not in known}
        return {name: value.readable for name, value in made.items()} | others


def model_of(config: Mapping[str, Any]) -> HfModel:
    """Return the model that a ``config.json`` describes.

    Raises:
        LookupError: transformers does not know it, or is not there; the text says which.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise LookupError("transformers is not installed") from error
    if "quantization_config" in config:
        raise LookupError("it is quantized")
    if any(part in key for key, value in _walk(config) for part in _FETCHING if value):
        raise LookupError("it is built from other pretrained models")
    if any(_too_many(key, value) for key, value in _walk(config)):
        raise LookupError("it has too many layers to be true")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    known = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    is_model = isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)
    if not is_model:
        raise LookupError(f"its class {name} is not part of transformers" if name else "it does not name its class")
    try:
        with _quiet():
            return HfModel(_without_memory(known, _plain(config)))
    except Exception as error:  # whatever a strange configuration leads transformers to
        raise LookupError(f"transformers cannot make a {name} of it") from error


def _transformers(module: str) -> Any:
    """Import one of its modules, which is an extra."""
    return importlib.import_module(f"transformers.{module}")


def _without_memory(known: Any, config: Mapping[str, Any]) -> Any:
    known_configs = _transformers("models.auto.configuration_auto").CONFIG_MAPPING
    made = known_configs[config["model_type"]].from_dict(dict(config))
    with torch.device("meta"):
        return known._from_config(made, attn_implementation="eager", dtype=torch.float32)


def _plain(config: Any) -> Any:
    """Return a configuration without what says how the model is run."""
    if isinstance(config, dict):
        return {k: _plain(v) for k, v in config.items() if not any(part in k for part in _IGNORED)}
    return [_plain(value) for value in config] if isinstance(config, list) else config


def _walk(config: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield key, value
            yield from _walk(value)
    elif isinstance(config, list):
        for value in config:
            yield from _walk(value)


def _too_many(key: str, value: Any) -> bool:
    return isinstance(value, int) and value > _MOST_LAYERS and any(w in key for w in ("layer", "depth", "block"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from speaking of a load that nobody asked for."""
    logging = _transformers("utils.logging")
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
