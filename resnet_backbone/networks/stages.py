"""What every network here is: a run of named stages, of which any contiguous part can be built."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from resnet_backbone.errors import InputError
from resnet_backbone.networks.norms import freeze_batch_norm


class FeatureInfo(NamedTuple):
    """Shape of a stage's output: channels, and pixels of the image per pixel of the output."""

    channels: int
    stride: int


def scale_channels(channels: int, width: float) -> int:
    """Return `channels * width` rounded to the nearest multiple of 8 (halves up), at least 8."""
    if width <= 0:
        raise InputError(f"width is {width}, expected a positive factor such as 1.0 or 0.25")
    return max(8, int(channels * width / 8 + 0.5) * 8)


class StagedNetwork(nn.Module):
    """A network as an ordered run of named stages, each an ordered list of submodules.

    `all_stages` names the stages of the whole network, input side first. `stages=None` builds all of them and the
    classifier; a contiguous run of names builds these stages alone. A subclass makes the modules of the stages in
    `stage_names` and enters each with `_add_stage`; running, freezing and `feature_info` follow from that table.
    """

    stage_names: tuple[str, ...]
    feature_info: dict[str, FeatureInfo]

    def __init__(self, all_stages: Sequence[str], stages: Sequence[str] | None) -> None:
        super().__init__()
        self.all_stages = tuple(all_stages)
        self.stage_names = self.all_stages if stages is None else _contiguous_run(self.all_stages, stages)
        self.has_classifier = stages is None
        self.feature_info = {}
        self._stage_paths: dict[str, tuple[str, ...]] = {}

    def _add_stage(self, name: str, paths: Sequence[str], feature: FeatureInfo | None = None) -> None:
        """Enter a built stage: the names of its submodules as they run, and its output's shape if spatial."""
        self._stage_paths[name] = tuple(paths)
        if feature is not None:
            self.feature_info[name] = feature

    def stage_modules(self, name: str) -> list[nn.Module]:
        """Return the submodules that hold the parameters and statistics of the stage `name`."""
        if name not in self.stage_names:
            raise InputError(f"no stage {name!r} was built, expected one of {', '.join(self.stage_names)}")
        modules = [self.get_submodule(path) for path in self._stage_paths[name]]
        return [module for module in modules if module.state_dict()]

    def run_stage(self, name: str, x: Tensor) -> Tensor:
        """Apply one stage to the output of the stage before it (the first one: to images)."""
        for path in self._stage_paths[name]:
            x = self.get_submodule(path)(x)
        return x

    def run_classifier(self, x: Tensor) -> Tensor:
        """Turn the last stage's output into logits `(N, num_classes)`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(N, num_classes)` of normalized images `(N, 3, H, W)`.

        A run of stages that does not begin at the first one, such as a detector's per-region head, has no images to
        classify: it takes the output of the stage before it and returns the output of its last.
        """
        if not self.has_classifier and self.stage_names[0] == self.all_stages[0]:
            raise RuntimeError(
                f"this network was built with stages {', '.join(self.stage_names)} and has no classifier: "
                "call forward_features, or build it with stages=None"
            )
        for name in self.stage_names:
            x = self.run_stage(name, x)
        return self.run_classifier(x) if self.has_classifier else x

    def forward_features(self, x: Tensor, out_features: Sequence[str]) -> dict[str, Tensor]:
        """Return the outputs of the stages `out_features`, in that order; no stage after the last of them is computed.

        `x` holds images `(N, 3, H, W)`, or, where the first stage was not built, the output of the stage before.
        """
        if isinstance(out_features, str):
            raise InputError(f"out_features is the string {out_features!r}, expected a sequence of names")
        unknown = [name for name in out_features if name not in self.feature_info]
        if unknown:
            raise InputError(
                f"this network has no feature {', '.join(map(repr, unknown))}, "
                f"expected some of {', '.join(self.feature_info)}"
            )
        outputs: dict[str, Tensor] = {}
        for name in self.stage_names:
            if len(outputs) == len(set(out_features)):
                break
            x = self.run_stage(name, x)
            if name in out_features:
                outputs[name] = x
        return {name: outputs[name] for name in out_features}

    def freeze(self, count: int) -> "StagedNetwork":
        """Fix the first `count` stages of the whole network (those of them built here), and return the network.

        Detectron2's meaning of FREEZE_AT: 0 nothing, 1 the stem (VGG: conv1), 2 the next stage too, and so on.
        Parameters stop requiring gradients; batch normalization becomes FrozenBatchNorm2d under the same names.
        """
        if not 0 <= count <= len(self.all_stages):
            raise InputError(
                f"cannot freeze {count} stages: expected 0 to {len(self.all_stages)} ({', '.join(self.all_stages)})"
            )
        for name in self.all_stages[:count]:
            for path in self._stage_paths.get(name, ()):
                module = self.get_submodule(path).requires_grad_(False)
                parent, _, child = path.rpartition(".")
                setattr(self.get_submodule(parent), child, freeze_batch_norm(module))
        return self


def _contiguous_run(all_stages: tuple[str, ...], stages: Sequence[str]) -> tuple[str, ...]:
    """Return `stages` as a tuple after checking that they follow one another in `all_stages`."""
    if isinstance(stages, str):
        raise InputError(f"stages is the string {stages!r}, expected a sequence of names such as ({stages!r},)")
    run = tuple(stages)
    start = all_stages.index(run[0]) if run and run[0] in all_stages else 0
    if not run or run != all_stages[start : start + len(run)]:
        raise InputError(f"stages is {run}, expected one or more names that follow one another in {all_stages}")
    return run
