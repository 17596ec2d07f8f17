"""Tiny generated data, tiny configurations and tiny checkpoints for the tests of training.

Everything is imported inside the fixtures, so that tests of the lower floors load neither torch nor Detectron2 for it.
"""

import importlib.util
import logging
from pathlib import Path
from types import ModuleType

import pytest

CONFIGS = Path(__file__).parents[1] / "configs"

PRETRAIN_SMALL = """
MODEL.DEVICE cpu  MODEL.NETWORK.WIDTH 0.125
INPUT.MIN_SIZE_TRAIN (32,36)  INPUT.MIN_SIZE_TEST 32  INPUT.CROP.SIZE (32,32)
DATALOADER.NUM_WORKERS 0
SOLVER.REFERENCE_IMS_PER_BATCH 0  SOLVER.IMS_PER_BATCH 8  SOLVER.BASE_LR 0.05  SOLVER.STEPS ()  SOLVER.MAX_ITER 2
SOLVER.AMP.ENABLED False
SOLVER.LOG_PERIOD 1  SOLVER.CHECKPOINT_PERIOD 0  TEST.EVAL_PERIOD 0  TEST.PRECISE_BN.NUM_ITER 2
"""

DETECTION_SMALL = """
MODEL.DEVICE cpu  MODEL.ROI_HEADS.NUM_CLASSES 8  MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8
MODEL.RPN.PRE_NMS_TOPK_TRAIN 50  MODEL.RPN.POST_NMS_TOPK_TRAIN 20
MODEL.RPN.PRE_NMS_TOPK_TEST 50  MODEL.RPN.POST_NMS_TOPK_TEST 10
INPUT.MIN_SIZE_TRAIN (64,80)  INPUT.MAX_SIZE_TRAIN 96  INPUT.MIN_SIZE_TEST 64  INPUT.MAX_SIZE_TEST 96
DATALOADER.NUM_WORKERS 0
SOLVER.REFERENCE_IMS_PER_BATCH 0  SOLVER.IMS_PER_BATCH 2  SOLVER.STEPS ()  SOLVER.MAX_ITER 1  SOLVER.WARMUP_ITERS 0
SOLVER.LOG_PERIOD 1  SOLVER.CHECKPOINT_PERIOD 0  TEST.EVAL_PERIOD 0
"""


@pytest.fixture(scope="session", autouse=True)
def no_autograd_threads():
    """Let autograd look for devices before torch's fake tensors pretend that there is one.

    It looks once, and for a GPU it would start threads: processes forked from this one could then take no gradients.
    """
    import torch

    if not torch.cuda.is_available():
        torch.ones((), requires_grad=True).backward()


def pytest_runtest_setup(item):
    """Skip what needs a GPU, or with `gpu(2)` two of them, where there are fewer."""
    marker = item.get_closest_marker("gpu")
    if marker is not None:
        import torch

        needed = marker.args[0] if marker.args else 1
        if torch.cuda.device_count() < needed:
            pytest.skip(f"needs {needed} CUDA device{'s' if needed > 1 else ''}")


@pytest.fixture(scope="session")
def load_script():
    """The function `(path)` that gives a Python file as a module: one of tools/ or projects/, which are no packages."""
    loaded: dict[Path, ModuleType] = {}

    def load(path: Path) -> ModuleType:
        if path not in loaded:
            spec = importlib.util.spec_from_file_location(f"script_{path.parent.name}_{path.stem}", path)
            loaded[path] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[path])
        return loaded[path]

    return load


@pytest.fixture(autouse=True)
def _loggers():
    """A run sends the log to its own folder and terminal; give the next test the loggers as they were."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "resnet_backbone")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before):
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> str:
    """The shard pattern of 64 generated images of 36 pixels in 8 classes."""
    from resnet_backbone.data.generated import write_classification

    return write_classification(tmp_path_factory.mktemp("data") / "shapes", images=64, image_size=36, seed=1)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> str:
    """The COCO file of 6 generated scenes of 96 pixels with objects of 8 categories."""
    from resnet_backbone.data.generated import write_detection

    return str(write_detection(tmp_path_factory.mktemp("data") / "scenes", images=6, image_size=96, seed=2))


@pytest.fixture(scope="session")
def pretrain_config(shapes):
    """The function `(output folder, KEY, VALUE, …, file=…)` that gives a configuration for a few iterations."""
    from resnet_backbone import pretraining
    from resnet_backbone.engine.config import load_config

    def load(output, *overrides, file=CONFIGS / "pretrain" / "imagenet.yaml"):
        data = ("DATASETS.TRAIN", shapes, "DATASETS.TEST", shapes, "MODEL.NETWORK.NAME", "resnet18", "SEED", "3")
        words = [*PRETRAIN_SMALL.split(), *data, "OUTPUT_DIR", str(output), *map(str, overrides)]
        return load_config(pretraining.get_config(), file, words)

    return load


@pytest.fixture(scope="session")
def detection_config(scenes):
    """The function `(file, output folder, KEY, VALUE, …)` that gives a configuration for one iteration."""
    from resnet_backbone import detection
    from resnet_backbone.engine.config import load_config

    def load(file, output, *overrides):
        data = ("DATASETS.TRAIN", scenes, "DATASETS.TEST", scenes, "SEED", "4", "OUTPUT_DIR", str(output))
        file = CONFIGS / file if (CONFIGS / file).exists() else file
        return load_config(detection.get_config(), file, [*DETECTION_SMALL.split(), *data, *map(str, overrides)])

    return load


@pytest.fixture(scope="session")
def classifier(pretrain_config, tmp_path_factory):
    """The function `(name, KEY, VALUE, …)` that gives a checkpoint: initialized, its BN statistics estimated."""
    from resnet_backbone import pretraining

    made: dict[tuple, Path] = {}

    def make(name, *overrides) -> Path:
        if (name, *overrides) not in made:
            folder = tmp_path_factory.mktemp("classifier")
            network = ("MODEL.NETWORK.NAME", name, "MODEL.NETWORK.POOL5", not name.startswith("vgg"))
            # Of 128 pixels the deepest stage still sees 4×4 values a channel.
            crop = ("INPUT.CROP.SIZE", (128, 128), "INPUT.MIN_SIZE_TRAIN", (128, 128), "INPUT.MIN_SIZE_TEST", 128)
            pretraining.run(pretrain_config(folder, *network, *crop, "SOLVER.MAX_ITER", 0, *overrides))
            made[name, *overrides] = folder / "model_final.pth"
        return made[name, *overrides]

    return make
