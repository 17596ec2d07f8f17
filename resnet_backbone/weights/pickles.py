"""Pickles of weights, read by a small machine that builds plain containers and descriptions of arrays, nothing else.

Python's own unpickler calls what a file names. This one knows a table of names and refuses all others; it makes no
copy of what the file holds, so that its memory is bounded by the file's size and `MOST_OPERATIONS`.
"""

import math
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np

MOST_OPERATIONS = 1_000_000  # ResNet-1202 with its optimizer's state takes a third of it
NUMBERS = {f"{kind}{size}" for kind in "fiu" for size in (2, 4, 8)} | {"i1", "u1", "b1"}

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_CONTAINERS = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PLACES = ("BINPUT", "LONG_BINPUT", "MEMOIZE")
_RECALLS = ("BINGET", "LONG_BINGET")


class Unreadable(Exception):
    """A file cannot be used as weights; the message goes on after the file's name and says what to do."""


class Global(NamedTuple):
    """A function or class that a pickle names. Nothing is imported for it."""

    name: str


@dataclass
class NumberType:
    """A NumPy dtype in a pickle, such as `f4` with byte order `<`."""

    code: str
    order: str = "<"

    @property
    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


@dataclass
class Array:
    """A NumPy array in a pickle. Its bytes stay as the file's object: text stands for bytes of the same numbers."""

    dtype: NumberType | None = None
    shape: tuple[int, ...] = ()
    fortran: bool = False
    data: bytes | bytearray | str | None = None

    def numpy(self) -> np.ndarray:
        """The array itself, in the machine's byte order; read-only where no conversion was needed."""
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        array = np.frombuffer(data, self.dtype.numpy).reshape(self.shape, order="F" if self.fortran else "C")
        return array.astype(array.dtype.newbyteorder("="), copy=False)


def read_pickle(
    file: BinaryIO,
    functions: Mapping[str, Callable | None],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Read one pickle from `file`, leaving it after the pickle's end.

    Args:
        file: in memory or mapped: asked for more than it has, it must give what it has without allocating the rest.
        functions: what the pickle may name, as "module name"; None for what it may name but not call.
        persistent: gets what the pickle refers to outside itself (torch's storages).

    Raises:
        Unreadable: the pickle is damaged, too long, or asks for something else.
    """
    return _Machine(functions, persistent).run(file)


def read_arrays(file: BinaryIO) -> Any:
    """Read a pickle of NumPy arrays, written by Python 2 or 3; arrays come as `Array`, NumPy's numbers as Python's."""
    return read_pickle(file, _NUMPY)


class _Machine:
    def __init__(self, functions: Mapping[str, Callable | None], persistent: Callable[[Any], Any] | None) -> None:
        self.functions = {"collections OrderedDict": self.ordered_dict, **functions}
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.operations = 0

    def run(self, file: BinaryIO) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(file):
                self.count(1)
                self.step(opcode.name, argument)
            return self.stack.pop()
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            raise Unreadable(f"is cut off or damaged (in its pickle: {reason}). Copy or download it again.") from error

    def count(self, operations: int) -> None:
        self.operations += operations
        if self.operations > MOST_OPERATIONS:
            raise Unreadable(
                f"is a pickle of more than {MOST_OPERATIONS:,} operations, which weights do not need. "
                "Save a file with the tensors alone."
            )

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _CONTAINERS:
            stack.append(_CONTAINERS[name]())
        elif name in _PLACES:
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in _RECALLS:
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in _TUPLES:
            stack.append(tuple(self.pop(len(stack) - _TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(self.pop(self.marks.pop())))
        elif name in ("SETITEM", "SETITEMS"):
            items = self.pop(self.marks.pop() if name == "SETITEMS" else len(stack) - 2)
            self.set_items(items[::2], items[1::2])
        elif name in ("APPEND", "APPENDS"):
            items = self.pop(self.marks.pop() if name == "APPENDS" else len(stack) - 1)
            if type(stack[-1]) is not list:
                raise TypeError("items for something that is no list")
            stack[-1].extend(items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self.name(argument if name == "GLOBAL" else " ".join(self.pop(len(stack) - 2)))
        elif name == "REDUCE":
            function, arguments = self.pop(len(stack) - 2)
            stack.append(self.call(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            _build(stack[-1], state)
        elif name == "BINPERSID" and self.persistent is not None:
            stack.append(self.persistent(stack.pop()))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise Unreadable(
                f"is a pickle with the instruction {name}, which weights do not need; nothing in it was executed. "
                "Save a file with the tensors alone."
            )

    def pop(self, start: int) -> list[Any]:
        """Take what lies on the stack from `start` on."""
        if not 0 <= start <= len(self.stack):
            raise IndexError("too few values on the stack")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def name(self, name: str) -> None:
        if name not in self.functions:
            raise Unreadable(
                f"is a pickle that asks for {name.replace(' ', '.', 1)[:80]!r}, which weights do not need; nothing in "
                "it was executed. If you trust whoever made it, load it with Python and save its tensors alone."
            )
        self.stack.append(Global(name))

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or self.functions[function.name] is None or type(arguments) is not tuple:
            raise TypeError("a call of something that is no function")
        return self.functions[function.name](*arguments)

    def set_items(self, keys: list[Any], values: list[Any]) -> None:
        target = self.stack[-1]
        # The hash of a nested tuple may take for ever, so keys are simple.
        if type(target) not in (dict, OrderedDict) or not all(key is None or type(key) in (str, int) for key in keys):
            raise TypeError("an entry whose name is neither text nor a whole number")
        target.update(zip(keys, values, strict=True))

    def ordered_dict(self, items: list[Any] | tuple = ()) -> OrderedDict:
        """Python 3 fills it afterwards, Python 2 gives a list of [name, value]."""
        self.count(len(items))  # the same list may be given again and again
        self.stack.append(OrderedDict())
        pairs = [(key, value) for key, value in items]
        self.set_items([key for key, _ in pairs], [value for _, value in pairs])
        return self.stack.pop()


def _build(target: Any, state: Any) -> None:
    """Give an object its state."""
    if type(target) is OrderedDict:
        return  # what torch notes about versions of modules
    if type(target) is Array:
        _version, target.shape, target.dtype, target.fortran, target.data = state
        _check_array(target)
    elif type(target) is NumberType:
        if state[1] not in ("<", ">", "|", "=") or state[2:5] != (None, None, None):
            raise TypeError("a dtype with fields")
        target.order = "<" if state[1] in "|=" else state[1]
    else:
        raise TypeError(f"a state for a {type(target).__name__}")


def _number_type(code: str, align: Any = False, copy: Any = True) -> NumberType:
    if code not in NUMBERS:
        kind = "Python objects" if type(code) is str and code.startswith("O") else f"dtype {code!r:.40}"
        raise Unreadable(
            f"is a pickle with an array of {kind}, expected numbers; nothing in it was executed. "
            "Save a file with the tensors alone."
        )
    return NumberType(code)


def _reconstruct(kind: Any, shape: Any, code: Any) -> Array:
    if kind != Global("numpy ndarray"):
        raise TypeError("an array that is no numpy.ndarray")
    return Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    array = Array(dtype, shape, order == "F", data)
    _check_array(array)
    return array


def _check_array(array: Array) -> None:
    """The shape must describe exactly the bytes that are there, so that no array is larger than its file."""
    if type(array.dtype) is not NumberType or type(array.data) not in (bytes, bytearray, str):
        raise TypeError("an array without dtype or data")
    shape = array.shape
    if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
        raise TypeError("an array without a shape")
    if math.prod(shape) * array.dtype.numpy.itemsize != len(array.data):
        raise ValueError(f"an array of shape {str(shape)[:60]} with {len(array.data):,} bytes")


def _scalar(dtype: Any, data: Any) -> float | int | bool:
    return _from_buffer(data, dtype, (), "C").numpy().item()


def _encode(text: Any, codec: Any) -> str:
    """Protocol 2 of Python 3 writes bytes so. The text stands for them, since each copy would take memory."""
    if type(text) is not str or codec != "latin1":
        raise TypeError("bytes in another code than latin1")
    return text


def _no_bytes() -> str:
    """How protocol 2 of Python 3 writes bytes of length 0. Other lengths would take memory, so there is no argument."""
    return ""


# NumPy 2 renamed its modules; files carry the name of the version that wrote them.
_NUMPY = {"numpy ndarray": None, "numpy dtype": _number_type, "_codecs encode": _encode, "__builtin__ bytes": _no_bytes}
for _core in ("numpy.core", "numpy._core"):
    _NUMPY |= {
        f"{_core}.multiarray _reconstruct": _reconstruct,
        f"{_core}.multiarray scalar": _scalar,
        f"{_core}.numeric _frombuffer": _from_buffer,
    }
