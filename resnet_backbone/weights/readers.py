"""Open a file of weights of any format and give its raw tensors, without knowing what network they are.

The format is told by the content, never by the file's name. Nothing in a file is executed, and what a file claims is
compared with what it holds before memory is taken for it.
"""

import json
import math
import mmap
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from resnet_backbone.weights.checkpoint import Checkpoint, CheckpointError, about, checkpoint_from, is_ours, read_head
from resnet_backbone.weights.pickles import Array, Unreadable, read_arrays
from resnet_backbone.weights.torch_files import DAMAGED, LEGACY_START, first_sentence, load_torch, open_zip

MOST_BYTES = 16 * 2**30  # ResNet-1001 in float64 takes 82 MB, VGG-19 1.2 GB
# Trained weights compress to about nine tenths; a network of zeros or ones, as in tests, to a thousandth.
MOST_EXPANSION = 100
SMALL_BYTES = 64 * 2**20  # so little may come from a file of any length

_MOST_DIMENSIONS = 5
_MOST_HEADER_BYTES = 8 * 2**20  # of safetensors: 50,000 tensors and a page of metadata
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
_SAFETENSORS_TYPES = dict(zip(("F16", "BF16", "F32", "F64", "I64"), _TYPES))
_NUMPY_TYPES = dict(zip(("f2", "f4", "f8", "i8"), (torch.float16, torch.float32, torch.float64, torch.int64)))
_WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "blobs")


@dataclass(frozen=True)
class TensorFile:
    """What a file of weights holds.

    Attributes:
        container: "resnet_backbone" (this project's checkpoint), "torch", "safetensors", "pickle" or "npz".
        tensors: names to tensors on the CPU, finite, in the file's order; each owns its memory. Wrappers such as
            "state_dict" and the prefix "module." are removed.
        header: what else the file says: the metadata of safetensors; text, numbers and booleans beside the tensors
            of torch files and pickles, such as "epoch" or "__author__".
        checkpoint: all that a checkpoint of this project says; None for other files.
    """

    container: str
    tensors: Mapping[str, torch.Tensor]
    header: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True)
class _Entry:
    """A tensor that has been described but not read; `dtype` is the format's word where it is none of `_TYPES`."""

    name: str
    dtype: torch.dtype | str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def read_tensors(path: str | os.PathLike, *, max_bytes: int | None = None) -> TensorFile:
    """Read the tensors of a torch file (zip or older), .safetensors, .pkl, .npz or checkpoint of this project.

    Takes memory for at most the file twice and its tensors twice.

    Args:
        path: the file; its name does not matter.
        max_bytes: what the tensors may take together; by default 16 GiB and 100 times the file's length (or 64 MiB if
            that is more), so that a small file cannot unpack to a large one.

    Raises:
        CheckpointError: the file is missing, cut off, hostile or of no known format, or its tensors are no weights.
    """
    path = Path(path)
    head = read_head(path)
    size = path.stat().st_size
    most = max_bytes if max_bytes is not None else min(MOST_BYTES, max(SMALL_BYTES, MOST_EXPANSION * size))
    with about(path):
        try:
            return _read(path, head, size, most)
        except (Unreadable, CheckpointError):
            raise
        except Exception as error:  # whatever a library meets in a damaged file
            raise Unreadable(
                f"cannot be read as weights ({first_sentence(error)}); nothing in it was executed. {DAMAGED}"
            ) from error


def _read(path: Path, head: bytes, size: int, most: int) -> TensorFile:
    # First, since a header of 0x4b50 or 0x280 bytes makes a safetensors file start like a zip archive or a pickle.
    if head[6:9] == b"\0\0{":
        return _read_safetensors(path, size, most)
    if head.startswith(b"PK"):
        with open_zip(path) as archive:
            if all(name.endswith(".npy") for name in archive.namelist()):
                return TensorFile("npz", _collect((_npz_entry(archive, m) for m in archive.infolist()), most))
        return _read_torch(path, most)
    if head.startswith(b"\x80"):
        return _read_torch(path, most) if head[2:].startswith(LEGACY_START) else _read_pickle(path, most)
    raise Unreadable(
        f"is no file of weights that is known (it starts with {head[:8]!r}). Expected a torch file, safetensors, a "
        "pickle of protocol 2 or later, or .npz."
    )


def _read_torch(path: Path, most: int) -> TensorFile:
    payload = load_torch(path)
    own = checkpoint_from(payload, path) if is_ours(payload) else None
    state, header = _unwrap(payload, torch.Tensor) if own is None else (own.model, _plain(payload))
    container = "torch" if own is None else "resnet_backbone"

    def entry(name: str, tensor: torch.Tensor) -> _Entry:
        # A copy, since tensors may be views of one storage.
        return _Entry(
            name,
            tensor.dtype,
            tuple(tensor.shape),
            lambda: tensor.detach().clone(memory_format=torch.contiguous_format),
        )

    return TensorFile(container, _collect((entry(*item) for item in state.items()), most), header, own)


def _read_pickle(path: Path, most: int) -> TensorFile:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        payload = read_arrays(content)
        if left := len(content) - content.tell():
            raise Unreadable(f"is a pickle with {left:,} bytes after its end, expected none. {DAMAGED}")
    state, header = _unwrap(payload, Array)

    def entry(name: str, array: Array) -> _Entry:
        if array.dtype is None:
            raise Unreadable(f"is damaged: its array {name[:80]!r} has no data. {DAMAGED}")
        dtype = _NUMPY_TYPES.get(array.dtype.code, array.dtype.code)
        return _Entry(name, dtype, array.shape, lambda: torch.tensor(array.numpy()))

    return TensorFile("pickle", _collect((entry(*item) for item in state.items()), most), header)


def _npz_entry(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Entry:
    """An array of a NumPy archive, whose header is read and compared with the member's length."""
    name = member.filename.removesuffix(".npy")
    with archive.open(member) as file:
        try:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):  # the others are for dtypes with thousands of fields
                raise ValueError(f"version {version}")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        except ValueError as error:
            raise Unreadable(
                f"is damaged: the header of its array {name[:80]!r} is not NumPy's ({first_sentence(error)}). {DAMAGED}"
            ) from error
        start = file.tell()
    if dtype.hasobject:
        raise Unreadable(
            f"has an array of Python objects, {name[:80]!r}, expected numbers; nothing in it was executed. "
            "Save its arrays of numbers alone."
        )
    length = member.file_size - start
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != length:
        raise Unreadable(
            f"is damaged: its array {name[:80]!r} of shape {str(shape)[:60]} and dtype {dtype!s:.40} does not fit the "
            f"{length:,} bytes that it has. {DAMAGED}"
        )

    def read() -> torch.Tensor:
        with archive.open(member) as file:
            file.read(start)
            data = file.read(length)  # a length, since without one zipfile unpacks more than the member claims
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
        return torch.tensor(array.astype(dtype.newbyteorder("="), copy=False))

    return _Entry(name, _NUMPY_TYPES.get(f"{dtype.kind}{dtype.itemsize}", str(dtype)), shape, read)


def _read_safetensors(path: Path, size: int, most: int) -> TensorFile:
    """Compare the header with the file, then let the format's own library read."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _MOST_HEADER_BYTES):
            raise Unreadable(
                f"is cut off or damaged (its safetensors header claims {length:,} bytes; the file has {size:,}, and at "
                f"most {_MOST_HEADER_BYTES:,} are expected). {DAMAGED}"
            )
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise Unreadable(
                f"is damaged: its safetensors header is not JSON ({first_sentence(error)}). {DAMAGED}"
            ) from error
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise Unreadable(f"is damaged: the metadata in its safetensors header are not texts by name. {DAMAGED}")
    _check_extents(header, size - 8 - length)
    with safe_open(path, framework="pt", device="cpu") as library:

        def entry(name: str, claim: Mapping[str, Any]) -> _Entry:
            # A copy, since the library's tensors are views of the mapped file.
            dtype = _SAFETENSORS_TYPES[claim["dtype"]]
            return _Entry(name, dtype, tuple(claim["shape"]), lambda: library.get_tensor(name).clone())

        return TensorFile("safetensors", _collect((entry(*item) for item in header.items()), most), metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _check_extents(header: Mapping[str, Any], size: int) -> None:
    """The tensors must fill the file one after the other, each as long as its dtype and shape say."""

    def damaged(name: str, reason: str) -> Unreadable:
        return Unreadable(f"is cut off or damaged (its tensor {name[:80]!r} {reason}). {DAMAGED}")

    def are_counts(values: Any) -> bool:
        return type(values) is list and all(type(value) is int and value >= 0 for value in values)

    extents = []
    for name, claim in header.items():
        if type(claim) is not dict or set(claim) != {"dtype", "shape", "data_offsets"}:
            raise damaged(name, "has another description than dtype, shape and data_offsets")
        offsets, dtype = claim["data_offsets"], claim["dtype"]
        if not are_counts(claim["shape"]) or not are_counts(offsets) or len(offsets) != 2 or type(dtype) is not str:
            raise damaged(name, "has an impossible dtype, shape or place")
        if dtype not in _SAFETENSORS_TYPES:
            raise _foreign_type(name, dtype)
        needed = math.prod(claim["shape"]) * _SAFETENSORS_TYPES[dtype].itemsize
        if offsets[1] - offsets[0] != needed:
            raise damaged(name, f"needs {needed:,} bytes and claims those from {offsets[0]:,} to {offsets[1]:,}")
        extents.append((*offsets, name))
    end = 0
    for start, stop, name in sorted(extents):
        if start != end or stop < start:
            raise damaged(name, f"claims the bytes from {start:,} to {stop:,}, expected a start at {end:,}")
        end = stop
    if end != size:
        raise Unreadable(
            f"is cut off or damaged (its tensors take {end:,} bytes, the file has {size:,} for them). {DAMAGED}"
        )


def _unwrap(payload: Any, kind: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors by name, of type `kind`, and the plain entries beside them."""
    if not isinstance(payload, dict):
        raise Unreadable(f"holds a {type(payload).__name__}, expected tensors by name. Save a state dict.")
    wrappers = [name for name in _WRAPPERS if isinstance(payload.get(name), dict)]
    if len(wrappers) > 1:
        raise Unreadable(
            f"holds tensors under {' and '.join(map(repr, wrappers))}, expected one of them. Save the one that is "
            "meant to a file of its own."
        )
    header = _plain(payload)
    state = payload[wrappers[0]] if wrappers else {n: v for n, v in payload.items() if n not in header}
    for name, value in state.items():
        if type(name) is not str or not isinstance(value, kind):
            raise Unreadable(
                f"has {type(value).__name__} {str(name)[:80]!r} among its tensors, expected tensors by name alone. "
                "Save a state dict."
            )
    if state and all(name.startswith("module.") for name in state):  # DataParallel's
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state, header


def _plain(payload: Mapping[Any, Any]) -> dict[str, Any]:
    """The entries that are text, numbers or booleans."""
    plain = (str, int, float, bool, type(None))
    return {name: value for name, value in payload.items() if type(name) is str and type(value) in plain}


def _collect(entries: Iterable[_Entry], most: int) -> dict[str, torch.Tensor]:
    """Read the tensors, after a look at all of them."""
    entries = list(entries)
    if not entries:
        raise Unreadable("holds no tensors. Give a file of weights.")
    total = 0
    for entry in entries:
        if entry.dtype not in _TYPES:
            raise _foreign_type(entry.name, str(entry.dtype))
        if len(entry.shape) > _MOST_DIMENSIONS:
            raise Unreadable(
                f"holds a tensor of {len(entry.shape)} dimensions, {entry.name[:80]!r}, expected at most "
                f"{_MOST_DIMENSIONS}. Give a file of an image network's weights."
            )
        total += math.prod(entry.shape) * entry.dtype.itemsize
    if total > most:
        raise Unreadable(
            f"unpacks to {total:,} bytes of tensors, at most {most:,} are allowed for a file of its length. If that is "
            "right, save copies of its tensors, uncompressed."
        )
    tensors = {}
    for entry in entries:
        tensor = entry.read()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise Unreadable(
                f"holds NaN or infinite values in {entry.name[:80]!r}: its training diverged or it was damaged. Use "
                "an earlier checkpoint or another file."
            )
        tensors[entry.name] = tensor
    return tensors


def _foreign_type(name: str, dtype: str) -> Unreadable:
    return Unreadable(
        f"holds a tensor of dtype {dtype.removeprefix('torch.')[:40]}, {name[:80]!r}, expected float16, bfloat16, "
        "float32, float64 or int64. Convert it and save it again."
    )
