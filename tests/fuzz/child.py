"""One process that fuzzes one target: libFuzzer, guided by the branches of the parser's modules."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from random import Random
from types import FunctionType, ModuleType
from typing import Any

import atheris

from tests.fuzz.registry import TARGETS

_PEAK_MIB = 3000
_HANG = 30  # seconds; what takes more than one is a finding by its processor time, and the run goes on
_DEPTH = 2  # changes from one input to the next; our mutators make several at once
_OWN_SHARE = 0.7  # of mutations; the rest are libFuzzer's


def preload(names: Iterable[str]) -> None:
    """Import targets, and what they instrument, once for all processes that are made from this one."""
    importlib.import_module("torch.distributed.checkpoint")
    packages = [package for name in names for package in TARGETS[name]]
    sys.meta_path.insert(0, _Instrumenting(packages))
    for module in [module for name, module in sys.modules.items() if _below(name, packages)]:
        _instrument(module)
    warnings.simplefilter("ignore")
    for name in names:
        importlib.import_module(f"tests.fuzz.targets.{name}")


def fuzz(name: str, folder: Path, runs: int, seconds: int, seed: int) -> None:
    """Fuzz; never returns.

    Args:
        name: the target.
        folder: has the corpus, which grows; findings are put beside it.
        runs: executions, 0 for any number.
        seconds: how long, 0 for ever.
        seed: of what libFuzzer and the mutator draw.
    """
    from tests.fuzz.target import FindingError, judge, target_named

    target = target_named(name)
    findings = folder / "findings"
    for number, seed_ in enumerate(target.seeds()):
        (folder / "corpus" / f"seed-{number:03}").write_bytes(seed_[: target.longest])

    def one(data: bytes) -> None:
        try:
            judge(target, data)
        except FindingError as finding:
            _keep(findings, data, finding.key, str(finding))

    options = [
        f"-runs={runs or -1}", f"-max_total_time={seconds}", f"-max_len={target.longest}", f"-seed={seed}",
        f"-timeout={_HANG}", f"-rss_limit_mb={_PEAK_MIB}", f"-artifact_prefix={findings}/crash-",
        "-print_final_stats=1", "-reload=0", "-len_control=20", f"-mutate_depth={_DEPTH}",
        f"-dict={_dictionary(folder, target.words)}",
    ]  # fmt: skip
    given: dict[str, Any] = {"custom_mutator": _mutator(target.mutate)} if target.mutate else {}
    atheris.Setup([name, *options, str(folder / "corpus")], one, **given)
    atheris.Fuzz()


def _mutator(mutate: Any) -> Any:
    def change(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < _OWN_SHARE:
            made: bytes = mutate(data, random)
            if 0 < len(made) <= most:
                return made
        changed: bytes = atheris.Mutate(data, most)
        return changed

    return change


def _keep(folder: Path, data: bytes, key: str, told: str) -> None:
    """Keep the shortest input of each kind of finding."""
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in key)
    kept = folder / f"{name}.bin"
    if not kept.exists() or kept.stat().st_size > len(data):
        kept.write_bytes(data)
        kept.with_suffix(".txt").write_text(told, errors="backslashreplace")


def _dictionary(folder: Path, words: Sequence[bytes]) -> Path:
    path = folder / "words.dict"
    lines = ['"' + "".join(f"\\x{byte:02x}" for byte in word) + '"' for word in words if word]
    path.write_text("\n".join(lines) + "\n")
    return path


def _below(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        code = super().get_code(fullname)
        return code and atheris.patch_code(code, True)


class _Instrumenting(MetaPathFinder):
    """Finds modules as they would be found, and instruments those below some packages."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if not _below(fullname, self.packages):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if type(spec.loader) is SourceFileLoader:
                    spec.loader = _Loader(spec.loader.name, spec.loader.path)
                return spec
        return None


def _instrument(module: ModuleType) -> None:
    """Instrument what is imported already."""
    for value in list(vars(module).values()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if isinstance(value, FunctionType):
            atheris.instrument_func(value)
        elif inspect.isclass(value):
            for method in vars(value).values():
                if isinstance(method, FunctionType):
                    atheris.instrument_func(method)


def run_forked(name: str, folder: Path, runs: int, seconds: int, seed: int, log: Path) -> tuple[int, int, float]:
    """Fuzz in a process that begins with what this one has imported.

    Returns:
        Its id, its exit code, negative for a signal, and the processor time that it took.
    """
    pid = os.fork()
    if pid == 0:
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            fuzz(name, folder, runs, seconds, seed)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(70)
    _, status, used = os.wait4(pid, 0)
    return pid, os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
