"""Recipes, flag logs and metrics: text that anybody may have written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.attacks.attack import Gallery
from tests.attacks.ground import Ground

attack = Gallery("texts", "recipe")

_BILLION = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)
)
for _what, _text in {
    "an object of Python": "base: !!python/object/apply:os.system ['TOUCH']\n",
    "a new object of Python": "base: !!python/object/new:os.system ['TOUCH']\n",
    "a module of Python": "base: !!python/module:antigravity\n",
    "a name of Python": "base: !!python/name:os.system\n",
    "an object as a key": "!!python/object/apply:os.system ['TOUCH']: 1\nbase: RUN@200\n",
    "an object in a list": "base: RUN@200\ndrop: [!!python/object/apply:os.system ['TOUCH']]\n",
    "a tag of its own": "base: !evil x\n",
    "a tag directive": "%TAG ! tag:yaml.org,2002:python/object/apply:\n---\nbase: !os.system ['TOUCH']\n",
    "a billion laughs": _BILLION + "base: RUN@200\n",
    "an alias of itself": "base: &a [*a]\n",
    "a mapping that holds itself": "&a base: RUN@200\nlayers: &b {x: *b}\n",
    "a merge of itself": "base: RUN@200\nlayers: &a\n  <<: *a\n",
    "merges that multiply": "base: RUN@200\n" + "".join(
        f"k{i}: &k{i}\n  x{i}: 1\n" + (f"  <<: [{','.join([f'*k{i - 1}'] * 9)}]\n" if i else "") for i in range(12)
    ),
    "a key twice": "base: RUN@100\nbase: RUN@200\n",
    "deep lists": "base: " + "[" * 100_000,
    "deep mappings": "base: " + "{a: " * 20_000,
    "deep indents": "".join(" " * i + "a:\n" for i in range(2000)),
    "two documents": "base: RUN@200\n---\nbase: RUN@100\n",
    "no document": "",
    "a comment alone": "# nothing\n",
    "a NUL": "base: 'a\0b'\n",
    "control characters": "base: \"\\x1b[2J\\x07\"\n",
    "a byte order mark": "\ufeffbase: RUN@200\n",
    "a number of a million digits": "base: RUN@200\nmax_stale_steps: " + "9" * 1_000_000 + "\n",
    "a number in base 60 without end": "base: RUN@200\nmax_stale_steps: " + "1:" * 100_000 + "1\n",
    "a date that is none": "base: 2001-99-99\n",
    "infinity": "base: RUN@200\nmax_stale_steps: .inf\n",
    "a key that is a list": "? [a, b]\n: 1\nbase: RUN@200\n",
    "a key that is a mapping": "? {a: b}\n: 1\nbase: RUN@200\n",
    "many keys": "base: RUN@200\nrename:\n" + "".join(f"  a{i}: b{i}\n" for i in range(30_000)),
    "binary": "base: !!binary aGVsbG8=\n",
    "a set": "base: RUN@200\ndrop: !!set {a, b}\n",
    "lone surrogates": 'base: "\\ud800"\n',
}.items():  # fmt: skip
    attack.add(f"YAML: {_what}", f"Is a recipe with {_what}.",
               lambda g, t=_text: g.recipe(t.replace("TOUCH", g.touch)))  # fmt: skip

_REDOS = "a" * 40
for _what, _changed in {
    "a base outside": {"base": "../../outside"},
    "a base that is a device": {"base": "/dev/zero"},
    "a base of a chain of stores": {"base": "simplecache::http://evil.example/run"},
    "a base of a registered store": {"base": "memory://run@200"},
    "a base of a NUL": {"base": "a\0b"},
    "a base of a million characters": {"base": "a" * 1_000_000},
    "a base of control characters": {"base": "\x1b[2J\x07@200"},
    "a base of a step of many digits": {"base": "run@" + "9" * 5000},
    "stars that backtrack": {"layers": {"*a" * 30 + "b": "RUN@100"}},
    "classes that backtrack": {"layers": {"[!a]*" * 40 + "x": "RUN@100"}},
    "braces that multiply": {"layers": {"{a,b}" * 40: "RUN@100"}},
    "braces that nest": {"layers": {"{" * 5000 + "}" * 5000: "RUN@100"}},
    "braces that are not closed": {"layers": {"{a,b" * 20_000: "RUN@100"}},
    "a range of brackets that is none": {"layers": {"model.layers.[9-0]": "RUN@100"}},
    "a class that is not closed": {"layers": {"model.layers.[" * 1000: "RUN@100"}},
    "a class of expressions": {"layers": {"[[:alpha:]&&--~~||]": "RUN@100"}},
    "a pattern of a million stars": {"layers": {"*" * 1_000_000: "RUN@100"}},
    "ten thousand patterns": {"layers": {f"*{i}*{i}*": "RUN@100" for i in range(10_000)}},
    "a drop of everything": {"drop": ["*"]},
    "a drop that backtracks": {"drop": ["*a" * 40 + "!"]},
    "a rename to a path": {"rename": {"model.layers.0": "../../../outside/it-ran"}},
    "a rename to control characters": {"rename": {"model.layers.0": "\x1b[2J<script>\n"}},
    "a rename to many digits": {"rename": {"model.layers.0": "model.layers." + "9" * 5000}},
    "a rename in a circle": {"rename": {"model.layers.0": "model.layers.1", "model.layers.1": "model.layers.0"}},
    "a rename to many names": {"rename": {"model.layers.0": [f"model.layers.{i}" for i in range(10_000)]}},
    "a rename to attributes": {"rename": {"model.layers.0": "__class__.__init__"}},
    "a train outside": {"train": "../../outside"},
    "keys that are unknown": {"exec": "touch it-ran", "__class__": 1},
    "kinds that are unknown": {"layers": {"*": {"from": "RUN@100", "kinds": ["../x", "\x1b"]}}},
}.items():  # fmt: skip
    attack.add(f"recipe: {_what}", f"Is a recipe with {_what}.",
               lambda g, c=_changed: g.recipe(_filled(c, str(g.folder / "run"))))  # fmt: skip


def _filled(value: Any, run: str) -> Any:
    if isinstance(value, str):
        return value.replace("RUN", run)
    if isinstance(value, list):
        return [_filled(one, run) for one in value]
    return {key: _filled(one, run) for key, one in value.items()} if isinstance(value, dict) else value


# mergekit's plans and LLMTailor's ---------------------------------------------------------------------


def _plan(**changed: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": "HF", "parameters": {"weight": 1.0}}, {"model": "HF", "parameters": {"weight": 0.5}}],
        **changed,
    }


for _what, _changed in {
    "a method that is a path": _plan(merge_method="../../evil"),
    "a method that is code": _plan(merge_method="__import__('os').system('true')"),
    "a model outside": _plan(models=[{"model": "../../outside"}] * 2),
    "a model of an adapter outside": _plan(models=[{"model": "HF+/etc/passwd"}] * 2),
    "ten thousand models": _plan(models=[{"model": "HF", "parameters": {"weight": 1}}] * 10_000),
    "a weight that is no number": _plan(models=[{"model": "HF", "parameters": {"weight": float("nan")}}] * 2),
    "a weight that is infinite": _plan(models=[{"model": "HF", "parameters": {"weight": float("inf")}}] * 2),
    "a weight of many digits": _plan(models=[{"model": "HF", "parameters": {"weight": 10**400}}] * 2),
    "a gradient of a million values": _plan(models=[{"model": "HF", "parameters": {"weight": [0.5] * 150_000}}] * 2),
    "a filter that backtracks": _plan(
        models=[{"model": "HF", "parameters": {"weight": [{"filter": "(a+)+$" + _REDOS, "value": 1}]}}] * 2
    ),
    "a dtype that is a function": _plan(dtype="load"),
    "slices of 2 to the 62 layers": {
        "merge_method": "passthrough", "slices": [{"sources": [{"model": "HF", "layer_range": [0, 1 << 62]}]}]
    },
    "slices of a million layers": {
        "merge_method": "passthrough", "slices": [{"sources": [{"model": "HF", "layer_range": [0, 1]}]}] * 20_000
    },
    "slices that go backwards": {
        "merge_method": "passthrough", "slices": [{"sources": [{"model": "HF", "layer_range": [5, -5]}]}]
    },
    "a tokenizer outside": _plan(tokenizer={"source": "../../outside"}, tokenizer_source="/etc/passwd"),
    "an architecture that is fetched": _plan(base_model="https://evil.example/x", chat_template="/etc/passwd"),
    "parameters that nest": _plan(parameters={"weight": {"a": [{"filter": ["*"], "value": [[[1]]]}]}}),
    "out by a key": _plan(out="../../outside/it-ran", out_path="/tmp/it-ran"),
}.items():  # fmt: skip

    def _written(ground: Ground, plan: Any = _changed) -> Path:
        text = json.dumps(plan).replace('"HF', f'"{ground.copy("hf")}')
        return ground.write("plan.yaml", text)

    attack.add(f"plan: {_what}", f"Is a plan of mergekit's with {_what}.", _written)


@attack
def recipe_of_five_megabytes(ground: Ground) -> Path:
    """Is larger than any recipe."""
    return ground.write("recipe.yaml", "# " + "x" * (5 << 20) + "\nbase: a\n")


@attack
def recipe_that_is_a_pipe(ground: Ground) -> Path:
    """Lets a reader wait for ever."""
    os.mkfifo(ground.folder / "recipe.yaml")
    return ground.folder / "recipe.yaml"


@attack
def recipe_that_is_a_device(ground: Ground) -> Path:
    """Is a symbolic link to a device that never ends."""
    (ground.folder / "recipe.yaml").symlink_to("/dev/zero")
    return ground.folder / "recipe.yaml"


@attack
def recipe_that_is_not_text(ground: Ground) -> Path:
    """Is no UTF-8."""
    return ground.write("recipe.yaml", b"\xff\xfe\x00base")


# Flag logs and metrics ------------------------------------------------------------------------------------


def _log(ground: Ground, text: str | bytes, name: str) -> Path:
    ground.copy("run")
    return ground.write(name, text)


_LINES = {
    "nothing": b"",
    "no JSON": b"hello\n",
    "deep nesting": b"[" * 1_000_000,
    "a step of many digits": b'{"step": ' + b"9" * 100_000 + b', "flag": [0]}\n',
    "a step that is negative": b'{"step": -5, "flag": [0]}\n',
    "a step that is no number": b'{"step": NaN, "flag": [0]}\n',
    "a step that is a truth value": b'{"step": true, "flag": [0]}\n',
    "a flag of many digits": b'{"step": 100, "flag": [' + b"9" * 100_000 + b"]}\n",
    "a flag of 2 to the 40": b'{"step": 100, "flag": [1099511627776]}\n',
    "a million flags": b'{"step": 100, "flag": [' + b"1," * 999_999 + b"1]}\n",
    "a hundred thousand lines": b'{"step": 100, "flag": [0]}\n' * 100_000,
    "steps that go back and forth": b'{"step": 200, "flag": [0]}\n{"step": 100, "flag": [1]}\n' * 30_000,
    "one line of sixty megabytes": b" " * (60 << 20),
    "control characters": b'{"step": "\x1b[2J", "flag": "\\u001b"}\n',
    "a key twice": b'{"step": 100, "step": 200, "flag": [0], "flag": ["../../outside"]}\n',
    "text that is not UTF-8": b"\xff\xfe\n",
    "a NUL": b"\x00\n",
    "infinity": b'{"step": 100, "flag": [0], "eval_loss": Infinity}\n{"step": 200, "eval_loss": NaN, "flag": []}\n',
    "values of many digits": b'{"step": 100, "flag": [0], "eval_loss": 1e999999}\n',
    "values that are lists": b'{"step": 100, "flag": [[0]], "eval_loss": [[1]]}\n',
    "steps of checkpoints that are not there": b'{"step": 150, "flag": [0, 1, 2], "eval_loss": 1}\n',
}
for _what, _content in _LINES.items():
    attack.add(
        f"flag log: {_what}", f"Is a flag log with {_what}.", lambda g, c=_content: _log(g, c, "flags.jsonl"), "flags"
    )
    attack.add(f"metrics: {_what}", f"Is a file of metrics with {_what}.",
               lambda g, c=_content: _log(g, c, "metrics.jsonl"), "metrics")  # fmt: skip

for _kind in ("flags", "metrics"):

    def _pipe(ground: Ground) -> Path:
        ground.copy("run")
        os.mkfifo(ground.folder / "log.jsonl")
        return ground.folder / "log.jsonl"

    def _device(ground: Ground) -> Path:
        ground.copy("run")
        (ground.folder / "log.jsonl").symlink_to("/dev/zero")
        return ground.folder / "log.jsonl"

    attack.add(f"{_kind} that are a pipe", "Lets a reader wait for ever.", _pipe, _kind)
    attack.add(f"{_kind} that are a device", "Is a symbolic link to a device that never ends.", _device, _kind)
