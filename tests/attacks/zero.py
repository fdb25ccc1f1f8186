"""ZeRO checkpoints: files of ranks that run code, lie about what they hold, or lead out of their folder."""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tailor_dcp.converters.zero_classes import STAND_INS, pickle_by_name
from tests.attacks.attack import Gallery
from tests.attacks.byte_entries import rebuilt, with_tensor
from tests.attacks.ground import Ground, saved, system
from tests.support.zero_samples import edit

attack = Gallery("zero", "folder")
MODEL = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
OPTIM = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
Change = Callable[[dict[str, Any]], Any]


def edited(ground: Ground, file: str, change: Change, stage: int = 3, ranks: tuple[int, ...] = (0, 1)) -> Path:
    """Return a checkpoint in which some ranks' files hold something else."""
    run = ground.copy(f"zero{stage}")
    for rank in ranks:
        path = run / "global_step5" / file.format(rank)
        if path.exists():
            edit(path, change)
    return run


def replaced(ground: Ground, file: str, content: bytes) -> Path:
    """Return a checkpoint in which a rank's file is another."""
    run = ground.copy("zero3")
    (run / "global_step5" / file.format(1)).write_bytes(content)
    return run


def coded(ground: Ground, file: str) -> Path:
    """Return a checkpoint in which a rank's file runs a command."""
    run = ground.copy("zero3")
    path = run / "global_step5" / file.format(1)
    with torch.serialization.safe_globals([(kind, name) for name, kind in STAND_INS.items()]):
        tree = torch.load(path, weights_only=True)
    torch.save({**tree, "evil": system(ground)}, path, pickle_module=pickle_by_name({}))
    return run


for _file in (MODEL, OPTIM):
    attack.add(f"code in {_file}", "Runs a command when a rank's file is unpickled.", lambda g, f=_file: coded(g, f))
    attack.add(f"a bare pickle for {_file}", "Replaces a rank's file by a pickle that runs a command.",
               lambda g, f=_file: replaced(g, f, saved(system(g))))  # fmt: skip
    attack.add(f"an expanded tensor for {_file}", "Replaces a rank's file by a huge tensor of a few bytes.",
               lambda g, f=_file: replaced(g, f, with_tensor(rebuilt(12, 0, (1 << 40,), (0,)))))  # fmt: skip
    attack.add(f"nothing for {_file}", "Empties a rank's file.", lambda g, f=_file: replaced(g, f, b""))


def _flat(value: Callable[[], Any]) -> Change:
    return lambda tree: tree["optimizer_state_dict"]["fp32_flat_groups"].__setitem__(0, value())


def _zero(name: str, value: Any) -> Change:
    return lambda tree: tree["optimizer_state_dict"].__setitem__(name, value)


def _shapes(value: Any) -> Change:
    return lambda tree: tree["param_shapes"].__setitem__(0, OrderedDict(value))


for _what, (_file, _change) in {
    "a flat buffer expanded to 2 to the 40": (OPTIM, _flat(lambda: torch.zeros(1).expand(1 << 40))),
    "a flat buffer expanded to a gigabyte": (OPTIM, _flat(lambda: torch.zeros(1).expand(1 << 28))),
    "a flat buffer of negative zeros in another dtype": (OPTIM, _flat(lambda: torch.zeros(9, dtype=torch.complex64))),
    "a flat buffer on no device": (OPTIM, _flat(lambda: torch.zeros(2280, device="meta"))),
    "a flat buffer of quantized numbers": (
        OPTIM, _flat(lambda: torch.quantize_per_tensor(torch.ones(2280), 0.1, 0, torch.qint8))
    ),
    "a flat buffer that is sparse": (OPTIM, _flat(lambda: torch.ones(2280).to_sparse())),
    "a flat buffer of every second element": (OPTIM, _flat(lambda: torch.ones(2 * 2280)[::2])),
    "a partition count of 2 to the 60": (OPTIM, _zero("partition_count", 1 << 60)),
    "a partition count of nothing": (OPTIM, _zero("partition_count", 0)),
    "a negative partition count": (OPTIM, _zero("partition_count", -1)),
    "a stage of 9": (OPTIM, _zero("zero_stage", 9)),
    "a stage that is text": (OPTIM, _zero("zero_stage", "\x1b[2J")),
    "a world of a billion ranks": (MODEL, lambda tree: tree.update(dp_world_size=10**9)),
    "a world of negative ranks": (MODEL, lambda tree: tree.update(dp_world_size=-2)),
    "a step of a thousand digits": (MODEL, lambda tree: tree.update(global_steps=10**1000)),
    "a step that is text": (MODEL, lambda tree: tree.update(global_steps="../../outside")),
    "shapes of 2 to the 62": (MODEL, _shapes({"a.weight": torch.Size([1 << 62])})),
    "shapes that overflow": (MODEL, _shapes({"a.weight": torch.Size([1 << 40, 1 << 40])})),
    "shapes of negative sizes": (MODEL, _shapes({"a.weight": (-7, -5)})),
    "shapes that are no numbers": (MODEL, _shapes({"a.weight": ("x", None)})),
    "shapes of many parameters": (MODEL, _shapes({f"p{i}": torch.Size([0]) for i in range(10_000)})),
    "a parameter of a hostile name": (MODEL, _shapes({"\x1b[2J<script>../../x\n": torch.Size([7, 5])})),
    "a parameter without a name": (MODEL, _shapes({None: torch.Size([7, 5])})),
    "a parameter called by a tuple": (MODEL, _shapes({("a", 1): torch.Size([7, 5])})),
    "buffers that are paths": (MODEL, lambda tree: tree.update(buffer_names=["../../../outside/secret"])),
    "shared parameters in a circle": (
        MODEL, lambda tree: tree.update(shared_params={"b.tied": "b.weight", "b.weight": "b.tied"})
    ),
    "shared parameters of themselves": (MODEL, lambda tree: tree.update(shared_params={"b.tied": "b.tied"})),
    "shared parameters of wrong types": (MODEL, lambda tree: tree.update(shared_params=[["a"], 3, None])),
    "a module that holds itself": (MODEL, lambda tree: tree["module"].update(me=tree["module"])),
    "a client state that nests without end": (MODEL, lambda tree: tree.update(mine=_deep(150))),
    "a scheduler that holds itself": (MODEL, lambda tree: tree.update(lr_scheduler=_circle())),
    "param groups without end": (
        OPTIM, lambda tree: tree["optimizer_state_dict"]["optimizer_state_dict"].update(param_groups=[{}] * 100_000)
    ),
    "param groups of wrong numbers": (
        OPTIM, lambda tree: tree["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"][0].update(
            params=[1 << 62, -1])
    ),
    "a learning rate that is a tensor of a gigabyte": (
        OPTIM, lambda tree: tree["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"][0].update(
            lr=torch.zeros(1).expand(1 << 28))
    ),
    "a step of the optimizer that is infinite": (
        OPTIM, lambda tree: [
            state.update(step=float("inf"))
            for state in tree["optimizer_state_dict"]["optimizer_state_dict"]["state"].values()]
    ),
    "a version of DeepSpeed that is a bomb": (MODEL, lambda tree: tree.update(ds_version="9" * 100_000)),
    "a configuration of DeepSpeed that is a path": (MODEL, lambda tree: tree.update(ds_config="/etc/passwd")),
}.items():  # fmt: skip
    attack.add(_what, f"Has {_what} in a rank's file.", lambda g, f=_file, c=_change: edited(g, f, c))


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def _circle() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["me"] = value
    return value


def _expanded(tree: dict[str, Any]) -> None:
    tree["optimizer_state_dict"]["single_partition_of_fp32_groups"][0] = torch.zeros(1).expand(1 << 40)


for _stage in (1, 2):
    attack.add(f"an expanded partition of stage {_stage}", "Expands a partition of a few bytes to a terabyte.",
               lambda g, s=_stage: edited(g, OPTIM, _expanded, s))  # fmt: skip


for _what, _text in {
    "outside": "../../outside",
    "to an absolute path": "/etc",
    "to a folder of a NUL": "a\0b",
    "to control characters": "global_step5\x1b[2J",
    "to a million characters": "global_step" + "5" * 4000,
    "to itself": ".",
}.items():

    def _latest(ground: Ground, text: str = _text) -> Path:
        run = ground.copy("zero3")
        (run / "latest").write_text(text)
        return run

    attack.add(f"latest that leads {_what}", f"Has a file latest that leads {_what}.", _latest)


@attack
def latest_that_is_a_pipe(ground: Ground) -> Path:
    """Lets whoever reads latest wait for ever."""
    run = ground.copy("zero3")
    (run / "latest").unlink(missing_ok=True)
    os.mkfifo(run / "latest")
    return run


@attack
def latest_that_is_a_link_outside(ground: Ground) -> Path:
    """Has an error tell the first bytes of a secret file."""
    run = ground.copy("zero3")
    (run / "latest").unlink(missing_ok=True)
    (run / "latest").symlink_to(ground.secret)
    return run


@attack
def rank_file_that_is_a_link_outside(ground: Ground) -> Path:
    """Puts a symbolic link to a file outside where a rank's should be."""
    run = ground.copy("zero3")
    path = run / "global_step5" / OPTIM.format(1)
    shutil.move(path, ground.outside / "moved.pt")
    path.symlink_to(ground.outside / "moved.pt")
    return run


@attack
def rank_file_that_is_a_pipe(ground: Ground) -> Path:
    """Puts a pipe where a rank's file should be."""
    run = ground.copy("zero3")
    path = run / "global_step5" / OPTIM.format(1)
    path.unlink()
    os.mkfifo(path)
    return run


@attack
def tag_folder_that_is_a_link_outside(ground: Ground) -> Path:
    """Makes the checkpoint's folder a link to one outside."""
    run = ground.copy("zero3")
    shutil.move(run / "global_step5", ground.outside / "global_step5")
    (run / "global_step5").symlink_to(ground.outside / "global_step5")
    return run


@attack
def rank_of_a_thousand_digits(ground: Ground) -> Path:
    """Names a file as of a rank whose number no list holds."""
    run = ground.copy("zero3")
    (run / "global_step5" / OPTIM.format("9" * 180)).write_bytes(b"x")
    return run


@attack
def ranks_up_to_a_billion(ground: Ground) -> Path:
    """Has the file of rank one billion, so that all before it would be looked for."""
    run = ground.copy("zero3")
    (run / "global_step5" / OPTIM.format(10**9)).write_bytes(b"x")
    return run


@attack
def universal_slices_that_lead_outside(ground: Ground) -> Path:
    """Is a universal checkpoint whose parameters' folders are links out of it."""
    run = ground.folder / "universal"
    zero = run / "global_step5_universal" / "zero"
    zero.mkdir(parents=True)
    (run / "latest_universal").write_text("global_step5_universal")
    (zero / "a.weight").symlink_to(ground.outside)
    (ground.outside / "fp32.pt").write_bytes(saved({"param": torch.ones(3)}))
    (zero.parent / "mp_rank_00_model_states.pt").write_bytes(saved({"module": {}, "universal_checkpoint_info": {}}))
    return run


@attack
def universal_file_that_runs_code(ground: Ground) -> Path:
    """Is a universal checkpoint whose parameter's file runs a command."""
    run = ground.folder / "universal"
    zero = run / "global_step5_universal" / "zero"
    (zero / "a.weight").mkdir(parents=True)
    (run / "latest_universal").write_text("global_step5_universal")
    (zero / "a.weight" / "fp32.pt").write_bytes(saved({"param": torch.ones(3), "x": system(ground)}))
    (zero.parent / "mp_rank_00_model_states.pt").write_bytes(saved({"module": {}, "universal_checkpoint_info": {}}))
    return run
