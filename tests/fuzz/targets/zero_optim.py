"""The files of a ZeRO checkpoint: a rank's optimizer states, or its model, beside an honest other one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from tailor_dcp.converters.options import Options
from tailor_dcp.converters.zero_source import open_source
from tailor_dcp.tensors import Given
from tests.fuzz.mutators.archives import archives
from tests.fuzz.mutators.pickles import pickles
from tests.fuzz.mutators.pickles import text as pickle_text
from tests.fuzz.scratch import put
from tests.fuzz.target import Target
from tests.fuzz.targets.blob_head import STORAGES
from tests.support.zero_samples import TARGETS as WRITERS
from tests.support.zero_samples import catalog

_MODELS = {2: "mp_rank_00_model_states.pt", 3: "zero_pp_rank_0_mp_rank_00_model_states.pt"}
_OPTIM = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
_MOST = 1 << 16  # elements of a tensor that is read


def parse(data: bytes) -> None:
    """Put the file in its place beside an honest one, and open the checkpoint."""
    stage = 2 if b"single_partition_of_fp32_groups" in data else 3
    name = _MODELS[3] if b"param_shapes" in data else _OPTIM
    honest = dict(_honest(stage))
    place = put(b"", f"zero{stage}/checkpoint/{name}").parent
    for other, content in honest.items():
        path = place / other
        if other == name:
            put(data, f"zero{stage}/checkpoint/{name}")
        elif not path.exists() or path.stat().st_size != len(content):
            put(content, f"zero{stage}/checkpoint/{other}")
    found = open_source(place, Options())
    tensors = [*found.weights.values(), *(t for states in found.state.values() for t in states.values())]
    for tensor in tensors:
        if tensor.count <= _MOST:
            assert tuple(tensor.whole().shape) == tuple(tensor.size), "a tensor is of another shape than it says"


@cache
def _honest(stage: int) -> tuple[tuple[str, bytes], ...]:
    """Return the files of a small checkpoint of one rank."""
    shapes = {"a.weight": (3, 2), "a.bias": (3,), "one": (1,)}
    small = catalog(
        weights={name: Given(torch.ones(shape)) for name, shape in shapes.items()},
        state={
            name: {kind: Given(torch.ones(shape)) for kind in ("exp_avg",
            "exp_avg_sq")} | {"step": Given(torch.tensor(5.0))} for name, shape in shapes.items()
        },
        groups=({"lr": 0.1, "params": ["a.weight", "a.bias"]}, {"lr": 0.2, "params": ["one"]}),
        buffers=frozenset(),
        frozen=frozenset(),
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp())
    try:
        WRITERS[stage].write(small, folder, folder, Options(world_size=1))
        return tuple((path.name, path.read_bytes()) for path in sorted(folder.rglob("*.pt")))
    finally:
        shutil.rmtree(folder)


def seeds() -> Iterator[bytes]:
    """Each file of a checkpoint of stage 3, and the optimizer's of stage 2."""
    for _, content in _honest(3):
        yield content
    yield dict(_honest(2))[_OPTIM]


_WORDS = tuple(
    map(
        pickle_text,
        (
            "optimizer_state_dict", "zero_stage", "partition_count", "fp32_flat_groups", "param_shapes", "module",
            "frozen_param_shapes", "frozen_param_fragments", "shared_params", "buffer_names", "state", "exp_avg",
            "step", "param_groups", "ds_config", "ds_version", "base_optimizer_state",
            "single_partition_of_fp32_groups", "group_paddings", "loss_scaler", "world_size", "dp_world_size",
            "mp_world_size", "global_steps", "lr_scheduler",
        ),
    )
)  # fmt: skip
TARGET = Target(parse, seeds, archives(pickles((*STORAGES, *_WORDS))), (*STORAGES, *_WORDS), longest=16384)
