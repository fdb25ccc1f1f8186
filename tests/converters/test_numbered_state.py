"""Naming an optimizer's numbered states by order and shapes, against trying all ways."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.converters import ConversionError
from tailor_dcp.converters.numbered_state import named

SIZES = st.lists(st.integers(1, 3), min_size=1, max_size=7)


@given(sizes=SIZES, data=st.data())
def test_states_are_named_where_there_is_one_way(sizes: list[int], data: st.DataObject) -> None:
    """And refused where there are several ways or none; some parameters may be frozen, some never stepped."""
    model = {f"p{i}": torch.zeros(size) for i, size in enumerate(sizes)}
    given_sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=len(sizes)))
    stepped = data.draw(st.lists(st.booleans(), min_size=len(given_sizes), max_size=len(given_sizes)))
    state = {i: {"step": 1, "exp_avg": torch.zeros(n)} for i, n in enumerate(given_sizes) if stepped[i]}
    optimizer = {"state": state, "param_groups": [{"lr": 1.0, "params": list(range(len(given_sizes)))}]}
    ways = [
        chosen
        for chosen in combinations(range(len(sizes)), len(given_sizes))
        if all(not stepped[i] or sizes[at] == given_sizes[i] for i, at in enumerate(chosen))
    ]
    tree: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if len(ways) != 1:
        with pytest.raises(ConversionError, match="more than one way" if ways else "do not fit"):
            named(tree, Path("a.pt"))
        return
    made = named(tree, Path("a.pt"))["optimizer"]
    assert made["param_groups"] == [{"lr": 1.0, "params": [f"p{at}" for at in ways[0]]}]
    assert list(made["state"]) == [f"p{ways[0][i]}" for i in state]


def test_names_that_the_optimizer_tells_are_believed() -> None:
    """torch's optimizers keep param_names if they were given named parameters."""
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=0.1)
    net(torch.ones(2)).sum().backward()
    optimizer.step()
    swapped = dict(reversed(net.state_dict().items()))
    made = named({"model": swapped, "optim": optimizer.state_dict()}, Path("a.pt"))["optim"]
    assert list(made["state"]) == ["weight", "bias"]
    assert "param_names" not in made["param_groups"][0]
