"""Tensors without elements, held against torch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.converters.lazy_tensors import LazyTensor, lazy
from tailor_dcp.errors import ConversionError
from tailor_dcp.tensors import Given


def of(tensor: torch.Tensor, name: str = "a") -> LazyTensor:
    return lazy(name, Given(tensor))


def step(draw: Any, tensor: torch.Tensor) -> Callable[[Any], Any]:
    """Return something that torch can do to a tensor of this shape without touching its elements."""
    dims = tensor.dim()
    dim = draw(st.integers(-dims, dims - 1))
    length = tensor.shape[dim]
    start = draw(st.integers(0, length - 1))
    order = draw(st.permutations(range(dims)))
    parts = draw(st.integers(1, length))
    return draw(
        st.sampled_from(
            [
                lambda t: torch.cat([t, t], dim=dim),
                lambda t: torch.stack([t, t], dim=dim),
                lambda t: t.narrow(dim, start, length - start),
                lambda t: t.select(dim, start) if dims > 1 else t,
                lambda t: torch.chunk(t, parts, dim=dim)[-1],
                lambda t: torch.split(t, [start, length - start], dim=dim)[1],
                lambda t: torch.unbind(t, dim)[start] if dims > 1 else t,
                lambda t: t.permute(*order).contiguous(),
                lambda t: t.transpose(dim, 0).contiguous(),
                lambda t: t.unsqueeze(dim),
                lambda t: t.unsqueeze(dim).squeeze(dim - 1 if dim < 0 else dim),
                lambda t: t.reshape(-1, t.shape[-1]),
                lambda t: t[...].detach().clone(),
                torch.nn.Parameter,
            ]
        )
    )


@given(st.data())
def test_any_chain_of_moves_gives_what_torch_gives(data: st.DataObject) -> None:
    """And any stretch of the result can be read by itself."""
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    real = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    ours: Any = of(real)
    for _ in range(data.draw(st.integers(1, 5))):
        if real.dim() > 4 or real.numel() > 4096:
            break
        move = step(data.draw, real)
        real, ours = move(real).detach(), move(ours)
    assert isinstance(ours, LazyTensor)
    assert ours.shape == real.shape
    assert torch.equal(ours.readable.whole(), real)
    start = data.draw(st.integers(0, real.numel()))
    stop = data.draw(st.integers(start, real.numel()))
    assert torch.equal(ours.readable.read(start, stop), real.reshape(-1)[start:stop])


def test_it_remembers_what_it_was_made_of() -> None:
    """By the names of all the tensors in it."""
    joined = torch.cat([of(torch.ones(2), "a"), of(torch.ones(3), "b")])
    assert isinstance(joined, LazyTensor)
    assert joined.names == {"a", "b"}


def test_arithmetic_is_refused() -> None:
    """With the function's name."""
    with pytest.raises(ConversionError, match=r"aten\.add"):
        of(torch.ones(2)) + 1


def test_another_dtype_is_not_taken_on() -> None:
    """What is in the files is given on as it is."""
    assert of(torch.ones(2, dtype=torch.bfloat16)).to(torch.float32).readable.dtype == torch.bfloat16


def test_dtypes_are_not_mixed() -> None:
    """Joining would have to convert one of them."""
    with pytest.raises(ConversionError, match="several dtypes"):
        torch.cat([of(torch.ones(2)), of(torch.ones(2, dtype=torch.bfloat16))])


def test_without_elements() -> None:
    """Empty tensors are joined and cut like others."""
    empty = torch.cat([of(torch.ones(0, 2)), of(torch.ones(0, 2))])
    assert isinstance(empty, LazyTensor)
    assert empty.readable.whole().shape == (0, 2)
