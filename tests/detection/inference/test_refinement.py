import torch

from resnet_backbone.detection.inference.refinement import best_boxes, regressed_regions


def test_a_proposal_goes_on_as_its_best_class_even_if_it_is_background():
    boxes = torch.arange(24.0).view(2, 12)
    scores = torch.tensor([[0.1, 0.3, 0.2, 0.4], [0.1, 0.05, 0.15, 0.7]])
    assert best_boxes(boxes, scores).tolist() == [[4.0, 5.0, 6.0, 7.0], [20.0, 21.0, 22.0, 23.0]]
    assert best_boxes(boxes[:, :4], scores).tolist() == boxes[:, :4].tolist()
    assert best_boxes(boxes[:0], scores[:0]).shape == (0, 4)


def test_regressed_regions_lie_in_the_image_and_have_an_area():
    inf, nan = torch.inf, torch.nan
    boxes = torch.tensor(
        [[-5.0, 2, 30, 40], [10, 10, 200, 90], [101, 5, 120, 9], [3, 8, 3, 9], [nan, 0, 5, 5], [0, 0, inf, 5]]
        + [[1, 2, 3, 4]]
    )
    scores = torch.tensor([[0.5, 0.5]] * 6 + [[nan, 0.5]])
    assert regressed_regions(boxes, scores, (50, 100)).tolist() == [[0, 2, 30, 40], [10, 10, 100, 50]]
