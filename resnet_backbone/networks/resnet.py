"""Residual networks (He, Zhang, Ren, Sun 2015) and their relatives, with torchvision's parameter names."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from resnet_backbone.errors import InputError
from resnet_backbone.networks.blocks import Block, BlockOptions, changes_shape
from resnet_backbone.networks.norms import norm_factory
from resnet_backbone.networks.stages import FeatureInfo, StagedNetwork, scale_channels


class Stem(NamedTuple):
    """A network's first convolution, and whether 3×3 max pooling with stride 2 follows."""

    channels: int
    kernel_size: int
    stride: int
    padding: int
    pooling: bool


IMAGENET_STEM = Stem(channels=64, kernel_size=7, stride=2, padding=3, pooling=True)  # Table 1
CIFAR_STEM = Stem(channels=16, kernel_size=3, stride=1, padding=1, pooling=False)  # section 4.2

# The stages after the stem, and their module names in torchvision.
LAYERS = {"res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}


class ResNet(StagedNetwork):
    """A stem followed by stages of blocks; each stage halves the resolution and doubles the channels.

    Stages: "stem" (conv1, batch norm, ReLU and, for ImageNet, max pooling: stride 4), then "res2", "res3" and so on
    (the paper's conv2_x, conv3_x: strides 4, 8, 16, 32; CIFAR's: 1, 2, 4). Parameters are named as in torchvision:
    conv1, bn1, layer1 to layer4, fc. Every stage's output is activated: stages of a pre-activation network end with the
    norm and ReLU that their blocks leave out. That norm is called `norm` (layer1.norm to layer4.norm).

    Args:
        block: the block repeated in every stage.
        depths: number of blocks in each stage.
        stem: the first layers.
        channels: channels of the 3×3 convolutions in res2's blocks; each later stage doubles them.
        num_classes: outputs of the classifier; no effect if `stages` omits the classifier.
        width: multiplier on the channels of the stem and every block, each rounded to a multiple of 8, at least 8.
        shortcut: "A" (zero padding where the shape changes), "B" (projections there) or "C" (projections in every
            block), section 4.1; None for a plain network without shortcuts.
        stride_in_1x1: whether a bottleneck that halves the resolution does so in its first 1×1 convolution (the paper
            and its released weights) or in its 3×3 (torchvision). Basic blocks always stride in their first 3×3.
        groups, width_per_group: for the bottlenecks' 3×3 convolutions (ResNeXt, wide ResNet), as in torchvision.
        norm: a key of `norms.NORMS`.
        zero_init_last_norm: whether the last norm of every residual branch starts at zero, so each block starts as the
            identity (arXiv 1706.02677, section 5.1).
        res5_dilation: 2 keeps res5 at stride 16 and dilates all its 3×3 convolutions, as Detectron2's DC5 models do.
            (torchvision's `replace_stride_with_dilation` leaves the first one undilated.)
        stages: None for the whole network with its classifier, or a contiguous run of stage names to build alone.

    Raises:
        InputError: an argument has an invalid value.
    """

    def __init__(
        self,
        *,
        block: type[Block],
        depths: Sequence[int],
        stem: Stem,
        channels: int,
        num_classes: int = 1000,
        width: float = 1.0,
        shortcut: str | None = "B",
        stride_in_1x1: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        norm: str = "BN",
        zero_init_last_norm: bool = False,
        res5_dilation: int = 1,
        stages: Sequence[str] | None = None,
    ) -> None:
        super().__init__(("stem", *list(LAYERS)[: len(depths)]), stages)
        if res5_dilation not in (1, 2):
            raise InputError(f"res5_dilation is {res5_dilation}, expected 1 or 2")
        norm_layer = norm_factory(norm)
        options = BlockOptions(
            norm=norm_layer,
            shortcut=shortcut,
            stride_in_1x1=stride_in_1x1,
            groups=groups,
            width_per_group=width_per_group,
        )

        in_channels, stride = scale_channels(stem.channels, width), stem.stride * (2 if stem.pooling else 1)
        if "stem" in self.stage_names:
            res2_channels = scale_channels(channels, width) * block.expansion
            # No norm before a pre-activation block that keeps the shape: its shortcut is the raw convolution output.
            normalized = not block.preactivation or changes_shape(in_channels, res2_channels, 1)
            pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if stem.pooling else nn.Identity()
            self.conv1 = nn.Conv2d(
                3, in_channels, kernel_size=stem.kernel_size, stride=stem.stride, padding=stem.padding, bias=False
            )
            # A pre-activation network pools before the norm and ReLU that its first block leaves out.
            self.prepool = pool if block.preactivation else nn.Identity()
            self.bn1 = norm_layer(in_channels) if normalized else nn.Identity()
            self.relu = nn.ReLU(inplace=True) if normalized else nn.Identity()
            self.maxpool = nn.Identity() if block.preactivation else pool
            self.feature_info["stem"] = FeatureInfo(in_channels, stride)

        for i, (name, depth) in enumerate(zip(self.all_stages[1:], depths, strict=True)):
            # res2 keeps the stem's resolution; every later stage halves it in its first block.
            dilation = res5_dilation if name == "res5" else 1
            first_stride = 1 if i == 0 or dilation > 1 else 2
            stride *= first_stride
            stage_channels = scale_channels(channels * 2**i, width)
            out_channels = stage_channels * block.expansion
            if name in self.stage_names:
                layer = nn.Sequential()
                for j in range(depth):
                    inputs, block_stride = (in_channels, first_stride) if j == 0 else (out_channels, 1)
                    layer.append(block(inputs, stage_channels, stride=block_stride, dilation=dilation, options=options))
                if block.preactivation:
                    layer.add_module("norm", norm_layer(out_channels))
                    layer.add_module("relu", nn.ReLU(inplace=True))
                self.add_module(LAYERS[name], layer)
                self.feature_info[name] = FeatureInfo(out_channels, stride)
            in_channels = out_channels

        if self.has_classifier:
            self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
            self.fc = nn.Linear(in_channels, num_classes)
        self._initialize(zero_init_last_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(N, num_classes)` for normalized images `(N, 3, H, W)`.

        Stages built without the stem, such as a detector's per-region head, do not classify images: they take the
        previous stage's output and return that of their last stage.
        """
        self.require_classifier()
        for name in self.stage_names:
            x = self.run_stage(name, x)
        return self.run_classifier(x) if self.has_classifier else x

    def forward_features(self, x: Tensor, out_features: Sequence[str]) -> dict[str, Tensor]:
        """Return the outputs of the stages in `out_features`, in that order; stop after the last one needed.

        `x` holds images `(N, 3, H, W)`, or the previous stage's output if the stem was not built.
        """
        outputs: dict[str, Tensor] = {}
        for name in self.stages_up_to(out_features):
            x = self.run_stage(name, x)
            if name in out_features:
                outputs[name] = x
        return {name: outputs[name] for name in out_features}

    def run_stage(self, name: str, x: Tensor) -> Tensor:
        """Apply one stage to the previous stage's output, or the stem to images."""
        if name == "stem":
            return self.maxpool(self.relu(self.bn1(self.prepool(self.conv1(x)))))
        return getattr(self, LAYERS[name])(x)

    def run_classifier(self, x: Tensor) -> Tensor:
        """Average-pool `(N, C, H, W)` and return logits `(N, num_classes)`."""
        return self.fc(self.avgpool(x).flatten(1))

    def dense_logits(self, x: Tensor) -> Tensor:
        """Return logits `(N, num_classes, h, w)` at every position of images `(N, 3, H, W)`; needs the whole network.

        The classifier is linear, so their mean over positions equals the network's logits for the whole image.
        """
        for name in self.stage_names:
            x = self.run_stage(name, x)
        return F.conv2d(x, self.fc.weight[:, :, None, None], self.fc.bias)

    def _stage_modules(self, name: str) -> list[nn.Module]:
        return [self.conv1, self.bn1] if name == "stem" else [getattr(self, LAYERS[name])]

    def _initialize(self, zero_init_last_norm: bool) -> None:
        """Initialize the weights: convolutions by He et al. (arXiv 1502.01852, section 2.2), as the paper says.

        The fan_out mode preserves the gradient's variance, as in torchvision. The paper specifies nothing for the
        classifier, which no ReLU follows; later work by its authors uses a standard deviation of 0.01 and zero bias for
        this network (arXiv 1706.02677, section 5.1). Batch norms start with scale 1 and shift 0.
        """
        if next(self.parameters()).is_meta:  # no values, and drawing none takes most of the building
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
            elif zero_init_last_norm and hasattr(module, "last_norm"):
                nn.init.zeros_(module.last_norm.weight)
