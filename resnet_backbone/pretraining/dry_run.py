"""Check that a pretraining configuration works, and how fast it trains."""

import numpy as np
from detectron2.config import CfgNode

from resnet_backbone.data.sources import open_source, register_source
from resnet_backbone.data.subset import Subset
from resnet_backbone.engine import dry_run
from resnet_backbone.pretraining.task import Classification, run

TEST_BATCHES = 2  # number of batches that try_run evaluates
SOME = "some images of DATASETS.TEST"  # the name of the data set that try_run evaluates


def try_run(cfg: CfgNode, *, iterations: int) -> None:
    """Try a short run with checkpoints, evaluations and a resume (`engine.dry_run.try_run`)."""
    dry_run.try_run(cfg, run, _test_on_few, iterations=iterations)


def throughput(cfg: CfgNode, *, iterations: int) -> None:
    """Print training images per second (`engine.dry_run.throughput`)."""
    dry_run.throughput(cfg, Classification, iterations=iterations)


def _test_on_few(cfg: CfgNode) -> int:
    """Limit the test data of `cfg` to a few batches; return their number of images."""
    count = TEST_BATCHES * (cfg.TEST.IMS_PER_BATCH or cfg.SOLVER.IMS_PER_BATCH)
    if cfg.DATASETS.HOLD_OUT:
        cfg.DATASETS.HOLD_OUT = min(cfg.DATASETS.HOLD_OUT, count)
        return cfg.DATASETS.HOLD_OUT
    if len(cfg.DATASETS.TEST) != 1:  # none, or the run reports the error
        return 0
    source = open_source(cfg.DATASETS.TEST[0])
    some = Subset(source, np.unique(np.linspace(0, len(source) - 1, count).astype(np.int64)))
    register_source(SOME, lambda _: some)
    cfg.DATASETS.TEST = (SOME,)
    return len(some)
