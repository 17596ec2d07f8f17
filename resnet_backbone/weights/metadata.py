"""What a checkpoint says about its weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from resnet_backbone.errors import InputError

KINDS = ("classifier", "detector")
CHANNEL_ORDERS = ("RGB", "BGR")
NORM_STATISTICS = ("none", "never", "running", "precise")


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What must be known to use a file of weights.

    Attributes:
        kind: "classifier" (parameter names as torchvision's) or "detector" (names of the Detectron2 model).
        architecture: the network's name in the catalogue.
        arguments: what the network was built with beyond its name, e.g. `{"width": 0.25, "stride_in_1x1": False}`.
        channel_order: "RGB" or "BGR", the order in which the network was fed.
        pixel_mean: subtracted from each channel, in that order, in the range 0…255.
        pixel_std: each channel is divided by it after the subtraction, in the range 0…255.
        norm_statistics: "none" (no batch normalisation in the network), "never" (never estimated), "running" (averages
            kept in training) or "precise" (computed over training images with the weights fixed).
        norm_epsilon: epsilon of the batch normalisation; None where there is none.
        class_names: in the order of the outputs.
        crop: height and width in pixels of the training images; None for detectors.
        origin: where the weights come from (versions, data set, iterations, seed, accuracy); plain values, for reading.
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

    def __post_init__(self) -> None:
        for name, allowed in (
            ("kind", KINDS),
            ("channel_order", CHANNEL_ORDERS),
            ("norm_statistics", NORM_STATISTICS),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"metadata: {name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}.")
        for name in ("pixel_mean", "pixel_std"):
            value = getattr(self, name)
            if len(value) != 3 or not all(isinstance(v, (int, float)) for v in value):
                raise InputError(f"metadata: {name} is {value!r}, expected three numbers in the range 0…255.")
        if min(self.pixel_std) <= 0:
            raise InputError(f"metadata: pixel_std is {self.pixel_std!r}, expected numbers above 0.")

    def to_dict(self) -> dict[str, Any]:
        """Plain containers and numbers only, so that the file can be read without executing anything."""
        plain = asdict(self)
        for name in ("pixel_mean", "pixel_std", "class_names", "crop"):
            plain[name] = None if plain[name] is None else list(plain[name])
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Metadata":
        """The inverse of `to_dict`; raises InputError that names a missing, unknown or impossible entry."""
        known = {f.name for f in fields(cls)}
        required = known - {"crop", "origin"}
        if missing := sorted(required - set(plain)):
            raise InputError(f"metadata lacks {', '.join(missing)}.")
        if unknown := sorted(set(plain) - known):
            raise InputError(f"metadata has entries that this version does not know: {', '.join(unknown)}.")
        values = dict(plain)
        for name in ("pixel_mean", "pixel_std", "class_names", "crop"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return cls(**values)

    def describe(self) -> str:
        """One line for the log."""
        arguments = ", ".join(f"{k}={v}" for k, v in sorted(self.arguments.items()))
        mean = ", ".join(f"{v:g}" for v in self.pixel_mean)
        std = ", ".join(f"{v:g}" for v in self.pixel_std)
        return (
            f"{self.kind} {self.architecture}({arguments}), {self.channel_order}, mean [{mean}], std [{std}], "
            f"{len(self.class_names)} classes, batch norm statistics: {self.norm_statistics}"
        )
