"""Read the raw tensors from a weights file in any format, without knowing the network.

The format is detected from the content, never from the file's name. Nothing in a file is executed. A file's length
bounds the memory it may take.
"""

import mmap
import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from resnet_backbone.weights.checkpoint import Checkpoint, CheckpointError, about, checkpoint_from, is_ours, read_head
from resnet_backbone.weights.pickles import Array, Unreadable, read_arrays
from resnet_backbone.weights.torch_files import LEGACY_START, load_torch, open_zip, unreadable

MOST_BYTES = 16 * 2**30  # ResNet-1001 in float64 takes 82 MB, VGG-19 1.2 GB
# Trained weights compress to about 90% of their size; a network of zeros or ones, as in tests, to a thousandth.
MOST_EXPANSION = 100
SMALL_BYTES = 64 * 2**20  # always allowed, whatever the file's length

_MOST_DIMENSIONS = 5
_TYPES = ("float16", "bfloat16", "float32", "float64", "int64")
_WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "blobs")


@dataclass(frozen=True)
class TensorFile:
    """The contents of a weights file.

    Attributes:
        container: "resnet_backbone" (this project's checkpoint), "torch", "safetensors", "pickle" or "npz".
        tensors: names to finite CPU tensors; each owns its memory. Wrappers such as "state_dict" are removed.
        header: the file's other contents: safetensors metadata; text, numbers and booleans alongside the tensors in
            torch files and pickles, such as "epoch" or "__author__".
        checkpoint: the full contents of this project's checkpoint; None for other files.
    """

    container: str
    tensors: Mapping[str, torch.Tensor]
    header: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None


def read_tensors(path: str | os.PathLike) -> TensorFile:
    """Read the tensors of a torch file (zip or older), .safetensors, .pkl, .npz or this project's checkpoint.

    The tensors may total at most 16 GiB and at most 100 times the file's length (or 64 MiB if that is more), so a small
    file cannot unpack to a huge one.

    Raises:
        CheckpointError: the file is missing, truncated, hostile or of unknown format, or its tensors are not weights.
    """
    path = Path(path)
    head = read_head(path)
    most = min(MOST_BYTES, max(SMALL_BYTES, MOST_EXPANSION * path.stat().st_size))
    with about(path):
        try:
            return _read(path, head, most)
        except (Unreadable, CheckpointError):
            raise
        except Exception as error:  # a library may raise anything on a damaged file
            raise unreadable(error) from error


def _read(path: Path, head: bytes, most: int) -> TensorFile:
    # Checked first: a header of 0x4b50 or 0x280 bytes makes a safetensors file start like a zip archive or a pickle.
    if head[6:9] == b"\0\0{":
        return _read_safetensors(path, most)
    if head.startswith(b"PK"):
        with open_zip(path) as archive:
            if all(name.endswith(".npy") for name in archive.namelist()):
                return _read_npz(path, archive, most)
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
    return TensorFile("torch" if own is None else "resnet_backbone", _collect(state, most), header, own)


def _read_pickle(path: Path, most: int) -> TensorFile:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        state, header = _unwrap(read_arrays(content), Array)
    _check_total((array.nbytes for array in state.values()), most)  # before text becomes bytes, once per name
    arrays = {name: array.numpy() for name, array in state.items()}
    return TensorFile("pickle", _collect(arrays, most), header)


def _read_npz(path: Path, archive: zipfile.ZipFile, most: int) -> TensorFile:
    _check_total((member.file_size for member in archive.infolist()), most + 2**20)  # plus headers
    with np.load(path, allow_pickle=False) as arrays:
        native = {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in arrays.items()}
        return TensorFile("npz", _collect(native, most))


def _read_safetensors(path: Path, most: int) -> TensorFile:
    """Read with the format's own library, which checks the header against the file and returns views of its mapping."""
    with safe_open(path, framework="pt", device="cpu") as file:
        names = file.keys()  # not a dict
        tensors = {name: file.get_tensor(name) for name in names}
        return TensorFile("safetensors", _collect(tensors, most), file.metadata() or {})


def _unwrap(payload: Any, kind: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split into the tensors (of type `kind`) by name and the plain entries alongside them."""
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
    return state, header


def _plain(payload: Mapping[Any, Any]) -> dict[str, Any]:
    """Keep the entries that are text, numbers or booleans."""
    plain = (str, int, float, bool, type(None))
    return {name: value for name, value in payload.items() if type(name) is str and type(value) in plain}


def _collect(values: Mapping[str, torch.Tensor | np.ndarray], most: int) -> dict[str, torch.Tensor]:
    """Copy the tensors after checking all of them."""
    if not values:
        raise Unreadable("holds no tensors. Give a file of weights.")
    _check_total((value.nbytes for value in values.values()), most)
    tensors = {}
    for name, value in values.items():
        if str(value.dtype).removeprefix("torch.") not in _TYPES:
            raise Unreadable(
                f"holds a tensor of dtype {str(value.dtype).removeprefix('torch.')[:40]}, {name[:80]!r}, expected "
                f"{', '.join(_TYPES)}. Convert it and save it again."
            )
        if value.ndim > _MOST_DIMENSIONS:
            raise Unreadable(
                f"holds a tensor of {value.ndim} dimensions, {name[:80]!r}, expected at most {_MOST_DIMENSIONS}. Give "
                "a file of an image network's weights."
            )
        tensor = _copy(value)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise Unreadable(
                f"holds NaN or infinite values in {name[:80]!r}: its training diverged or it was damaged. Use "
                "an earlier checkpoint or another file."
            )
        tensors[name] = tensor
    return tensors


def _copy(value: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Copy into its own memory: tensors may be views of one storage or of the mapped file."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    return torch.tensor(value)


def _check_total(sizes: Iterable[int], most: int) -> None:
    if (total := sum(sizes)) > most:
        raise Unreadable(
            f"unpacks to {total:,} bytes of tensors, at most {most:,} are allowed for a file of its length. If that is "
            "right, save copies of its tensors, uncompressed."
        )
