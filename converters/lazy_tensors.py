"""Tensors that know only where their elements come from.

What other libraries do to weights when they load or save them (join the experts of a layer, cut a fused projection
apart) they do with torch's own functions. These tensors go through such code and come out as a description of the
result, of which any stretch can then be read; no element is touched meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tailor_dcp.errors import ConversionError
from tailor_dcp.tensors import Readable

from .views import joined_along, part_along, reordered, reshaped

_aten = torch.ops.aten


class LazyTensor(torch.Tensor):
    """A tensor without elements.

    Attributes:
        readable: where they are.
        names: the tensors that it was made of.
    """

    readable: Readable
    names: frozenset[str]

    @staticmethod
    def __new__(cls, readable: Readable, names: frozenset[str]) -> LazyTensor:
        """Make one; torch sees its shape and dtype."""
        made: LazyTensor = torch.Tensor._make_wrapper_subclass(cls, readable.size, dtype=readable.dtype)
        made.readable = readable
        made.names = names
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Describe the result of a function instead of computing it.

        Raises:
            ConversionError: it is none of those that only move elements.
        """
        rule = _RULES.get(func.overloadpacket)
        if rule is None:
            raise ConversionError(f"{func} cannot be done with tensors that are not in memory.")
        return rule(*args, **(kwargs or {}))


def lazy(name: str, readable: Readable) -> LazyTensor:
    """Return a tensor of this name that stands for what can be read."""
    return LazyTensor(readable, frozenset([name]))


def _same(tensor: LazyTensor, *_: Any, **__: Any) -> LazyTensor:
    return LazyTensor(tensor.readable, tensor.names)


def _as(tensor: LazyTensor, readable: Readable) -> LazyTensor:
    return LazyTensor(readable, tensor.names)


def _dim(tensor: LazyTensor, dim: int) -> int:
    return dim % tensor.dim()


def _cat(tensors: list[LazyTensor], dim: int = 0) -> LazyTensor:
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ConversionError("Tensors of several dtypes would have to be joined to one.")
    names = frozenset[str]().union(*(tensor.names for tensor in tensors))
    return LazyTensor(joined_along(_dim(tensors[0], dim), [tensor.readable for tensor in tensors]), names)


def _stack(tensors: list[LazyTensor], dim: int = 0) -> LazyTensor:
    dim = dim % (tensors[0].dim() + 1)
    return _cat([_unsqueeze(tensor, dim) for tensor in tensors], dim)


def _unsqueeze(tensor: LazyTensor, dim: int) -> LazyTensor:
    size = list(tensor.shape)
    size.insert(dim % (len(size) + 1), 1)
    return _view(tensor, size)


def _squeeze(tensor: LazyTensor, dim: int) -> LazyTensor:
    dim = _dim(tensor, dim)
    size = [length for number, length in enumerate(tensor.shape) if number != dim or length != 1]
    return _view(tensor, size)


def _slice(
    tensor: LazyTensor, dim: int = 0, start: int | None = 0, end: int | None = None, step: int = 1
) -> LazyTensor:
    dim = _dim(tensor, dim)
    first, last, step = slice(start, end, step).indices(tensor.shape[dim])
    if step != 1:
        raise ConversionError("Every so-manieth element of a tensor would have to be taken.")
    return _as(tensor, part_along(dim, tensor.readable, first, max(first, last)))


def _select(tensor: LazyTensor, dim: int, index: int) -> LazyTensor:
    dim = _dim(tensor, dim)
    index %= tensor.shape[dim]
    return _squeeze(_slice(tensor, dim, index, index + 1), dim)


def _unbind(tensor: LazyTensor, dim: int = 0) -> list[LazyTensor]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[dim])]


def _split(tensor: LazyTensor, sizes: int | list[int], dim: int = 0) -> list[LazyTensor]:
    dim = _dim(tensor, dim)
    length = tensor.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return [_slice(tensor, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _view(tensor: LazyTensor, size: Any) -> LazyTensor:
    size = list(size)
    if -1 in size:
        known = torch.Size(length for length in size if length != -1).numel()
        size[size.index(-1)] = tensor.shape.numel() // known if known else 0
    return _as(tensor, reshaped(tensor.readable, size))


def _permute(tensor: LazyTensor, dims: list[int]) -> LazyTensor:
    return _as(tensor, reordered(tensor.readable, [_dim(tensor, dim) for dim in dims]))


def _transpose(tensor: LazyTensor, first: int, second: int) -> LazyTensor:
    order = list(range(tensor.dim()))
    first, second = _dim(tensor, first), _dim(tensor, second)
    order[first], order[second] = second, first
    return _permute(tensor, order)


_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((_aten.detach, _aten.alias, _aten.clone, _aten.contiguous), _same),
    # The dtype is not for the model's class to choose: what is in the files is given on as it is.
    _aten._to_copy: _same,
    **dict.fromkeys((_aten.view, _aten._unsafe_view, _aten.reshape, _aten._reshape_alias), _view),
    **dict.fromkeys((_aten.split, _aten.split_with_sizes), _split),
    _aten.cat: _cat,
    _aten.stack: _stack,
    _aten.unsqueeze: _unsqueeze,
    _aten.squeeze: _squeeze,
    _aten.slice: _slice,
    _aten.select: _select,
    _aten.unbind: _unbind,
    _aten.permute: _permute,
    _aten.transpose: _transpose,
    _aten.t: lambda tensor: _transpose(tensor, 0, 1),
}
"""What functions that only move elements do."""
