"""Every key of the configuration is read by some run, or refused when somebody sets it; nothing is ignored."""

import pytest

from resnet_backbone import pretraining
from resnet_backbone.engine.config import ConfigError, flatten, get_key
from resnet_backbone.pretraining.config import UNREAD
from tests.reads import another, recorded

# Together these runs take every branch that reads a key.
RUNS = [
    ("SOLVER.AMP.ENABLED", True, "MODEL.NETWORK.NAME", ""),
    ("SOLVER.LR_SCHEDULER_NAME", "WarmupPlateauLR", "TEST.EVAL_PERIOD", 1, "SOLVER.WARMUP_ITERS", 2),
    (
        *("INPUT.CROP.TYPE", "padded", "INPUT.PCA_COLOR_STD", 0.0, "DATASETS.HOLD_OUT", 8),
        *("INPUT.CROP.SIZE", (36, 36), "INPUT.MIN_SIZE_TEST", 36),
    ),
    ("INPUT.CROP.TYPE", "random_resized", "DATALOADER.ON_CORRUPT", "skip", "SOLVER.CLIP_GRADIENTS.ENABLED", True),
    ("TEST.SCALES", (40, 48)),
]


@pytest.fixture(scope="module")
def read(pretrain_config, tmp_path_factory):
    found = set()
    for keys in RUNS:
        cfg = pretrain_config(tmp_path_factory.mktemp("run"), *keys)
        with recorded(cfg) as keys_read:
            pretraining.run(cfg)
        found |= keys_read
    return found


def test_the_keys_that_no_run_reads_are_those_refused(read):
    every = [key for key, _ in flatten(pretraining.get_config()) if key != "VERSION"]
    refused = {key for key in every if any(f"{key}.".startswith(f"{group}.") for group in UNREAD)}
    assert set(every) - read == refused
    assert all(any(f"{key}.".startswith(f"{group}.") for key in refused) for group in UNREAD)


@pytest.mark.parametrize(
    "key", ["MODEL.RPN.NMS_THRESH", "TEST.EXPECTED_RESULTS", "SOLVER.REFERENCE_WORLD_SIZE", "INPUT.MAX_SIZE_TRAIN"]
)
def test_one_that_is_set_is_refused_by_key_and_value(pretrain_config, tmp_path, key):
    value = another(get_key(pretraining.get_config(), key))
    with pytest.raises(ConfigError) as error:
        pretraining.run(pretrain_config(tmp_path / "run", key, value))
    assert f"{key} is {value} (command line), but tools/pretrain.py does not read it." in str(error.value)
