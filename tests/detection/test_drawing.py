"""Objects drawn on images, compared pixel by pixel with what was asked for."""

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks, RotatedBoxes
from detectron2.utils.colormap import colormap

from resnet_backbone.detection.drawing import draw

GRAY = np.full((120, 160, 3), 100, np.uint8)
COLORS = colormap(rgb=True)


def objects(**fields) -> Instances:
    return Instances(GRAY.shape[:2], **fields)


def test_a_box_is_outlined_in_its_class_color_and_nothing_else_changes():
    found = draw(GRAY, objects(gt_boxes=Boxes([[20, 30, 100, 90]])), [])
    changed = (found != GRAY).any(axis=2)
    assert (GRAY == 100).all()  # the given image stays
    assert (found[30, 20:101] == COLORS[0].astype(int)).all() and (found[30:91, 100] == COLORS[0].astype(int)).all()
    changed[29:32, 19:102] = changed[89:92, 19:102] = changed[29:92, 19:22] = changed[29:92, 99:102] = False
    assert not changed.any()


def test_masks_are_blended_whether_bitmaps_or_polygons():
    bitmap = torch.zeros(1, 120, 160, dtype=torch.bool)
    bitmap[:, 40:80, 30:70] = True
    expected = GRAY.copy()
    expected[40:80, 30:70] = (100 + 0.4 * (COLORS[2].astype(int) - 100)).round()
    classes, names = torch.tensor([2]), ["", "", ""]
    for masks in (bitmap, BitMasks(bitmap), PolygonMasks([[np.float64([30, 40, 70, 40, 70, 80, 30, 80])]])):
        assert np.array_equal(draw(GRAY, objects(pred_masks=masks, pred_classes=classes), names), expected)


def test_names_of_any_script_and_numbers_instead_of_names_are_written_within_the_image():
    for x, y in ((-30, -30), (150, 110), (10, 60)):
        boxes = Boxes([[x, y, x + 30, y + 30]])
        texts = [
            draw(GRAY, objects(pred_boxes=boxes, pred_classes=torch.tensor([n]), scores=torch.tensor([0.5])), names)
            for n, names in ((0, ["été"]), (0, ["ete"]), (0, ["кот"]), (1, ["été"]))
        ]
        assert len({text.tobytes() for text in texts}) == 4


def test_keypoints_without_a_label_are_left_out_and_no_objects_are_no_change():
    points = torch.tensor([[[40.0, 40, 2], [80, 80, 0]]])
    found = draw(GRAY, objects(gt_keypoints=points), [])
    assert (found[40, 40] == COLORS[0].astype(int)).all() and (found[80, 80] == 100).all()
    assert np.array_equal(draw(GRAY, objects(pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0)), []), GRAY)


def test_a_rotated_box_is_drawn_along_its_sides():
    found = draw(GRAY, objects(pred_boxes=RotatedBoxes([[80.0, 60, 60, 20, 90]])), [])
    assert (found[60, 70] == COLORS[0].astype(int)).all() and (found[30, 80] == COLORS[0].astype(int)).all()
    assert (found[60, 50] == 100).all()
