"""Residual networks for ImageNet (He, Zhang, Ren, Sun 2015, Table 1), with torchvision's parameter names."""

from collections.abc import Sequence

from torch import Tensor, nn

from resnet_backbone.networks.blocks import BasicBlock, Bottleneck
from resnet_backbone.networks.norms import norm_factory
from resnet_backbone.networks.stages import FeatureInfo, StagedNetwork, scale_channels

# Table 1: channels of the stem, and of the 3×3 convolutions in conv2_x; each later stage has twice as many.
BASE_CHANNELS = 64


class ResNet(StagedNetwork):
    """A stem and stages of residual blocks with option B shortcuts (a projection where the shape changes).

    Stages: "stem" (conv1, batch norm, ReLU and max pooling: stride 4), then "res2" to "res5" (the paper's conv2_x to
    conv5_x: strides 4, 8, 16, 32). Parameters are named as torchvision's: conv1, bn1, layer1 to layer4, fc.

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks per stage, from res2 on.
        num_classes: outputs of the classifier; without effect where `stages` leaves that out.
        width: factor on the channels of the stem and of every block, each rounded to a multiple of 8, at least 8.
        stride_in_1x1: whether a bottleneck that halves the resolution does so in its first 1×1 convolution (the paper,
            its released weights) or in its 3×3 (torchvision). Basic blocks have the stride in their first 3×3 always.
        norm: a name of `norms.NORMS`.
        stages: None for the whole network with its classifier, or a contiguous run of stage names to build alone.
    """

    def __init__(
        self,
        *,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        num_classes: int = 1000,
        width: float = 1.0,
        stride_in_1x1: bool = False,
        norm: str = "BN",
        stages: Sequence[str] | None = None,
    ) -> None:
        residual_stages = [f"res{2 + i}" for i in range(len(depths))]
        super().__init__(("stem", *residual_stages), stages)
        norm_layer = norm_factory(norm)

        channels = scale_channels(BASE_CHANNELS, width)
        stride = 4
        if "stem" in self.stage_names:
            self.conv1 = nn.Conv2d(3, channels, kernel_size=7, stride=2, padding=3, bias=False)
            self.bn1 = norm_layer(channels)
            self.relu = nn.ReLU(inplace=True)
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
            self._add_stage("stem", ("conv1", "bn1", "relu", "maxpool"), FeatureInfo(channels, stride))

        for i, (name, depth) in enumerate(zip(residual_stages, depths, strict=True)):
            # The stem's pooling has brought res2 to its resolution; every later stage halves it in its first block.
            first_stride = 1 if i == 0 else 2
            stride *= first_stride
            in_channels, block_width = channels, scale_channels(BASE_CHANNELS * 2**i, width)
            channels = block_width * block.expansion
            if name in self.stage_names:
                blocks = [
                    block(
                        in_channels if j == 0 else channels,
                        block_width,
                        stride=first_stride if j == 0 else 1,
                        norm=norm_layer,
                        stride_in_1x1=stride_in_1x1,
                    )
                    for j in range(depth)
                ]
                self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
                self._add_stage(name, (f"layer{i + 1}",), FeatureInfo(channels, stride))

        if self.has_classifier:
            self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
            self.fc = nn.Linear(channels, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        """Draw the initial weights: He et al. (arXiv 1502.01852, section 2.2) for convolutions, as the paper says.

        It keeps the gradient's variance (fan_out), as torchvision does. For the classifier, which no ReLU follows, the
        paper names nothing; a standard deviation of 0.01 with zero bias is what later work of its authors gives for
        this network (arXiv 1706.02677, section 5.1). Batch norms start with scale 1 and shift 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def run_classifier(self, x: Tensor) -> Tensor:
        """Average `(N, C, H, W)` over its pixels and return logits `(N, num_classes)`."""
        return self.fc(self.avgpool(x).flatten(1))
