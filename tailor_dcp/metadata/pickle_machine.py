"""An interpreter for the few pickle instructions that DCP writes. It never runs what a file asks for."""

from __future__ import annotations

import pickletools
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

from tailor_dcp.metadata.pickle_names import (
    ATTRIBUTES,
    MAX_MARKS,
    MAX_NAME,
    NAMES,
    NEEDED,
    TYPES,
    Asked,
    Pairs,
    checked_fields,
    damaged,
    hostile,
    kind_of,
    shown,
)
from tailor_dcp.metadata.pickle_rows import Layout


class Machine:
    """Interprets the instructions that DCP's pickles are made of, on plain data and the classes above.

    Args:
        data: The pickle.
        shortcuts: For some names, what may read on from where the file refers to the name: true if it did.
    """

    def __init__(self, data: bytes, shortcuts: Mapping[Asked, Callable[[Machine, Asked, int], bool]]) -> None:
        self.data = data
        self.shortcuts = shortcuts
        self.pos = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: list[Any] = []
        self.where: dict[object, int] = {}  # memo indexes of attributes' names and of markers
        self.framed = False
        self.stateless = 0  # instances that were made and not yet given their state
        # What the shortcuts keep.
        self.patterns: dict[Asked, re.Pattern[bytes]] = {}
        self.known: dict[bytes, tuple[list[Any], list[Any]]] = {}
        self.texts: dict[bytes, str] = {}
        self.layouts: dict[Asked, list[Layout]] = {}
        self.odd = 0  # up to here rows are interpreted: each that is tried anew would be looked through to the end

    def run(self) -> Any:
        """Interpret the whole file and return what it stands for."""
        try:
            self.until(len(self.data) - 1)
        except IndexError:
            damaged(f"what it needs at byte {self.pos} is not there")
        except UnicodeDecodeError:
            damaged(f"the text before byte {self.pos} is not UTF-8")
        if self.data[self.pos :] != b"." or len(self.stack) != 1 or self.marks:
            damaged("it does not end as it should")
        if self.stateless:
            damaged(f"{self.stateless} of its entries are empty")
        return self.stack[0]

    def until(self, end: int) -> None:
        """Interpret instructions up to a position."""
        data = self.data
        while self.pos < end:
            self.pos += 1
            STEPS[data[self.pos - 1]](self)

    def take(self, size: int) -> bytes:
        """Return the next bytes of the file."""
        end = self.pos + size
        if end > len(self.data):
            damaged(f"byte {self.pos} announces {size} bytes and {len(self.data) - self.pos} follow")
        taken = self.data[self.pos : end]
        self.pos = end
        return taken

    def number(self, width: int, signed: bool = False) -> int:
        """Return the next bytes as a little-endian number."""
        return int.from_bytes(self.take(width), "little", signed=signed)

    def pop_mark(self) -> list[Any]:
        """Return what was pushed since the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def target(self, kind: type) -> Any:
        """Return the list or dict on top of the stack, to which items are added."""
        if type(self.stack[-1]) is not kind:
            damaged(f"byte {self.pos - 1} adds items to a value of type {kind_of(self.stack[-1])}")
        return self.stack[-1]


Step = Callable[[Machine], None]


def _refuse(m: Machine) -> None:
    code = m.data[m.pos - 1]
    names = {op.code: op.name for op in pickletools.opcodes}
    hostile(f"the pickle instruction {names.get(chr(code), f'0x{code:02x}')} (at byte {m.pos - 1})")


def _protocol(m: Machine) -> None:
    if m.number(1) > 5:
        damaged(f"it has the unknown pickle protocol {m.data[m.pos - 1]}")


def _frame(m: Machine) -> None:
    length = m.number(8)
    end = m.pos + length
    if (missing := end - len(m.data)) > 0:
        damaged(f"its last {missing} bytes are missing")
    if m.framed:
        damaged(f"the frame before byte {m.pos} is within another")
    # Python's unpickler drops what is left of a frame when an instruction goes on after it, and reads something else.
    m.framed = True
    m.until(min(end, len(m.data) - 1))
    m.framed = False
    if m.pos != min(end, len(m.data) - 1):
        damaged(f"a frame ends within the instruction before byte {m.pos}")


def _push(value: object) -> Step:
    return lambda m: m.stack.append(value)


def _int(width: int, signed: bool = False) -> Step:
    return lambda m: m.stack.append(m.number(width, signed))


def _long(m: Machine) -> None:
    m.stack.append(m.number(m.number(1), signed=True))


def _float(m: Machine) -> None:
    m.stack.append(struct.unpack(">d", m.take(8))[0])


def _text(width: int) -> Step:
    return lambda m: m.stack.append(str(m.take(m.number(width)), "utf-8", "surrogatepass"))


def _bytes(width: int) -> Step:
    return lambda m: m.stack.append(m.take(m.number(width)))


def _mark(m: Machine) -> None:
    if len(m.marks) == MAX_MARKS:
        damaged(f"it nests deeper than {MAX_MARKS} levels")
    m.marks.append(m.stack)
    m.stack = []


def _drop(m: Machine) -> None:
    m.pop_mark()


def _tuple(size: int) -> Step:
    def step(m: Machine) -> None:
        m.stack.append(tuple([m.stack.pop() for _ in range(size)][::-1]))

    return step


def _marked_tuple(m: Machine) -> None:
    items = m.pop_mark()
    m.stack.append(tuple(items))


def _append(m: Machine) -> None:
    value = m.stack.pop()
    m.target(list).append(value)


def _appends(m: Machine) -> None:
    items = m.pop_mark()
    m.target(list).extend(items)


def _set_item(m: Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.target(Pairs).extend((key, value))


def _set_items(m: Machine) -> None:
    items = m.pop_mark()
    if len(items) % 2:
        damaged(f"the dict before byte {m.pos} has a key without a value")
    m.target(Pairs).extend(items)


def _memoize(m: Machine) -> None:
    value = m.stack[-1]
    if type(value) is Asked or (type(value) is str and value in ATTRIBUTES):
        m.where.setdefault(value, len(m.memo))
    m.memo.append(value)


def _put(width: int) -> Step:
    def step(m: Machine) -> None:
        # Picklers count up. Python's unpickler would make a table as long as any index it is given.
        if (index := m.number(width)) != len(m.memo):
            damaged(f"it stores memo {index} after {len(m.memo)} memos")
        _memoize(m)

    return step


def _get(width: int) -> Step:
    def step(m: Machine) -> None:
        start = m.pos - 1
        value = m.memo[m.number(width)]
        if type(value) is Asked and value in m.shortcuts and m.shortcuts[value](m, value, start):
            return
        m.stack.append(value)

    return step


def _global(m: Machine) -> None:
    lines = m.data[m.pos : m.pos + MAX_NAME].split(b"\n", 2)
    if len(lines) != 3:
        damaged(f"the name at byte {m.pos} does not end")
    m.pos += len(lines[0]) + len(lines[1]) + 2
    _ask(m, str(lines[0], "utf-8"), str(lines[1], "utf-8"))


def _stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    _ask(m, module, name)


def _ask(m: Machine, module: object, name: object) -> None:
    if type(module) is not str or type(name) is not str:
        hostile("a name that is not text")
    if (module, name) not in NAMES:
        hostile(f"{shown(module)}.{shown(name)}")
    m.stack.append(NAMES[module, name])


def _new(m: Machine) -> None:
    args, asked = m.stack.pop(), m.stack[-1]
    if type(asked) is not Asked or asked.new is None or type(args) is not tuple or args:
        hostile(f"an instance of {asked.name if type(asked) is Asked else 'what is no class'}, made unusually")
    m.stack[-1] = object.__new__(asked.new)
    m.stateless += bool(NEEDED[asked.new])


def _reduce(m: Machine) -> None:
    args, asked = m.stack.pop(), m.stack[-1]
    if type(asked) is not Asked or asked.call is None or type(args) is not tuple:
        hostile(f"a call of {asked.name if type(asked) is Asked else 'what is no function'}")
    m.stack[-1] = asked.call(args)


def _build(m: Machine) -> None:
    state, built = m.stack.pop(), m.stack[-1]
    kind = type(built)
    if kind not in TYPES:
        hostile(f"a state to be set on a value of type {kind_of(built)}")
    fields = checked_fields(kind, state)
    if vars(built).keys() & fields.keys():
        damaged(f"a {kind.__name__} is given its state twice")
    vars(built).update(fields)
    m.stateless -= bool(NEEDED[kind])


STEPS: list[Step] = [_refuse] * 256
for _code, _step in {
    b"\x80": _protocol,
    b"\x95": _frame,
    b"N": _push(None),
    b"\x88": _push(True),
    b"\x89": _push(False),
    b"K": _int(1),
    b"M": _int(2),
    b"J": _int(4, signed=True),
    b"\x8a": _long,
    b"G": _float,
    b"\x8c": _text(1),
    b"X": _text(4),
    b"\x8d": _text(8),
    b"C": _bytes(1),
    b"B": _bytes(4),
    b"\x8e": _bytes(8),
    b"(": _mark,
    b"1": _drop,
    b")": _push(()),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"t": _marked_tuple,
    b"]": lambda m: m.stack.append([]),
    b"a": _append,
    b"e": _appends,
    b"}": lambda m: m.stack.append(Pairs()),
    b"s": _set_item,
    b"u": _set_items,
    b"\x94": _memoize,
    b"q": _put(1),
    b"r": _put(4),
    b"h": _get(1),
    b"j": _get(4),
    b"c": _global,
    b"\x93": _stack_global,
    b"\x81": _new,
    b"R": _reduce,
    b"b": _build,
    b".": lambda m: damaged(f"it goes on after its end at byte {m.pos}"),
}.items():
    STEPS[_code[0]] = _step
