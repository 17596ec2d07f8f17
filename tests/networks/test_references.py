"""Every network that torchvision or timm has, against theirs: same weights, same logits, same gradients."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from resnet_backbone.networks import build_network, list_networks

TORCHVISION = [name for name in list_networks() if name in torchvision.models.list_models(torchvision.models)]
TIMM_PREACT = {"preact_resnet50": "resnetv2_50", "preact_resnet101": "resnetv2_101", "preact_resnet152": "resnetv2_152"}


def test_torchvision_has_these():
    assert [
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
        *("vgg16", "vgg16_bn", "vgg19", "vgg19_bn"),
    ] == TORCHVISION


def give_random_weights(net, randomize):
    """Weights of a plausible size without the library's slow initialization, biases and statistics that matter."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                bound = (6 / module.weight[0].numel()) ** 0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.uniform_(-0.1, 0.1, generator=generator)
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
    return randomize(net)


def compare(net, reference, image, relative_error, gradients):
    """Logits in eval and train mode, and in train mode the gradients of parameters that `gradients` pairs by name."""
    with torch.no_grad():
        assert relative_error(net.eval()(image), reference.eval()(image)) < 1e-5
    value, expected = net.train()(image), reference.train()(image)
    assert relative_error(value, expected) < 1e-5
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
    (value * weight).sum().backward()
    (expected * weight).sum().backward()
    ours, theirs = dict(net.named_parameters()), dict(reference.named_parameters())
    for name, their_name in gradients.items():
        error = relative_error(ours[name].grad, theirs[their_name].grad.view_as(ours[name]))
        assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_networks(name, randomize, relative_error):
    with torch.device("meta"):
        reference, net = getattr(torchvision.models, name)(num_classes=10), build_network(name, num_classes=10)
    reference = give_random_weights(reference.to_empty(device="cpu"), randomize)
    net = net.to_empty(device="cpu")
    net.load_state_dict(reference.state_dict(), strict=True)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    names = dict.fromkeys(name for name, _ in reference.named_parameters())
    compare(net, reference, torch.randn(4, 3, 64, 64), relative_error, {name: name for name in names})
    reference.load_state_dict(net.state_dict(), strict=True)
    # Both have seen the same batch, so that their statistics moved alike.
    for key, value in net.state_dict().items():
        if key.endswith("running_var"):
            torch.testing.assert_close(value, reference.state_dict()[key])


def timm_preact_names(depths):
    """Our parameters' names to timm's: its norm in front of a stage's projection is our norm after the stage before."""
    names = {"conv1.weight": "stem.conv.weight", "fc.weight": "head.fc.weight", "fc.bias": "head.fc.bias"}

    def norm(ours, theirs):
        for entry in ("weight", "bias", "running_mean", "running_var"):
            names[f"{ours}.{entry}"] = f"{theirs}.{entry}"

    for i, depth in enumerate(depths):
        norm("bn1" if i == 0 else f"layer{i}.norm", f"stages.{i}.blocks.0.norm1")
        names[f"layer{i + 1}.0.downsample.weight"] = f"stages.{i}.blocks.0.downsample.conv.weight"
        for j in range(depth):
            for k in (1, 2, 3):
                names[f"layer{i + 1}.{j}.conv{k}.weight"] = f"stages.{i}.blocks.{j}.conv{k}.weight"
                if (j, k) != (0, 1):
                    norm(f"layer{i + 1}.{j}.bn{k}", f"stages.{i}.blocks.{j}.norm{k}")
    norm(f"layer{len(depths)}.norm", "norm")
    return names


@pytest.mark.parametrize("name", TIMM_PREACT)
def test_timms_preactivation_networks(name, randomize, relative_error):
    reference = give_random_weights(timm.create_model(TIMM_PREACT[name], num_classes=10), randomize)
    net = build_network(name, num_classes=10)
    names = timm_preact_names([len(stage.blocks) for stage in reference.stages])
    state = reference.state_dict()
    translated = {ours: state[theirs].view_as(net.state_dict()[ours]) for ours, theirs in names.items()}
    unmatched = net.load_state_dict(translated, strict=False)
    assert [key for key in unmatched.missing_keys if not key.endswith("num_batches_tracked")] == []
    assert set(names.values()) == {key for key in state if not key.endswith("num_batches_tracked")}
    parameters = {ours: theirs for ours, theirs in names.items() if "running" not in ours}
    compare(net, reference, torch.randn(4, 3, 64, 64), relative_error, parameters)
