import pytest
import torch
from detectron2.config import get_cfg

from resnet_backbone.engine.keys import add_engine_config


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def cfg(tmp_path):
    """Detectron2's and the engine's defaults for a run of a few iterations on the CPU."""
    cfg = get_cfg()
    add_engine_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.SEED = 5
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.BASE_LR = 0.05
    cfg.SOLVER.MAX_ITER = 10
    cfg.SOLVER.STEPS = (6,)
    cfg.SOLVER.WARMUP_ITERS = 3
    cfg.SOLVER.CHECKPOINT_PERIOD = 4
    cfg.SOLVER.LOG_PERIOD = 5
    return cfg


@pytest.fixture
def write(tmp_path):
    """A function that writes a YAML file and returns its path."""

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        return str(path)

    return write
