"""What test_evaluation.py runs in two processes: `python launched_evaluation.py WEIGHTS`, configurations on stdin."""

import json
import sys
from pathlib import Path

import torch
from detectron2.utils import comm

from resnet_backbone import build_network
from resnet_backbone.data.sources import open_source
from resnet_backbone.engine.config import load_config
from resnet_backbone.engine.launch import launch
from resnet_backbone.pretraining import get_config
from resnet_backbone.pretraining.evaluation import build_evaluator
from resnet_backbone.pretraining.preprocessing import build_normalize

RECIPE = Path(__file__).parents[2] / "configs" / "pretrain" / "imagenet.yaml"


def configuration(overrides):
    keys = ["MODEL.DEVICE", "cpu", "INPUT.CROP.SIZE", "(32,32)", "INPUT.MIN_SIZE_TEST", "36"]
    keys += ["DATALOADER.NUM_WORKERS", "0", "SOLVER.AMP.ENABLED", "False"]
    return load_config(get_config(), RECIPE, [*keys, *overrides])


def evaluate(cfg, *, weights, several):
    """Evaluate with each configuration; each rank writes down what it was told."""
    results = []
    for overrides in several:
        cfg = configuration(overrides)
        model = build_network("resnet18", 3, width=0.125).eval()
        model.load_state_dict(torch.load(weights))
        evaluator = build_evaluator(cfg, open_source(cfg.DATASETS.TEST[0]), build_normalize(cfg))
        evaluator.try_two_images(model)
        results.append(evaluator(model))
    (Path(weights).parent / f"rank{comm.get_rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    several = json.load(sys.stdin)
    sys.exit(launch(evaluate, configuration([]), processes=2, weights=sys.argv[1], several=several))
