"""The residual building blocks, with torchvision's parameter names.

All blocks take the same arguments, so that a network is told only which one to repeat: input channels, `channels` (of
the 3×3 convolutions, before `width_per_group`; the output has `expansion` times as many), stride and dilation of
the 3×3, and the options that all blocks of a network share.
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
    """What all blocks of a network have in common.

    Attributes:
        norm: makes a normalization layer from its number of channels.
        shortcut: "A", "B" or "C" (He et al. 2015, section 4.1: zero padding, projections where the shape changes,
            projections everywhere); None for a plain network without any.
        stride_in_1x1: whether a bottleneck's stride is in its first 1×1 convolution instead of its 3×3.
        groups: of a bottleneck's 3×3 convolution (ResNeXt, arXiv 1611.05431: the cardinality).
        width_per_group: channels of a group in a bottleneck's 3×3 where `channels` is 64, else in proportion.
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
        """Channels of the 3×3 convolution in a bottleneck of this many `channels`."""
        return max(1, channels * self.width_per_group // 64) * self.groups


class PaddedShortcut(nn.Module):
    """Option A's shortcut: every `stride`-th pixel, and zeros for the additional channels. It has no parameters."""

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

    The stride is always in the first 3×3: there is no 1×1 before it, so `stride_in_1x1` has no effect.
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

    `stride_in_1x1` puts the stride in the first 1×1, as the paper and its released weights have it; else it is in the
    3×3, as in torchvision: some 6 % more multiply-adds (ResNet-50), and the main path skips no pixel.
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

    A block that changes the shape takes its input already normalized and activated, since its projection branches off
    behind that: the stage before ends with the norm, and this block has no `bn1`.
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
    """Norm and ReLU before each of the 1×1, 3×3 and 1×1 convolutions; else as `PreActBasicBlock` and `Bottleneck`."""

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
    """Whether a block's output cannot be added to its input as it is."""
    return stride != 1 or in_channels != out_channels


def _conv3x3(in_channels: int, out_channels: int, stride: int, dilation: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False
    )


def _conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


def _shortcut(in_channels: int, out_channels: int, stride: int, options: BlockOptions) -> nn.Module | None:
    """The module of a shortcut that is more than the identity (section 4.1, options A to C), else None."""
    changes = changes_shape(in_channels, out_channels, stride)
    if options.shortcut is None or not (changes or options.shortcut == "C"):
        return None
    if options.shortcut == "A":
        return PaddedShortcut(out_channels - in_channels, stride)
    return nn.Sequential(_conv1x1(in_channels, out_channels, stride), options.norm(out_channels))


def _add_shortcut(block: BasicBlock | Bottleneck, out: Tensor, x: Tensor) -> Tensor:
    if not block.residual:
        return out
    out += x if block.downsample is None else block.downsample(x)  # in place: nothing needs the branch's output itself
    return out
