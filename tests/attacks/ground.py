"""The ground that an attack is made on: copies of honest checkpoints, and a folder outside that must stay untouched."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import save_file

from tailor_dcp import LayerwisePlanner, LayerwiseWriter
from tests.support import zero_samples

SECRET = "the-secret-that-nobody-may-read"
LAYERS = [f"model.layers.{i}.mlp.weight" for i in range(3)]
FQNS = [*LAYERS, "lm_head.weight"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16, "head_dim": 4,
}  # fmt: skip


def state(fill: float | None = 1.0) -> dict[str, Any]:
    """Return a small training state; with values, or as zeros to load into."""
    value = float(fill or 0)  # of an integer, torch would make integers
    return {
        "model": {fqn: torch.full((4, 3), value + i) for i, fqn in enumerate(FQNS)},
        "optim": {
            "state": {
                fqn: {"exp_avg": torch.full((4, 3), value), "exp_avg_sq": torch.full((4, 3), value)} for fqn in FQNS
            },
            "param_groups": [{"lr": 0.1, "params": list(FQNS)}],
        },
        "train": {"step": 3, "note": "hello", "scheduler": {"last_epoch": 5}},
    }


class Honest:
    """Honest checkpoints, each made once and copied for each attack."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run = folder / "run"
        for step, policy in ((100, "full"), (200, "parity")):
            writer = LayerwiseWriter(str(run / f"step-{step}"))
            dcp.save(state(step), storage_writer=writer, planner=LayerwisePlanner(policy))
        for stage in (1, 2, 3):
            zero_samples.sample(folder / f"zero{stage}", stage)
        hf = folder / "hf"
        hf.mkdir()
        save_file({fqn: torch.ones(4, 3) for fqn in FQNS}, hf / "model.safetensors", {"format": "pt"})
        (hf / "config.json").write_text(json.dumps(CONFIG))


class Ground:
    """Where one attack is built.

    Attributes:
        folder: its own; the product may write here alone.
        outside: beside it; nothing may be read or changed here.
        sentinel: a file in ``outside`` that the attack's code would create.
        secret: a file there, which the attack would have read.
    """

    def __init__(self, root: Path, honest: Honest) -> None:
        self.folder, self.outside = root / "ground", root / "outside"
        self.sentinel, self.secret = self.outside / "it-ran", self.outside / "secret.distcp"
        self._honest = honest.folder
        self.folder.mkdir(parents=True)
        self.outside.mkdir()
        self.secret.write_text(SECRET * 200)

    def copy(self, name: str) -> Path:
        """Return a copy of an honest checkpoint or run."""
        return Path(shutil.copytree(self._honest / name, self.folder / name))

    def checkpoint(self, change: Callable[[Any], Any] | None = None, raw: bytes | None = None) -> Path:
        """Return a DCP checkpoint whose metadata were changed, as an object or as a whole."""
        path = self.copy("run") / "step-200"
        if raw is not None:
            (path / ".metadata").write_bytes(raw)
        if change is not None:
            metadata = pickle.loads((path / ".metadata").read_bytes())
            changed = change(metadata)
            (path / ".metadata").write_bytes(pickle.dumps(metadata if changed is None else changed))
        return path

    def entry(self, stored: bytes, key: str = "train.note") -> Path:
        """Return a DCP checkpoint in which an object's bytes are others."""

        def change(metadata: Any) -> None:
            index = next(index for index in metadata.storage_data if index.fqn == key)
            (path / "evil.distcp").write_bytes(stored)
            place = metadata.storage_data[index]
            metadata.storage_data[index] = type(place)("evil.distcp", 0, len(stored), None)

        path = self.folder / "run" / "step-200"
        return self.checkpoint(change)

    def write(self, name: str, content: str | bytes) -> Path:
        """Return a file of its own."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def recipe(self, changed: dict[str, Any] | str) -> Path:
        """Return a recipe over an honest run: a text, or what is changed in an honest one."""
        run = self.copy("run")
        honest = {"base": f"{run}@200"}
        text = changed.replace("RUN", str(run)) if isinstance(changed, str) else yaml.safe_dump({**honest, **changed})
        return self.write("recipe.yaml", text)

    @property
    def touch(self) -> str:
        """The shell's command that creates the sentinel."""
        return f"touch {self.sentinel}"


class Runs:
    """An object whose pickle runs a command."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self._call = call, args

    def __reduce__(self) -> Any:
        return self._call


def system(ground: Ground) -> Runs:
    """Return what runs a shell's command when it is unpickled."""
    return Runs(os.system, ground.touch)


def saved(value: Any) -> bytes:
    """Return what ``torch.save`` writes."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def archive(code: bytes, *, records: dict[str, bytes] | None = None, compressed: bool = False) -> bytes:
    """Return an archive as ``torch.save`` writes it, around a pickle that it would not write."""
    stream = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", kind) as made:
        made.writestr("archive/data.pkl", code)
        made.writestr("archive/byteorder", b"little")
        for name, content in (records or {}).items():
            made.writestr(name, content)
        made.writestr("archive/version", b"3\n")
    return stream.getvalue()
