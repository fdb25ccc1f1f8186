"""DeepSpeed's classes in its files, by name: they are read and written without deepspeed being there."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from types import ModuleType
from typing import Any


class ZeroStage:
    """In place of ``ZeroStageEnum``."""

    def __init__(self, value: int) -> None:
        self.value = int(value)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self.value,)


class LossScaler:
    """In place of a loss scaler that does not adapt."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class DynamicLossScaler(LossScaler):
    """In place of one that does."""


class Fragment:
    """In place of ``fragment_address``: a parameter's place in a rank's part of a stream."""

    def __init__(self, numel: int, start: int) -> None:
        self.numel, self.start = numel, start


STAND_INS: dict[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": ZeroStage,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": LossScaler,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": DynamicLossScaler,
    "deepspeed.utils.tensor_fragment.fragment_address": Fragment,
}
"""The class that is built instead of each, by its full name."""


def pickle_by_name(stand_ins: Mapping[str, type]) -> ModuleType:
    """Return what ``torch.save`` takes as ``pickle_module``; it writes stand-ins under the names they stand for.

    Where deepspeed is installed, its own classes are found under these names.
    """
    names = {cls: name.rpartition(".") for name, cls in stand_ins.items()}

    # The C pickler imports every class that it names; this one is slower, but what is pickled is small.
    class Pickler(pickle._Pickler):  # its methods are in no type stub
        def save_global(self, obj: Any, name: str | None = None) -> None:
            if obj not in names:
                super().save_global(obj, name)  # type: ignore[misc]
                return
            module, _, attribute = names[obj]
            self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())  # type: ignore[attr-defined]
            self.memoize(obj)  # type: ignore[attr-defined]

    made = ModuleType("pickle_by_name")
    made.Pickler = Pickler  # type: ignore[attr-defined]
    return made
