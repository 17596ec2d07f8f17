"""The shared base of ResNet and VGG: named stages; any contiguous run of them can be built and frozen."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from resnet_backbone.errors import InputError
from resnet_backbone.networks.norms import freeze_batch_norm


class FeatureInfo(NamedTuple):
    """Shape of a stage's output: channels, and image pixels per output pixel."""

    channels: int
    stride: int


def scale_channels(channels: int, width: float) -> int:
    """Return `channels * width` rounded to the nearest multiple of 8 (halves up), at least 8."""
    if width <= 0:
        raise InputError(f"width is {width}, expected a positive factor such as 1.0 or 0.25")
    return max(8, int(channels * width / 8 + 0.5) * 8)


class StagedNetwork(nn.Module):
    """A network of named stages; subclasses build and run the modules of the stages in `stage_names`.

    `all_stages` names the stages of the whole network, input side first. `stages=None` builds all of them and the
    classifier; a contiguous run of names builds only those stages.

    Attributes:
        stage_names: the stages that were built, in execution order.
        has_classifier: whether the classifier was built.
        feature_info: output shapes of the stages in `stage_names` that produce feature maps.
    """

    def __init__(self, all_stages: Sequence[str], stages: Sequence[str] | None) -> None:
        super().__init__()
        self.all_stages = tuple(all_stages)
        self.stage_names = self.all_stages if stages is None else _contiguous_run(self.all_stages, stages)
        self.has_classifier = stages is None
        self.feature_info: dict[str, FeatureInfo] = {}

    def stage_modules(self, name: str) -> list[nn.Module]:
        """Return the modules of stage `name` in execution order, at least those with parameters or statistics."""
        if name not in self.stage_names:
            raise InputError(f"no stage {name!r} was built, expected one of {', '.join(self.stage_names)}")
        return self._stage_modules(name)

    def stages_up_to(self, out_features: Sequence[str]) -> tuple[str, ...]:
        """Return the stages that `out_features` need: all up to the last one."""
        if isinstance(out_features, str):
            raise InputError(f"out_features is the string {out_features!r}, expected a sequence of names")
        unknown = [name for name in out_features if name not in self.feature_info]
        if unknown:
            raise InputError(
                f"this network has no feature {', '.join(map(repr, unknown))}, "
                f"expected some of {', '.join(self.feature_info)}"
            )
        return self.stage_names[: max([0, *(self.stage_names.index(name) + 1 for name in out_features)])]

    def require_classifier(self) -> None:
        """Raise if the network takes images but was built without the classifier."""
        if not self.has_classifier and self.stage_names[0] == self.all_stages[0]:
            raise RuntimeError(
                f"this network was built with stages {', '.join(self.stage_names)} and has no classifier: "
                "call forward_features, or build it with stages=None"
            )

    def freeze(self, count: int) -> "StagedNetwork":
        """Freeze the first `count` stages of the whole network (those built here), and return the network.

        `count` follows Detectron2's FREEZE_AT: 0 freezes nothing, 1 the stem (VGG: conv1), 2 the next stage too, etc.
        Parameters stop requiring gradients; batch normalization becomes FrozenBatchNorm2d under the same names.
        """
        if not 0 <= count <= len(self.all_stages):
            raise InputError(
                f"cannot freeze {count} stages: expected 0 to {len(self.all_stages)} ({', '.join(self.all_stages)})"
            )
        stages = [name for name in self.all_stages[:count] if name in self.stage_names]
        frozen = {module for name in stages for module in self.stage_modules(name)}
        for parent in list(self.modules()):
            for name, module in parent.named_children():
                if module in frozen:
                    setattr(parent, name, freeze_batch_norm(module.requires_grad_(False)))
        return self


def _contiguous_run(all_stages: tuple[str, ...], stages: Sequence[str]) -> tuple[str, ...]:
    """Return `stages` as a tuple after checking that they are consecutive in `all_stages`."""
    if isinstance(stages, str):
        raise InputError(f"stages is the string {stages!r}, expected a sequence of names such as ({stages!r},)")
    run = tuple(stages)
    start = all_stages.index(run[0]) if run and run[0] in all_stages else 0
    if not run or run != all_stages[start : start + len(run)]:
        raise InputError(f"stages is {run}, expected one or more names that follow one another in {all_stages}")
    return run
