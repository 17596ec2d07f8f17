"""Samples against Detectron2's, in number and distribution."""

import pytest
import torch
from detectron2.modeling.sampling import subsample_labels

from resnet_backbone.ops import sample


def labels(positives: int, negatives: int, ignored: int) -> torch.Tensor:
    values = torch.cat([torch.ones(positives), torch.zeros(negatives), -torch.ones(ignored)]).long()
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("positives", [0, 3, 400])
@pytest.mark.parametrize("negatives", [0, 5, 400])
@pytest.mark.parametrize(("number", "fraction"), [(64, 0.5), (64, 0.25), (64, 1.0), (64, 0.0), (1, 0.5), (2000, 0.5)])
def test_numbers_are_detectron2s(positives, negatives, number, fraction):
    values = labels(positives, negatives, 7)
    indices, drawn = sample(values == 1, values == 0, number, fraction)
    expected = subsample_labels(values, number, fraction, bg_label=0)
    kinds = values[indices[drawn]]
    assert len(indices) == min(number, len(values)) and len(indices[drawn].unique()) == drawn.sum()
    assert [(kinds == 1).sum(), (kinds == 0).sum()] == [len(part) for part in expected]
    assert torch.equal(drawn, drawn.sort(descending=True).values)  # those drawn come first
    assert torch.equal(kinds, kinds.sort(descending=True).values)  # positives before negatives


def test_each_is_as_likely_as_the_others():
    values = labels(20, 60, 10)
    torch.manual_seed(0)
    counts = torch.zeros(90)
    for _ in range(2000):
        indices, drawn = sample(values == 1, values == 0, 30, 0.5)
        counts[indices[drawn]] += 1
    for kind, expected in ((1, 15 / 20), (0, 15 / 60), (-1, 0.0)):
        shares = counts[values == kind] / 2000
        assert (shares - expected).abs().max() < 4.5 * (expected * (1 - expected) / 2000) ** 0.5 + 1e-9
