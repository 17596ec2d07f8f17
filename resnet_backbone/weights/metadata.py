"""Metadata that a checkpoint stores about its weights."""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from resnet_backbone.errors import InputError

KINDS = ("classifier", "detector")
CHANNEL_ORDERS = ("RGB", "BGR")
NORM_STATISTICS = ("none", "never", "running", "precise", "folded")
_MAPPINGS = ("arguments", "origin", "config")


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The facts needed to use a file of weights.

    Attributes:
        kind: "classifier" (torchvision's parameter names) or "detector" (the Detectron2 model's names).
        architecture: the network's catalogue name.
        arguments: build arguments beyond the name, e.g. `{"width": 0.25, "stride_in_1x1": False}`.
        channel_order: "RGB" or "BGR", the order of the network's input.
        pixel_mean: subtracted from each channel, in that order, in the range 0…255.
        pixel_std: divides each channel after the subtraction, in the range 0…255.
        norm_statistics: "none" (the network has no batch norm), "never" (never estimated), "running" (averages
            kept during training), "precise" (computed over training images with fixed weights) or "folded" (whoever
            wrote the weights folded them into scale and shift, leaving mean 0 and variance 1 - epsilon).
        norm_epsilon: the batch norm epsilon; None if there is no batch norm.
        class_names: in output order.
        crop: height and width in pixels of the training images; None for detectors.
        origin: provenance of the weights (versions, data set, iterations, seed, accuracy); plain, informational values.
        config: a detector's configuration, dotted keys to values: of all that decides what it is and how it is tested.
            Empty for classifiers, and for detectors from before this was recorded.

    `arguments`, `origin` and `config` hold strings, numbers, booleans, None, and lists, tuples and dicts of these;
    NumPy numbers become Python numbers.

    Raises:
        InputError: an entry is invalid; the message gives its name, its value and what was expected.
    """

    kind: str
    architecture: str
    arguments: Mapping[str, Any]
    channel_order: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    norm_statistics: str
    norm_epsilon: float | None
    class_names: tuple[str, ...]
    crop: tuple[int, int] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def expect(name: str, fits: bool, expected: str) -> None:
            if not fits:
                raise InputError(f"metadata: {name} is {getattr(self, name)!r}, expected {expected}.")

        for name, allowed in (
            ("kind", KINDS),
            ("channel_order", CHANNEL_ORDERS),
            ("norm_statistics", NORM_STATISTICS),
        ):
            expect(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        expect("architecture", isinstance(self.architecture, str) and bool(self.architecture), "a network's name")
        for name in ("pixel_mean", "pixel_std"):
            expect(name, _are_numbers(getattr(self, name), 3), "three numbers in the range 0…255")
        expect("pixel_std", min(self.pixel_std) > 0, "numbers above 0")
        expect("norm_epsilon", self.norm_epsilon is None or _are_numbers([self.norm_epsilon], 1), "a number or None")
        names = self.class_names
        expect("class_names", isinstance(names, tuple) and all(isinstance(n, str) for n in names), "a tuple of names")
        crop = self.crop
        expect(
            "crop",
            crop is None or (_are_numbers(crop, 2) and all(isinstance(v, int) and v > 0 for v in crop)),
            "height and width in pixels, or None",
        )
        for name in _MAPPINGS:
            expect(name, isinstance(getattr(self, name), Mapping), "values by name")
            object.__setattr__(self, name, _plain(getattr(self, name), name))

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain containers and numbers, so that the file can be read without executing anything."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("pixel_mean", "pixel_std", "class_names", "crop"):
            plain[name] = None if plain[name] is None else list(plain[name])
        for name in _MAPPINGS:
            plain[name] = dict(plain[name])
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Metadata":
        """Invert `to_dict`; raises an InputError that names a missing, unknown or invalid entry."""
        if not isinstance(plain, Mapping):
            raise InputError(f"metadata is {type(plain).__name__}, expected entries by name.")
        known = {f.name for f in fields(cls)}
        required = known - {"crop", "origin", "config"}
        if missing := sorted(required - set(plain)):
            raise InputError(f"metadata lacks {', '.join(missing)}.")
        if unknown := sorted(map(str, set(plain) - known)):
            raise InputError(f"metadata has entries that this version does not know: {', '.join(unknown)}.")
        values = dict(plain)
        for name in ("pixel_mean", "pixel_std", "class_names", "crop"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**values)

    def describe(self) -> str:
        """Describe the metadata in one line for the log."""
        arguments = ", ".join(f"{k}={v}" for k, v in sorted(self.arguments.items()))
        mean = ", ".join(f"{v:g}" for v in self.pixel_mean)
        std = ", ".join(f"{v:g}" for v in self.pixel_std)
        return (
            f"{self.kind} {self.architecture}({arguments}), {self.channel_order}, mean [{mean}], std [{std}], "
            f"{len(self.class_names)} classes, batch norm statistics: {self.norm_statistics}"
        )


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, (tuple, list))
        and len(values) == count
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    )


def _plain(value: Any, name: str) -> Any:
    """Convert `value` to types that `torch.load(weights_only=True)` reads back, which excludes subclasses."""
    if value is None or isinstance(value, bool):
        return value
    for kind, plain in ((str, str), (numbers.Integral, int), (numbers.Real, float)):
        if isinstance(value, kind):
            return plain(value)
    if isinstance(value, Mapping):
        return {_plain(k, name): _plain(v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(_plain(v, name) for v in value)
    raise InputError(f"metadata: {name} is a {type(value).__name__}, expected text, numbers, lists or dicts of them.")
