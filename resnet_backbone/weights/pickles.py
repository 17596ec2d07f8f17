"""Read pickles of NumPy arrays, calling nothing they name except the few functions below.

NumPy's own types are excluded: through a dtype's state, a file could make NumPy treat numbers as addresses.
"""

import math
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

MOST_OPERATIONS = 1_000_000  # ResNet-1202 with its optimizer state needs a third of this
NUMBERS = {f"{kind}{size}" for kind in "fiu" for size in (2, 4, 8)} | {"i1", "u1", "b1"}


class Unreadable(Exception):
    """A file cannot be used as weights; the message continues after the file's name and says what to do."""


class Array:
    """Stands in for a NumPy array. Its data may be text, which represents bytes of the same values, in latin1."""

    def __init__(self) -> None:
        self.dtype, self.shape, self.fortran, self.data = NumberType("u1"), (0,), False, b""

    def __setstate__(self, state: tuple) -> None:
        _version, self.shape, self.dtype, self.fortran, self.data = state
        if type(self.dtype) is not NumberType or type(self.data) not in (bytes, bytearray, str):
            raise TypeError("an array without dtype or data")
        if type(self.shape) is not tuple or not all(type(n) is int and n >= 0 for n in self.shape):
            raise TypeError("an array without a shape")
        if math.prod(self.shape) * self.dtype.numpy.itemsize != len(self.data):
            raise ValueError(f"an array of shape {str(self.shape)[:60]} with {len(self.data):,} bytes")

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def numpy(self) -> np.ndarray:
        """Return the array in native byte order; read-only if no conversion was needed."""
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        array = np.frombuffer(data, self.dtype.numpy).reshape(self.shape, order="F" if self.fortran else "C")
        return array.astype(array.dtype.newbyteorder("="), copy=False)


class NumberType:
    """Stands in for a NumPy dtype, such as `f4` with byte order `<`."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in NUMBERS:
            raise TypeError(f"an array of {code!r:.40}, expected numbers")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "=") or state[2:5] != (None, None, None):
            raise TypeError("a dtype with fields")
        self.numpy = self.numpy.newbyteorder("<" if state[1] in "|=" else state[1])


def read_arrays(file: BinaryIO) -> Any:
    """Read a Python 2 or 3 pickle of NumPy arrays; arrays become `Array`, NumPy numbers become Python numbers.

    Raises:
        Unreadable: the pickle is damaged, too long, or requests anything else.
    """
    check_pickle(file)
    if left := len(file.read()):
        raise Unreadable(f"is a pickle with {left:,} bytes after its end, expected none. Copy or download it again.")
    file.seek(0)
    try:
        return _Unpickler(file, encoding="latin1").load()
    except Unreadable:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise damaged(error) from error


def check_pickle(file: BinaryIO) -> None:
    """Scan one pickle without executing it, leaving `file` (in memory or mapped) positioned after it.

    `pickletools` checks all lengths against the file. Memo indices are checked against the number of operations,
    since Python's unpickler allocates memory for every index below the highest.
    """
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if number >= MOST_OPERATIONS:
                raise Unreadable(
                    f"is a pickle of more than {MOST_OPERATIONS:,} operations, which weights do not need. "
                    "Save a file with the tensors alone."
                )
            if opcode.name in ("BINPUT", "LONG_BINPUT", "PUT") and argument > MOST_OPERATIONS:
                raise ValueError(f"place {argument:,}")
            if opcode.name == "GLOBAL" and argument.endswith(" bytearray"):  # torch lets files create one of any length
                raise refused(argument.replace(" ", "."))
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise damaged(error) from error


def refused(name: str) -> Unreadable:
    """The error for a file that requests a function or class."""
    return Unreadable(
        f"is a pickle that asks for {name[:80]!r}, which weights do not need; nothing in it was executed. If you trust "
        "whoever made it, load it with Python and save its tensors alone."
    )


def damaged(error: Exception) -> Unreadable:
    reason = " ".join(str(error).split())[:100] or type(error).__name__
    return Unreadable(f"is cut off or damaged (in its pickle: {reason}). Copy or download it again.")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # NumPy 2 renamed its modules
        if full == "numpy.ndarray":
            return None  # an argument of _reconstruct
        if full == "collections.OrderedDict":
            return OrderedDict
        if full not in _FUNCTIONS:
            raise refused(f"{module}.{name}")
        return _Function(_FUNCTIONS[full])


class _Function:
    """A function that a pickle can call but not modify: a pickle may set attributes on any object it gets."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a state for a function")


def _reconstruct(kind: None, shape: Any, code: Any) -> Array:
    return Array()  # of any shape: its state follows


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _scalar(dtype: Any, data: Any) -> float | int | bool:
    return _from_buffer(data, dtype, (), "C").numpy().item()


def _encode(text: Any, codec: Any) -> str:
    """Read bytes as Python 3's protocol 2 writes them. The text stands in for them, since each copy takes memory."""
    if type(text) is not str or codec != "latin1":
        raise TypeError("bytes in another code than latin1")
    return text


def _no_bytes() -> str:
    """Read empty bytes as Python 3's protocol 2 writes them. No argument, since other lengths would take memory."""
    return ""


_FUNCTIONS: dict[str, Callable] = {
    "numpy.dtype": NumberType,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _no_bytes,
    "builtins.bytes": _no_bytes,
}
