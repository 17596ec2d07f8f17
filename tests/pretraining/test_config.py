from detectron2.config import get_cfg

from resnet_backbone.pretraining import get_config


def flatten(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_keeps_every_default_of_detectron2():
    ours = dict(flatten(get_config()))
    assert {key: ours[key] for key, _ in flatten(get_cfg())} == dict(flatten(get_cfg()))


def test_two_configurations_are_independent():
    get_config().MODEL.NETWORK.WIDTH = 7.0
    assert get_config().MODEL.NETWORK.WIDTH == 1.0
