"""Files of `torch.save`, checked in full before `torch.load` sees them.

`torch.load(weights_only=True)` executes no code, but a few bytes make it allocate as much as they like (a bytearray of
10¹² zeros, a storage of any length). So the pickle is first read by a machine that allocates nothing, and every
storage it mentions must lie in the file with exactly the length it claims.
"""

import io
import mmap
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resnet_backbone.weights.pickles import Global, Unreadable, read_pickle

LEGACY_START = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number as a pickle, after two bytes of protocol
DAMAGED = "Copy or download it again, or use an earlier checkpoint."

_ITEM_BYTES = {
    **{f"torch {name}Storage": 1 for name in ("Byte", "Char", "Bool")},
    **{f"torch {name}Storage": 2 for name in ("Half", "BFloat16", "Short")},
    **{f"torch {name}Storage": 4 for name in ("Float", "Int")},
    **{f"torch {name}Storage": 8 for name in ("Double", "Long")},
}
_MOST_TABLE_BYTES = 4 * 2**20  # of 40,000 tensors
_MOST_DIMENSIONS = 64  # torch's own limit


class _Storage(NamedTuple):
    """Stands for a storage while the pickle is checked."""

    count: int


class _Tensor(NamedTuple):
    """Stands for a tensor while the pickle is checked."""


def load_torch(path: Path) -> Any:
    """What `torch.save` wrote to `path`, in its zip format or the one before torch 1.6, onto the CPU.

    Executes nothing; takes about as much memory as the file is long.

    Raises:
        Unreadable: the file is cut off, altered, hostile, or holds more than tensors and plain containers.
    """
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            _check_zip(path)
        else:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                _check_legacy(content)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch's reader meets in a foreign file
        raise Unreadable(
            f"cannot be read as weights ({first_sentence(error)}); nothing in it was executed. Save a file with the "
            "tensors alone."
        ) from error


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip archive as torch and NumPy write them: stored or deflated, without passwords, comments or doublets."""
    if (length := _table_bytes(path)) > _MOST_TABLE_BYTES:
        raise Unreadable(
            f"is a zip archive whose table of contents takes {length:,} bytes, expected at most {_MOST_TABLE_BYTES:,}. "
            "Give a file of weights."
        )
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # a damaged table of contents may claim anything
        size = path.stat().st_size
        raise Unreadable(f"is cut off or damaged ({size:,} bytes; {first_sentence(error)}). {DAMAGED}") from error
    members = archive.infolist()
    strange = None
    if len({member.filename for member in members}) < len(members):
        strange = "two members of the same name"
    elif archive.comment:  # readers may differ on where it begins, and so on what the archive holds
        strange = "a comment"
    elif any(member.flag_bits & 1 for member in members):
        strange = "a password"
    elif any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        strange = "another compression than deflate"  # whose memory may be as large as the archive says
    if strange:
        archive.close()
        raise Unreadable(f"is damaged: it is a zip archive with {strange}, as torch and NumPy write none. {DAMAGED}")
    return archive


def _table_bytes(path: Path) -> int:
    """How long a zip archive says that its table of contents is: zipfile reads the whole of it on opening."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16 - 100))
        tail = file.read()
    end = tail.rfind(b"PK\5\6")
    large = end - 76  # where an archive beyond 4 GB has a second record, which counts
    lengths = [0]
    if 0 <= end <= len(tail) - 22:
        lengths += struct.unpack_from("<I", tail, end + 12)
    if large >= 0 and tail.startswith(b"PK\6\6", large):
        lengths += struct.unpack_from("<Q", tail, large + 40)
    return min(max(lengths), path.stat().st_size)


def first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text.split(". ")[0][:120] or type(error).__name__).rstrip(".")


def _check_zip(path: Path) -> None:
    size = path.stat().st_size
    with open_zip(path) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        folder = next(iter(sizes), "").split("/")[0]
        if f"{folder}/constants.pkl" in sizes:
            raise Unreadable(
                "is a TorchScript program, which holds code, so it was not opened. Save its weights alone: "
                "torch.save(torch.jit.load(FILE).state_dict(), OTHER)."
            )
        if f"{folder}/data.pkl" not in sizes:
            some = ", ".join(map(repr, list(sizes)[:3])) or "nothing"
            raise Unreadable(
                f"cannot be read as weights: it is a zip archive with {some:.200}, not torch's or NumPy's. Give "
                "a file of weights."
            )
        if sum(sizes.values()) > size or any(member.compress_type for member in archive.infolist()):
            raise Unreadable(
                f"is damaged: torch compresses nothing, and its members claim {sum(sizes.values()):,} bytes where the "
                f"file has {size:,}. {DAMAGED}"
            )
        try:
            damaged = archive.testzip()
        except Exception as error:  # a damaged header may claim anything
            raise Unreadable(f"is cut off or damaged ({size:,} bytes; {first_sentence(error)}). {DAMAGED}") from error
        if damaged is not None:
            raise Unreadable(
                f"was altered after it was written: the checksum of its record {damaged[:80]!r} does not fit. {DAMAGED}"
            )

        def check(key: str, claimed: int) -> None:
            found = sizes.get(f"{folder}/data/{key}")
            if found != claimed:
                there = "absent" if found is None else f"{found:,} bytes long"
                raise Unreadable(
                    f"is cut off or damaged (a tensor's data, {key!r:.40}, should be {claimed:,} bytes long and are "
                    f"{there}). {DAMAGED}"
                )

        read_pickle(io.BytesIO(archive.read(f"{folder}/data.pkl")), _REBUILD, _persistent(check))


def _check_legacy(file: mmap.mmap) -> None:
    """The format before torch 1.6: pickles of magic number, version, machine, content and keys, then the storages."""
    claims: dict[str, int] = {}

    def check(key: str, claimed: int) -> None:
        if claims.setdefault(key, claimed) != claimed:
            raise Unreadable(f"is damaged: it claims two lengths for a tensor's data, {key!r:.40}. {DAMAGED}")

    for _ in range(3):
        read_pickle(file, {})
    read_pickle(file, _REBUILD, _persistent(check))
    keys = read_pickle(file, {})
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(claims):
        raise Unreadable(f"is cut off or damaged (its list of data does not fit its tensors). {DAMAGED}")
    # Each storage is its number of values, then the values. The number is torch's to compare with the pickle's.
    needed = file.tell() + sum(8 + claims[key] for key in keys)
    if needed != len(file):
        raise Unreadable(f"is cut off or damaged (its tensors need {needed:,} bytes, it has {len(file):,}). {DAMAGED}")


def _persistent(check: Callable[[str, int], None]) -> Callable[[Any], _Storage]:
    """What the pickle calls to refer to a storage; `check` gets the storage's key and the bytes that it claims."""

    def persistent(identity: Any) -> _Storage:
        kind, storage, key, location, count, *view = identity
        if kind != "storage" or type(key) is not str or type(location) is not str or type(count) is not int:
            raise TypeError("a reference to something that is no storage")
        if view not in ([], [None]) or not isinstance(storage, Global) or count < 0:
            raise TypeError("a view of a storage")
        check(key, count * _ITEM_BYTES[storage.name])
        return _Storage(count)

    return persistent


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides) or len(shape) > _MOST_DIMENSIONS:
        raise TypeError("a tensor without storage or shape")
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise TypeError("a tensor's shape is not of whole numbers")
    reach = offset + sum((n - 1) * stride for n, stride in zip(shape, strides)) + 1
    if 0 not in shape and reach > storage.count:
        raise ValueError(f"a tensor that reaches to value {reach:,} of {storage.count:,}")
    return _Tensor()


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> _Tensor:
    if not isinstance(data, _Tensor):
        raise TypeError("a parameter without a tensor")
    return data


_REBUILD = {
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    **dict.fromkeys(_ITEM_BYTES),
}
