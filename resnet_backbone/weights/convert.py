"""Read other libraries' weights as our checkpoints, accounting for every tensor."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_backbone.errors import InputError
from resnet_backbone.networks import HIDDEN_ARGUMENTS, accepted_arguments
from resnet_backbone.weights.architectures import Architecture, find_architecture, has_bottleneck_blocks
from resnet_backbone.weights.checkpoint import Checkpoint, CheckpointError
from resnet_backbone.weights.metadata import Metadata
from resnet_backbone.weights.names import KeyMapping, map_keys, recognize, some
from resnet_backbone.weights.prefixes import identify_under_prefix
from resnet_backbone.weights.preprocessing import (
    describe,
    preprocessing_of,
    preset_values,
    refuse_contradiction,
    settle,
)
from resnet_backbone.weights.readers import TensorFile, read_tensors
from resnet_backbone.weights.writers import METADATA_KEY, OWN, output_format, write_weights

# Every network here is built with this epsilon. Any difference from another one is folded into the running variance.
EPSILON = 1e-5
_EPSILONS = {"keras": 1.001e-5}


@dataclass(frozen=True)
class Conversion:
    """The result of converting a file.

    Attributes:
        checkpoint: weights under our names, with their metadata.
        source: the file's name.
        container: the kind of file (`readers.TensorFile`).
        format: the naming scheme of its tensors: one of `names.FORMATS`, or "resnet_backbone".
        mapped: names in the file to our names; several map to one where a bias is folded into a norm.
        dropped: names in the file to the reason the network does not need them.
        said_by: the source of each preprocessing entry.
        prefix: what stands before the network's names in the file, such as "module."; "" for nothing.
    """

    checkpoint: Checkpoint
    source: str
    container: str
    format: str
    mapped: Mapping[str, str]
    dropped: Mapping[str, str]
    said_by: Mapping[str, str]
    prefix: str = ""

    def summary(self) -> str:
        """Summarize the findings in a few lines for the terminal or the log."""
        metadata = self.checkpoint.metadata
        classes = f"{len(metadata.class_names)} classes" if metadata.class_names else "no classifier"
        arguments = ", ".join(f"{k}={v}" for k, v in sorted(metadata.arguments.items()))
        lines = [
            f"{self.source}: {self.container} file with {self.format}'s names",
            f"network: {metadata.architecture}({arguments}), {classes}, norm statistics: {metadata.norm_statistics}",
            f"tensors: {len(self.mapped)} mapped, {len(self.dropped)} dropped, none left over",
        ]
        if self.prefix:
            lines.append(f"prefix: {self.prefix} was taken off the names of {len(self.mapped)} tensors")
        for reason in dict.fromkeys(self.dropped.values()):
            names = [name for name, why in self.dropped.items() if why == reason]
            lines.append(f"  {len(names)} dropped ({reason}): {some(names)}")
        values = {name: getattr(metadata, name, metadata.arguments.get(name)) for name in self.said_by}
        for who in dict.fromkeys(self.said_by.values()):
            said = {name: values[name] for name in self.said_by if self.said_by[name] == who}
            lines.append(f"preprocessing: {describe(said)} ({who})")
        return "\n".join(lines)


def read_weights(
    path: str | os.PathLike,
    *,
    architecture: str | None = None,
    preprocessing: str | None = None,
    channel_order: str | None = None,
    pixel_mean: tuple[float, float, float] | None = None,
    pixel_std: tuple[float, float, float] | None = None,
    stride_in_1x1: bool | None = None,
    norm_epsilon: float | None = None,
) -> Conversion:
    """Read and identify weights in this project's format or any in `names.FORMATS`.

    An override applies where the file itself says nothing, and takes precedence over its format's convention.

    Args:
        path: the file.
        architecture: catalogue name, where the tensors are ambiguous.
        preprocessing: a name in `preprocessing.PRESETS`, which sets the next four at once.
        channel_order: "RGB" or "BGR".
        pixel_mean, pixel_std: in that order, in the range 0…255.
        stride_in_1x1: whether a bottleneck's stride is in its first 1×1 convolution.
        norm_epsilon: the batch norm epsilon that the weights were trained with.

    Raises:
        CheckpointError: the file cannot be read, has unexplained tensors, or fits no network.
        InputError: a required fact about the weights is unknown or contradicts the file.
    """
    overrides = {
        "channel_order": channel_order,
        "pixel_mean": None if pixel_mean is None else tuple(pixel_mean),
        "pixel_std": None if pixel_std is None else tuple(pixel_std),
        "stride_in_1x1": stride_in_1x1,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    file, source = read_tensors(path), str(path)
    if (own := file.checkpoint) is not None:
        metadata, left_out = own.metadata, {} if own.trainer is None else {"trainer": "the optimizer's state and more"}
    else:
        metadata, left_out = _metadata_beside(file, source), {}
    if metadata is not None:
        for name, value in preprocessing_of(metadata).items():
            refuse_contradiction(name, overrides.get(name, preset_values(preprocessing).get(name)), value, source)
        refuse_contradiction("--norm-epsilon", norm_epsilon, metadata.norm_epsilon, source)
        refuse_contradiction("--arch", architecture, metadata.architecture, source)
        return _read_own(file, metadata, source, left_out)
    return _read_foreign(file, source, architecture, preprocessing, overrides, norm_epsilon)


def convert(
    source: str | os.PathLike, target: str | os.PathLike, *, format: str | None = None, **overrides: Any
) -> tuple[Conversion, str]:
    """Read `source` with `read_weights(source, **overrides)` and write it to `target` with `write_weights`.

    Returns:
        The conversion, and what the reader of `target` must be told.
    """
    if os.path.exists(target) and os.path.exists(source) and os.path.samefile(source, target):
        raise InputError(f"{target} is the file to read. Give the result another name.")
    output_format(Path(target), format)  # fail before minutes of reading
    conversion = read_weights(source, **overrides)
    return conversion, write_weights(target, conversion.checkpoint, format)


def _read_foreign(
    file: TensorFile,
    source: str,
    architecture: str | None,
    preset: str | None,
    overrides: Mapping[str, Any],
    norm_epsilon: float | None,
) -> Conversion:
    """Convert another library's file, with metadata from its format's convention and the overrides."""
    prefix, network = identify_under_prefix(file, source, lambda part: _identify(part, source, architecture))
    format, keys, model, found = network.format, network.keys, network.model, network.found
    has_bottlenecks = has_bottleneck_blocks(model)
    if "stride_in_1x1" in overrides and not has_bottlenecks:
        raise InputError(
            f"--stride-in-1x1 is {overrides['stride_in_1x1']}, but {found.name} has no bottlenecks, whose stride it "
            "would be. Leave the flag out."
        )
    known = settle(
        found,
        format=format,
        container=file.container,
        has_bottlenecks=has_bottlenecks,
        overrides=overrides,
        in_file=_kept_in(network.tensors, keys.dropped),
        preset=preset,
        source=source,
    )
    # Arguments that do not affect the tensors keep everybody's defaults.
    accepted = accepted_arguments(found.name)
    arguments = {name: value for name, value in HIDDEN_ARGUMENTS.items() if name in accepted}
    if has_bottlenecks:
        arguments["stride_in_1x1"] = known.values["stride_in_1x1"]
    statistics = _norm_statistics(model, folded=network.folded)
    if norm_epsilon is not None and statistics in ("none", "folded"):
        raise InputError(
            f"--norm-epsilon is {norm_epsilon}, but {source} has no batch normalization with a variance of its own. "
            "Leave the flag out."
        )
    epsilon = _EPSILONS.get(format, EPSILON) if norm_epsilon is None else norm_epsilon
    if statistics != "folded":
        _take_up_epsilon(model, epsilon)
    metadata = Metadata(
        kind="classifier",
        architecture=found.name,
        arguments={**found.arguments, **arguments},
        channel_order=known.values["channel_order"],
        pixel_mean=known.values["pixel_mean"],
        pixel_std=known.values["pixel_std"],
        norm_statistics=statistics,
        norm_epsilon=None if statistics == "none" else EPSILON,
        # No format stores class names, and a data set's own names would imply an order that nobody vouches for.
        class_names=tuple(f"class {i}" for i in range(found.num_classes or 0)),
        origin={
            "converted_from": {
                "file": Path(source).name,
                "format": format,
                "norm_epsilon": None if statistics in ("none", "folded") else epsilon,
                "preprocessing": known.sources,
            }
        },
    )
    mapped = {prefix + name: ours for name, ours in keys.mapped.items()}
    dropped = {prefix + name: reason for name, reason in keys.dropped.items()}
    dropped |= {name: f"without the prefix {prefix}" for name in file.tensors if not name.startswith(prefix)}
    return Conversion(
        Checkpoint(model, metadata), source, file.container, format, mapped, dropped, known.sources, prefix
    )


class _Network(NamedTuple):
    """A network among a file's tensors: what they are called, and under our names."""

    tensors: Mapping[str, Tensor]
    format: str
    keys: KeyMapping
    model: dict[str, Tensor]
    folded: bool
    found: Architecture


def _identify(file: TensorFile, source: str, architecture: str | None) -> _Network:
    """Identify the one network that all the tensors make up; raises CheckpointError if they do not."""
    format = recognize(file.tensors)
    keys = _map_keys(format, file, source)
    model, folded = _in_our_layout(format, file, keys.mapped)
    return _Network(
        file.tensors, format, keys, model, folded, find_architecture(model, name=architecture, source=source)
    )


def _metadata_beside(file: TensorFile, source: str) -> Metadata | None:
    """The metadata that `write_weights` embedded in another format; None for a foreign file."""
    text = file.header.get(METADATA_KEY)
    if text is None:
        return None
    try:
        return Metadata.from_dict(json.loads(text))
    except (TypeError, ValueError) as error:  # InputError is a ValueError
        raise CheckpointError(
            f"{source}: its entry {METADATA_KEY} is not this project's metadata ({error}). Convert the "
            "weights again from where they came from."
        ) from error


def _read_own(file: TensorFile, metadata: Metadata, source: str, dropped: Mapping[str, str]) -> Conversion:
    """Return this project's own weights bit for bit, without computing anything."""
    format, mapped = OWN, {name: name for name in file.tensors}
    if file.container == "pickle":
        format, mapped = "detectron2", _map_keys("detectron2", file, source).mapped
    model = {ours: file.tensors[name] for name, ours in mapped.items()}
    said_by = dict.fromkeys(preprocessing_of(metadata), "the file's own metadata")
    return Conversion(Checkpoint(model, metadata), source, file.container, format, mapped, dropped, said_by)


def _map_keys(format: str, file: TensorFile, source: str) -> KeyMapping:
    """Apply `names.map_keys` to all tensors; raises CheckpointError for a leftover or duplicate."""
    keys = map_keys(format, file.tensors)
    if keys.unknown:
        raise CheckpointError(
            f"{source} has {len(keys.unknown)} tensors that {format}'s names do not explain "
            f"({some(keys.unknown)}); none is dropped without a reason. Take them out of the file if they are not "
            "needed, or give weights of a network in list_networks()."
        )
    seen: dict[str, str] = {}
    for name, ours in keys.mapped.items():
        if ours in seen:
            raise CheckpointError(
                f"{source} has both {seen[ours]} and {name} for the network's {ours}. Remove the one that is not meant."
            )
        seen[ours] = name
    return keys


def _in_our_layout(format: str, file: TensorFile, mapped: Mapping[str, str]) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors under our names and in our layout, and whether any norm lacked statistics."""
    arrange = {"keras": _from_keras, "timm": _from_timm}.get(format, lambda ours, tensor: tensor)
    model = {ours: arrange(ours, file.tensors[name]) for name, ours in mapped.items()}
    for ours in [name for name in model if name.endswith(".scale_factor")]:
        _divide_statistics(model, ours)
    folded = False
    if format == "caffe2":
        for ours in [name for name in model if _is_norm(name) and name.endswith(".weight")]:
            folded |= _add_folded_statistics(model, ours.removesuffix("weight"))
    if format in ("caffe2", "keras", "caffe"):
        for ours in [name for name in model if name.endswith(".bias")]:
            mean = f"{_norm_behind(ours)}.running_mean"
            # A mismatched shape is left for the comparison with the network to report.
            if mean in model and model[mean].shape == model[ours].shape:
                model[mean] = (model[mean].double() - model.pop(ours).double()).to(model[mean].dtype)
    return model, folded


def _take_up_epsilon(model: dict[str, Tensor], epsilon: float) -> None:
    """Fold the difference between the source's epsilon and ours into the variances, rounding once."""
    if epsilon != EPSILON:
        for ours in [name for name in model if name.endswith(".running_var")]:
            model[ours] = (model[ours].double() + (epsilon - EPSILON)).to(model[ours].dtype)


def _from_keras(ours: str, tensor: Tensor) -> Tensor:
    """Convert (H, W, in, out) kernels to (out, in, H, W), (in, out) to (out, in); our fc6 reads channel by channel."""
    if tensor.dim() == 4:
        return tensor.permute(3, 2, 0, 1).contiguous()
    if tensor.dim() != 2:
        return tensor
    if ours == "classifier.0.weight" and tensor.shape[0] % 49 == 0:
        tensor = tensor.view(7, 7, -1, tensor.shape[1]).permute(2, 0, 1, 3).reshape(tensor.shape)
    return tensor.t().contiguous()


def _from_timm(ours: str, tensor: Tensor) -> Tensor:
    """Undo timm's storing of fully connected layers as convolutions."""
    return tensor.flatten(1) if ours.startswith(("fc.", "classifier.")) and tensor.dim() == 4 else tensor


def _divide_statistics(model: dict[str, Tensor], scale_factor: str) -> None:
    """Divide Caffe's summed statistics by the divisor it stores with them."""
    norm = scale_factor.removesuffix("scale_factor")
    factor = model.pop(scale_factor).double()
    if factor.numel() != 1 or factor <= 0:
        raise CheckpointError(
            f"{norm}scale_factor is {factor.flatten().tolist()[:3]}, expected one number above 0: the statistics of "
            "this batch normalization were never estimated. Give weights of a trained network."
        )
    for name in (f"{norm}running_mean", f"{norm}running_var"):
        if name in model:
            model[name] = (model[name].double() / factor.view(())).to(model[name].dtype)


def _add_folded_statistics(model: dict[str, Tensor], norm: str) -> bool:
    """Give a norm with only scale and shift neutral statistics; return whether it was one.

    A variance of 1 - epsilon makes the divisor sqrt(variance + epsilon) exactly 1 in float32. Detectron2's frozen
    batch norm starts the same way.
    """
    if f"{norm}running_mean" in model or f"{norm}running_var" in model:
        return False
    weight = model[f"{norm}weight"]
    model[f"{norm}running_mean"] = torch.zeros_like(weight)
    model[f"{norm}running_var"] = torch.full_like(weight, 1 - EPSILON)
    return True


def _is_norm(ours: str) -> bool:
    module = ours.rpartition(".")[0]
    return module.endswith((".downsample.1", ".norm")) or module.rpartition(".")[2] in ("bn1", "bn2", "bn3")


def _norm_behind(ours: str) -> str | None:
    """The name of the norm after a residual network's convolution; None for anything else."""
    place, _, last = ours.rpartition(".")[0].rpartition(".")
    prefix = f"{place}." if place else ""
    if last in ("conv1", "conv2", "conv3"):
        return f"{prefix}bn{last[-1]}"
    return f"{place}.1" if last == "0" and place.endswith(".downsample") else None


def _norm_statistics(model: Mapping[str, Tensor], *, folded: bool) -> str:
    """Infer `Metadata.norm_statistics` from the values when the file does not state it."""
    norms = [name.removesuffix("running_var") for name in model if name.endswith(".running_var")]
    if not norms:
        return "none"
    if folded:
        return "folded"
    # The initial values, before any image: mean 0 and variance 1, or 1 - epsilon in Detectron2's frozen norm.
    untouched = all(
        not model[f"{norm}running_mean"].any() and ((model[f"{norm}running_var"] - 1).abs() <= 1.5 * EPSILON).all()
        for norm in norms
    )
    if not untouched:
        return "running"
    initial = all(
        ((model[f"{norm}weight"] == 0) | (model[f"{norm}weight"] == 1)).all() and not model[f"{norm}bias"].any()
        for norm in norms
    )
    return "never" if initial else "folded"


def _kept_in(tensors: Mapping[str, Tensor], dropped: Mapping[str, str]) -> dict[str, tuple[float, ...]]:
    """The pixel mean and standard deviation that older Detectron2 detectors store among their tensors."""
    names = [name for name in ("pixel_mean", "pixel_std") if name in dropped and tensors[name].numel() == 3]
    # float32 stores 103.53 as 103.52999878; rounding restores the original digits.
    return {name: tuple(round(value, 4) for value in tensors[name].flatten().tolist()) for name in names}
