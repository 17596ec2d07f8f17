"""The configuration keys that both training tools read and Detectron2 does not have."""

from detectron2.config import CfgNode


def add_engine_config(cfg: CfgNode) -> None:
    """Add what Detectron2 has no key for and both training tools read."""
    # Detectron2's SOLVER.AMP.ENABLED switches mixed precision on; this is its type: bf16, fp16 or fp32.
    cfg.SOLVER.AMP.PRECISION = "bf16"
    # Micro-batches per step, computed one after the other. Batch norm sees one micro-batch at a time.
    cfg.SOLVER.ACCUMULATE = 1
    # Decay per iteration of the moving average of the weights, which is then evaluated and saved; 0: no average.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Compile the step with torch.compile (of a detector, the backbone); on a GPU, record the step as one CUDA graph.
    cfg.SOLVER.COMPILE = False
    cfg.SOLVER.CUDA_GRAPH = False
    # Keep the newest N checkpoints; 0: all. The best one (model_best.pth) is kept in any case.
    cfg.SOLVER.CHECKPOINT_KEEP = 0
    # WarmupPlateauLR: multiply the learning rate by GAMMA after more than PATIENCE evaluations in a row that improved
    # the metric by less than THRESHOLD (in the metric's unit).
    cfg.SOLVER.PLATEAU_PATIENCE = 3
    cfg.SOLVER.PLATEAU_THRESHOLD = 0.1
    # Above 0: a constant warm-up that ends when the training error (in percent, averaged over LOG_PERIOD iterations)
    # falls below it, instead of after WARMUP_ITERS (ResNet paper, section 4.2: 80).
    cfg.SOLVER.WARMUP_UNTIL_ERROR = 0.0
    # Report to this project of Weights & Biases too, which must be installed.
    cfg.WANDB_PROJECT = ""
    # Metrics are averaged on the device and read, printed and written every so many iterations.
    cfg.SOLVER.LOG_PERIOD = 20
    # The batch that BASE_LR, MAX_ITER, STEPS and the periods were written for. Where IMS_PER_BATCH differs, they are
    # rescaled linearly. 0: they are meant as they stand.
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0

    cfg.MODEL.NETWORK = CfgNode()
    # A name of resnet_backbone.list_networks().
    cfg.MODEL.NETWORK.NAME = "resnet101"
    # Multiplies the number of channels, of VGG's fully connected layers too.
    cfg.MODEL.NETWORK.WIDTH = 1.0
    # ResNets: "A", "B" or "C", the kind of shortcut (ResNet paper, section 4.1).
    cfg.MODEL.NETWORK.SHORTCUT = "B"
    # ResNets: start the last norm of every residual branch at zero.
    cfg.MODEL.NETWORK.ZERO_INIT_LAST_NORM = False
    # VGG as a classifier: False leaves out the last max pooling, for crops of about 112 pixels and smaller.
    cfg.MODEL.NETWORK.POOL5 = True
    # Prefixes of parameter names that may be missing in MODEL.WEIGHTS.
    cfg.MODEL.NETWORK.ALLOW_MISSING = ()
    # Frozen batch normalization on weights whose statistics were never estimated stops the run unless this is True.
    cfg.MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN = False
