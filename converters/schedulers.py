"""Learning-rate schedulers' states, made whole again after a DCP checkpoint."""

from __future__ import annotations

from typing import Any


def whole_scheduler(state: Any) -> Any:
    """Return a scheduler's state with what DCP does not keep: empty dicts.

    ``LambdaLR`` has one for every function without a state of its own, as all of transformers' schedules are, and
    its ``load_state_dict`` fails without them; other schedulers do not mind them.

    Args:
        state: what ``scheduler.state_dict()`` was; anything else is returned as it is.
    """
    if not isinstance(state, dict) or "lr_lambdas" in state or not isinstance(state.get("base_lrs"), list):
        return state
    return {**state, "lr_lambdas": [{} for _ in state["base_lrs"]]}
