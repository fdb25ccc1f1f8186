"""Staging: what is on its way to a device is never overwritten, however late the device takes it over."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp import LayerwiseReader, reading, staging
from tailor_dcp.staging import Staging, batches

Copies = Sequence[tuple[torch.Tensor, torch.Tensor]]
CPU = torch.device("cpu")


class LateDevice:
    """Copies nothing before somebody waits for it; as a GPU may, if it is busy."""

    def __init__(self) -> None:
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.most = 0

    def send(self, copies: Copies) -> Sequence[staging.Sent]:
        self.copies += copies
        self.most = max(self.most, len(self.copies))
        return [self]

    def synchronize(self) -> None:
        for target, value in self.copies:
            target.copy_(value)
        self.copies.clear()


@given(st.lists(st.integers(0, 300), max_size=30), st.integers(1, 200))
def test_a_late_device_gets_every_value(sizes: list[int], room: int) -> None:
    device, values = LateDevice(), [torch.tensor(list(random.Random(i).randbytes(n))) for i, n in enumerate(sizes)]
    targets = [torch.zeros_like(value) for value in values]
    with Staging(room, device.send) as stage:
        for batch in batches(list(zip(values, targets, strict=True)), room, lambda pair: pair[0].numel()):
            held = stage.room([value.numel() for value, _ in batch], [CPU])
            for memory, (value, _) in zip(held, batch, strict=True):
                memory.copy_(value)
            stage.send([(target, memory) for memory, (_, target) in zip(held, batch, strict=True)])
    assert all(torch.equal(value, target) for value, target in zip(values, targets, strict=True))


def test_one_is_filled_while_the_other_is_sent() -> None:
    """The device still has a whole stretch to copy when the next is asked for, and is waited for before the third."""
    device, target = LateDevice(), torch.zeros(4, dtype=torch.uint8)
    with Staging(4, device.send) as stage:
        for waiting in (0, 1, 0):
            [memory] = stage.room([4], [CPU])
            assert len(device.copies) == waiting
            stage.send([(target, memory)])


def test_an_error_leaves_no_copy_under_way() -> None:
    """The device must not read memory that is given back."""
    device, target = LateDevice(), torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(OSError), Staging(4, device.send) as stage:
        stage.send([(target, stage.room([4], [CPU])[0])])
        raise OSError
    assert not device.copies


@given(st.lists(st.integers(0, 500), max_size=20), st.integers(1, 600))
def test_batches_keep_the_order_and_the_size(sizes: list[int], size: int) -> None:
    found = list(batches(sizes, size, lambda one: one))
    assert [one for batch in found for one in batch] == sizes
    assert all(len(batch) == 1 or sum(-(-n // 64) * 64 for n in batch) <= size for batch in found)


def test_a_load_through_a_late_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor goes through memory of ours, in parts that are smaller than most of them."""
    device = LateDevice()
    state = {f"t{i}": torch.randn(n, 100) for i, n in enumerate((1, 3, 40, 100, 2, 2))}
    state |= {"half": torch.randn(30, 7).to(torch.bfloat16), "scalar": torch.tensor(3.0), "bits": torch.ones(5) > 0}
    dcp.save(dict(state), checkpoint_id=tmp_path)
    monkeypatch.setattr(reading, "_STAGED", 4096)
    monkeypatch.setattr(reading, "_runs_straight", lambda box, target, dtype: None)
    monkeypatch.setattr(reading, "Staging", lambda size: Staging(size, device.send))
    target = {key: torch.zeros_like(value) for key, value in state.items()}
    dcp.load(target, storage_reader=LayerwiseReader(tmp_path, threads=2))
    assert all(torch.equal(target[key], value) for key, value in state.items())
    assert device.most > 1 and not device.copies


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_load_into_gpu_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"t{i}": torch.randn(n, 1000) for i, n in enumerate((1, 300, 4000))}
    dcp.save(dict(state), checkpoint_id=tmp_path)
    monkeypatch.setattr(reading, "_STAGED", 1 << 20)
    for atomic in (False, True):
        target = {key: torch.zeros_like(value, device="cuda") for key, value in state.items()}
        dcp.load(target, storage_reader=LayerwiseReader(tmp_path, atomic=atomic))
        assert all(torch.equal(target[key].cpu(), value) for key, value in state.items())
