"""What a detector predicts for regions at several scales, and in the mirror: against loops, and by symmetries."""

from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeTransform
from detectron2.structures import Boxes

from resnet_backbone.detection.inference.multiscale import Pyramid, lower_scales
from resnet_backbone.detection.inference.options import RCNNWithOptions
from tests.detection.inference.test_options import assert_equal, detector, found_by
from tests.detection.modeling.small import SIZE, accelerated, inputs

SCALES = (1 / 3, 2 / 3, 1.0, 4 / 3, 5 / 3)  # the paper's 200, 400, 600, 800, 1000 of 600


def test_the_scales_around_the_size_of_pretraining_are_taken():
    sides = [100, 150, 200, 224, 250, 350, 700, 2000]
    boxes = torch.tensor([[10.0, 10, 10 + side * 2, 10 + side / 2] for side in sides])
    # 100 pixels are at most 167, and 150 are 200 and 250; 700 are 233 and more.
    assert lower_scales(boxes, SCALES, 224).tolist() == [3, 3, 2, 2, 1, 0, 0, 0]
    assert lower_scales(boxes[:0], SCALES, 224).shape == (0,)
    assert lower_scales(torch.tensor([[5.0, 5, 5, 9]]), SCALES, 224).tolist() == [3], "without area"


def test_no_other_pair_of_adjacent_scales_is_nearer():
    corners = torch.rand(200, 2, generator=torch.Generator().manual_seed(2)) * 300
    boxes = torch.cat([corners * 0.1, corners * 0.1 + corners + 1], dim=1)
    for box, lower in zip(boxes.tolist(), lower_scales(boxes, SCALES, 100).tolist(), strict=True):
        side = ((box[2] - box[0]) * (box[3] - box[1])) ** 0.5
        distances = [max(side * low - 100, 100 - side * high, 0) for low, high in pairwise(SCALES)]
        assert distances[lower] == pytest.approx(min(distances))


@pytest.mark.parametrize("scale", [0.4, 1.0, 1.7])
def test_images_are_resized_as_by_the_mapper(scale):
    model = detector("C4")
    smooth = cv2.GaussianBlur(np.random.default_rng(1).integers(0, 256, (*SIZE, 3), dtype=np.uint8), (0, 0), 2)
    record = {"image": torch.from_numpy(smooth.transpose(2, 0, 1).copy())}
    images, _ = Pyramid(model, [record]).level(scale)
    height, width = (round(side * scale) for side in SIZE)
    resized = ResizeTransform(*SIZE, height, width).apply_image(smooth)
    expected = model.preprocess_image([{"image": torch.from_numpy(resized.transpose(2, 0, 1).copy())}])
    assert images.image_sizes == expected.image_sizes == [(height, width)]
    difference = (images.tensor - expected.tensor).abs() * model.pixel_std
    assert difference.max() < 1.01 and difference.mean() < 0.25, "the mapper's library rounds twice"


def pooled_by_hand(model, pyramid: Pyramid, scale: float, box: list[float]) -> torch.Tensor:
    """The predictor's input for a box in the first image at a scale, by the parts of Detectron2's heads."""
    heads = model.roi_heads
    images, features = pyramid.level(scale)
    (height, width), *_ = images.image_sizes
    x, y = width / SIZE[1], height / SIZE[0]
    given = [Boxes(torch.tensor([[box[0] * x, box[1] * y, box[2] * x, box[3] * y]]))]
    empty = [Boxes(torch.zeros(0, 4))] * (len(images.image_sizes) - 1)
    if hasattr(heads, "res5"):
        return heads.res5(heads.pooler([features[name] for name in heads.in_features], given + empty)).mean((2, 3))[0]
    return heads.box_head(heads.box_pooler([features[name] for name in heads.box_in_features], given + empty))[0]


@pytest.mark.parametrize("kind", ["C4", "FPN", "VGG-16", "FPN, one box for all classes"])
def test_each_channel_is_the_larger_one_of_two_scales(kind):
    model, scales, size = detector(kind), (0.5, 1.0, 1.5), 48
    boxes = torch.tensor([[4.0, 4, 34, 44], [10, 5, 100, 90], [50, 20, 120, 90], [0, 0, 128, 96], [5, 5, 125, 95]])
    pairs = [(1.0, 1.5), (0.5, 1.0), (0.5, 1.0), (0.5, 1.0), (0.5, 1.0)]
    pyramid = Pyramid(model, inputs(), scales=scales, region_size=size)
    predictor, differs = model.roi_heads.box_predictor, False
    with torch.no_grad():
        (found_boxes, found_scores), _ = pyramid.predict([boxes, boxes[:0]])
        (other_boxes, _), _ = Pyramid(accelerated(model), inputs(), scales=scales, region_size=size).predict(
            [boxes, boxes[:0]]
        )
        for number, (box, pair) in enumerate(zip(boxes.tolist(), pairs, strict=True)):
            low, high = (pooled_by_hand(model, pyramid, scale, box) for scale in pair)
            scores, deltas = predictor(torch.maximum(low, high)[None])
            expected = predictor.box2box_transform.apply_deltas(deltas, boxes[number : number + 1])
            torch.testing.assert_close(found_boxes[number], expected[0], rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(found_scores[number], scores.softmax(1)[0], rtol=1e-4, atol=1e-5)
            differs |= bool((low > high).any() and (high > low).any())
    assert differs
    torch.testing.assert_close(other_boxes, found_boxes, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", ["C4", "Mask R-CNN"])
def test_two_scales_that_are_one_are_the_model(kind):
    model, batch = detector(kind), inputs()
    same = found_by(RCNNWithOptions(model, scales=(1.0, 1.0001), region_size=64), batch)
    for found, expected in zip(same, found_by(model, batch), strict=True):
        assert_equal(found, expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def looked_at(pyramid: Pyramid, regions=None):
    regions = pyramid.propose() if regions is None else regions
    return regions, pyramid.predict(regions)


@pytest.mark.parametrize("kind", ["C4", "FPN, one box for all classes"])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.5)])
def test_the_mirror_of_the_mirror_is_the_image(kind, scales):
    model, records = detector(kind), inputs()
    mirrored = [{**record, "image": record["image"].flip(2)} for record in records]
    regions, expected = looked_at(Pyramid(model, records, scales=scales, region_size=64))
    in_mirror, found = looked_at(Pyramid(model, mirrored, scales=scales, region_size=64, mirrored=True))
    width = SIZE[1]

    def flipped(boxes: torch.Tensor) -> torch.Tensor:
        boxes = boxes.reshape(len(boxes), -1, 4)
        return torch.stack([width - boxes[..., 2], boxes[..., 1], width - boxes[..., 0], boxes[..., 3]], -1).flatten(1)

    for ours, theirs in zip(in_mirror, regions, strict=True):
        torch.testing.assert_close(ours, flipped(theirs))
    for (boxes, scores), (their_boxes, their_scores) in zip(found, expected, strict=True):
        torch.testing.assert_close(boxes, flipped(their_boxes), rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(scores, their_scores, rtol=1e-5, atol=1e-6)


def test_a_detector_that_takes_other_channels_gets_them():
    model, records = detector("C4"), inputs()
    reversed_ = [{**record, "image": record["image"].flip(0)} for record in records]
    (regions, expected), (again, found) = (
        looked_at(Pyramid(model, records)),
        looked_at(Pyramid(model, reversed_, swapped=True)),
    )
    assert all(map(torch.equal, regions, again))
    assert all(torch.equal(a, b) for one, other in zip(found, expected) for a, b in zip(one, other))


def test_a_detector_that_takes_larger_images_gets_them():
    model, records = detector("C4"), inputs()
    small = Pyramid(model, records, scales=(2.0,), proposal_scale=2.0)
    large_records = [{"image": small._seen(record["image"], 2.0)} for record in records]
    regions, found = looked_at(small)
    large_regions, expected = looked_at(Pyramid(model, large_records))
    for one, other in zip(regions, large_regions, strict=True):
        torch.testing.assert_close(2 * one, other)
        assert other[:, 2].max() > SIZE[1]
    for (boxes, scores), (their_boxes, their_scores) in zip(found, expected, strict=True):
        torch.testing.assert_close(2 * boxes, their_boxes, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(scores, their_scores)


def test_no_regions_at_any_scale():
    model, nothing = detector("C4"), [torch.zeros(0, 4)] * 2
    for scales in ((1.0,), SCALES):
        for boxes, scores in looked_at(Pyramid(model, inputs(), scales=scales), nothing)[1]:
            assert boxes.shape == (0, 20) and scores.shape == (0, 6)


def test_scales_that_no_region_takes_are_not_computed():
    model, region = detector("C4"), torch.tensor([[0.0, 0, 100, 90]])
    pyramid = Pyramid(model, inputs(), scales=SCALES, region_size=60)
    looked_at(pyramid, [region, region])
    assert sorted(pyramid._levels) == list(SCALES[:2])
