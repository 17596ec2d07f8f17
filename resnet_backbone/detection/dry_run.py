"""Check that a detection configuration works, and how fast it trains."""

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from resnet_backbone.detection.data.datasets import register
from resnet_backbone.detection.task import Detection, run
from resnet_backbone.engine import dry_run

TEST_IMAGES = 8  # number of images of each data set that try_run evaluates


def try_run(cfg: CfgNode, *, iterations: int) -> None:
    """Try a short run with checkpoints, evaluations and a resume (`engine.dry_run.try_run`)."""
    dry_run.try_run(cfg, run, _test_on_few, iterations=iterations)


def throughput(cfg: CfgNode, *, iterations: int) -> None:
    """Print training images per second (`engine.dry_run.throughput`)."""
    dry_run.throughput(cfg, Detection, iterations=iterations)


def _test_on_few(cfg: CfgNode) -> int:
    """Limit the test data of `cfg` to a few images of each data set; return their number."""
    names, count = [], 0
    for entry in cfg.DATASETS.TEST:
        register(entry, cfg.OUTPUT_DIR)
        dicts = DatasetCatalog.get(entry)
        few = dicts[:: -(-len(dicts) // TEST_IMAGES) or 1]
        name = f"some images of {entry}"
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, lambda few=few: few)
            described = MetadataCatalog.get(entry).as_dict()
            own = ("name", "fingerprint")  # of the data set itself, and of the folder that it was converted from
            MetadataCatalog.get(name).set(**{key: value for key, value in described.items() if key not in own})
        names.append(name)
        count += len(few)
    cfg.DATASETS.TEST = tuple(names)
    return count
