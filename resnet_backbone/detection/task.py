"""Detector training as a task: Detectron2's model with our networks or its own, as configured."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling.backbone import FPN
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

from resnet_backbone.detection.build import build_detector
from resnet_backbone.detection.checks import (
    check_datasets,
    check_evaluable,
    check_names,
    check_network_keys,
    check_test_keys,
)
from resnet_backbone.detection.combinations import TEST_OPTIONS, check_combinations
from resnet_backbone.detection.config import RANGES, UNREAD, get_config
from resnet_backbone.detection.data.loader import TrainBatches
from resnet_backbone.detection.evaluation.evaluate import check_expected, evaluate, try_two_images
from resnet_backbone.detection.evaluation.metrics import best_metric, headline
from resnet_backbone.detection.inference.detector import load_members
from resnet_backbone.detection.inference.options import as_tested
from resnet_backbone.detection.modeling.backbone import NetworkBackbone
from resnet_backbone.detection.weights import is_frozen_norm, is_own, read, stock_arguments
from resnet_backbone.engine import run as engine_run
from resnet_backbone.engine.config import flatten
from resnet_backbone.engine.hooks import check_metric
from resnet_backbone.engine.network_config import configured_network
from resnet_backbone.engine.nonfinite import Losses
from resnet_backbone.engine.output import versions
from resnet_backbone.engine.precise_bn import finish_norm_statistics
from resnet_backbone.engine.ranges import check_ranges
from resnet_backbone.engine.unread import refuse_unread
from resnet_backbone.weights import Checkpoint, Metadata

logger = logging.getLogger(__name__)


def run(cfg: CfgNode, *, resume: bool = False, eval_only: bool = False) -> dict[str, Any]:
    """Train a detector as configured (`engine.run.run`); return the metrics, `{"bbox": {"AP": …}}`.

    A stock Detectron2 configuration works too.
    """
    results = engine_run.run(cfg, Detection(cfg), resume=resume, eval_only=eval_only)
    if comm.is_main_process():
        check_expected(cfg, results)
    return results


class Detection:
    """Detector training as a task of `engine.run`."""

    def __init__(self, cfg: CfgNode):
        self._cfg = cfg
        self._folder = Path(cfg.OUTPUT_DIR)
        self._precise = False
        self.best_metric = best_metric(cfg)

    def check(self, *, eval_only: bool) -> None:
        check_names(self._cfg)
        refuse_unread(self._cfg, get_config(), UNREAD, tool="tools/train_net.py")
        check_ranges(self._cfg, RANGES)
        check_combinations(self._cfg)
        check_network_keys(self._cfg)
        check_test_keys(self._cfg)
        self._last_evaluation = eval_only

    def build(self, last: Checkpoint | None, *, eval_only: bool) -> nn.Module:
        cfg = self._cfg
        weights, file = read(cfg, last, self._folder)
        check_datasets(cfg, training=not eval_only)
        if eval_only:
            check_evaluable(cfg, weights, file)
        else:
            self._batches = TrainBatches(cfg)
            self.num_images = self._batches.num_images
        model = build_detector(cfg, weights, file)
        names = MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("thing_classes", ()) if cfg.DATASETS.TEST else ()
        self._members = load_members(cfg, names)
        logger.info(describe_frozen(model))
        if len(cfg.DATASETS.TEST) > 1 and not eval_only:
            logger.info("%s selects the best checkpoint (TEST.BEST_METRIC)", self.best_metric)
        self._norms = [
            m for m in model.modules() if is_frozen_norm(m) or isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        self._pretrained_by = None if weights is None else weights.metadata
        self.metadata(0)
        return model

    def try_evaluation(self, model: nn.Module) -> None:
        found = try_two_images(self._cfg, as_tested(self._cfg, model, self._members))
        if comm.is_main_process() and found and not self.best_metric.endswith("panoptic_seg/PQ"):
            check_metric(self.best_metric, flatten_results_dict(found))

    def batches(self, start_iteration: int) -> Iterable[Any]:
        return self._batches(start_iteration)

    def losses(self, model: nn.Module, batch: Any) -> tuple[Losses, Losses]:
        return model(batch), {}

    def compile(self, model: nn.Module) -> None:
        model.backbone.compile()

    def image_names(self, iteration: int) -> Sequence[str]:
        return self._batches.names(iteration)

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        model = as_tested(self._cfg, model, self._members)
        if self._last_evaluation:
            augmented = self._cfg.TEST.AUG.ENABLED
            return evaluate(self._cfg, model, self._folder, augmented=augmented, report=True)
        # In training, there is a storage, whose writers include TensorBoard's.
        return evaluate(self._cfg, model, self._folder, show=get_event_storage().put_image)

    def metadata(self, iterations: int, **results: float) -> Metadata:
        metadata = _describe(self._cfg, self._norms, self._pretrained_by, iterations, results)
        return replace(metadata, norm_statistics="precise") if self._precise else metadata

    def finish(self, model: nn.Module) -> None:
        """With TEST.PRECISE_BN, replace batch norm's running averages with statistics over training images."""
        with EventStorage():  # Detectron2's models log something in each forward pass
            self._precise = finish_norm_statistics(self._cfg, model, self._batches(0))
        self._last_evaluation = True

    def headline(self, results: dict[str, Any]) -> dict[str, float]:
        return headline(self.best_metric, results)


def describe_frozen(model: nn.Module) -> str:
    """Return a log line: which stages, and how many tensors and norms, of the model are frozen."""
    parameters = list(model.parameters())
    still = sum(not p.requires_grad for p in parameters)
    norms = sum(is_frozen_norm(module) for module in model.modules())
    backbone = getattr(model, "backbone", model)
    backbone = backbone.bottom_up if isinstance(backbone, FPN) else backbone
    if isinstance(backbone, NetworkBackbone):
        network = backbone.network
        stages = {name: nn.ModuleList(network.stage_modules(name)) for name in network.stage_names}
    else:
        stages = dict(backbone.named_children())
    frozen = [name for name, stage in stages.items() if _is_frozen(stage)]
    return (
        f"frozen: {'stages ' + ', '.join(frozen) if frozen else 'no stage'}; {still} of {len(parameters)} parameter "
        f"tensors; {norms} batch normalizations with fixed statistics, scale and bias"
    )


def _is_frozen(module: nn.Module) -> bool:
    """Return whether `module` has parameters and none of them is trained."""
    trained = [parameter.requires_grad for parameter in module.parameters()]
    return bool(trained) and not any(trained)


def _describe(
    cfg: CfgNode, norms: Sequence[nn.Module], source: Metadata | None, iterations: int, results: Mapping[str, float]
) -> Metadata:
    """Return the metadata of this detector's checkpoint.

    Args:
        norms: the model's normalization layers.
        source: metadata of the initial weights, if they had any.
        iterations: number of completed iterations.
        results: evaluation results.
    """
    if is_own(cfg):
        name, arguments = configured_network(cfg)
    else:
        name, arguments = cfg.MODEL.BACKBONE.NAME, stock_arguments(cfg)
    if not norms:
        statistics = "none"
    elif iterations and not any(is_frozen_norm(m) for m in norms):
        statistics = "running"
    elif source is not None:
        statistics = source.norm_statistics
    else:
        statistics = "running" if cfg.MODEL.WEIGHTS else "never"  # weights in Detectron2's formats are trained
    # A resumed run's checkpoint is itself a detector and records its pretraining.
    pretrained = {}
    if source is not None:
        pretrained = source.origin if source.kind == "classifier" else source.origin.get("pretrained", {})
    return Metadata(
        kind="detector",
        architecture=name,
        arguments=arguments,
        channel_order=cfg.INPUT.FORMAT,
        pixel_mean=tuple(cfg.MODEL.PIXEL_MEAN),
        pixel_std=tuple(cfg.MODEL.PIXEL_STD),
        norm_statistics=statistics,
        norm_epsilon=norms[0].eps if norms else None,
        class_names=tuple(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", ()))
        if cfg.DATASETS.TRAIN
        else (),
        origin={
            "written_by": versions(),
            "dataset": ", ".join(cfg.DATASETS.TRAIN),
            "iterations": iterations,
            "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
            "seed": cfg.SEED,
            "pretrained": dict(pretrained),
            **results,
        },
        config={key: value for key, value in flatten(cfg) if _describes(key)},
    )


def _describes(key: str) -> bool:
    """Whether a key says what a detector is or how it is tested, wherever and from whatever it was trained."""
    if key.startswith("MODEL."):
        return key not in ("MODEL.WEIGHTS", "MODEL.DEVICE", "MODEL.ACCELERATE")
    if key in TEST_OPTIONS:
        return key != "TEST.ENSEMBLE"  # whose files are this machine's
    return key in (
        "INPUT.FORMAT",
        "INPUT.MIN_SIZE_TEST",
        "INPUT.MAX_SIZE_TEST",
        "TEST.DETECTIONS_PER_IMAGE",
        "TEST.MULTI_SCALE.REGION_SIZE",
    )
