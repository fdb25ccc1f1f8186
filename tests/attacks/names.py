"""Names of parameters that deceive people, terminals, pages and pattern matching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import MetadataIndex

from tests.attacks.attack import Gallery
from tests.attacks.byte_entries import honest
from tests.attacks.ground import Ground, saved
from tests.attacks.metadata import KEY

attack = Gallery("names", "dcp")

NAMES = {
    "escape sequences": "model.layers.0.\x1b[2J\x1b[H\x1b]0;owned\x07.weight",
    "eight-bit controls": "model.layers.0.\x9b31m.weight",
    "carriage return": "model.layers.0.weight\rtailor: all is well",
    "new lines": "model.layers.0\ntailor: all is well.weight",
    "text that is turned around": "model.layers.0.\u202ethgiew\u202c",
    "text isolates": "model.layers.0.\u2066weight\u2069",
    "zero width": "model.layers.\u200b0.wei\u200dght",
    "homoglyphs": "m\u043edel.layers.0.weight",
    "combining characters": "model.layers.0." + "e\u0301" * 5000,
    "tags": "model.layers.0.<script>alert(1)</script>.weight",
    "attributes": 'model.layers.0."onmouseover="alert(1).weight',
    "an image": "model.layers.0.<img src=x onerror=alert(1)>.weight",
    "a closing style": "model.layers.0.</style></title><script>1</script>",
    "entities": "model.layers.0.&lt;script&gt;&#x3c;",
    "markup of links": "model.layers.0.[link=http://evil.example]click[/link]",
    "markup of colours": "model.layers.0.[red]x[/red][/]",
    "unclosed markup": "model.layers.0.[/bold",
    "backslashes before markup": "model.layers.0.\\[red\\\\[/red]",
    "NUL": "model.layers.0.wei\0ght",
    "nothing": "",
    "dots alone": "." * 2000,
    "a hundred thousand dots": "a" + ".a" * 100_000,
    "a million characters": "model.layers.0." + "w" * 1_000_000,
    "a path outside": "../../../outside/secret",
    "an absolute path": "/etc/passwd",
    "a number of a thousand digits": f"model.layers.{'9' * 1000}.weight",
    "a number of five thousand digits": f"model.layers.{'9' * 5000}.weight",
    "digits of other scripts": "model.layers.\u0663.weight",
    "superscript digits": "model.layers.\u00b2.weight",
    "patterns": "model.layers.*.[!a]{1,2}.weight",
    "braces": "model.layers." + "{a,b}" * 40,
    "an attribute of objects": "model.__class__.__init__.__globals__",
    "format fields": "model.layers.0.{0.__class__}%s%n.weight",
    "a formula": "=cmd|' /C calc'!A0",
    "YAML": "model.layers.0: !!python/object/apply:os.system [true]",
    "private characters": "model.layers.0.\ue000\uffff\U0010ffff",
    "line separators": "model.layers.0\u2028\u2029\x85weight",
}


def renamed(ground: Ground, name: str, old: str = KEY.removeprefix("model.")) -> Path:
    """Return a checkpoint of a stock planner in which a parameter, or a kind of state, has another name."""

    def change(metadata: Any) -> None:
        del metadata.tailor
        for key in [key for key, path in metadata.planner_data.items() if old in path]:
            new = key.replace(old, name)
            metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(key)
            path = metadata.planner_data.pop(key)
            metadata.planner_data[new] = tuple(name if part == old else part for part in path)
            for index in [index for index in metadata.storage_data if index.fqn == key]:
                place = metadata.storage_data.pop(index)
                metadata.storage_data[MetadataIndex(new, index.offset, index.index)] = place

    return ground.checkpoint(change)


for _what, _name in NAMES.items():
    attack.add(f"{_what} in a name", f"Calls a parameter by a name of {_what}.", lambda g, n=_name: renamed(g, n))

for _what in ("escape sequences", "text that is turned around", "markup of colours", "tags", "nothing",
              "a hundred thousand dots", "a million characters", "a path outside"):  # fmt: skip
    attack.add(f"{_what} in a kind", f"Calls a kind of the optimizer's state by a name of {_what}.",
               lambda g, n=NAMES[_what]: renamed(g, n, "exp_avg"))  # fmt: skip

for _what in ("escape sequences", "new lines", "tags", "NUL", "a path outside", "text that is turned around", "braces",
              "a number of five thousand digits", "nothing", "a hundred thousand dots"):  # fmt: skip

    def _safetensors(ground: Ground, name: str = NAMES[_what]) -> Path:
        folder = ground.copy("hf")
        save_file({**honest(), name: torch.ones(2)}, folder / "model.safetensors")
        return folder

    def _torch(ground: Ground, name: str = NAMES[_what]) -> Path:
        return ground.write("model.pt", saved({"model": {**honest(), name: torch.ones(2)}}))

    attack.add(f"{_what} in safetensors", f"Calls a tensor of a Hugging Face folder by {_what}.", _safetensors, "model")
    attack.add(f"{_what} in a torch.save file", f"Calls a tensor of a torch.save file by {_what}.", _torch, "folder")


@attack.of("folder")
def surrogates_in_a_torch_save_file(ground: Ground) -> Path:
    """Calls a parameter by half of a character, which no file and no terminal can be told."""
    return ground.write("model.pt", saved({"model": {**honest(), "a.\ud800": torch.ones(2)}}))


@attack
def markup_in_the_records_units(ground: Ground) -> Path:
    """Renames layers and kinds in our own record, which tables and pages show."""

    def change(metadata: Any) -> None:
        def bad(value: Any) -> Any:
            if isinstance(value, str) and value.startswith(("model.layers", "lm_head", "exp_avg", "weight")):
                return f"<script>{value}</script>\x1b[2J[red]x[/red]\u202e" if value not in known else value
            if isinstance(value, list | tuple):
                return type(value)(map(bad, value))
            return {bad(k): bad(v) for k, v in value.items()} if isinstance(value, dict) else value

        known = set(metadata.state_dict_metadata)
        metadata.tailor["units"] = bad(metadata.tailor["units"])

    return ground.checkpoint(change)


@attack
def a_run_of_a_hostile_name(ground: Ground) -> Path:
    """Lies in a folder whose name moves the cursor and opens a tag."""
    path = ground.checkpoint()
    bad = path.parent.with_name("\x1b[2J<script>[red]\u202e\nx")
    path.parent.rename(bad)
    return bad / path.name
