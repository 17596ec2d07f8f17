"""VGG networks (Simonyan, Zisserman 2014, arXiv 1409.1556, Table 1), with torchvision's parameter names."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from resnet_backbone.errors import InputError
from resnet_backbone.networks.norms import norm_factory
from resnet_backbone.networks.stages import FeatureInfo, StagedNetwork, scale_channels

# Table 1: channels of the five blocks of 3×3 convolutions and the two hidden fully connected layers. A block includes
# the pooling before it, so pool5 is a block without convolutions.
BLOCK_CHANNELS = {"conv1": 64, "conv2": 128, "conv3": 256, "conv4": 512, "conv5": 512, "pool5": 512}
FC_CHANNELS = 4096
# Side of fc6's input in pixels, both in the classifier (224 / 32) and for a detector's RoI features.
FC_RESOLUTION = 7


class VGG(StagedNetwork):
    """Blocks of 3×3 convolutions between max poolings, then fc6, fc7 and the classifier.

    Stages: "conv1" to "conv5" (strides 1, 2, 4, 8, 16; each ends with its last ReLU, before the pooling, so conv5 is
    VGG-16's conv5_3), "pool5" (stride 32), "fc6" and "fc7" (each with its ReLU and dropout; they output vectors, so
    they are not features). Parameters are named as in torchvision: features.N, classifier.{0,3,6}.

    A run of stages that starts at fc6 takes RoI features `(N, C, 7, 7)`, also flattened to `(N, 49 C)`.

    Args:
        plan: convolutions per block, conv1 to conv5.
        num_classes: outputs of the classifier; no effect if `stages` omits the classifier.
        width: multiplier on the channels of the convolutions, fc6 and fc7, rounded to multiples of 8, at least 8.
        pool5: whether to include the last max pooling, between conv5 and fc6. Omit it for crops of about 112 pixels or
            less: at 112 pixels conv5 is 7×7, the resolution that fc6 will see as a detector's head on 7×7 RoI features
            from conv5_3. With pool5, a 64-pixel crop shrinks to 2×2, and fc6 learns from copies of four values per
            channel. No parameter's name or shape depends on it.
        dropout: dropout probability after fc6 and fc7.
        norm: a key of `norms.NORMS`, after every convolution and before its ReLU; None for the published network.
        stages: None for the whole network with its classifier, or a contiguous run of stage names to build alone.
    """

    def __init__(
        self,
        *,
        plan: Sequence[int],
        num_classes: int = 1000,
        width: float = 1.0,
        pool5: bool = True,
        dropout: float = 0.5,
        norm: str | None = "BN",
        stages: Sequence[str] | None = None,
    ) -> None:
        depths = dict(zip(BLOCK_CHANNELS, (*plan, 0), strict=True))
        if not pool5:
            del depths["pool5"]
        super().__init__((*depths, "fc6", "fc7"), stages)
        norm_layer = None if norm is None else norm_factory(norm)

        self.features = nn.Sequential()
        # Layers are numbered as in the whole network, even if only some stages are built.
        self.layer_numbers = {"fc6": range(3), "fc7": range(3, 6)}
        number, channels, stride = 0, 3, 1
        for name, depth in depths.items():
            pool_first = name != "conv1"
            in_channels, channels = channels, scale_channels(BLOCK_CHANNELS[name], width)
            stride *= 2 if pool_first else 1
            numbers = range(number, number + pool_first + depth * (2 if norm_layer is None else 3))
            number = numbers.stop
            if name in self.stage_names:
                layers = _conv_block(in_channels, channels, depth, norm_layer, pool_first)
                for i, layer in zip(numbers, layers, strict=True):
                    self.features.add_module(str(i), layer)
                self.layer_numbers[name] = numbers
                self.feature_info[name] = FeatureInfo(channels, stride)

        if "fc6" in self.stage_names:
            self.avgpool = nn.AdaptiveAvgPool2d(FC_RESOLUTION)
        self.classifier = nn.Sequential()
        fc_channels = scale_channels(FC_CHANNELS, width)
        sizes = {"fc6": (channels * FC_RESOLUTION**2, fc_channels), "fc7": (fc_channels, fc_channels)}
        for name, (inputs, outputs) in sizes.items():
            if name in self.stage_names:
                layers = [nn.Linear(inputs, outputs), nn.ReLU(inplace=True), nn.Dropout(dropout)]
                for i, layer in zip(self.layer_numbers[name], layers, strict=True):
                    self.classifier.add_module(str(i), layer)
        if self.has_classifier:
            self.classifier.add_module("6", nn.Linear(fc_channels, num_classes))
        self._initialize()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(N, num_classes)` for images `(N, 3, H, W)`; without conv1, like `ResNet` without its stem."""
        self.require_classifier()
        for name in self.stage_names:
            x = self.run_stage(name, x)
        return self.run_classifier(x) if self.has_classifier else x

    def forward_features(self, x: Tensor, out_features: Sequence[str]) -> dict[str, Tensor]:
        """Return the outputs of the stages in `out_features`, in that order; stop after the last one needed."""
        outputs: dict[str, Tensor] = {}
        for name in self.stages_up_to(out_features):
            x = self.run_stage(name, x)
            if name in out_features:
                outputs[name] = x
        return {name: outputs[name] for name in out_features}

    def run_stage(self, name: str, x: Tensor) -> Tensor:
        """Apply one stage; fc6 takes feature maps `(N, C, H, W)`, which it pools to 7×7, or vectors `(N, 49 C)`."""
        if name == "fc6" and x.dim() == 4:
            x = self.avgpool(x).flatten(1)
        for layer in self._stage_modules(name):
            x = layer(x)
        return x

    def run_classifier(self, x: Tensor) -> Tensor:
        """Turn fc7's output `(N, C)` into logits `(N, num_classes)`."""
        return self.classifier[-1](x)

    def dense_logits(self, x: Tensor) -> Tensor:
        """Return logits `(N, num_classes, h, w)` at every position of images `(N, 3, H, W)`; needs the whole network.

        The fully connected layers run as convolutions, fc6 as 7×7 and the others as 1×1 (arXiv 1409.1556, section
        3.2), so each position holds the logits of one 7×7 feature window.

        Raises:
            InputError: the features are smaller than that window.
        """
        for name in self.stage_names[: self.stage_names.index("fc6")]:
            x = self.run_stage(name, x)
        if min(x.shape[2:]) < FC_RESOLUTION:
            side = FC_RESOLUTION * self.feature_info[name].stride
            raise InputError(
                f"fc6 as a convolution needs {FC_RESOLUTION}×{FC_RESOLUTION} features and got "
                f"{x.shape[2]}×{x.shape[3]}; give images whose shorter side is at least {side} pixels"
            )
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                side = FC_RESOLUTION if layer.in_features > x.shape[1] else 1
                x = F.conv2d(x, layer.weight.unflatten(1, (x.shape[1], side, side)), layer.bias)
            else:
                x = layer(x)
        return x

    def _stage_modules(self, name: str) -> list[nn.Module]:
        layers = self.classifier if name in ("fc6", "fc7") else self.features
        return [getattr(layers, str(number)) for number in self.layer_numbers[name]]

    def _initialize(self) -> None:
        """Initialize the weights: He et al. (arXiv 1502.01852, equation 10) for all layers followed by a ReLU.

        The fan_in mode preserves the activations' variance, so the whole network trains from scratch without batch
        norm. With the VGG paper's 0.01 everywhere, training had to start from a shallower trained network (section
        3.1). The classifier keeps that 0.01. Biases are zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        if self.has_classifier:
            nn.init.normal_(self.classifier[-1].weight, std=0.01)


def _conv_block(in_channels: int, channels: int, depth: int, norm_layer, pool_first: bool) -> list[nn.Module]:
    """Return a block's layers: optional max pooling, then `depth` 3×3 convolutions, each with norm and ReLU."""
    layers: list[nn.Module] = [nn.MaxPool2d(kernel_size=2, stride=2)] if pool_first else []
    for i in range(depth):
        # The bias has no effect before a batch norm, but torchvision's vgg16_bn has it.
        layers.append(nn.Conv2d(in_channels if i == 0 else channels, channels, kernel_size=3, padding=1))
        if norm_layer is not None:
            layers.append(norm_layer(channels))
        layers.append(nn.ReLU(inplace=True))
    return layers
