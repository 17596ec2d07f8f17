"""Configuration keys that both training tools read and Detectron2 lacks."""

from detectron2.config import CfgNode


def add_engine_config(cfg: CfgNode) -> None:
    """Add the keys that both training tools read and Detectron2 lacks."""
    # Precision when Detectron2's SOLVER.AMP.ENABLED is on: bf16, fp16 or fp32.
    cfg.SOLVER.AMP.PRECISION = "bf16"
    # Gradient accumulation: micro-batches per step. Batch norm sees one micro-batch at a time.
    cfg.SOLVER.ACCUMULATE = 1
    # Per-iteration decay of the weights' moving average, which is evaluated and saved in their place; 0: no average.
    cfg.SOLVER.EMA_DECAY = 0.0
    # COMPILE: torch.compile the step (in a detector, the backbone). CUDA_GRAPH: capture the step as one graph on a GPU.
    cfg.SOLVER.COMPILE = False
    cfg.SOLVER.CUDA_GRAPH = False
    # Keep the newest N checkpoints; 0: all. The best one (model_best.pth) is always kept.
    cfg.SOLVER.CHECKPOINT_KEEP = 0
    # WarmupPlateauLR: multiply the learning rate by GAMMA after more than PATIENCE consecutive evaluations that improve
    # the metric by no more than THRESHOLD (in the metric's unit).
    cfg.SOLVER.PLATEAU_PATIENCE = 3
    cfg.SOLVER.PLATEAU_THRESHOLD = 0.1
    # Above 0: a constant warm-up that ends when the training error (in percent, averaged over LOG_PERIOD iterations)
    # falls below this, instead of after WARMUP_ITERS (ResNet paper, section 4.2: 80).
    cfg.SOLVER.WARMUP_UNTIL_ERROR = 0.0
    # Also report to this Weights & Biases project; wandb must be installed.
    cfg.WANDB_PROJECT = ""
    # The evaluation metric (higher is better) that selects model_best.pth and drives WarmupPlateauLR; empty: top1 of a
    # classifier, bbox/AP of a detector. With several data sets in DATASETS.TEST, the first one's, unless the key begins
    # with the name of another: NAME/bbox/AP.
    cfg.TEST.BEST_METRIC = ""
    # End the run after N evaluations in a row without a new best of that metric; 0: never.
    cfg.TEST.PATIENCE = 0
    # Metrics are averaged on the device; read, print and write them every N iterations.
    cfg.SOLVER.LOG_PERIOD = 20
    # The batch size that BASE_LR, MAX_ITER, STEPS and the periods were written for. If IMS_PER_BATCH differs, they are
    # rescaled linearly. 0: no rescaling.
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0
    # On an unreadable training image: "stop", or "skip" to replace it with another, up to this fraction of the images.
    cfg.DATALOADER.ON_CORRUPT = "stop"
    cfg.DATALOADER.MAX_CORRUPT = 0.001

    cfg.MODEL.NETWORK = CfgNode()
    # A name from resnet_backbone.list_networks(); empty: the ResNet or ResNeXt that MODEL.RESNETS describes, by DEPTH,
    # NUM_GROUPS and WIDTH_PER_GROUP.
    cfg.MODEL.NETWORK.NAME = ""
    # Multiplies the number of channels, including VGG's fully connected layers.
    cfg.MODEL.NETWORK.WIDTH = 1.0
    # ResNets: the shortcut type, "A", "B" or "C" (ResNet paper, section 4.1).
    cfg.MODEL.NETWORK.SHORTCUT = "B"
    # ResNets: zero-initialize the last norm of every residual branch.
    cfg.MODEL.NETWORK.ZERO_INIT_LAST_NORM = False
    # VGG classifiers: False drops the last max pooling, for crops of about 112 pixels or smaller.
    cfg.MODEL.NETWORK.POOL5 = True
    # Prefixes of parameter names that may be missing from MODEL.WEIGHTS.
    cfg.MODEL.NETWORK.ALLOW_MISSING = ()
    # Unless True, a run stops if frozen batch normalization would use statistics that were never estimated.
    cfg.MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN = False
    # Detectors: replace modules by faster ones with the same results (detection.modeling.fast).
    cfg.MODEL.ACCELERATE = True
