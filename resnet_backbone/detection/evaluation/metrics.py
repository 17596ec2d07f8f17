"""Which of an evaluation's metrics decides about the best checkpoint, and which go into the final one's metadata."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation.testing import flatten_results_dict

# By MODEL.META_ARCHITECTURE; all others detect boxes.
MAIN_METRICS = {"ProposalNetwork": "box_proposals/AR@1000", "SemanticSegmentor": "sem_seg/mIoU"}


def best_metric(cfg: CfgNode) -> str:
    """Return the name, in flattened results, of the metric that selects `model_best.pth` and drives WarmupPlateauLR.

    That is TEST.BEST_METRIC, by default the architecture's main one; with several test sets, of the first unless the
    key itself names one of them.
    """
    metric = cfg.TEST.BEST_METRIC or MAIN_METRICS.get(cfg.MODEL.META_ARCHITECTURE, "bbox/AP")
    tests = cfg.DATASETS.TEST
    if len(tests) < 2 or any(metric.startswith(f"{name}/") for name in tests):
        return metric
    return f"{tests[0]}/{metric}"


def headline(metric: str, results: dict[str, Any]) -> dict[str, float]:
    """Return what the final checkpoint records: of boxes AP and AP50, and the metric that selects the best one.

    Args:
        metric: as `best_metric` gives it.
        results: of the final evaluation; empty if there was none.
    """
    flat = flatten_results_dict(results)
    prefix = metric.rpartition("/")[0]
    names = {"AP": f"{prefix}/AP", "AP50": f"{prefix}/AP50"} if prefix.endswith("bbox") else {}
    names[metric.rpartition("/")[2]] = metric
    return {name: flat[key] for name, key in names.items() if key in flat}
