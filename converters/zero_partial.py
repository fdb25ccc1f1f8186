"""StreamCheck's partial checkpoints: ZeRO-3 files with some of a run's flat streams, each under its own number.

The model's file names all parameters, as ever. The optimizer's files hold the streams of the units that a save was for:
``state`` by the streams' numbers, ``fp32_flat_groups`` and ``param_groups`` shortened to them, in one order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tailor_dcp.errors import DamagedSourceError
from tailor_dcp.layers import LayerMap

_NAMED = 6


def numbers_of(path: Path, groups: Iterable[Mapping[str, Any]], count: int) -> list[int]:
    """Return the number of each flat stream in a file, in the order of the streams.

    Args:
        path: the file, for messages.
        groups: its param groups; their ``params`` are numbers of streams.
        count: how many streams it holds.

    Raises:
        DamagedSourceError: the groups are not of these streams.
    """
    numbers = [number for group in groups for number in group["params"]]
    sound = all(type(number) is int and number >= 0 for number in numbers) and len({*numbers}) == len(numbers)
    if not sound or len(numbers) != count:
        raise DamagedSourceError(f"{path} has param groups of other parameters; copy it anew.")
    return numbers


def is_partial(numbers: Collection[int], states: Collection[Any], shapes: Sequence[Mapping[str, Any]]) -> bool:
    """Tell a partial checkpoint from a damaged one: what is missing are whole streams, with their states.

    Args:
        numbers: the streams that are there.
        states: the numbers of the optimizer's states.
        shapes: the parameters of each stream, of those that are missing, too.
    """
    missing = set(range(len(shapes))) - set(numbers)
    return 0 < len(numbers) < len(shapes) and set(states) <= set(numbers) and all(shapes[number] for number in missing)


def note_of(folder: Path, held: Iterable[str], everything: Iterable[str]) -> str:
    """Return what the user should know of a partial checkpoint.

    Args:
        folder: where it is.
        held: the parameters that it holds.
        everything: those that it names.
    """
    layers = LayerMap()
    there = list(dict.fromkeys(layers.layer(fqn) for fqn in held))
    of_all = len({layers.layer(fqn) for fqn in everything})
    more = f" and {len(there) - _NAMED} more" if len(there) > _NAMED else ""
    return (
        f"{folder} is a partial checkpoint, of {len(there)} of {of_all} layers ({', '.join(there[:_NAMED])}{more}); "
        f"the others are in other checkpoints of its run, and tailor merge --flags puts them together."
    )
