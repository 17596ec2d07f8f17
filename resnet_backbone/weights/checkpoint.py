"""The project's checkpoint file: a torch zip archive of weights, metadata and, during training, trainer state.

Detectron2's `DetectionCheckpointer` reads the same file: it uses the key `model` and ignores the rest.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_backbone.errors import InputError, os_error
from resnet_backbone.weights.files import atomic_write
from resnet_backbone.weights.metadata import Metadata
from resnet_backbone.weights.pickles import Unreadable
from resnet_backbone.weights.torch_files import load_torch, owned

FORMAT = "resnet_backbone"
VERSION = 1

_EXPECTED = (
    "Expected a file written by tools/pretrain.py, tools/train_net.py or tools/convert_weights.py, which reads other "
    "formats."
)


class CheckpointError(InputError):
    """A checkpoint cannot be read or does not fit."""


class ForeignFile(CheckpointError):
    """A whole file, but not one that `write_checkpoint` wrote."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file.

    Attributes:
        model: parameter and buffer names to tensors.
        metadata: describes the weights.
        iteration: the last finished iteration, counted from 0; None if the file is not for resuming.
        trainer: optimizer and hooks; None if the file is not for resuming.
    """

    model: Mapping[str, torch.Tensor]
    metadata: Metadata
    iteration: int | None = None
    trainer: Mapping[str, Any] | None = None


def write_checkpoint(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """Write atomically: `path` holds either the complete new file or its previous contents.

    Raises:
        CheckpointError: the file cannot be written, for example because the disk is full.
    """
    payload = {
        "format": FORMAT,
        "version": VERSION,
        "model": {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.model.items()},
        "metadata": checkpoint.metadata.to_dict(),
    }
    if checkpoint.iteration is not None:
        payload["iteration"] = checkpoint.iteration
    if checkpoint.trainer is not None:
        payload["trainer"] = dict(checkpoint.trainer)
    try:
        with atomic_write(path) as file:
            torch.save(payload, file)
    except (OSError, RuntimeError) as error:
        if (reason := os_error(error)) is None:
            raise
        raise CheckpointError(
            f"{path} cannot be written ({reason.strerror or reason}); the previous file is untouched. "
            "Free some space and continue with --resume, or choose another OUTPUT_DIR."
        ) from error


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read a file written by `write_checkpoint` onto the CPU, without executing anything in it.

    Raises:
        ForeignFile: the file is in another format.
        CheckpointError: the file is missing, truncated or altered.
    """
    path = Path(path)
    head = read_head(path)
    if not head.startswith(b"PK"):
        raise ForeignFile(f"{path} is {_guess(head)}. {_EXPECTED}")
    with about(path):
        payload = owned(load_torch(path))
    if not is_ours(payload):
        raise ForeignFile(
            f"{path} is a torch file without this project's metadata: nothing in it says the architecture, the channel "
            f"order or the pixel mean. {_EXPECTED}"
        )
    return checkpoint_from(payload, path)


def holds_detector(path: str | os.PathLike) -> bool:
    """Whether a file is this project's checkpoint of a detector; a file in another format is not."""
    try:
        return read_checkpoint(path).metadata.kind == "detector"
    except ForeignFile:
        return False


def is_ours(payload: Any) -> bool:
    """Whether `write_checkpoint` wrote this torch file's contents."""
    return isinstance(payload, dict) and payload.get("format") == FORMAT


def checkpoint_from(payload: Mapping[str, Any], path: Path) -> Checkpoint:
    """Rebuild the checkpoint that `write_checkpoint` stored in `payload`; a CheckpointError names `path`."""
    version = payload.get("version")
    if not isinstance(version, int) or version != VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint of version {version!s:.40}, this code reads version {VERSION}. "
            "Use the release of resnet_backbone that wrote it."
        )
    model = payload.get("model")
    if not isinstance(model, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in model.values()):
        raise CheckpointError(f"{path}: its entry 'model' does not hold tensors by name. Use another checkpoint.")
    try:
        metadata = Metadata.from_dict(payload.get("metadata"))
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Checkpoint(model, metadata, payload.get("iteration"), payload.get("trainer"))


def read_head(path: Path) -> bytes:
    """Read the first bytes of a file that exists, is readable, and is neither empty nor a web page.

    Raises:
        CheckpointError: one of these does not hold.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; {_what_is_near(path)}.")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if not head:
        raise CheckpointError(f"{path} is an empty file, not a checkpoint. Copy or download it again.")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(
            f"{path} is an HTML page, not a checkpoint; the download probably failed. Download it again."
        )
    return head


@contextlib.contextmanager
def about(path: Path) -> Iterator[None]:
    """Turn format readers' errors about a file into a CheckpointError that names it."""
    try:
        yield
    except Unreadable as error:
        raise CheckpointError(f"{path} {error}") from error


def _what_is_near(path: Path) -> str:
    suffix = path.suffix or ".pth"
    if path.is_dir():
        candidates = _names(path, ".pth")
        return "it is a folder" + (f" with {', '.join(candidates)}: name one of them" if candidates else "")
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    return f"its folder has {', '.join(_names(path.parent, suffix)) or f'no {suffix} file'}"


def _names(folder: Path, suffix: str) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if path.suffix == suffix)[:5]


def _guess(head: bytes) -> str:
    if head.startswith(b"\x80"):
        return "a pickle, not a checkpoint of this project (it was not opened, since pickles can execute code)"
    return f"not a torch checkpoint (it starts with {head[:8]!r})"
