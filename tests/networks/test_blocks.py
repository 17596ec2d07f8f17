"""Where the blocks have their strides and their shortcuts."""

import pytest
from torch import nn

from resnet_backbone.networks.blocks import BasicBlock, Bottleneck


def strides(block):
    return [module.stride[0] for name, module in block.named_modules() if name in ("conv1", "conv2", "conv3")]


@pytest.mark.parametrize(("stride_in_1x1", "expected"), [(True, [2, 1, 1]), (False, [1, 2, 1])])
def test_stride_of_the_bottleneck(stride_in_1x1, expected):
    block = Bottleneck(64, 32, stride=2, norm=nn.BatchNorm2d, stride_in_1x1=stride_in_1x1)
    assert strides(block) == expected
    assert block.downsample[0].stride == (2, 2)


@pytest.mark.parametrize("stride_in_1x1", [True, False])
def test_stride_of_the_basic_block_stays(stride_in_1x1):
    assert strides(BasicBlock(64, 128, stride=2, norm=nn.BatchNorm2d, stride_in_1x1=stride_in_1x1)) == [2, 1]


def test_projection_only_where_the_shape_changes():
    assert BasicBlock(64, 64, stride=1, norm=nn.BatchNorm2d).downsample is None
    assert BasicBlock(64, 64, stride=2, norm=nn.BatchNorm2d).downsample is not None
    assert Bottleneck(256, 64, stride=1, norm=nn.BatchNorm2d).downsample is None
    assert Bottleneck(64, 64, stride=1, norm=nn.BatchNorm2d).downsample is not None
