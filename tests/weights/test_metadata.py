import json

import numpy as np
import pytest

from resnet_backbone.errors import InputError
from resnet_backbone.weights import Metadata


def test_dict_and_back_through_json(metadata):
    made = metadata()
    assert Metadata.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert Metadata.from_dict(metadata(crop=None, norm_epsilon=None).to_dict()) == metadata(
        crop=None, norm_epsilon=None
    )


@pytest.mark.parametrize("statistics", ["none", "never", "running", "precise", "folded"])
def test_norm_statistics_through_json(metadata, statistics):
    made = metadata(norm_statistics=statistics)
    assert Metadata.from_dict(json.loads(json.dumps(made.to_dict()))).norm_statistics == statistics
    assert f"batch norm statistics: {statistics}" in made.describe()


def test_numpy_numbers_become_plain(metadata):
    made = metadata(
        origin={"AP": np.float64(48.5), "AP50": np.float32(0.5), "images": np.int64(3), "nan": float("nan")}
    )
    assert made.origin["AP"] == 48.5 and made.origin["AP50"] == 0.5 and made.origin["images"] == 3
    assert [type(v) for v in made.origin.values()] == [float, float, int, float]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"kind": "segmenter"}, ["kind", "'segmenter'", "classifier", "detector"]),
        ({"channel_order": "rgb"}, ["channel_order", "'rgb'", "RGB, BGR"]),
        ({"norm_statistics": None}, ["norm_statistics", "None", "precise", "folded"]),
        ({"architecture": ""}, ["architecture", "''"]),
        ({"pixel_mean": (1.0, 2.0)}, ["pixel_mean", "(1.0, 2.0)", "three numbers"]),
        ({"pixel_mean": None}, ["pixel_mean", "None", "three numbers"]),
        ({"pixel_mean": (float("nan"), 1.0, 1.0)}, ["pixel_mean", "nan"]),
        ({"pixel_std": (1.0, 0.0, 1.0)}, ["pixel_std", "above 0"]),
        ({"pixel_std": ("1", "1", "1")}, ["pixel_std", "three numbers"]),
        ({"norm_epsilon": "small"}, ["norm_epsilon", "'small'"]),
        ({"class_names": "cat"}, ["class_names", "'cat'"]),
        ({"class_names": (1, 2)}, ["class_names", "(1, 2)"]),
        ({"crop": (224,)}, ["crop", "(224,)"]),
        ({"crop": (0, 224)}, ["crop", "(0, 224)"]),
        ({"crop": (0.9, 0.9)}, ["crop", "(0.9, 0.9)"]),
        ({"arguments": ["width"]}, ["arguments", "['width']"]),
        ({"origin": {"when": object()}}, ["origin.when", "object"]),
    ],
)
def test_impossible_entries_are_named(metadata, entries, words):
    with pytest.raises(InputError) as caught:
        metadata(**entries)
    assert all(word in str(caught.value) for word in words)


def test_missing_and_unknown_entries_are_named(metadata):
    plain = metadata().to_dict()
    with pytest.raises(InputError, match=r"lacks architecture, pixel_std\."):
        Metadata.from_dict({k: v for k, v in plain.items() if k not in ("architecture", "pixel_std")})
    with pytest.raises(InputError, match=r"does not know: color\."):
        Metadata.from_dict({**plain, "color": "RGB"})
    with pytest.raises(InputError, match="is NoneType"):
        Metadata.from_dict(None)


def test_describe_says_how_to_feed_the_network(metadata):
    line = metadata().describe()
    assert "\n" not in line
    for part in ("classifier resnet50(", "width=0.25", "stride_in_1x1=False", "RGB", "[123.675, 116.28, 103.53]"):
        assert part in line
    for part in ("[58.395, 57.12, 57.375]", "3 classes", "precise"):
        assert part in line
