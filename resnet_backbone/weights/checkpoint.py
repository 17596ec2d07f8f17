"""The project's checkpoint file: a torch zip archive with weights, metadata and, while training, the trainer's state.

Detectron2's `DetectionCheckpointer` reads the same file: it looks for the key `model` and leaves the rest alone.
"""

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_backbone.errors import InputError
from resnet_backbone.weights.files import atomic_write
from resnet_backbone.weights.metadata import Metadata

FORMAT = "resnet_backbone"
VERSION = 1


class CheckpointError(InputError):
    """A checkpoint cannot be read or does not fit."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        model: parameter and buffer names to tensors.
        metadata: what the weights mean.
        iteration: the last finished iteration, counted from 0; None in a file that is not for resuming.
        trainer: optimizer and hooks; None in a file that is not for resuming.
    """

    model: Mapping[str, torch.Tensor]
    metadata: Metadata
    iteration: int | None = None
    trainer: Mapping[str, Any] | None = None


def write_checkpoint(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """Write atomically: `path` holds the whole new file or what it held before.

    Raises:
        CheckpointError: the file cannot be written, for instance because the disk is full.
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
        # torch.save turns a failed write into a RuntimeError of its own, with the OSError as context.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise CheckpointError(
            f"{path} cannot be written ({reason.strerror or reason}); what stood there before is untouched. "
            "Free some space and go on with --resume, or choose another OUTPUT_DIR."
        ) from error


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read a file that `write_checkpoint` wrote, onto the CPU, executing nothing in it.

    Raises:
        CheckpointError: the file is missing, cut off, altered, or of a format that is not supported.
    """
    path = Path(path)
    _check_archive(path)
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the restricted unpickler meets in a foreign file
        raise CheckpointError(
            f"{path} cannot be read as weights ({_first_sentence(error)}); nothing in it was executed. Expected a file "
            "written by tools/pretrain.py or tools/train_net.py."
        ) from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a torch file without this project's metadata, a format that is not supported yet: nothing in "
            "it says the architecture, the channel order or the pixel mean. Give a file written by tools/pretrain.py "
            "or tools/train_net.py."
        )
    if payload.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint of version {payload.get('version')}, this code reads version {VERSION}. "
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


def _check_archive(path: Path) -> None:
    """Tell a missing, foreign, cut off or altered file apart before torch's reader sees it."""
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; {_what_is_near(path)}.")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if not head.startswith(b"PK"):
        raise CheckpointError(
            f"{path} is {_guess(head)}. Give a file written by tools/pretrain.py or tools/train_net.py."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged header may claim anything: a password, another compression, a bad date
        raise CheckpointError(
            f"{path} is cut off or damaged ({path.stat().st_size:,} bytes; {_first_sentence(error)}). "
            "Copy it again or use an earlier checkpoint."
        ) from error
    if damaged is not None:
        raise CheckpointError(
            f"{path} was altered after it was written: the checksum of its record {damaged} does not fit. "
            "Copy it again or use an earlier checkpoint."
        )


def _what_is_near(path: Path) -> str:
    if path.is_dir():
        candidates = sorted(p.name for p in path.glob("*.pth"))
        return "it is a folder" + (f" with {', '.join(candidates[:5])}: name one of them" if candidates else "")
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    candidates = sorted(p.name for p in path.parent.glob("*.pth"))
    return f"its folder has {', '.join(candidates[:5]) if candidates else 'no .pth file'}"


def _guess(head: bytes) -> str:
    if not head:
        return "an empty file, not a checkpoint"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "an HTML page, not a checkpoint; the download probably failed"
    if head.startswith(b"\x80"):
        return "a pickle, a format that is not supported yet (it was not opened, since pickles can execute code)"
    return f"not a torch checkpoint (it starts with {head[:8]!r}), a format that is not supported yet"


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text.split(". ")[0][:120] or type(error).__name__).rstrip(".")
