"""Candidates and box voting against their definitions, written out for one box at a time."""

import numpy as np
import pytest
import torch
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference_single_image
from torchvision.ops import batched_nms

from resnet_backbone.detection.inference.voting import Candidates, find_candidates, vote

SIZE = 60, 80  # height and width


def overlap(one, other) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both) if both else 0.0


def voted(candidates: Candidates, kept: list[int]) -> list[list[float]]:
    """Gidaris and Komodakis, arXiv 1505.01749: the mean of the boxes around each, weighted by their scores."""
    boxes, scores, classes = (each.tolist() for each in candidates)
    result = []
    for index in kept:
        total, sums = 0.0, [0.0] * 4
        for box, score, kind in zip(boxes, scores, classes, strict=True):
            if kind == classes[index] and overlap(box, boxes[index]) >= 0.5:
                total += score
                sums = [so_far + score * side for so_far, side in zip(sums, box, strict=True)]
        result.append([each / total for each in sums] if total else boxes[index])
    return result


def random_predictions(seed: int, *, regions: int = 12, classes: int = 3, agnostic: bool = False):
    """Boxes that crowd together, and lie beyond the image's border in part; scores in steps, so that some are equal."""
    generator = np.random.default_rng(seed)
    centers = generator.uniform([20, 15], [60, 45], (3, 2))[generator.integers(0, 3, regions)]
    columns = 1 if agnostic else classes
    centers = centers[:, None] + generator.normal(0, 4, (regions, columns, 2))
    sizes = generator.uniform(20, 60, (regions, columns, 2))
    boxes = np.concatenate([centers - sizes / 2, centers + sizes / 2], axis=2).reshape(regions, 4 * columns)
    scores = generator.integers(0, 11, (regions, classes + 1)) / 20
    return torch.tensor(boxes, dtype=torch.float32), torch.tensor(scores, dtype=torch.float32)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_candidates_are_what_detectron2_suppresses(seed, agnostic):
    boxes, scores = random_predictions(seed, agnostic=agnostic)
    boxes[3, 1], scores[5, 0] = torch.inf, torch.nan  # Detectron2 leaves such regions out
    rows = []
    for region, (sides, row) in enumerate(zip(boxes.tolist(), scores.tolist(), strict=True)):
        for kind, score in enumerate(row[:-1]):
            if region not in (3, 5) and score > 0.22:
                box = sides[:4] if agnostic else sides[4 * kind : 4 * kind + 4]
                limits = (SIZE[1], SIZE[0]) * 2
                rows.append(([min(max(side, 0), limit) for side, limit in zip(box, limits, strict=True)], score, kind))
    found = find_candidates(boxes, scores, SIZE, 0.22)
    for values, expected in zip(found, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(values, torch.tensor(expected))
    theirs, _ = fast_rcnn_inference_single_image(boxes, scores, SIZE, 0.22, 0.3, 100)
    kept = batched_nms(*found, 0.3)
    assert 0 < len(kept) < len(found.boxes)
    assert torch.equal(found.boxes[kept], theirs.pred_boxes.tensor)
    assert torch.equal(found.scores[kept], theirs.scores) and torch.equal(found.classes[kept], theirs.pred_classes)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_votes_are_counted_as_defined(seed, agnostic):
    candidates = find_candidates(*random_predictions(seed, agnostic=agnostic), SIZE, 0.0)
    kept = batched_nms(*candidates, 0.3)
    expected = torch.tensor(voted(candidates, kept.tolist()))
    found = vote(kept, candidates)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found - candidates.boxes[kept]).abs().max() > 1  # they do move
    assert found.min() >= 0 and (found <= torch.tensor([80.0, 60.0, 80.0, 60.0])).all()


def made(*rows) -> Candidates:
    boxes, scores, classes = zip(*rows, strict=True)
    return Candidates(torch.tensor(boxes), torch.tensor(scores), torch.tensor(classes))


def test_boxes_of_other_classes_never_vote():
    alone = made(([0.0, 0.0, 40.0, 40.0], 0.5, 0), ([4.0, 0.0, 44.0, 40.0], 0.5, 0))
    among_others = made(
        ([0.0, 0.0, 40.0, 40.0], 0.5, 0), ([4.0, 0.0, 44.0, 40.0], 0.5, 0), ([1.0, 0.0, 41.0, 40.0], 1.0, 1)
    )
    for candidates in (alone, among_others):
        assert vote(torch.tensor([0]), candidates).tolist() == [[2.0, 0.0, 42.0, 40.0]]


def test_an_overlap_of_one_half_votes_and_less_does_not():
    half = made(([0.0, 0.0, 20.0, 10.0], 0.4, 0), ([0.0, 0.0, 10.0, 10.0], 0.4, 0))
    assert vote(torch.tensor([0]), half).tolist() == [[0.0, 0.0, 15.0, 10.0]]
    less = made(([0.0, 0.0, 20.5, 10.0], 0.4, 0), ([0.0, 0.0, 10.0, 10.0], 0.4, 0))
    assert vote(torch.tensor([0]), less).tolist() == [[0.0, 0.0, 20.5, 10.0]]


def test_one_candidate_and_none_and_one_without_area():
    box = [3.0, 4.0, 50.0, 60.0]
    assert vote(torch.tensor([0]), made((box, 0.1, 2))).tolist() == [box]
    none = find_candidates(torch.zeros(0, 12), torch.zeros(0, 4), SIZE, 0.05)
    assert vote(torch.zeros(0, dtype=torch.int64), none).shape == (0, 4)
    line = [10.0, 10.0, 10.0, 30.0]
    assert vote(torch.tensor([0]), made((line, 0.5, 0), (box, 0.5, 0))).tolist() == [line]
