"""The catalogue against torchvision's networks of the same names and the published sizes."""

import pytest
import torch
import torchvision

import resnet_backbone
from resnet_backbone.networks import build_network, list_networks, network_arguments

# Published sizes with 1000 classes (torchvision's documentation; the paper gives none).
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
}


def test_package_doors():
    assert resnet_backbone.build_network is build_network
    assert resnet_backbone.list_networks is list_networks
    assert resnet_backbone.__version__ == "0.1.0"
    assert set(PARAMETERS) <= set(list_networks())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_and_state_dict_are_torchvisions(name):
    with torch.device("meta"):
        net = build_network(name)
        reference = getattr(torchvision.models, name)()
    assert sum(parameter.numel() for parameter in net.parameters()) == PARAMETERS[name]
    assert [key for key, _ in net.named_parameters()] == [key for key, _ in reference.named_parameters()]
    # Strict loading compares names and shapes, which needs no memory for the values.
    net.load_state_dict(reference.state_dict(), strict=True, assign=True)
    reference.load_state_dict(build_on_meta(name).state_dict(), strict=True, assign=True)


def build_on_meta(name, **arguments):
    with torch.device("meta"):
        return build_network(name, **arguments)


def test_num_classes_is_the_second_positional():
    assert build_on_meta("resnet18").fc.out_features == 1000
    with torch.device("meta"):
        assert build_network("resnet18", 7).fc.out_features == 7
        assert build_network("vgg16", 7).classifier[6].out_features == 7


def test_network_arguments_are_what_the_row_leaves_open():
    common = ("width", "shortcut", "stride_in_1x1", "norm", "zero_init_last_norm")
    assert network_arguments("resnet101") == (*common, "res5_dilation", "stages")
    assert network_arguments("cifar_resnet18") == (*common, "stages")
    assert network_arguments("cifar_resnet20") == ("width", "stride_in_1x1", "norm", "zero_init_last_norm", "stages")
    assert network_arguments("plain18") == ("width", "stride_in_1x1", "norm", "res5_dilation", "stages")
    assert network_arguments("preact_resnet50") == network_arguments("plain18")
    assert network_arguments("vgg16") == ("width", "pool5", "dropout", "stages")
    assert network_arguments("vgg16_bn") == ("width", "pool5", "dropout", "norm", "stages")


@pytest.mark.parametrize("name", list_networks())
def test_every_row_takes_its_arguments_at_their_defaults(name):
    values = {
        "width": 1.0,
        "shortcut": "B",
        "stride_in_1x1": False,
        "norm": "BN",
        "zero_init_last_norm": False,
        "res5_dilation": 1,
        "stages": None,
        "pool5": True,
        "dropout": 0.5,
    }
    arguments = {argument: values[argument] for argument in network_arguments(name)}
    assert build_on_meta(name, **arguments).state_dict().keys() == build_on_meta(name).state_dict().keys()


def test_unknown_name_offers_the_nearest():
    with pytest.raises(ValueError, match=r"'resnet_101', did you mean 'resnet101'\?.*list_networks\(\)"):
        build_network("resnet_101")
    with pytest.raises(ValueError, match=r"'VGG16', did you mean 'vgg16'\?"):
        network_arguments("VGG16")
    with pytest.raises(ValueError, match=r"'resnet110', did you mean 'cifar_resnet110'\?"):
        build_network("resnet110")
    with pytest.raises(ValueError, match=r"no network is named 'swin'; list_networks\(\)"):
        build_network("swin")


def test_unknown_argument_names_itself_the_network_and_the_choices():
    with pytest.raises(ValueError, match=r"resnet50 takes no argument 'stride_1x1', did you mean 'stride_in_1x1'\?"):
        build_network("resnet50", stride_1x1=True)
    with pytest.raises(ValueError, match=r"vgg16 takes no argument 'norm'; it takes num_classes, width, pool5"):
        build_network("vgg16", norm="BN")


def test_what_makes_the_row_cannot_be_overridden():
    with pytest.raises(ValueError, match="resnet50 takes no argument 'depths'"):
        build_network("resnet50", depths=(1, 1, 1, 1))
