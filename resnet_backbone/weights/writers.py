"""Write checkpoints in our format and in others."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from resnet_backbone.errors import InputError
from resnet_backbone.networks import HIDDEN_ARGUMENTS
from resnet_backbone.weights.architectures import has_bottleneck_blocks
from resnet_backbone.weights.checkpoint import Checkpoint, CheckpointError, write_checkpoint
from resnet_backbone.weights.files import atomic_write
from resnet_backbone.weights.metadata import Metadata
from resnet_backbone.weights.names import detectron2_name, some
from resnet_backbone.weights.onnx import write_onnx
from resnet_backbone.weights.preprocessing import describe, preprocessing_of

OWN = "resnet_backbone"
# The .safetensors and Detectron2 .pkl files written here store the metadata as JSON under this key.
METADATA_KEY = "resnet_backbone"


def write_weights(path: str | os.PathLike, checkpoint: Checkpoint, format: str | None = None) -> str:
    """Write `checkpoint` in the default format for the suffix of `path`, or in another that the suffix allows.

    Returns:
        What the reader must be told because the format omits it; empty if the metadata is included.

    Raises:
        InputError: the suffix matches no format, or the format cannot hold this network.
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    write = _WRITERS[output_format(path, format)]
    try:
        return write(path, checkpoint)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror or error}). Choose another place.") from error


def output_format(path: Path, format: str | None) -> str:
    """Choose the format for `path`; raises InputError if its suffix matches no format or a different one."""
    allowed = _SUFFIXES.get(path.suffix.lower())
    if allowed is None:
        raise InputError(f"{path} ends in {path.suffix or 'no suffix'}, expected one of {', '.join(_SUFFIXES)}.")
    if format is not None and format not in allowed:
        raise InputError(f"a {path.suffix} file is written as {' or '.join(allowed)}, not as {format}. Change either.")
    return format or allowed[0]


def _write_own(path: Path, checkpoint: Checkpoint) -> str:
    write_checkpoint(path, Checkpoint(checkpoint.model, checkpoint.metadata))
    return ""


def _write_safetensors(path: Path, checkpoint: Checkpoint) -> str:
    # Copy, because the library rejects tensors that share memory or are not contiguous.
    tensors = {name: _plain(tensor).clone() for name, tensor in checkpoint.model.items()}
    header = {"format": "pt", METADATA_KEY: json.dumps(checkpoint.metadata.to_dict())}
    with atomic_write(path) as out:
        out.write(safetensors.torch.save(tensors, header))
    return ""


def _write_torchvision(path: Path, checkpoint: Checkpoint) -> str:
    metadata = checkpoint.metadata
    _refuse_detector(metadata, "torchvision's format")
    # torchvision, whose networks use the defaults, would silently load the file and compute something else.
    for name, theirs in HIDDEN_ARGUMENTS.items():
        ours = metadata.arguments.get(name, theirs)
        if ours != theirs and (name != "stride_in_1x1" or has_bottleneck_blocks(checkpoint.model)):
            raise InputError(
                f"this {metadata.architecture} has {name}={ours}, torchvision's has {theirs}: with the same tensors it "
                "would compute something else. Write .pth, .pkl or .safetensors in our own or Detectron2's format."
            )
    with atomic_write(path) as out:
        torch.save({name: _plain(tensor) for name, tensor in checkpoint.model.items()}, out)
    return f"{path.name} does not say how it was trained: {describe(preprocessing_of(metadata))}."


def _write_detectron2(path: Path, checkpoint: Checkpoint) -> str:
    metadata = checkpoint.metadata
    _refuse_detector(metadata, "Detectron2's backbone format")
    # Leave out num_batches_tracked: Detectron2's frozen batch norm has no such entry.
    names = {name: detectron2_name(name) for name in checkpoint.model if not name.endswith("num_batches_tracked")}
    shape = tuple(checkpoint.model["conv1.weight"].shape[1:]) if "conv1.weight" in checkpoint.model else ()
    strange = [name for name, theirs in names.items() if theirs is None]
    # Detectron2 projects where the shape changes (option B); if res3's first block has no projection, it is A or plain.
    if (
        strange
        or shape != (3, 7, 7)
        or "layer2.0.downsample.0.weight" not in names
        or "layer1.1.downsample.0.weight" in names
    ):
        raise InputError(
            f"Detectron2 has no network like {metadata.architecture}"
            f"{f' (nothing for {some(strange)})' if strange else ''}: it builds ResNets, ResNeXts and wide ResNets "
            "for ImageNet with projection shortcuts. Write .pth or .safetensors."
        )
    payload = {
        "model": {theirs: _to_numpy(checkpoint.model[name]) for name, theirs in names.items()},
        "__author__": "resnet_backbone",
        "matching_heuristics": True,
        METADATA_KEY: json.dumps(metadata.to_dict()),
    }
    with atomic_write(path) as out:
        pickle.dump(payload, out, protocol=4)
    mean, std = (json.dumps(list(values)).replace(" ", "") for values in (metadata.pixel_mean, metadata.pixel_std))
    return (
        f"Detectron2 does not read how {path.name} was trained; set INPUT.FORMAT {metadata.channel_order} "
        f"MODEL.PIXEL_MEAN {mean} MODEL.PIXEL_STD {std} "
        f"MODEL.RESNETS.STRIDE_IN_1X1 {metadata.arguments.get('stride_in_1x1', False)}"
    )


def _refuse_detector(metadata: Metadata, format: str) -> None:
    if metadata.kind != "classifier":
        raise InputError(
            f"this is a {metadata.kind}, {format} takes classifiers. Write .pth, which Detectron2 loads as it is, or "
            ".safetensors, or .onnx. For TorchScript, trace the detector with detectron2.export.TracingAdapter "
            "(docs/weights.md, Exporting a detector)."
        )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _to_numpy(tensor: Tensor) -> np.ndarray:
    # NumPy lacks bfloat16; float32 holds the same values.
    return _plain(tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _write_onnx(path: Path, checkpoint: Checkpoint) -> str:
    error = write_onnx(path, checkpoint)
    return (
        f"{path.name} takes RGB images in 0…255, its preprocessing is part of the graph; onnxruntime's logits differ "
        f"from torch's by {error:.0e} of the largest"
    )


_WRITERS: dict[str, Callable[[Path, Checkpoint], str]] = {
    OWN: _write_own,
    "torchvision": _write_torchvision,
    "detectron2": _write_detectron2,
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
}
# The formats allowed for each suffix; the first is the default.
_SUFFIXES = {
    ".pth": (OWN, "torchvision"),
    ".pkl": ("detectron2",),
    ".safetensors": ("safetensors",),
    ".onnx": ("onnx",),
}

WRITTEN_FORMATS = tuple(_WRITERS)
