"""In plain words: what an evaluation shows, the largest loss, and what usually helps."""

import math
from collections.abc import Mapping

from resnet_backbone.detection.evaluation.errors import Errors

_ALMOST_NOTHING = 2.0  # points of AP50
_SMALL_LOSS = 1.0

_LOSSES = {
    "classification": (
        "objects that are found but given the wrong category",
        "More training images of the categories that are taken for each other (table below) usually help, a longer "
        "schedule, and labels that are checked for just these categories.",
    ),
    "localization": (
        "detections that overlap their object too little",
        "Larger images usually help (INPUT.MIN_SIZE_TRAIN, INPUT.MIN_SIZE_TEST), a feature pyramid, a cascade of box "
        "heads, a longer schedule, and annotations that are all drawn by the same rule.",
    ),
    "both": (
        "detections near an object, with neither its category nor its place right",
        "They are typical for a detector that has seen too little: a longer schedule, more images and better "
        "pretrained weights usually help.",
    ),
    "duplicate": (
        "objects that are detected more than once",
        "A stricter suppression usually helps: a lower MODEL.ROI_HEADS.NMS_THRESH_TEST, or for RetinaNet "
        "MODEL.RETINANET.NMS_THRESH_TEST.",
    ),
    "background": (
        "detections where nothing is annotated",
        "Look at some of them first: they may show objects that nobody annotated. Otherwise, a longer schedule "
        "usually helps, and training images without objects (DATALOADER.FILTER_EMPTY_ANNOTATIONS False).",
    ),
    "missed": (
        "objects that are overlooked",
        "Larger images and smaller anchors usually help if they are small (MODEL.ANCHOR_GENERATOR.SIZES), and a longer "
        "schedule or more training images of the rare categories if not.",
    ),
}  # fmt: skip


def advise(metrics: Mapping[str, float], objects: Mapping[str, int], errors: Errors | None, *, measure: str) -> str:
    """Return a paragraph about an evaluation.

    Args:
        metrics: COCO's, 0…100.
        objects: how many there are of each size.
        errors: None for keypoints.
        measure: what says that a detection is right: IoU or OKS.
    """
    if math.isnan(metrics["AP"]):
        return "There is no object to find, so AP is not defined."
    found = f"AP is {metrics['AP']:.1f}, and {metrics['AP50']:.1f} where an {measure} of 0.5 is enough (AP50)."
    if metrics["AP50"] < _ALMOST_NOTHING:
        return (
            f"{found} Almost nothing is right. Before anything else, check that the detections' categories and boxes "
            "are those of the ground truth (ids, x and y, width and height, size of the images), that test images are "
            "preprocessed as training images, and that the training loss went down."
        )
    return " ".join([found, *_largest_loss(errors), *_strictness(metrics, measure), *_small_objects(metrics, objects)])


def _largest_loss(errors: Errors | None) -> list[str]:
    if errors is None:
        return []
    name, cost = max(errors.cost.items(), key=lambda item: item[1])
    if cost < _SMALL_LOSS:
        return [f"No type of error costs more than {_SMALL_LOSS:g} point of AP50."]
    what, help_ = _LOSSES[name]
    return [f"Most is lost to {what}: corrected, they would raise AP50 by {cost:.1f} points. {help_}"]


def _strictness(metrics: Mapping[str, float], measure: str) -> list[str]:
    lost = metrics["AP50"] - metrics["AP75"]
    if not lost > metrics["AP50"] / 3:  # not for NaN
        return []
    return [
        f"Many detections fit only roughly: at an {measure} of 0.75, AP is {lost:.1f} points lower than at 0.5. What "
        "makes places more exact helps: larger images, a feature pyramid, a cascade of heads, a longer schedule."
    ]


def _small_objects(metrics: Mapping[str, float], objects: Mapping[str, int]) -> list[str]:
    small, large = metrics.get("APs", math.nan), metrics["APl"]
    if not small < large / 2:
        return []
    share = objects["small"] / sum(objects.values())
    return [f"Small objects, {share:.0%} of all, have an AP of {small:.1f}; large ones have {large:.1f}."]
