"""A loaded detector against Detectron2's DefaultPredictor, and what cannot be loaded."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from resnet_backbone import detection
from resnet_backbone.detection import add_network_config, load_detector
from resnet_backbone.errors import InputError
from resnet_backbone.weights import Checkpoint, read_checkpoint, write_checkpoint


def default_predictor(file: Path) -> DefaultPredictor:
    cfg = get_cfg()
    add_network_config(cfg)
    cfg.merge_from_file(str(file.parent / "run" / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(file)
    return DefaultPredictor(cfg)


def assert_same(found, expected, atol=1e-4):
    assert len(found) == len(expected) > 0
    assert found.image_size == expected.image_size
    assert torch.equal(found.pred_classes, expected.pred_classes)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=atol, rtol=1e-4)


def test_the_checkpoint_alone_gives_what_detectron2s_predictor_gives(detector_file, pictures):
    detector = load_detector(detector_file)
    assert detector.class_names == read_checkpoint(detector_file).metadata.class_names
    theirs = default_predictor(detector_file)
    for file in pictures[:2]:
        bgr = cv2.imread(str(file))
        expected = theirs(bgr)["instances"]
        assert len(expected) == 7  # TEST.DETECTIONS_PER_IMAGE
        rgb = np.ascontiguousarray(bgr[:, :, ::-1])
        assert_same(detector(str(file)), expected)
        assert_same(detector(rgb), expected)
        assert_same(detector(bgr, channel_order="BGR"), expected)
        assert_same(detector(torch.from_numpy(rgb).permute(2, 0, 1)), expected)


def test_several_images_are_detected_on_as_if_each_were_alone(detector_file, pictures):
    detector = load_detector(detector_file)
    images = [cv2.imread(str(file)) for file in pictures[:4]]
    images[1] = images[1][:50]
    images[3] = cv2.resize(images[3], (70, 120))
    alone = [detector(image) for image in images]
    for detector.batch_size in (1, 3):
        for found, expected in zip(detector([*images, pictures[0]]), [*alone, detector(pictures[0])], strict=True):
            assert_same(found, expected)
    assert detector([]) == []


def test_keys_may_be_set_but_not_against_the_weights(detector_file, pictures):
    detector = load_detector(detector_file, opts=("TEST.DETECTIONS_PER_IMAGE", "3"))
    assert len(detector(pictures[0])) == 3
    with pytest.raises(InputError, match=r"INPUT.FORMAT is BGR \(command line\).*RGB"):
        load_detector(detector_file, opts=("INPUT.FORMAT", "BGR"))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("TEST.MULTI_SCALE.MIN_SIZES", "(240, 160, 80)"), r"TEST.MULTI_SCALE.MIN_SIZES is .*ascending"),
        (("TEST.MULTI_SCALE.MIN_SIZES", "(80,)"), "TEST.MULTI_SCALE.MIN_SIZES is .*expected"),
        (("TEST.MULTI_SCALE.REGION_SIZE", "-5"), "TEST.MULTI_SCALE.REGION_SIZE is -5 .*expected"),
        (("MODEL.ROI_HEADS.NMS_THRESH_TEST", "3"), "NMS_THRESH_TEST is 3.0 .*expected"),
        (("INPUT.MAX_SIZE_TEST", "20"), "INPUT.MAX_SIZE_TEST is 20 .*below the shorter side"),
        (("MODEL.ROI_HEADS.NAME", "StandardHeads"), "StandardHeads .*is not registered; the nearest is Standard"),
        (("TEST.AUG.ENABLED", "True"), r"TEST.AUG.ENABLED is True \(command line\).*evaluations alone"),
        (
            ("MODEL.ROI_HEADS.GLOBAL_CONTEXT", "True"),
            "GLOBAL_CONTEXT is True .*trained with False.*Set it to False",
        ),
    ],
)
def test_values_that_cannot_be_used_are_refused_as_in_training(detector_file, opts, message):
    with pytest.raises(InputError, match=message):
        load_detector(detector_file, opts=opts)


@pytest.mark.parametrize("own", [True, False])
def test_files_that_do_not_describe_themselves_need_a_configuration(detector_file, tmp_path, pictures, own):
    whole = read_checkpoint(detector_file)
    file, config = tmp_path / "old.pth", detector_file.parent / "run" / "config.yaml"
    if own:  # from before the configuration was recorded
        write_checkpoint(file, Checkpoint(whole.model, replace(whole.metadata, config={})))
    else:
        torch.save({"model": dict(whole.model), "iteration": 1}, file)  # as Detectron2's trainer does
    with pytest.raises(InputError, match=r"does not say how .*--config-file"):
        load_detector(file)
    expected = load_detector(detector_file)(pictures[0])
    assert_same(load_detector(file, config_file=config)(pictures[0]), expected)
    (tmp_path / "config.yaml").write_text(config.read_text())
    beside = load_detector(file)
    assert_same(beside(pictures[0]), expected)
    assert len(beside.class_names) == 8  # of the data set that the configuration names


def test_a_detector_of_detectron2s_own_parts(tmp_path, pictures):
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    small = ("MODEL.DEVICE", "cpu", "MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8)
    small += ("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.RETINANET.PRIOR_PROB", 0.5)
    small += ("INPUT.MIN_SIZE_TEST", 64, "MODEL.BACKBONE.FREEZE_AT", 0)
    cfg.merge_from_list(list(small))
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model_final.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    detector = load_detector(tmp_path / "model_final.pth")
    assert detector.class_names == tuple(MetadataCatalog.get("coco_2017_train").thing_classes)
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    expected = DefaultPredictor(cfg)(cv2.imread(str(pictures[0])))["instances"]
    assert_same(detector(pictures[0]), expected, atol=1e-3)


def test_what_is_no_detector_is_refused_in_a_sentence(detector_file, classifier, detection_config, tmp_path):
    with pytest.raises(InputError, match=r"holds a classifier \(resnet18\).*tools/train_net.py"):
        load_detector(classifier("resnet18"))
    torn = tmp_path / "torn.pth"
    torn.write_bytes(detector_file.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"torn\.pth"):
        load_detector(torn)
    with pytest.raises(InputError, match=r"there is no checkpoint .*none\.pth"):
        load_detector(tmp_path / "none.pth")
    whole = read_checkpoint(detector_file)
    for key, value in (("MODEL.META_ARCHITECTURE", "SemanticSegmentor"), ("MODEL.LOAD_PROPOSALS", True)):
        other = replace(whole.metadata, config={**whole.metadata.config, key: value})
        write_checkpoint(tmp_path / "other.pth", Checkpoint(whole.model, other))
        with pytest.raises(InputError, match=key):
            load_detector(tmp_path / "other.pth")
    newer = replace(whole.metadata, config={**whole.metadata.config, "MODEL.OF_TOMORROW": 1})
    write_checkpoint(tmp_path / "newer.pth", Checkpoint(whole.model, newer))
    with pytest.raises(InputError, match=r"no configuration key MODEL.OF_TOMORROW \(metadata of"):
        load_detector(tmp_path / "newer.pth")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((20, 30), np.uint8), r"shape \(20, 30\), expected \(H, W, 3\)"),
        (np.zeros((3, 20, 30), np.uint8), r"shape \(3, 20, 30\), expected \(H, W, 3\)"),
        (torch.zeros(20, 30, 3, dtype=torch.uint8), r"shape \(20, 30, 3\), expected \(3, H, W\)"),
        (torch.rand(3, 20, 30), "float32, expected uint8.*Multiply"),
        (np.zeros((0, 30, 3), np.uint8), r"shape \(0, 30, 3\)"),
        (np.zeros((1000, 4, 3), np.uint8), "4×1000 pixels"),
    ],
)
def test_arrays_of_another_form_are_refused(detector_file, image, message):
    detector = detection.inference.detector.Detector.__new__(detection.inference.detector.Detector)
    with pytest.raises(InputError, match=message):
        detector(image)


def test_an_unknown_channel_order_is_refused(detector_file):
    with pytest.raises(InputError, match="expected RGB or BGR"):
        load_detector(detector_file)(np.zeros((20, 30, 3), np.uint8), channel_order="rgb")
