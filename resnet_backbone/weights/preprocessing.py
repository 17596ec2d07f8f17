"""Preprocessing of networks of known origin, and the source of each value for the given weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from resnet_backbone.errors import InputError
from resnet_backbone.weights.architectures import Architecture, MissingMetadata
from resnet_backbone.weights.metadata import Metadata

IMAGENET = {
    "channel_order": "RGB",
    "pixel_mean": (123.675, 116.28, 103.53),
    "pixel_std": (58.395, 57.12, 57.375),
    "stride_in_1x1": False,
}
# As Detectron2 feeds MSRA's networks; Caffe2's Detectron subtracted (102.9801, 115.9465, 122.7717).
MSRA = {
    "channel_order": "BGR",
    "pixel_mean": (103.53, 116.28, 123.675),
    "pixel_std": (1.0, 1.0, 1.0),
    "stride_in_1x1": True,
}
# Detectron2's X-101-32x8d.pkl (its model zoo's configs say so).
_CAFFE2_RESNEXT = {**MSRA, "pixel_std": (57.375, 57.12, 58.395), "stride_in_1x1": False}
# VGG's published mean, which Keras adopted for its ResNets.
_VGG_MEAN = {**MSRA, "pixel_mean": (103.939, 116.779, 123.68)}
# Per-channel means of the mean image published with MSRA's Caffe networks.
_MSRA_MEAN_IMAGE = {**MSRA, "pixel_mean": (103.0626, 115.9029, 123.1516)}
_HALF = {**IMAGENET, "pixel_mean": (127.5, 127.5, 127.5), "pixel_std": (127.5, 127.5, 127.5)}

PRESETS = {"torchvision": IMAGENET, "msra": MSRA}

_VGGS = ("vgg16", "vgg16_bn", "vgg19", "vgg19_bn")
_BOTTLENECKS = ("resnet50", "resnet101", "resnet152")
_BOTH = (
    *("resnet18", "resnet34", *_BOTTLENECKS, "resnext50_32x4d", "resnext101_32x8d"),
    *("wide_resnet50_2", "wide_resnet101_2", *_VGGS),
)
# The networks that each format's library publishes, with the one preprocessing that all their weights share. timm has
# no weights for preact_resnet152, hence no known preprocessing.
_KNOWN: dict[str, dict[str, Mapping[str, Any]]] = {
    "torchvision": dict.fromkeys(_BOTH, IMAGENET),
    "timm": {**dict.fromkeys(_VGGS, IMAGENET), "preact_resnet50": _HALF, "preact_resnet101": _HALF},
    "detectron2": {},
    "caffe2": {**dict.fromkeys(_BOTTLENECKS, MSRA), "resnext101_32x8d": _CAFFE2_RESNEXT},
    "keras": dict.fromkeys((*_BOTTLENECKS, "vgg16", "vgg19"), _VGG_MEAN),
    "caffe": {**dict.fromkeys(_BOTTLENECKS, _MSRA_MEAN_IMAGE), "vgg16": _VGG_MEAN, "vgg19": _VGG_MEAN},
}

# The required facts, as the tool's flags.
FLAGS = {
    "channel_order": "--channel-order",
    "pixel_mean": "--pixel-mean",
    "pixel_std": "--pixel-std",
    "stride_in_1x1": "--stride-in-1x1",
}


@dataclass(frozen=True)
class Preprocessing:
    """What is known about how weights were trained.

    Attributes:
        values: keyed by the names in `FLAGS`.
        sources: where each value comes from, under the same keys.
    """

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def add(self, values: Mapping[str, Any], source: str) -> None:
        """Add values that are not known yet."""
        for name, value in values.items():
            if name not in self.values:
                self.values[name], self.sources[name] = value, source


def settle(
    architecture: Architecture,
    *,
    format: str,
    container: str,
    has_bottlenecks: bool,
    overrides: Mapping[str, Any],
    in_file: Mapping[str, Any],
    preset: str | None,
    source: str,
) -> Preprocessing:
    """Settle every entry of `FLAGS` that matters to this network, each with its source.

    Args:
        architecture: the network.
        format: one of `names.FORMATS`.
        container: as in `readers.TensorFile`.
        has_bottlenecks: whether the position of the stride matters.
        overrides: the user's values, which take precedence over the preset and the format's convention.
        in_file: the file's own values, which must not be contradicted.
        preset: a name in `PRESETS` or None.
        source: the file's name in messages.

    Raises:
        InputError: a value is unknown, or the user contradicts the file.
    """
    in_preset = preset_values(preset)
    for name, value in in_file.items():
        refuse_contradiction(name, overrides.get(name, in_preset.get(name)), value, source)
    known = Preprocessing()
    known.add(in_file, "the file")
    known.add(overrides, "override")
    known.add(in_preset, f"--preprocessing {preset}")
    # torchvision publishes only .pth; one of timm's resnet34 weights, also in .safetensors, was trained with 0.5.
    two_origins = (format, container, architecture.name) == ("torchvision", "safetensors", "resnet34")
    if _is_published(architecture) and not two_origins:
        convention = _KNOWN[format].get(architecture.name, {})
        known.add(convention, f"by convention of {format}'s published weights")
    wanted = [name for name in FLAGS if name != "stride_in_1x1" or has_bottlenecks]
    if missing := [name for name in wanted if name not in known.values]:
        reason = "of which timm hands out weights with two preprocessings" if two_origins else "which does not say it"
        presets = " or ".join(f"--preprocessing {name} ({describe(values)})" for name, values in PRESETS.items())
        raise MissingMetadata(
            f"{source} holds {architecture.name} in {format}'s names, {reason}: {', '.join(missing)} must be known.",
            f"Say what it was trained with by {' '.join(FLAGS[name] for name in missing)}, or all at once by "
            f"{presets}.",
            missing,
        )
    return Preprocessing({n: known.values[n] for n in wanted}, {n: known.sources[n] for n in wanted})


def preprocessing_of(metadata: Metadata) -> dict[str, Any]:
    """Extract the entries of `FLAGS` that `metadata` has."""
    values = {name: getattr(metadata, name, metadata.arguments.get(name)) for name in FLAGS}
    return {name: value for name, value in values.items() if value is not None}


def preset_values(name: str | None) -> Mapping[str, Any]:
    """The values that a name in `PRESETS` sets; empty for None."""
    if name is not None and name not in PRESETS:
        raise InputError(f"--preprocessing is {name}, expected one of {', '.join(PRESETS)}.")
    return {} if name is None else PRESETS[name]


def refuse_contradiction(name: str, override: Any, found: Any, source: str) -> None:
    """Raise InputError if the user contradicts the file."""
    if override is None:
        return
    if isinstance(found, (tuple, list)):
        same = all(abs(a - b) < 1e-3 for a, b in zip(override, found, strict=True))
    else:
        same = override == found
    if not same:
        raise InputError(
            f"{FLAGS.get(name, name)} is {_text(override)}, but {source} itself says {_text(found)}. "
            "Leave the flag out."
        )


def describe(values: Mapping[str, Any]) -> str:
    """Format `values` in one line, for messages."""
    texts = {
        "channel_order": "{}",
        "pixel_mean": "mean {}",
        "pixel_std": "std {}",
    }
    parts = [text.format(_text(values[name])) for name, text in texts.items() if name in values]
    if "stride_in_1x1" in values:
        parts.append(f"stride in the {'first 1×1' if values['stride_in_1x1'] else '3×3'}")
    return ", ".join(parts)


def _is_published(architecture: Architecture) -> bool:
    """Whether this is the standard network: nobody publishes narrow ones or ones with other shortcuts."""
    return architecture.arguments["width"] == 1 and architecture.arguments.get("shortcut", "B") == "B"


def _text(value: Any) -> str:
    return f"[{', '.join(f'{v:g}' for v in value)}]" if isinstance(value, (tuple, list)) else str(value)
