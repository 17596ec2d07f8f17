"""The residual building blocks, with torchvision's parameter names.

All blocks take the same arguments, so a network only needs to know which one to repeat: input channels, `channels` (of
the 3×3 convolutions, before `width_per_group`; the output has `expansion` times as many), the stride and dilation of
the 3×3, and the options shared by all blocks of a network.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from resnet_backbone.errors import InputError

NormFactory = Callable[[int], nn.Module]

SHORTCUTS = ("A", "B", "C")


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """Options shared by all blocks of a network.

    Attributes:
        norm: builds a normalization layer for a given number of channels.
        shortcut: "A", "B" or "C" (He et al. 2015, section 4.1: zero padding, projections where the shape changes,
            projections everywhere); None for a plain network without shortcuts.
        stride_in_1x1: whether a bottleneck strides in its first 1×1 convolution instead of its 3×3.
        groups: number of groups in a bottleneck's 3×3 convolution (the cardinality of ResNeXt, arXiv 1611.05431).
        width_per_group: channels per group in a bottleneck's 3×3 when `channels` is 64; scales with `channels`.
    """

    norm: NormFactory
    shortcut: str | None = "B"
    stride_in_1x1: bool = False
    groups: int = 1
    width_per_group: int = 64

    def __post_init__(self) -> None:
        if self.shortcut is not None and self.shortcut not in SHORTCUTS:
            raise InputError(f"shortcut is {self.shortcut!r}, expected one of {', '.join(SHORTCUTS)}")

    def grouped_channels(self, channels: int) -> int:
        """Return the channels of the 3×3 convolution in a bottleneck with `channels` channels."""
        return max(1, channels * self.width_per_group // 64) * self.groups


class PaddedShortcut(nn.Module):
    """Option A's parameter-free shortcut: take every `stride`-th pixel and zero-pad the additional channels."""

    def __init__(self, additional_channels: int, stride: int) -> None:
        super().__init__()
        self.additional_channels = additional_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.additional_channels))

    def extra_repr(self) -> str:
        return f"additional_channels={self.additional_channels}, stride={self.stride}"


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (Figure 5, left): `(N, in, H, W)` to `(N, channels, H/stride, W/stride)`.

    The first 3×3 always carries the stride. There is no 1×1 before it, so `stride_in_1x1` has no effect.
    """

    expansion = 1
    preactivation = False

    def __init__(
        self, in_channels: int, channels: int, *, stride: int = 1, dilation: int = 1, options: BlockOptions
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride, dilation)
        self.bn1 = options.norm(channels)
        self.conv2 = _conv3x3(channels, channels, 1, dilation)
        self.bn2 = options.norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.residual = options.shortcut is not None
        self.downsample = _shortcut(in_channels, channels, stride, options)

    @property
    def last_norm(self) -> nn.Module:
        """The norm at the end of the residual branch."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(_add_shortcut(self, out, x))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions and a shortcut (Figure 5, right): `(N, in, H, W)` to `(N, 4 channels, H/stride, …)`.

    `stride_in_1x1` puts the stride in the first 1×1, as in the paper and its released weights. Otherwise it is in the
    3×3, as in torchvision, which costs about 6% more multiply-adds (ResNet-50) but skips no pixels on the main path.
    """

    expansion = 4
    preactivation = False

    def __init__(
        self, in_channels: int, channels: int, *, stride: int = 1, dilation: int = 1, options: BlockOptions
    ) -> None:
        super().__init__()
        stride_1x1, stride_3x3 = (stride, 1) if options.stride_in_1x1 else (1, stride)
        inner, out_channels = options.grouped_channels(channels), channels * self.expansion
        self.conv1 = _conv1x1(in_channels, inner, stride_1x1)
        self.bn1 = options.norm(inner)
        self.conv2 = _conv3x3(inner, inner, stride_3x3, dilation, options.groups)
        self.bn2 = options.norm(inner)
        self.conv3 = _conv1x1(inner, out_channels)
        self.bn3 = options.norm(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.residual = options.shortcut is not None
        self.downsample = _shortcut(in_channels, out_channels, stride, options)

    @property
    def last_norm(self) -> nn.Module:
        """The norm at the end of the residual branch."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(_add_shortcut(self, out, x))


class PreActBasicBlock(nn.Module):
    """Norm and ReLU before each of two 3×3 convolutions, and nothing after the addition (arXiv 1603.05027, Figure 4e).

    A block that changes the shape has no `bn1`: its projection branches off after the norm and ReLU, so it expects
    input that the previous stage has already normalized and activated.
    """

    expansion = 1
    preactivation = True

    def __init__(
        self, in_channels: int, channels: int, *, stride: int = 1, dilation: int = 1, options: BlockOptions
    ) -> None:
        super().__init__()
        self.bn1 = None if changes_shape(in_channels, channels, stride) else options.norm(in_channels)
        self.conv1 = _conv3x3(in_channels, channels, stride, dilation)
        self.bn2 = options.norm(channels)
        self.conv2 = _conv3x3(channels, channels, 1, dilation)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None if self.bn1 is not None else _conv1x1(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.bn1 is None else self.relu(self.bn1(x))
        out = self.conv1(out)
        out = self.conv2(self.relu(self.bn2(out)))
        return out + (x if self.downsample is None else self.downsample(x))


class PreActBottleneck(nn.Module):
    """Norm and ReLU before each 1×1, 3×3 and 1×1 convolution; otherwise like `PreActBasicBlock` and `Bottleneck`."""

    expansion = 4
    preactivation = True

    def __init__(
        self, in_channels: int, channels: int, *, stride: int = 1, dilation: int = 1, options: BlockOptions
    ) -> None:
        super().__init__()
        stride_1x1, stride_3x3 = (stride, 1) if options.stride_in_1x1 else (1, stride)
        out_channels = channels * self.expansion
        self.bn1 = None if changes_shape(in_channels, out_channels, stride) else options.norm(in_channels)
        self.conv1 = _conv1x1(in_channels, channels, stride_1x1)
        self.bn2 = options.norm(channels)
        self.conv2 = _conv3x3(channels, channels, stride_3x3, dilation)
        self.bn3 = options.norm(channels)
        self.conv3 = _conv1x1(channels, out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None if self.bn1 is not None else _conv1x1(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.bn1 is None else self.relu(self.bn1(x))
        out = self.conv1(out)
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.conv3(self.relu(self.bn3(out)))
        return out + (x if self.downsample is None else self.downsample(x))


Block = BasicBlock | Bottleneck | PreActBasicBlock | PreActBottleneck


def changes_shape(in_channels: int, out_channels: int, stride: int) -> bool:
    """Return whether a block's output has a different shape than its input, so the two cannot be added directly."""
    return stride != 1 or in_channels != out_channels


def _conv3x3(in_channels: int, out_channels: int, stride: int, dilation: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False
    )


def _conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


def _shortcut(in_channels: int, out_channels: int, stride: int, options: BlockOptions) -> nn.Module | None:
    """Return the shortcut module (section 4.1, options A to C), or None for the identity or no shortcut."""
    changes = changes_shape(in_channels, out_channels, stride)
    if options.shortcut is None or not (changes or options.shortcut == "C"):
        return None
    if options.shortcut == "A":
        return PaddedShortcut(out_channels - in_channels, stride)
    return nn.Sequential(_conv1x1(in_channels, out_channels, stride), options.norm(out_channels))


def _add_shortcut(block: BasicBlock | Bottleneck, out: Tensor, x: Tensor) -> Tensor:
    if not block.residual:
        return out
    out += x if block.downsample is None else block.downsample(x)  # in place: nothing else reads the branch's output
    return out
