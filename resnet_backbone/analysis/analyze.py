"""The structure and cost of a network, stage by stage: the ResNet paper's Table 1 for any network.

Nothing is inferred from names: layers, shapes and receptive fields come from the modules that ran, in execution order.
A multiply-add counts once (the paper's "FLOPs"), in convolutions and linear layers only; activations are the number of
elements that those layers output.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn

from resnet_backbone.errors import InputError
from resnet_backbone.networks.blocks import Block, Bottleneck, PreActBottleneck
from resnet_backbone.networks.catalogue import build_network, find_row, list_networks
from resnet_backbone.networks.stages import StagedNetwork

WEIGHTED = (nn.Conv2d, nn.Linear)


class PaperNumbers(NamedTuple):
    """Numbers that He et al. 2015 report for a network."""

    multiply_adds: float | None = None
    parameters: float | None = None


# Multiply-adds: Table 1, section 3.3 (plain-34), section 4.1 (VGG). Parameters: Table 6.
PAPER = {
    "resnet18": PaperNumbers(multiply_adds=1.8e9),
    "resnet34": PaperNumbers(multiply_adds=3.6e9),
    "resnet50": PaperNumbers(multiply_adds=3.8e9),
    "resnet101": PaperNumbers(multiply_adds=7.6e9),
    "resnet152": PaperNumbers(multiply_adds=11.3e9),
    "plain34": PaperNumbers(multiply_adds=3.6e9),
    "vgg16": PaperNumbers(multiply_adds=15.3e9),
    "vgg19": PaperNumbers(multiply_adds=19.6e9),
    "cifar_resnet20": PaperNumbers(parameters=0.27e6),
    "cifar_resnet32": PaperNumbers(parameters=0.46e6),
    "cifar_resnet44": PaperNumbers(parameters=0.66e6),
    "cifar_resnet56": PaperNumbers(parameters=0.85e6),
    "cifar_resnet110": PaperNumbers(parameters=1.7e6),
    "cifar_resnet1202": PaperNumbers(parameters=19.4e6),
}


class Unit(NamedTuple):
    """A block, or a layer outside of blocks, and how often it repeats: `[3×3, 64; 3×3, 64] × 2`."""

    layers: tuple[str, ...]
    count: int

    @property
    def bracketed(self) -> bool:
        return self.count > 1 or len(self.layers) > 1

    def __str__(self) -> str:
        text = "; ".join(self.layers)
        return f"[{text}] × {self.count}" if self.bracketed else text


@dataclass(frozen=True, kw_only=True)
class StageAnalysis:
    """One stage, or the classifier, which is named "fc".

    Attributes:
        structure: the units that ran, without norms, activations and projections.
        output_shape: (C, H, W), or (C,) for a vector.
        layers: number of convolutions and linear layers on the main path, without projections, as in the paper.
        receptive_field: side, in image pixels, of the region that an output pixel depends on; None for a vector.
        stride: image pixels from one output pixel to the next; None for a vector.
    """

    name: str
    structure: tuple[Unit, ...]
    output_shape: tuple[int, ...]
    layers: int
    parameters: int
    multiply_adds: int
    activations: int
    receptive_field: int | None
    stride: int | None


@dataclass(frozen=True, kw_only=True)
class NetworkAnalysis:
    """A network at a given image size, with the paper's numbers if it reports any for this setup.

    `stride_in_1x1` is None for a network without bottlenecks, where it does not apply.
    """

    name: str
    image_size: int
    stride_in_1x1: bool | None
    stages: tuple[StageAnalysis, ...]
    paper: PaperNumbers | None = None

    @property
    def layers(self) -> int:
        return sum(stage.layers for stage in self.stages)

    @property
    def parameters(self) -> int:
        return sum(stage.parameters for stage in self.stages)

    @property
    def multiply_adds(self) -> int:
        return sum(stage.multiply_adds for stage in self.stages)

    @property
    def activations(self) -> int:
        return sum(stage.activations for stage in self.stages)

    def totals(self) -> dict[str, Any]:
        """Return the network's name, settings and total counts as plain values."""
        keys = ("name", "stride_in_1x1", "image_size", "layers", "parameters", "multiply_adds", "activations")
        return {key: getattr(self, key) for key in keys}

    def details(self) -> dict[str, Any]:
        """Return the totals and every stage as plain values."""
        stages = [
            {**vars(stage), "structure": "; ".join(map(str, stage.structure)), "output_shape": list(stage.output_shape)}
            for stage in self.stages
        ]
        return {**self.totals(), "stages": stages}


def analyze(name: str, *, image_size: int | None = None, **arguments: Any) -> NetworkAnalysis:
    """Analyze `build_network(name, **arguments)`, by default at its data set's image size.

    Builds it on the meta device for its data set's classes: ImageNet's 1000 at 224 pixels, CIFAR's 10 at 32.
    """
    row = find_row(name)
    size = row.image_size if image_size is None else image_size
    with torch.device("meta"):
        net = build_network(name, row.num_classes, **arguments)
    # The paper's networks differ from the defaults only in where the stride is.
    published = size == row.image_size and set(arguments) <= {"stride_in_1x1"}
    return replace(analyze_network(net, image_size=size), name=name, paper=PAPER.get(name) if published else None)


def analyze_catalogue() -> list[NetworkAnalysis]:
    """Analyze every network; those with bottlenecks again with the stride in their first 1×1 convolution."""
    analyses = []
    for name in list_networks():
        analyses.append(analyze(name))
        if analyses[-1].stride_in_1x1 is not None:
            analyses.append(analyze(name, stride_in_1x1=True))
    return analyses


def analyze_network(net: StagedNetwork, *, image_size: int) -> NetworkAnalysis:
    """Analyze a network, or its first stages, by running it once on one image in evaluation mode.

    On the meta device (`with torch.device("meta"): net = build_network(…)`) this computes nothing and uses no memory.
    Only trainable parameters count, so FrozenBatchNorm2d's constants do not.
    """
    if net.stage_names[0] != net.all_stages[0]:
        raise InputError(
            f"the network begins at {net.stage_names[0]!r}, expected a network that takes images: "
            f"build it from {net.all_stages[0]!r} on"
        )
    total_stride = max(info.stride for info in net.feature_info.values())
    if image_size < total_stride:
        raise InputError(f"image_size is {image_size}, expected at least {total_stride}, the stride of the network")
    bottlenecks = [module for module in net.modules() if isinstance(module, Bottleneck | PreActBottleneck)]
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            stages = tuple(_run_stages(net, image_size))
    finally:
        net.train(training)
    return NetworkAnalysis(
        name=type(net).__name__,
        image_size=image_size,
        stride_in_1x1=any(block.conv1.stride != (1, 1) for block in bottlenecks) if bottlenecks else None,
        stages=stages,
    )


class _Call(NamedTuple):
    """A layer that ran, and its input and output shapes."""

    layer: nn.Module
    input_shape: torch.Size
    output_shape: torch.Size


def _run_stages(net: StagedNetwork, image_size: int) -> Iterator[StageAnalysis]:
    """Run one image through the stages and the classifier, and yield the analysis of each."""
    blocks = [module for module in net.modules() if isinstance(module, Block)]
    block_of = {layer: block for block in blocks for layer in block.modules()}
    projections = {layer for block in blocks if block.downsample is not None for layer in block.downsample.modules()}
    weight = next(net.parameters())
    x = weight.new_zeros(1, 3, image_size, image_size)
    field = stride = 1
    remaining_parameters = _count_parameters([net])
    for name in (*net.stage_names, *(("fc",) if net.has_classifier else ())):
        with _recorded(net) as calls:
            x = net.run_classifier(x) if name == "fc" else net.run_stage(name, x)
        path = [call for call in calls if call.layer not in projections]
        weighted = [call for call in calls if isinstance(call.layer, WEIGHTED)]
        for call in path:
            if isinstance(call.layer, nn.Conv2d | nn.MaxPool2d):
                field += (_side(call.layer.kernel_size) - 1) * _side(call.layer.dilation) * stride
                stride *= _side(call.layer.stride)
        parameters = remaining_parameters if name == "fc" else _count_parameters(net.stage_modules(name))
        remaining_parameters -= parameters
        spatial = x.dim() == 4
        yield StageAnalysis(
            name=name,
            structure=tuple(_units(path, block_of)),
            output_shape=tuple(x.shape[1:]),
            layers=sum(isinstance(call.layer, WEIGHTED) for call in path),
            parameters=parameters,
            # For each output, one with each weight of its channel.
            multiply_adds=sum(call.output_shape.numel() * call.layer.weight[0].numel() for call in weighted),
            activations=sum(call.output_shape.numel() for call in weighted),
            receptive_field=field if spatial else None,
            stride=stride if spatial else None,
        )


@contextmanager
def _recorded(net: nn.Module) -> Iterator[list[_Call]]:
    """Yield a list that records every convolution, pooling and linear layer of `net` as it runs."""
    calls: list[_Call] = []

    def record(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        calls.append(_Call(layer, inputs[0].shape, output.shape))

    handles = [
        module.register_forward_hook(record)
        for module in net.modules()
        if isinstance(module, (*WEIGHTED, nn.MaxPool2d, nn.AdaptiveAvgPool2d))
    ]
    # Batch norm changes no shape, and on the meta device it would take most of the time.
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.forward = lambda x: x
    try:
        yield calls
    finally:
        for norm in norms:
            del norm.forward
        for handle in handles:
            handle.remove()


def _count_parameters(modules: Sequence[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _side(value: int | tuple[int, int]) -> int:
    """Return a kernel size, stride or dilation as one number; all are square here."""
    return value if isinstance(value, int) else value[0]


def _units(path: Sequence[_Call], block_of: dict[nn.Module, Block]) -> Iterator[Unit]:
    """Describe the calls on a stage's main path, merging equal neighbors."""
    described = [
        # As in the paper, output sizes show a block's stride; writing it out would make the first block differ.
        tuple(_describe(call, inside_block=isinstance(owner, Block)) for call in calls)
        for owner, calls in groupby(path, key=lambda call: block_of.get(call.layer, call.layer))
    ]
    for layers, equal in groupby(filter(any, described)):
        yield Unit(tuple(filter(None, layers)), len(list(equal)))


def _describe(call: _Call, *, inside_block: bool) -> str:
    """Return a layer as written in Table 1 and Figure 3, `3×3, 64`; empty for pooling that changes nothing."""
    layer, size = call.layer, call.output_shape[-1]
    if isinstance(layer, nn.Linear):
        return f"{layer.out_features}-d fc"
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        if call.output_shape == call.input_shape and size > 1:
            return ""
        return "average pool" if size == 1 else f"average pool to {size}×{size}"
    kernel = f"{_side(layer.kernel_size)}×{_side(layer.kernel_size)}"
    if isinstance(layer, nn.MaxPool2d):
        return f"{kernel} max pool, /{_side(layer.stride)}"
    parts = [kernel, str(layer.out_channels)]
    if layer.groups > 1:
        parts.append(f"C={layer.groups}")
    if _side(layer.dilation) > 1:
        parts.append(f"dilation {_side(layer.dilation)}")
    if _side(layer.stride) > 1 and not inside_block:
        parts.append(f"/{_side(layer.stride)}")
    return ", ".join(parts)
