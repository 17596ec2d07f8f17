"""The residual building blocks (He et al. 2015, Figure 5), with torchvision's parameter names.

Both blocks take the same arguments, so that a network is told only which one to repeat:
input channels, `width` (channels of the 3×3 convolutions; the output has `expansion` times as many), stride, norm.
"""

from collections.abc import Callable

from torch import Tensor, nn

NormFactory = Callable[[int], nn.Module]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


def build_shortcut(in_channels: int, out_channels: int, stride: int, norm: NormFactory) -> nn.Module | None:
    """Return option B's shortcut (section 4.1): a projection where the shape changes, else None for the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), norm(out_channels))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (Figure 5, left): `(N, in, H, W)` to `(N, width, H/stride, W/stride)`.

    The stride is always in the first 3×3: there is no 1×1 before it, so `stride_in_1x1` has no effect.
    """

    expansion = 1

    def __init__(
        self, in_channels: int, width: int, *, stride: int, norm: NormFactory, stride_in_1x1: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = build_shortcut(in_channels, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + shortcut)


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions and a shortcut (Figure 5, right): `(N, in, H, W)` to `(N, 4 width, H/stride, …)`.

    `stride_in_1x1` puts the stride in the first 1×1, as the paper and its released weights have it; else it is in the
    3×3, as in torchvision: some 6 % more multiply-adds (ResNet-50), and the main path skips no pixel.
    """

    expansion = 4

    def __init__(
        self, in_channels: int, width: int, *, stride: int, norm: NormFactory, stride_in_1x1: bool = False
    ) -> None:
        super().__init__()
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        out_channels = width * self.expansion
        self.conv1 = conv1x1(in_channels, width, stride_1x1)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, stride_3x3)
        self.bn2 = norm(width)
        self.conv3 = conv1x1(width, out_channels)
        self.bn3 = norm(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = build_shortcut(in_channels, out_channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + shortcut)
