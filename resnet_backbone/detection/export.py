"""Export a detector to ONNX by Detectron2's tracing, and verify the export on images with detections."""

import functools
import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.export import TracingAdapter
from torch import Tensor, nn

from resnet_backbone.data.generated import write_detection
from resnet_backbone.detection.combinations import TEST_OPTIONS
from resnet_backbone.detection.data.mapper import read_image
from resnet_backbone.detection.inference.detector import NO_OPTIONS, Detector, load_detector
from resnet_backbone.detection.inference.sources import find_sources
from resnet_backbone.engine.config import said
from resnet_backbone.errors import InputError
from resnet_backbone.weights import CheckpointError, atomic_write

IMAGES = 8  # to compare on
BOX_TOLERANCE, SCORE_TOLERANCE = 0.02, 1e-4  # pixels; reordered sums differ by about 1e-4 and 1e-6
MASK_TOLERANCE = 1e-3  # of a probability
OUTPUTS = ("boxes", "scores", "classes", "masks")


class Export(NamedTuple):
    """What was written, and how it was checked.

    Attributes:
        size: height and width of the images that the graph takes; None for any.
        images: number of images on which it was compared with torch.
        objects: number of detections on them.
        box_error: largest difference of a box's side, in pixels.
        score_error: largest difference of a score.
        left_out: the keys of test-time options that the checkpoint has and the graph lacks.
    """

    size: tuple[int, int] | None
    images: int
    objects: int
    box_error: float
    score_error: float
    left_out: tuple[str, ...]

    def text(self) -> str:
        """Return a sentence for the terminal."""
        size = "any size" if self.size is None else f"{self.size[0]}×{self.size[1]} pixels"
        return (
            f"it takes RGB images in 0…255 of {size}, resized as for the detector; onnxruntime finds what torch finds: "
            f"{self.objects} objects on {self.images} images, boxes to {self.box_error:.0e} pixels, scores to "
            f"{self.score_error:.0e}" + (f"; left out: {', '.join(self.left_out)}" if self.left_out else "")
        )


def export_detector(weights: str | Path, target: str | Path, *, images: str | None = None) -> Export:
    """Write a detector as ONNX, atomically, once onnxruntime finds the same objects as torch.

    Input `image`: RGB, float32, 0…255, `(3, H, W)`, resized as for the detector. Outputs `boxes` `(N, 4)` in the
    input's pixels, `scores` `(N,)`, `classes` `(N,)`, and with a mask head `masks` `(N, 1, 28, 28)` (C4: 14×14), each
    over its box. Channel order, mean, standard deviation and thresholds are in the graph; the metadata is in the file's
    properties under `resnet_backbone`. The graph is that of the model alone, without test-time options.

    Args:
        images: a file, folder or pattern: images on which the detector finds something. None: generated ones.

    Raises:
        InputError: the model is of a kind that cannot be traced, or finds nothing on the images.
        CheckpointError: onnx or onnxruntime is not installed, the file is of Detectron2's trainer, or onnxruntime finds
            other objects; nothing is written.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise CheckpointError(
            f"writing {target} needs {error.name}, which is not installed. Run: pip install onnx onnxruntime"
        ) from error
    # The graph is that of Detectron2's own modules, whatever the checkpoint was trained with.
    detector = load_detector(weights, opts=("MODEL.ACCELERATE", "False", "MODEL.DEVICE", "cpu", *NO_OPTIONS))
    if detector.metadata is None:
        raise CheckpointError(f"{weights} is not a checkpoint of tools/train_net.py, whose metadata the graph carries.")
    _check_kind(detector.cfg)
    pictures = _pictures(detector, images)
    adapter = TracingAdapter(detector.model, [{"image": pictures[0]}], functools.partial(_infer, detector.cfg))
    expected = [dict(zip(OUTPUTS, adapter(picture))) for picture in pictures]
    counts = [len(found["boxes"]) for found in expected]
    if not any(counts):
        raise InputError(
            f"{weights} finds nothing on {images or 'generated images'}, so that its export could not be verified. "
            "Give images on which it finds something (--images)."
        )
    traced = counts.index(max(counts))
    for any_size in (True, False):
        content = _trace(adapter, pictures[traced], any_size=any_size)
        run = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run
        places = [i for i, picture in enumerate(pictures) if any_size or picture.shape == pictures[traced].shape]
        found = [dict(zip(OUTPUTS, map(torch.from_numpy, run(None, {"image": pictures[i].numpy()})))) for i in places]
        errors = [
            difference(one, expected[i], limit=detector.cfg.TEST.DETECTIONS_PER_IMAGE) for one, i in zip(found, places)
        ]
        if None not in errors:
            break
    else:
        raise CheckpointError(
            f"{target} was not written: onnxruntime finds other objects than torch. Please report this with the "
            "versions of torch and onnxruntime."
        )
    proto = onnx.load_from_string(content)
    onnx.helper.set_model_props(proto, {"resnet_backbone": json.dumps(detector.metadata.to_dict())})
    with atomic_write(target) as file:
        file.write(proto.SerializeToString())
    size = tuple(pictures[traced].shape[1:])
    objects = sum(counts[i] for i in places)
    left_out = tuple(key for key in TEST_OPTIONS if detector.metadata.config.get(key))
    return Export(None if any_size else size, len(places), objects, *map(max, zip(*errors, strict=True)), left_out)


def _check_kind(cfg: CfgNode) -> None:
    key, allowed = "MODEL.META_ARCHITECTURE", ("GeneralizedRCNN", "RetinaNet")
    if cfg.MODEL.META_ARCHITECTURE not in allowed:
        raise InputError(f"{said(cfg, key)}; {' and '.join(allowed)} can be exported to ONNX.")
    if cfg.MODEL.KEYPOINT_ON:
        raise InputError(f"{said(cfg, 'MODEL.KEYPOINT_ON')}; detectors of boxes and masks can be exported to ONNX.")


def _infer(cfg: CfgNode, model: nn.Module, inputs: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
    """Return what OUTPUTS names, of one RGB image."""
    image = inputs[0]["image"]
    fed = [{"image": image.flip(0) if cfg.INPUT.FORMAT == "BGR" else image}]
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        found = model(fed)[0]["instances"]
    else:
        found = model.inference(fed, do_postprocess=False)[0]  # masks as the head gives them
    masks = (found.pred_masks,) if found.has("pred_masks") else ()
    return found.pred_boxes.tensor, found.scores, found.pred_classes, *masks


def _pictures(detector: Detector, images: str | None) -> list[Tensor]:
    """Return images as the graph takes them, evenly spaced among those given, and the first one once more, cut."""
    if images is None:
        with TemporaryDirectory() as folder:
            file = write_detection(Path(folder) / "scenes", images=IMAGES, image_size=320, seed=1)
            arrays = [read_image(str(path), "RGB") for path in sorted((file.parent / "images").iterdir())]
    else:
        sources = [source for source in find_sources([images]) if not source.is_video]
        count = min(IMAGES, len(sources))
        arrays = [read_image(str(sources[i * len(sources) // count].file), "RGB") for i in range(count)]
    if not arrays:
        raise InputError(f"{images} has no images, only videos.")
    prepared = [detector.prepare(array)["image"].float() for array in arrays]
    if detector.cfg.INPUT.FORMAT == "BGR":
        prepared = [image.flip(0) for image in prepared]
    return [*prepared, prepared[0][:, : prepared[0].shape[1] * 3 // 4].contiguous()]


def _trace(adapter: TracingAdapter, image: Tensor, *, any_size: bool) -> bytes:
    names = OUTPUTS[: len(adapter(image))]
    axes = {name: {0: "objects"} for name in names}
    if any_size:
        axes["image"] = {1: "height", 2: "width"}
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, about Detectron2's own code
        torch.onnx.export(
            adapter,
            (image,),
            buffer,
            dynamo=False,  # which fails on Detectron2's own code
            opset_version=17,
            input_names=["image"],
            output_names=list(names),
            dynamic_axes=axes,
        )
    return buffer.getvalue()


def difference(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, limit: int
) -> tuple[float, float] | None:
    """Return the largest difference of a box's side in pixels and of a score; None if the objects are not the same.

    Each object must have a counterpart of its class, within the tolerances, unless its score is as low as the last
    one's that was kept: rounding decides about those.

    Args:
        limit: the largest number of objects that a detector returns.
    """
    boxes = (found["boxes"][:, None] - expected["boxes"]).abs().amax(2)
    scores = (found["scores"][:, None] - expected["scores"]).abs()
    same = (boxes <= BOX_TOLERANCE) & (scores <= SCORE_TOLERANCE)
    same &= found["classes"][:, None] == expected["classes"]
    if "masks" in expected:
        same &= (found["masks"][:, None] - expected["masks"]).abs().amax((2, 3, 4)) <= MASK_TOLERANCE
    for side, matched in ((found, same.any(1)), (expected, same.any(0))):
        kept = side["scores"]
        lowest = kept.min() if len(kept) == limit else 0.0
        if not (matched | (kept <= lowest + SCORE_TOLERANCE)).all():
            return None
    pairs = same.any(1)
    if not pairs.any():
        return 0.0, 0.0
    return boxes[same].max().item(), scores[same].max().item()
