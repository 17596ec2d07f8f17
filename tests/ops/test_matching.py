"""Matching against Detectron2's Matcher, bit for bit."""

import pytest
import torch
from detectron2.modeling.matcher import Matcher

from resnet_backbone.ops import match

RULES = {
    "RPN": ([0.3, 0.7], [0, -1, 1], True),
    "RoI heads": ([0.5], [0, 1], False),
    "all ignored": ([0.5], [-1, 1], True),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(0, 50), (1, 50), (20, 500), (7, 0)])
def test_it_is_detectron2s(rule, shape):
    thresholds, labels, low_quality = RULES[rule]
    if shape[1] == 0 and low_quality:
        pytest.skip("Detectron2 takes the maximum of nothing")
    overlaps = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    overlaps[overlaps < 0.3] = 0.0
    if shape[0] > 1 and shape[1]:
        overlaps[1] = 0.0  # a ground truth that no box overlaps: all of them overlap it most
        overlaps[:, 3] = 0.5  # ties, at a threshold
    matcher = Matcher(thresholds, labels, allow_low_quality_matches=low_quality)
    found = match(overlaps, matcher.thresholds, labels, allow_low_quality=low_quality)
    for one, other in zip(found, matcher(overlaps), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
