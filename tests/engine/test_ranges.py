"""What a range allows, and the sentence about a value outside."""

import math

import pytest

from resnet_backbone.engine.config import ConfigError, load_config, set_key
from resnet_backbone.engine.ranges import RANGES, check_ranges, each, either, number, one_of, whole
from resnet_backbone.engine.train import check_solver


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (number(at_least=0, below=1), [0, 0.0, 0.999], [-1e-9, 1, 1.0, math.nan, math.inf, True, "0.5", None, [0]]),
        (number(above=0, at_most=16), [1e-9, 16], [0, 16.1, -math.inf, 10**400]),
        (number(), [-1e300, 0, 7], [math.nan, math.inf, -math.inf, 10**400, False]),
        (whole(1, 8), [1, 8], [0, 9, 1.0, True, "1", None]),
        (whole(0), [0, 2**31 - 1], [2**31, -1]),
        (one_of("a", None, 1, True), ["a", None, 1, True], ["A", 1.0, False, 0, "", ["a"]]),
        (each(whole(1), 2), [(1, 2), [3, 3]], [(1,), (1, 2, 3), (0, 1), (1, math.nan), 1, "12", None]),
        (each(whole(1)), [(1,), [1] * 9], [(), [], [[1]]]),
        (each(whole(1), empty=True), [(), [2]], [[0], None]),
        (either(one_of(-1), whole(5)), [-1, 5], [0, 4, -2]),
    ],
)
def test_what_is_allowed(allowed, inside, outside):
    assert [value for value in inside if not allowed.allows(value)] == []
    assert [value for value in outside if allowed.allows(value)] == []


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("SOLVER.BASE_LR", "-1", "is -1.0 (command line), expected a number of at least 0 and at most 1000."),
        ("SOLVER.BASE_LR", "1e999", "is inf (command line), expected a number of at least 0 and at most 1000."),
        ("SOLVER.MOMENTUM", "2", "is 2.0 (command line), expected a number of at least 0 and below 1."),
        ("MODEL.PIXEL_STD", "(1, 0, 1)", "is [1, 0, 1] (command line), expected 3 values, each a number above 0."),
        ("INPUT.FORMAT", "rgb", "is rgb (command line), expected RGB or BGR."),
        ("SEED", "-7", "is -7 (command line), expected a whole number from -1 to 4294967295."),
        (
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
            "x" * 5000,
            f"is {'x' * 160} … (5000 characters) (command line), expected value or norm.",
        ),
    ],
)
def test_the_sentence(cfg, key, value, sentence):
    check_ranges(cfg, RANGES)
    with pytest.raises(ConfigError) as error:
        check_ranges(load_config(cfg, None, [key, value]), RANGES)
    assert str(error.value) == f"{key} {sentence}"


def test_a_number_that_is_none_in_a_file(cfg, write):
    load_config(cfg, write("a.yaml", "SOLVER: {GAMMA: .nan}"))
    with pytest.raises(ConfigError, match=r"SOLVER\.GAMMA is nan \(.*a\.yaml\), expected a number above 0"):
        check_ranges(cfg, RANGES)


def test_synchronized_batch_norm_needs_gpus(cfg, monkeypatch):
    set_key(cfg, "MODEL.FPN.NORM", "SyncBN", "test")
    check_solver(cfg)  # one process has nothing to synchronize
    monkeypatch.setattr("resnet_backbone.engine.train.comm.get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match=r"MODEL\.FPN\.NORM is SyncBN \(test\), .*MODEL\.DEVICE is cpu with 2 proc"):
        check_solver(cfg)
