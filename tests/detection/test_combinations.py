"""Keys that do not go together: Detectron2 fails on them too, but late, and without naming a key."""

import re

import pytest
import torch
from detectron2 import model_zoo
from detectron2.data import transforms
from detectron2.modeling import build_model

from resnet_backbone import detection
from resnet_backbone.detection.combinations import check_combinations
from resnet_backbone.engine.config import ConfigError, load_config

C4 = "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"


def load(file, *words):
    keys = ["MODEL.DEVICE", "cpu", *words]
    return load_config(detection.get_config(), model_zoo.get_config_file(file), keys)


@pytest.mark.parametrize(
    ("file", "words", "named"),
    [
        (C4, "MODEL.KEYPOINT_ON True", r"MODEL.KEYPOINT_ON is True .*NAME is Res5ROIHeads.*Set it to False"),
        (C4, "MODEL.ROI_HEADS.IN_FEATURES [res4,res4]", r"MODEL.ROI_HEADS.IN_FEATURES is .*takes one feature"),
        (C4, "MODEL.RPN.IOU_THRESHOLDS [0.5]", r"MODEL.RPN.IOU_LABELS is .*MODEL.RPN.IOU_THRESHOLDS is \[0.5\]"),
        (C4, "MODEL.ROI_HEADS.IOU_LABELS [0,-1,1]", r"MODEL.ROI_HEADS.IOU_LABELS is .*one label more"),
        (FPN, "MODEL.ANCHOR_GENERATOR.SIZES [[32],[64]]", r"SIZES is .*expected 1 list or 5.*MODEL.RPN.IN_FEATURES"),
        (FPN, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS [[1],[1],[1],[1],[1,2]]", r"give 1, 1, 1, 1, 2 anchors"),
        (RETINANET, "MODEL.RETINANET.IOU_LABELS [0,1]", r"MODEL.RETINANET.IOU_LABELS is"),
        (RETINANET, "MODEL.ANCHOR_GENERATOR.SIZES [[32],[64]]", r"SIZES is .*MODEL.RETINANET.IN_FEATURES"),
        (FPN, "MODEL.FPN.IN_FEATURES ()", r"MODEL.FPN.IN_FEATURES is \[\].*one or more of MODEL.RESNETS.OUT_FEATURES"),
        (FPN, "MODEL.FPN.IN_FEATURES [res4,res9]", r"MODEL.FPN.IN_FEATURES is \['res4', 'res9'\]"),
        (FPN, "MODEL.FPN.NORM GN MODEL.FPN.OUT_CHANNELS 48", r"MODEL.FPN.OUT_CHANNELS is 48 .*multiple of 32"),
        (FPN, "MODEL.ROI_MASK_HEAD.NORM GN MODEL.ROI_MASK_HEAD.CONV_DIM 48", r"MODEL.ROI_MASK_HEAD.CONV_DIM is 48"),
        (PANOPTIC, "MODEL.SEM_SEG_HEAD.CONVS_DIM 48", r"SEM_SEG_HEAD.CONVS_DIM is 48 .*MODEL.SEM_SEG_HEAD.NORM is GN"),
        (FPN, "MODEL.ROI_BOX_HEAD.NAME ''", r"MODEL.ROI_BOX_HEAD.NAME is empty"),
        (FPN, "MODEL.ROI_BOX_HEAD.NUM_FC 0", r"MODEL.ROI_BOX_HEAD.NUM_FC and NUM_CONV are 0"),
        (FPN, "MODEL.ROI_HEADS.NAME RROIHeads", r"MODEL.MASK_ON is True .*ROI_HEADS.NAME is RROIHeads"),
        (C4, "MODEL.ROI_HEADS.NAME RROIHeads", r"POOLER_TYPE is ROIAlignV2.*expected ROIAlignRotated"),
        (CASCADE, "MODEL.ROI_BOX_CASCADE_HEAD.IOUS (0.5,0.6)", r"CASCADE_HEAD.IOUS is .*BBOX_REG_WEIGHTS is"),
        (CASCADE, "MODEL.ROI_HEADS.IOU_THRESHOLDS [0.6]", r"CASCADE_HEAD.IOUS is .*IOU_THRESHOLDS is \[0.6\]"),
        (CASCADE, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG False", r"CLS_AGNOSTIC_BBOX_REG is False"),
    ],
)
def test_what_detectron2_cannot_build(file, words, named):
    check_combinations(load(file))
    cfg = load(file, *words.split())
    with pytest.raises(ConfigError, match=named):
        check_combinations(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "meta", ""
    with torch.device("meta"), pytest.raises((AssertionError, KeyError, ValueError)):
        build_model(cfg)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING range", r"INPUT.MIN_SIZE_TRAIN is .*since INPUT.MIN_SIZE_TRAIN_SAMPLING is"),
        ("INPUT.CROP.ENABLED True INPUT.CROP.TYPE absolute", r"INPUT.CROP.SIZE is .*since INPUT.CROP.TYPE is absolute"),
        ("INPUT.CROP.ENABLED True INPUT.CROP.SIZE [2,2]", r"INPUT.CROP.SIZE is .*at most 1"),
        ("INPUT.CROP.ENABLED True INPUT.CROP.TYPE absolute_range INPUT.CROP.SIZE [60,40]", r"in ascending order"),
        ("INPUT.MAX_SIZE_TRAIN 600", r"INPUT.MAX_SIZE_TRAIN is 600 .*INPUT.MIN_SIZE_TRAIN is \(640"),
        ("INPUT.MAX_SIZE_TEST 600", r"INPUT.MAX_SIZE_TEST is 600 .*INPUT.MIN_SIZE_TEST is 800"),
    ],
)
def test_sizes(words, named):
    with pytest.raises(ConfigError, match=named):
        check_combinations(load(FPN, *words.split()))


JITTER = "INPUT.SCALE_JITTER.ENABLED True"
PASTE = f"INPUT.COPY_PASTE 0.5 INPUT.MASK_FORMAT bitmask {JITTER}"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (f"{JITTER} INPUT.SCALE_JITTER.RANGE (2,0.1)", r"SCALE_JITTER.RANGE is .*smallest and the largest factor"),
        (f"{JITTER} INPUT.SCALE_JITTER.SIZE 9000", r"SIZE is 9000 .*to 18000 pixels, expected a whole .* to 16384"),
        (f"{JITTER} INPUT.CROP.ENABLED True", r"CROP.ENABLED is True .*SCALE_JITTER.ENABLED is True .*one to False"),
        (f"{JITTER} MODEL.META_ARCHITECTURE PanopticFPN", r"SCALE_JITTER.ENABLED is True .*PanopticFPN.*semantic"),
        (f"{PASTE} INPUT.SCALE_JITTER.ENABLED False", r"COPY_PASTE is 0.5 .*same size. Set INPUT.SCALE_JITTER.ENABLED"),
        (f"{PASTE} MODEL.MASK_ON False", r"COPY_PASTE is 0.5 .*MODEL.MASK_ON is False.*by their masks"),
        (f"{PASTE} INPUT.MASK_FORMAT polygon", r"INPUT.MASK_FORMAT is polygon.*Set INPUT.MASK_FORMAT to bitmask\."),
        (f"{PASTE} MODEL.KEYPOINT_ON True", r"MODEL.KEYPOINT_ON is True.*Set MODEL.KEYPOINT_ON to False"),
        (f"{PASTE} MODEL.LOAD_PROPOSALS True", r"MODEL.LOAD_PROPOSALS is True.*Set MODEL.LOAD_PROPOSALS to False"),
    ],
)
def test_jitter_and_copy_paste(words, named):
    check_combinations(load(FPN, *PASTE.split()))
    with pytest.raises(ConfigError, match=named):
        check_combinations(load(FPN, *words.split()))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("TEST.BOX_REFINEMENT", True),
        ("TEST.BOX_VOTING", True),
        ("TEST.FLIP", True),
        ("TEST.MULTI_SCALE.MIN_SIZES", (200, 400)),
        ("TEST.ENSEMBLE", ("other.pth",)),
    ],
)
@pytest.mark.parametrize(
    ("file", "words", "named"),
    [
        (RETINANET, "", r"MODEL.META_ARCHITECTURE is RetinaNet .*GeneralizedRCNN"),
        (PANOPTIC, "", r"MODEL.META_ARCHITECTURE is PanopticFPN"),
        (PANOPTIC, "MODEL.META_ARCHITECTURE SemanticSegmentor", r"MODEL.META_ARCHITECTURE is SemanticSegmentor"),
        ("COCO-Detection/rpn_R_50_FPN_1x.yaml", "", r"MODEL.META_ARCHITECTURE is ProposalNetwork"),
        (CASCADE, "", r"MODEL.ROI_HEADS.NAME is CascadeROIHeads .*one stage"),
        (
            FPN,
            "MODEL.ROI_HEADS.NAME RROIHeads MODEL.MASK_ON False MODEL.ROI_BOX_HEAD.POOLER_TYPE ROIAlignRotated",
            r"MODEL.ROI_HEADS.NAME is RROIHeads",
        ),
        (C4, "TEST.AUG.ENABLED True", r"TEST.AUG.ENABLED is True"),
    ],
)
def test_options_of_the_test(file, words, named, key, value):
    check_combinations(load(file, *words.split()))
    off = "False" if value is True else r"\(\)"
    with pytest.raises(
        ConfigError, match=rf"{key} is {re.escape(str(value))} \(command line\), but {named}.*Set {key} to {off}\."
    ):
        check_combinations(load(file, *words.split(), key, str(value)))
    check_combinations(load(C4, key, str(value)))
    check_combinations(load(FPN, key, str(value)))


def test_several_scales_need_one_that_they_are_compared_with():
    words = ("TEST.MULTI_SCALE.MIN_SIZES", "(200, 400)", "INPUT.MIN_SIZE_TEST", "0", "INPUT.MAX_SIZE_TEST", "100")
    with pytest.raises(ConfigError, match=r"MULTI_SCALE.MIN_SIZES is \(200, 400\) .*INPUT.MIN_SIZE_TEST is 0"):
        check_combinations(load(C4, *words))


@pytest.mark.parametrize(
    ("file", "words", "named"),
    [
        (FPN, "", "MODEL.ROI_HEADS.NAME is StandardROIHeads .*conv5_x, which NetworkRes5ROIHeads has"),
        (CASCADE, "", "MODEL.ROI_HEADS.NAME is CascadeROIHeads"),
        (C4, "MODEL.ROI_HEADS.NAME Res5ROIHeads", "MODEL.ROI_HEADS.NAME is Res5ROIHeads"),
        (RETINANET, "", "MODEL.META_ARCHITECTURE is RetinaNet .*no RoI heads"),
        (PANOPTIC, "MODEL.META_ARCHITECTURE SemanticSegmentor", "MODEL.META_ARCHITECTURE is SemanticSegmentor"),
    ],
)
def test_global_context_needs_our_conv5_x(file, words, named):
    key = "MODEL.ROI_HEADS.GLOBAL_CONTEXT"
    check_combinations(load(file, *words.split()))
    with pytest.raises(ConfigError, match=rf"{key} is True \(command line\), but {named}.*Set {key} to False\."):
        check_combinations(load(file, *words.split(), key, "True"))
    check_combinations(load(C4, "MODEL.ROI_HEADS.NAME", "NetworkRes5ROIHeads", key, "True"))


def test_a_size_of_0_resizes_nothing():
    """Detectron2's own meaning, which no longer side contradicts."""
    check_combinations(load(FPN, "INPUT.MIN_SIZE_TEST", "0", "INPUT.MAX_SIZE_TEST", "100"))
    assert isinstance(
        transforms.ResizeShortestEdge(0, 100, "choice").get_transform(torch.ones(9, 9)), transforms.NoOpTransform
    )
