"""Where the blocks have their strides and their shortcuts, and what the shortcuts compute."""

import pytest
import torch
from torch import nn

from resnet_backbone.networks.blocks import (
    BasicBlock,
    BlockOptions,
    Bottleneck,
    PreActBasicBlock,
    PreActBottleneck,
)

OPTIONS = BlockOptions(norm=nn.BatchNorm2d)
STRIDE_IN_1X1 = BlockOptions(norm=nn.BatchNorm2d, stride_in_1x1=True)


def strides(block):
    return [module.stride[0] for name, module in block.named_modules() if name in ("conv1", "conv2", "conv3")]


@pytest.mark.parametrize("block", [Bottleneck, PreActBottleneck])
@pytest.mark.parametrize(("options", "expected"), [(STRIDE_IN_1X1, [2, 1, 1]), (OPTIONS, [1, 2, 1])])
def test_stride_of_the_bottleneck(block, options, expected):
    built = block(64, 32, stride=2, options=options)
    assert strides(built) == expected
    projection = built.downsample if block is PreActBottleneck else built.downsample[0]
    assert projection.stride == (2, 2)


@pytest.mark.parametrize("block", [BasicBlock, PreActBasicBlock])
@pytest.mark.parametrize("options", [OPTIONS, STRIDE_IN_1X1])
def test_stride_of_the_basic_block_stays(block, options):
    assert strides(block(64, 128, stride=2, options=options)) == [2, 1]


@pytest.mark.parametrize(("basic", "bottleneck"), [(BasicBlock, Bottleneck), (PreActBasicBlock, PreActBottleneck)])
def test_projection_only_where_the_shape_changes(basic, bottleneck):
    assert basic(64, 64, options=OPTIONS).downsample is None
    assert basic(64, 64, stride=2, options=OPTIONS).downsample is not None
    assert bottleneck(256, 64, options=OPTIONS).downsample is None
    assert bottleneck(64, 64, options=OPTIONS).downsample is not None


def test_option_c_projects_in_every_block():
    block = BasicBlock(64, 64, options=BlockOptions(norm=nn.BatchNorm2d, shortcut="C"))
    assert [type(module) for module in block.downsample] == [nn.Conv2d, nn.BatchNorm2d]


def test_option_a_subsamples_and_appends_zeros():
    block = BasicBlock(8, 16, stride=2, options=BlockOptions(norm=nn.BatchNorm2d, shortcut="A")).eval()
    assert list(block.downsample.parameters()) == []
    x = torch.rand(2, 8, 5, 6)  # odd and even sides: both give what a strided 3×3 with padding gives
    shortcut = torch.cat([x[:, :, [0, 2, 4]][..., [0, 2, 4]], torch.zeros(2, 8, 3, 3)], dim=1)
    residual = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    assert torch.equal(block(x), torch.relu(residual + shortcut))


def test_a_plain_block_is_its_layers_in_a_row():
    block = BasicBlock(8, 8, options=BlockOptions(norm=nn.BatchNorm2d, shortcut=None)).eval()
    x = torch.randn(1, 8, 6, 6)
    layers = nn.Sequential(block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2, nn.ReLU())
    assert torch.equal(block(x), layers(x))
    assert block.downsample is None


def test_dilation_is_that_of_the_3x3_and_keeps_the_size():
    block = Bottleneck(32, 8, dilation=2, options=OPTIONS)
    assert block.conv2.dilation == (2, 2)
    assert block(torch.randn(2, 32, 7, 7)).shape == (2, 32, 7, 7)
    basic = BasicBlock(8, 8, dilation=2, options=OPTIONS)
    assert (basic.conv1.dilation, basic.conv2.dilation) == ((2, 2), (2, 2))


def test_an_unknown_shortcut_is_named():
    with pytest.raises(ValueError, match="shortcut is 'D', expected one of A, B, C"):
        BlockOptions(norm=nn.BatchNorm2d, shortcut="D")
