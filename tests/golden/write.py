"""Writes the golden checkpoints beside it, and reads them with a torch that knows nothing of this package.

Each archive holds the runs of one writer, links kept, and for each checkpoint what it must load as: values that the
writing program had in memory, in NumPy's own format. Archives are never changed, only added: a checkpoint that some
version wrote has to load for ever.

    write.py stock tests/golden/stock-2.9.1.tar.xz         # any torch from 2.1 on; needs NumPy and no more
    write.py ours tests/golden/format-2.tar.xz             # this tree's tailor_dcp, with PYTHONPATH=.
    write.py ours tests/golden/format-1.tar.xz link copy   # an older tree's, which knows fewer runs
    write.py read tests/golden/*.tar.xz                    # stock dcp.load, with any torch

An older version of this package is written with by ``git archive COMMIT | tar -x -C OLD`` and ``PYTHONPATH=OLD``, where
``OLD/tailor_dcp/converters`` links to ``../converters``. Which commits were taken is told in ``docs/format.md``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

Values = dict[str, Any]
"""What a checkpoint holds, by key."""
Histories = dict[str, list[Values]]
"""The states that a training had, step by step, by the name of its run."""
EXPECTED = "expected"
"""The folder of an archive that tells what its checkpoints hold; everything beside it is a run."""
SUMS = "SHA256SUMS"
"""What ``sha256sum --check`` reads."""


# What a checkpoint must load as -----------------------------------------------------------


def dump_values(values: Values) -> bytes:
    """Return values by key as the bytes of an ``.npz``: tensors as they are in memory, all else as JSON."""
    arrays: dict[str, Any] = {}
    index: list[dict[str, Any]] = []
    for key, value in values.items():
        told: dict[str, Any] = {"key": key}
        if isinstance(value, torch.Tensor):
            told.update(dtype=str(value.dtype), shape=list(value.shape), array=f"a{len(arrays)}")
            arrays[told["array"]] = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        else:
            told["value"] = value
        index.append(told)
    stream = io.BytesIO()
    np.savez_compressed(stream, index=np.frombuffer(as_json(index).encode(), np.uint8), **arrays)
    return stream.getvalue()


def as_json(value: object) -> str:
    """Return a value as JSON, which writes tuples as lists, and has no bytes."""
    return json.dumps(value, default=lambda data: {"bytes": data.hex()})


def load_values(path: Path) -> Values:
    """Return what ``dump_values`` was given, objects as JSON has them."""
    values = {}
    with np.load(path) as arrays:
        for told in json.loads(arrays["index"].tobytes()):
            if "array" in told:
                value = torch.empty(told["shape"], dtype=getattr(torch, told["dtype"].replace("torch.", "")))
                if value.numel():
                    value.view(-1).view(torch.uint8).copy_(torch.from_numpy(arrays[told["array"]].copy()))
                values[told["key"]] = value
            else:
                values[told["key"]] = told["value"]
    return values


def same(found: object, expected: object) -> bool:
    """Tell whether a value is what it must be, bit for bit."""
    if isinstance(expected, torch.Tensor):
        if not isinstance(found, torch.Tensor) or (found.dtype, found.shape) != (expected.dtype, expected.shape):
            return False
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, expected)]
        return torch.equal(*bits)
    return as_json(found) == as_json(expected)


def blank(values: Values) -> Values:
    """Return a flat state dict to load into, none of whose elements is what it must become."""
    return {
        key: torch.full_like(value, 77) if isinstance(value, torch.Tensor) else "not loaded"
        for key, value in values.items()
    }


def stock_load(state: Values, folder: Path) -> None:
    """Load with torch alone, in this process."""
    load = dcp.load if hasattr(dcp, "load") else dcp.load_state_dict
    how = {} if dist.is_initialized() or "no_dist" not in load.__code__.co_varnames else {"no_dist": True}
    load(state, storage_reader=dcp.FileSystemReader(str(folder)), **how)


# Stock torch ------------------------------------------------------------------------------


def stock_runs(root: Path) -> None:
    """Write with torch's own planner and writer, all of whose options leave traces on the disk."""
    _spawn(_save_sharded, 2, str(root))
    _spawn(_save_with_options, 1, str(root))


def _save_sharded(root: str) -> None:
    """Two ranks: tensors in uneven shards, a replicated one, an object."""
    try:
        from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
    except ImportError:
        from torch.distributed._tensor import DeviceMesh, Shard, distribute_tensor

    mesh = DeviceMesh("cpu", [0, 1])
    whole = {
        "model.layers.0.weight": _drawn("a", (5, 3)),
        "model.layers.1.weight": _drawn("b", (4, 2)).to(torch.bfloat16),
        "model.norm.weight": _drawn("c", (3,)),
    }
    shards = {
        key: distribute_tensor(value.float(), mesh, [Shard(0)]).to(value.dtype)  # gloo once scattered no bfloat16
        for key, value in whole.items()
        if value.dim() == 2
    }
    objects = {"train.note": "two ranks"}
    _stock_save({**whole, **shards, **objects}, Path(root) / "sharded" / "step-1")
    _expect(root, "sharded", "step-1", {**whole, **objects})


def _save_with_options(root: str) -> None:
    """One rank: a file an item, no fsync, two threads; tensors and objects of every sort."""
    state = {
        "model.layers.0.weight": _drawn("a", (3, 4)).t(),
        "model.layers.0.bias": _drawn("b", (4,)).to(torch.bfloat16),
        "model.layers.1.weight": _drawn("c", (2, 8))[:, ::2],
        "model.layers.1.empty": torch.empty(0, 3),
        "optim.state.layers.0.weight.step": torch.tensor(7.0),
        "train.rng": torch.arange(5, dtype=torch.uint8),
        "train.step": 7,
        "train.note": {"loss": 0.5, "names": ["a", "b"], "best": None, "done": False},
    }
    how = {"single_file_per_rank": False, "sync_files": False, "thread_count": 2, "per_thread_copy_ahead": 0}
    _stock_save(state, Path(root) / "options" / "step-7", flatten=False, **how)
    _expect(root, "options", "step-7", state)


def _stock_save(state: Values, folder: Path, flatten: bool = True, **options: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save = dcp.save if hasattr(dcp, "save") else dcp.save_state_dict
    planner = dcp.DefaultSavePlanner(flatten_state_dict=flatten)
    save(state, storage_writer=dcp.FileSystemWriter(str(folder), **options), planner=planner)


# Ours -------------------------------------------------------------------------------------


def link(root: Path) -> Histories:
    """Torch's own writer, layers in turn, hard links, a tie."""
    return _train(root, "link", "parity", steps=(10, 20, 30))


def layerwise(root: Path) -> Histories:
    """Our writer, with checksums; weights and moments in bfloat16."""
    return _train(root, "layerwise", "moments:every=2,weights=bf16,moments=bf16", layerwise=True, steps=(10, 20, 30))


def reference(root: Path) -> Histories:
    """Files of earlier steps pointed at."""
    return _train(root, "reference", "parity", layerwise=True, carry="reference")


def copy(root: Path) -> Histories:
    """Files of earlier steps copied."""
    return _train(root, "copy", "parity", carry="copy")


def unchanged(root: Path) -> Histories:
    """Fingerprints."""
    return _train(root, "unchanged", "unchanged+full", layerwise=True)


def drift(root: Path) -> Histories:
    """Sketches."""
    return _train(root, "drift", "drift:threshold=0.5,max_stale=3", layerwise=True)


def fsdp2(root: Path) -> Histories:
    """FSDP2 on two ranks, saved by ``TrainState``."""
    run = Path(root) / "fsdp2"
    _spawn(_train_fsdp2, 2, str(run))
    history = [torch.load(path, weights_only=True) for path in sorted(run.glob("*.pt"))]
    for path in run.glob("*.pt"):
        path.unlink()
    return {"fsdp2": history}


def converted(root: Path) -> Histories:
    """A ZeRO-3 checkpoint of two ranks, converted."""
    return _convert(root, "converted", link=False)


def linked(root: Path) -> Histories:
    """The same, but linked to its files; torch's own reader cannot read it."""
    return _convert(root, "linked", link=True)


RUNS = (link, layerwise, reference, copy, unchanged, drift, fsdp2, converted, linked)


def our_runs(root: Path, names: Sequence[str]) -> None:
    """Write with tailor_dcp, and check what stock torch loads against what the training had in memory."""
    for run in RUNS:
        if names and run.__name__ not in names:
            continue
        for name, history in run(root).items():
            for folder in sorted((Path(root) / name).glob("*/")):
                values = _loaded(folder, history, readable=run is not linked)
                _expect(root, name, folder.name, values)


def _loaded(folder: Path, history: list[Values], readable: bool = True) -> Values:
    """Return what stock torch loads, once it is sure that the training had each of these values at some step."""
    metadata = dcp.FileSystemReader(str(folder)).read_metadata()
    state = {key: "not loaded" for key in metadata.state_dict_metadata if key not in history[-1]}
    if readable:
        state.update(blank(history[-1]))
    stock_load(state, folder)
    for key in state.keys() & history[-1].keys():
        assert any(rounds_to(then[key], state[key]) for then in history), f"{folder}: {key}"
    return {**history[-1], **state}


def rounds_to(old: object, value: object) -> bool:
    if same(value, old):
        return True
    return isinstance(old, torch.Tensor) and old.is_floating_point() and same(value, old.bfloat16().to(old.dtype))


def _train(
    root: Path, name: str, policy: str, layerwise: bool = False, steps: Sequence[int] = (10, 20), **options: Any
) -> Histories:
    from tailor_dcp import LayerwisePlanner

    history = []
    for step in steps:
        nested = train_state(step)
        folder = Path(root) / name / f"step-{step}"
        writer = _layerwise_writer(folder) if layerwise else dcp.FileSystemWriter(folder)
        dcp.save(nested, storage_writer=writer, planner=LayerwisePlanner(policy, **options), no_dist=True)
        history.append(flat(nested))
    return {name: history}


def _layerwise_writer(folder: Path | str) -> dcp.StorageWriter:
    from tailor_dcp.writer import LayerwiseWriter

    return LayerwiseWriter(folder)


def train_state(step: int) -> dict[str, Any]:
    """Return a state whose every value tells its key and its step; one layer is frozen."""
    weights = {
        "embed.weight": _drawn("embed", (5, 2), step),
        "layers.0.mlp.weight": _drawn("l0", (3, 2), step),
        "layers.1.mlp.weight": _drawn("l1", (3, 2), step),
        "layers.1.scale": _drawn("frozen", (3,)).to(torch.bfloat16),
    }
    trained = [name for name in weights if name != "layers.1.scale"]
    moments = {
        name: {
            "exp_avg": _drawn(f"{name}.m", weights[name].shape, step),
            "exp_avg_sq": _drawn(f"{name}.v", weights[name].shape, step).abs(),
            "step": torch.tensor(float(step)),
        }
        for name in trained
    }
    weights["lm_head.weight"] = weights["embed.weight"]
    groups = [{"lr": 1 / step, "betas": [0.9, 0.99], "params": trained}]
    train = {"step": step, "rng": torch.full((4,), step, dtype=torch.uint8)}
    return {"model": weights, "optim": {"state": moments, "param_groups": groups}, "train": train}


def _train_fsdp2(run: str) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.fsdp import fully_shard

    from tailor_dcp import LayerwisePlanner, TrainState

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    for layer in (*model, model):
        fully_shard(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in (1, 2):
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        state = TrainState(model, optimizer)
        writer = _layerwise_writer(f"{run}/step-{step}")
        dcp.save(state, storage_writer=writer, planner=LayerwisePlanner("parity"))
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, moments = get_state_dict(model, optimizer, options=whole)
        if dist.get_rank() == 0:
            torch.save(flat({"model": weights, "optim": moments}), f"{run}/{step}.pt")
        dist.barrier()


def _convert(root: Path, name: str, link: bool) -> Histories:
    from dataclasses import replace

    from tailor_dcp.converters import Options, convert, torch_file
    from tests.support.zero_samples import TARGETS, catalog

    torch_file._SMALL = 0  # or so small a file would be copied, not linked
    made = catalog()
    names = [n for n in made.weights if n != "big"]
    small = replace(
        made,
        weights={n: made.weights[n] for n in names},
        state={n: state for n, state in made.state.items() if n in names},
        groups=tuple({**g, "params": [n for n in g["params"] if n in names]} for g in made.groups),
    )
    with tempfile.TemporaryDirectory(dir=root) as folder:
        source = Path(folder)
        TARGETS[3].write(small, source, source, Options(world_size=2))
        target = Path(root) / name / "step-5"
        convert(source, target, "dcp", options=Options(link=True) if link else Options())
    values = {f"model.{n}": given.tensor for n, given in small.weights.items()}
    for n, state in small.state.items():
        values.update({f"optim.state.{n}.{kind}": given.tensor for kind, given in state.items()})
    return {name: [values]}


def flat(nested: dict[str, Any]) -> Values:
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    return flatten_state_dict(nested)[0]


# Around them ------------------------------------------------------------------------------


def _drawn(name: str, shape: Sequence[int], step: int = 0) -> torch.Tensor:
    seed = int.from_bytes(name.encode()[:6], "big") + step
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def _expect(root: Path | str, run: str, checkpoint: str, values: Values) -> None:
    if dist.is_initialized() and dist.get_rank():
        return
    folder = Path(root) / EXPECTED
    folder.mkdir(exist_ok=True)
    (folder / f"{run}.{checkpoint}.npz").write_bytes(dump_values(values))


def _spawn(function: Callable[..., None], ranks: int, *arguments: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (function, ranks, f"{folder}/store", arguments), ranks)


def _rank(rank: int, function: Callable[..., None], ranks: int, store: str, arguments: Sequence[str]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    function(*arguments)
    dist.barrier()
    os._exit(0)  # a thread of gloo's sometimes aborts a process that ends in the ordinary way


def _pack(root: Path, archive: str) -> None:
    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(archive, "w:xz", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(root.iterdir()):
            tar.add(path, path.name, filter=plain)


def _note_sum(archive: Path) -> None:
    """Note the archive's checksum beside it: one that was written once must never become another by accident."""
    sums = archive.with_name(SUMS)
    lines = dict(reversed(line.split("  ")) for line in sums.read_text().splitlines()) if sums.exists() else {}
    lines[archive.name] = hashlib.sha256(archive.read_bytes()).hexdigest()
    sums.write_text("".join(f"{lines[name]}  {name}\n" for name in sorted(lines)))


def _read(archives: Sequence[str]) -> None:
    """Print for each checkpoint whether this torch's own loader gives what it must."""
    # Without a group, some versions' own loader fails.
    dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
    for archive in archives:
        with tempfile.TemporaryDirectory() as folder, tarfile.open(archive) as tar:
            tar.extractall(folder)
            for path in sorted(Path(folder).glob(f"{EXPECTED}/*.npz")):
                print(Path(archive).name.partition(".tar")[0], path.stem, _verdict(Path(folder), path), flush=True)


def _verdict(root: Path, path: Path) -> str:
    run, checkpoint = path.stem.split(".")
    values = load_values(path)
    state = blank(values)
    try:
        stock_load(state, root / run / checkpoint)
    except BaseException as error:  # CheckpointException is no Exception
        why = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
        return f"FAILS {type(why).__name__}: {' '.join(str(why).split())[:160]}"
    wrong = [key for key, value in values.items() if not same(state[key], value)]
    return f"DIFFERS {wrong}" if wrong else "loads"


def main(verb: str, *arguments: str) -> None:
    """Write or read."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if verb == "read":
        print("torch", torch.__version__)
        _read(arguments)
        sys.stdout.flush()
        os._exit(0)  # see _rank
    archive, *names = arguments
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        root = Path(folder)
        stock_runs(root) if verb == "stock" else our_runs(root, names)
        _pack(root, archive)
    _note_sum(Path(archive))


if __name__ == "__main__":
    main(*sys.argv[1:])
