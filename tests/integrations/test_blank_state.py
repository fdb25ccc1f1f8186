"""The state before a first step: as the optimizer itself would begin, and nothing of it touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.optim import Optimizer

from tailor_dcp.integrations.blank_state import blank_state

OPTIMIZERS: dict[str, Callable[[list[torch.Tensor]], Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_from_it_is_training_from_nothing(name: str) -> None:
    start, gradients = torch.randn(7), torch.randn(3, 7)

    def train(given: bool) -> torch.Tensor:
        flat = torch.nn.Parameter(start.clone())
        optimizer = OPTIMIZERS[name]([flat])
        if given:
            optimizer.state[flat] = blank_state(optimizer, [(0, flat)])[0]
        for gradient in gradients:
            flat.grad = gradient.clone()
            optimizer.step()
        return flat.detach()

    assert torch.equal(train(True), train(False))


def test_optimizer_and_scheduler_do_not_notice() -> None:
    flats = [torch.nn.Parameter(torch.randn(5)) for _ in range(3)]
    before = [flat.detach().clone() for flat in flats]
    optimizer = torch.optim.AdamW([{"params": flats[:1], "lr": 0.1}, {"params": [], "lr": 0.2}])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    optimizer.state[flats[0]] = {"step": torch.tensor(4.0)}
    groups, counted = [dict(group) for group in optimizer.param_groups], scheduler.state_dict()
    made = blank_state(optimizer, [(1, flats[1]), (1, flats[2])])
    assert [{kind: tuple(value.shape) for kind, value in state.items()} for state in made] == [
        {"step": (), "exp_avg": (5,), "exp_avg_sq": (5,)}
    ] * 2
    assert not any(value.any() for state in made for value in state.values())
    assert made[0]["exp_avg"].data_ptr() != made[1]["exp_avg"].data_ptr()
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert list(optimizer.state) == [flats[0]]
    assert scheduler.state_dict() == counted
    assert called == []
    assert all(torch.equal(flat, old) and flat.grad is None for flat, old in zip(flats, before, strict=True))
