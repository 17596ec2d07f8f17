"""The catalogue against torchvision's networks of the same names and the published sizes."""

import inspect

import pytest
import torch
import torchvision

import resnet_backbone
from resnet_backbone.networks import accepted_arguments, build_network, list_networks
from resnet_backbone.networks.catalogue import ARGUMENTS, CATALOGUE

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


def test_accepted_arguments_are_what_the_row_leaves_open():
    common = ("width", "shortcut", "stride_in_1x1", "norm", "zero_init_last_norm")
    assert accepted_arguments("resnet101") == (*common, "res5_dilation", "stages")
    assert accepted_arguments("cifar_resnet18") == (*common, "stages")
    assert accepted_arguments("cifar_resnet20") == ("width", "stride_in_1x1", "norm", "zero_init_last_norm", "stages")
    assert accepted_arguments("plain18") == ("width", "stride_in_1x1", "norm", "res5_dilation", "stages")
    assert accepted_arguments("preact_resnet50") == accepted_arguments("plain18")
    assert accepted_arguments("vgg16") == ("width", "pool5", "dropout", "stages")
    assert accepted_arguments("vgg16_bn") == ("width", "pool5", "dropout", "norm", "stages")


@pytest.mark.parametrize("name", list_networks())
def test_every_row_takes_its_arguments_at_their_defaults(name):
    arguments = {argument: ARGUMENTS[argument].default for argument in accepted_arguments(name)}
    assert build_on_meta(name, **arguments).state_dict().keys() == build_on_meta(name).state_dict().keys()


def test_the_table_has_every_argument_with_the_constructors_default():
    accepted = {argument for name in list_networks() for argument in accepted_arguments(name)}
    assert set(ARGUMENTS) == {"num_classes", *accepted}
    for row in CATALOGUE.values():
        for parameter in inspect.signature(row.network_class).parameters.values():
            if parameter.name in accepted - set(row.arguments):
                assert parameter.default == ARGUMENTS[parameter.name].default, parameter.name


# Another value of every argument, for a network that takes it.
OTHER_VALUES = {
    "num_classes": ("resnet50", 3),
    "width": ("resnet50", 0.25),
    "shortcut": ("resnet50", "C"),
    "stride_in_1x1": ("resnet50", True),
    "norm": ("resnet50", "GN"),
    "zero_init_last_norm": ("resnet50", True),
    "res5_dilation": ("resnet50", 2),
    "pool5": ("vgg16_bn", False),
    "dropout": ("vgg16_bn", 0.1),
    "stages": ("resnet50", ("stem", "res2")),
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_what_an_argument_decides(argument, randomize):
    name, value = OTHER_VALUES[argument]
    one = randomize(build_network(name, **{"num_classes": 5, "width": 0.125})).eval()
    other = build_network(name, **{"num_classes": 5, "width": 0.125, argument: value}).eval()
    shapes = [{key: tensor.shape for key, tensor in net.state_dict().items()} for net in (one, other)]
    if shapes[0] != shapes[1]:
        assert ARGUMENTS[argument].decides == "tensors"
        return
    other.load_state_dict(one.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        same = torch.equal(one(image), other(image))
    assert ARGUMENTS[argument].decides == ("training" if same else "computation")


@pytest.mark.parametrize("name", list_networks())
def test_the_rows_images_end_in_the_papers_last_feature_map(name):
    """7×7 for ImageNet (Table 1), 8×8 for CIFAR (section 4.2); the walk-through pads, and halves once more."""
    row = CATALOGUE[name]
    with torch.device("meta"):
        net = build_network(name, row.num_classes)
        last = list(net.feature_info)[-1]
        output = net.forward_features(torch.empty(1, 3, row.image_size, row.image_size), [last])[last]
    side = 5 if name == "cifar_resnet18" else 8 if name.startswith("cifar") else 7
    assert output.shape[-2:] == (side, side)
    assert row.num_classes == (10 if name.startswith("cifar") else 1000)


def test_unknown_name_offers_the_nearest():
    with pytest.raises(ValueError, match=r"'resnet_101', did you mean 'resnet101'\?.*list_networks\(\)"):
        build_network("resnet_101")
    with pytest.raises(ValueError, match=r"'VGG16', did you mean 'vgg16'\?"):
        accepted_arguments("VGG16")
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
