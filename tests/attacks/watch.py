"""Watching: what a process does outside of the ground that an attack was made on."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from tests.attacks.ground import SECRET, Ground

_RUNS = frozenset(
    {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen", "pty.spawn"}
)
_TALKS = frozenset(
    {
        "socket.connect",
        "socket.getaddrinfo",
        "socket.gethostbyname",
        "socket.sendto",
        "socket.sendmsg",
        "urllib.Request",
    }
)
_CHANGES: dict[str, dict[int, int]] = {
    "os.chmod": {0: 2}, "os.chown": {0: 3}, "os.link": {0: 2, 1: 3}, "os.mkdir": {0: 2}, "os.remove": {0: 1},
    "os.rename": {0: 2, 1: 3}, "os.rmdir": {0: 1}, "os.symlink": {1: 2}, "os.truncate": {0: 9}, "os.utime": {0: 3},
    "shutil.rmtree": {0: 1},
}  # fmt: skip
"""Which arguments are paths that change, and which tell the folder that each is in."""
_FORBIDDEN = ("/etc/passwd", "/etc/shadow", "/etc/hosts", "/dev/zero", "/dev/random", "/dev/mem")
_EVIL = frozenset({"os", "posix", "nt", "subprocess", "sys", "importlib", "runpy", "pty", "socket", "shutil", "ctypes"})
_EVIL_BUILTINS = frozenset({"eval", "exec", "getattr", "setattr", "__import__", "compile", "open", "globals", "input"})
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Watch:
    """Notes what must not happen, from when it is made on; a process has one for good."""

    def __init__(self, ground: Ground) -> None:
        self.seen: list[str] = []
        self._inside = os.path.realpath(ground.folder)
        self._outside = os.path.realpath(ground.outside)
        self._ground = ground
        self._listening = True
        os.utime(ground.secret, (1_000_000_000, 1_100_000_000))  # a read would bring the first one up to date
        self._before = self._state()
        self._modules = set(sys.modules)
        sys.addaudithook(self._hook)

    def taken(self) -> list[str]:
        """Return what was seen since this was last asked."""
        self._listening = False
        seen, self.seen = self.seen, []
        if self._state() != self._before:
            seen.append(f"{self._outside} was touched")
            self._before = self._state()
        fresh, self._modules = set(sys.modules) - self._modules, set(sys.modules)
        roots = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]))
        files = {name: getattr(sys.modules.get(name), "__file__", None) for name in fresh}
        seen += [f"{name} was imported" for name, file in files.items() if file and not file.startswith(roots)]
        self._listening = True
        return list(dict.fromkeys(seen))

    def _state(self) -> list[Any]:
        if not self._ground.secret.exists():
            return []
        status = self._ground.secret.stat()
        return [
            sorted(map(str, self._ground.outside.iterdir())),
            status.st_atime_ns,
            status.st_mtime_ns,
            status.st_nlink,
        ]

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._listening:
            return
        if event in _RUNS or event in _TALKS:
            self.seen.append(f"{event}{arguments[:2]!r}"[:200])
        elif event == "pickle.find_class" and _runs(*arguments[:2]):
            self.seen.append(f"unpickled {'.'.join(arguments)}")
        elif event == "open":
            flags = arguments[2] or 0
            self._check(event, arguments[0], bool(flags & _WRITING), follows=not flags & (os.O_EXCL | os.O_NOFOLLOW))
        elif event in ("os.listdir", "os.scandir"):
            self._check(event, arguments[0], False)
        elif event in _CHANGES:
            for path, folder in _CHANGES[event].items():
                self._check(event, _placed(arguments, path, folder), True)

    def _check(self, event: str, path: Any, changes: bool, follows: bool = True) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        try:
            given = Path(os.fsdecode(path))
            # What is renamed, removed or made anew is a link itself, not what it leads to.
            followed = follows and event in ("open", "os.listdir", "os.scandir", "os.truncate")
            real = os.path.realpath(given) if followed else f"{os.path.realpath(given.parent)}/{given.name}"
        except (ValueError, OSError):  # a NUL in it
            return
        if real.startswith((self._outside, *_FORBIDDEN)):
            self.seen.append(f"{event} of {real}")
        elif changes and real != "/dev/null" and not real.startswith(self._inside):
            self.seen.append(f"{event} changes {real}")


def _runs(module: str, name: str) -> bool:
    """Tell whether an unpickler that was asked for this would have run something."""
    return module.partition(".")[0] in _EVIL or ("builtin" in module and name in _EVIL_BUILTINS)


def _placed(arguments: tuple[Any, ...], path: int, folder: int) -> Any:
    """Return a path that may be relative to an open folder."""
    at = arguments[folder] if folder < len(arguments) else -1
    if isinstance(at, int) and at >= 0 and isinstance(arguments[path], str | bytes):
        return Path(f"/proc/self/fd/{at}").readlink() / os.fsdecode(arguments[path])
    return arguments[path]


def leaked(folder: Path) -> list[str]:
    """Return the files in which the secret has come to lie."""
    found = []
    for path in folder.rglob("*"):
        small = path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 24
        if small and SECRET.encode() in path.read_bytes():
            found.append(f"the secret has come into {path.name}")
    return found
