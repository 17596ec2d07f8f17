import pytest
import timm
import torch
import torchvision

from resnet_backbone.errors import InputError
from resnet_backbone.networks import build_network, list_networks
from resnet_backbone.weights import CheckpointError
from resnet_backbone.weights.architectures import Architecture, find_architecture

# Networks with the same tensors as another: option A's shortcuts have no parameters, nor has a missing one.
TWINS = [name for name in list_networks() if "plain" in name or name.replace("resnet", "plain") in list_networks()]
CIFAR_TWINS = [name for name in TWINS if name.startswith("cifar_")]


def state_of(build, *arguments, **named) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return build(*arguments, **named).state_dict()


def find(state, name=None) -> Architecture:
    return find_architecture(state, name=name, source="file.pth")


def refusal(state, name=None) -> str:
    with pytest.raises(CheckpointError) as caught:
        find(state, name)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", [n for n in list_networks() if n in torchvision.models.list_models(torchvision.models)]
)
def test_torchvisions_networks(name):
    found = find(state_of(torchvision.models.get_model, name, num_classes=7))
    assert (found.name, found.num_classes, found.arguments["width"]) == (name, 7, 1)
    assert found.arguments.get("shortcut", "B") == "B"


NARROW = [
    *("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "preact_resnet50", "vgg16", "vgg19_bn"),
    *("cifar_resnet18", "cifar_preact_resnet110", "cifar_wide_resnet28_10"),
]


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("width", [0.01, 0.3, 2.0])
def test_any_width_is_found(name, width):
    """By a width with the same channels: 0.3 may come back as another number that rounds alike."""
    state = state_of(build_network, name, 10, width=width)
    found = find(state)
    again = state_of(build_network, found.name, found.num_classes, **found.arguments)
    assert found.name == name
    assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in state.items()}


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_the_shortcuts_show_in_the_tensors(shortcut):
    found = find(state_of(build_network, "resnet50", 10, width=0.125, shortcut=shortcut))
    assert found == Architecture("resnet50", {"width": 0.125, "shortcut": shortcut}, 10)


@pytest.mark.parametrize("name", CIFAR_TWINS)
def test_networks_with_the_same_tensors_are_asked_for(name):
    state = state_of(build_network, name, 10)
    message = refusal(state)
    for twin in (name.replace("plain", "resnet"), name.replace("resnet", "plain")):
        assert f"--arch {twin}" in message
        assert find(state, twin) == Architecture(twin, {"width": 1.0}, 10)


def test_a_plain_network_or_option_a():
    state = state_of(build_network, "plain18", 10, width=0.25)
    assert "resnet18 (width=0.25, shortcut=A) and plain18 (width=0.25) alike" in refusal(state)
    assert find(state, "plain18").arguments == {"width": 0.25}
    assert find(state, "resnet18").arguments == {"width": 0.25, "shortcut": "A"}


def test_num_batches_tracked_does_not_count():
    state = state_of(torchvision.models.resnet18)
    found = find({name: tensor for name, tensor in state.items() if "num_batches" not in name})
    assert found == find(state)


@pytest.mark.parametrize(
    ("name", "without"),
    [("resnet50", "fc."), ("vgg16_bn", "classifier.6."), ("vgg16", "classifier."), ("preact_resnet50", "fc.")],
)
def test_a_network_without_its_classifier(name, without):
    state = state_of(build_network, name, 10)
    found = find({n: t for n, t in state.items() if not n.startswith(without)})
    assert (found.name, found.num_classes) == (name, None)


@pytest.mark.parametrize("missing", ["fc.bias", "fc.weight", "layer4.1.bn2.bias", "conv1.weight"])
def test_a_missing_tensor_is_named(missing):
    state = state_of(torchvision.models.resnet18)
    del state[missing]
    message = refusal(state)
    assert "nearest is resnet18" in message and f"lacks {missing}" in message


def test_differences_are_named():
    state = state_of(torchvision.models.resnet50)
    assert "resnet50: the file has extra.weight of" not in refusal({**state, "extra.weight": torch.zeros(2)})
    assert "resnet50: the file has extra.weight besides" in refusal({**state, "extra.weight": torch.zeros(2)})
    wrong = {**state, "layer1.0.conv2.weight": torch.zeros(64, 64, 1, 1)}
    assert "layer1.0.conv2.weight of 64×64×1×1 instead of 64×64×3×3" in refusal(wrong)


def test_another_name_than_the_tensors_say():
    state = state_of(torchvision.models.resnet50)
    message = refusal(state, "wide_resnet50_2")
    assert "is not wide_resnet50_2" in message
    assert "layer1.0.conv1.weight of 64×64×1×1 instead of 128×64×1×1" in message and "and 172 more" in message
    assert "lacks layer3.6.conv1.weight" in refusal(state, "resnet101")
    with pytest.raises(InputError, match="no network is named 'resnet51', did you mean 'resnet50'"):
        find(state, "resnet51")


def test_networks_that_are_not_in_the_catalogue():
    assert "stages of 3, 4, 15, 3 blocks" in refusal(state_of(timm.create_model, "resnet50", layers=[3, 4, 15, 3]))
    # Group norm has no statistics: whether a file lost them or never had any does not show.
    assert "lacks bn1.running_mean" in refusal(state_of(build_network, "resnet50", norm="GN"))
    assert "nearest is" in refusal(state_of(timm.create_model, "seresnet50"))
    assert "nearest is" in refusal(state_of(torchvision.models.vgg11))
