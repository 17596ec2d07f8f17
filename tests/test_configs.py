"""Every shipped configuration loads, builds and trains, at an eighth of the width on tiny images."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from resnet_backbone import build_network, detection, pretraining
from resnet_backbone.data.transforms import EvalTransform, TrainTransform
from resnet_backbone.detection.data import datasets
from resnet_backbone.detection.data.loader import TrainBatches
from resnet_backbone.detection.task import Detection
from resnet_backbone.engine.config import flatten, get_key, load_config, origin
from resnet_backbone.engine.describe import flat_config
from resnet_backbone.engine.network_config import fill_from_metadata
from resnet_backbone.engine.output import write_config
from resnet_backbone.engine.schedule import build_multiplier
from resnet_backbone.pretraining.task import Classification
from resnet_backbone.weights import read_checkpoint
from tests.reads import recorded

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
ALL = sorted(str(p.relative_to(ROOT)) for top in ("configs", "projects") for p in (ROOT / top).rglob("*.yaml"))
DETECTORS = sorted(p.name for p in CONFIGS.glob("*.yaml") if not p.name.startswith("base_"))
BASES = sorted(p.name for p in CONFIGS.glob("base_*.yaml"))
CLASSIFIERS = sorted(p.name for p in (CONFIGS / "pretrain").glob("*.yaml"))
SMALLER = ("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "INPUT.SCALE_JITTER.SIZE", 96)
MODERN = "faster_rcnn_R50_FPN_modern.yaml"
# The paper's own operators: keys that a command adds to a file.
VARIANTS = {
    "faster_rcnn_R50.yaml": ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool", "MODEL.RESNETS.STRIDE_IN_1X1", True),
    "faster_rcnn_VGG16.yaml": ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"),
}


def test_no_shipped_configuration_is_left_out():
    networks = ("R101", "R101_VOC2007", "R101_VOC2012", "R101_options", "R50", "R50_FPN", "R50_FPN_modern")
    networks += ("VGG16", "VGG16_FPN", "VGG16_VOC2007", "VGG16_VOC2012")
    assert [f"faster_rcnn_{name}.yaml" for name in networks] == DETECTORS
    cifar = [f"cifar10{name}.yaml" for name in ("", "_110", "_walkthrough")]
    assert [*cifar, *(f"imagenet{name}.yaml" for name in ("", "_modern", "_plateau", "_vgg"))] == CLASSIFIERS


@pytest.mark.parametrize("file", ALL)
def test_detectron2s_own_loader_reads_the_same(file, caplog):
    """As a user's script does; nothing in them needs this package's loader."""
    theirs, ours = get_cfg(), detection.get_config()
    detection.add_network_config(theirs)
    if "pretrain" in file or "cifar10" in file:
        theirs, ours = pretraining.get_config(), pretraining.get_config()
    theirs.merge_from_file(str(ROOT / file))
    assert "has no VERSION" not in caplog.text
    theirs.MODEL.DEVICE = "cpu"
    assert flat_config(theirs) == flat_config(load_config(ours, ROOT / file, ["MODEL.DEVICE", "cpu"]))


@pytest.mark.parametrize(("file", "keys"), [*((file, ()) for file in DETECTORS), *VARIANTS.items()], ids=str)
def test_a_detector_takes_a_step_that_reaches_every_trainable_parameter(
    detection_config, classifier, tmp_path, file, keys
):
    name = load_config(detection.get_config(), CONFIGS / file).MODEL.NETWORK.NAME
    path = str(classifier(name, *keys[2:]))
    cfg = detection_config(file, tmp_path, "MODEL.WEIGHTS", path, *SMALLER, *keys)
    fill_from_metadata(cfg, read_checkpoint(path).metadata, path)
    datasets.check(cfg, cfg.DATASETS.TRAIN[0])
    torch.manual_seed(0)
    model = build_model(cfg).train()
    # fc6 and fc7 come with their dropout; a pyramid's box head is Detectron2's.
    assert any("Dropout" in type(m).__name__ for m in model.modules()) == (cfg.MODEL.ROI_BOX_HEAD.NAME == "VGGBoxHead")
    with EventStorage():
        losses = model(next(TrainBatches(cfg)(0)))
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
    sum(losses.values()).backward()
    for key, value in losses.items():
        assert 0 <= value.item() < 1000, key
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
            # A ReLU's dead unit or one sampled RoI may leave a zero here and there, but no tensor.
            assert parameter.grad.abs().sum() > 0 or key.startswith("proposal_generator.rpn_head.anchor_deltas"), key
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


@pytest.mark.parametrize("file", CLASSIFIERS)
def test_a_classifier_trains(pretrain_config, tmp_path, file):
    name = load_config(pretraining.get_config(), CONFIGS / "pretrain" / file).MODEL.NETWORK.NAME
    keys = ("MODEL.NETWORK.NAME", name, "MODEL.NETWORK.POOL5", name != "vgg16", "SOLVER.MAX_ITER", 1)
    if file == "imagenet_modern.yaml":  # its warm-up must end, and INPUT.CROP.SIZE fit
        keys += ("SOLVER.WARMUP_ITERS", 0)
    if file == "imagenet_plateau.yaml":
        keys += ("TEST.EVAL_PERIOD", 1)
    results = pretraining.run(pretrain_config(tmp_path, *keys, file=CONFIGS / "pretrain" / file))
    assert 0 <= results["top1"] <= 100
    assert read_checkpoint(tmp_path / "model_final.pth").metadata.architecture == name


@pytest.mark.parametrize("file", [*DETECTORS, *BASES, "pretrain/imagenet.yaml"])
def test_stride_placement_is_stated(file):
    assert yaml.safe_load((CONFIGS / file).read_text())["MODEL"]["RESNETS"]["STRIDE_IN_1X1"] is False


@pytest.mark.parametrize("file", DETECTORS)
def test_detectors_leave_the_number_of_classes_to_the_data(file):
    cfg = load_config(detection.get_config(), CONFIGS / file)
    assert origin(cfg, "MODEL.ROI_HEADS.NUM_CLASSES") is None and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80


@pytest.mark.parametrize("file", DETECTORS)
def test_detectors_leave_the_preprocessing_to_the_weights(file):
    cfg = load_config(detection.get_config(), CONFIGS / file)
    assert all(origin(cfg, key) is None for key in ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"))


@pytest.mark.parametrize("file", [*DETECTORS, *(f"pretrain/{name}" for name in CLASSIFIERS)])
def test_the_header_says_command_and_expected_result(file):
    header = [line for line in (CONFIGS / file).read_text().splitlines() if line.startswith("#")]
    tool = "pretrain" if file.startswith("pretrain/") else "train_net"
    assert header[0].startswith(f"# python tools/{tool}.py --config-file configs/{file}")
    assert re.search(r"Expected|has no figure", " ".join(header))


@pytest.mark.parametrize("file", DETECTORS)
def test_weights_of_the_command_are_where_pretraining_puts_them(file):
    """The header's MODEL.WEIGHTS is the OUTPUT_DIR of the pretraining command with the same network."""
    name = load_config(detection.get_config(), CONFIGS / file).MODEL.NETWORK.NAME
    assert f"MODEL.WEIGHTS output/{name}/model_final.pth" in (CONFIGS / file).read_text().splitlines()[0]


def test_the_papers_detector():
    """ResNet paper, appendix A, and the Faster R-CNN baseline that it names."""
    cfg = load_config(detection.get_config(), CONFIGS / "faster_rcnn_R101.yaml")
    assert cfg.INPUT.MIN_SIZE_TRAIN == (600,) and cfg.INPUT.MAX_SIZE_TEST == 1000
    assert cfg.MODEL.RPN.POST_NMS_TOPK_TEST == 300 and cfg.SOLVER.IMS_PER_BATCH == 16
    multiplier = build_multiplier(cfg)
    for iteration, rate in ((0, 1e-6), (1000, 1e-3), (239_999, 1e-3), (240_000, 1e-4), (319_999, 1e-4)):
        assert cfg.SOLVER.BASE_LR * multiplier(iteration / cfg.SOLVER.MAX_ITER) == pytest.approx(rate, rel=1e-3)
    vgg = load_config(detection.get_config(), CONFIGS / "faster_rcnn_VGG16.yaml")
    assert vgg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION == 7 and vgg.MODEL.ROI_HEADS.IN_FEATURES == ["conv5"]
    assert vgg.SOLVER == cfg.SOLVER and vgg.INPUT == cfg.INPUT and vgg.DATASETS == cfg.DATASETS


@pytest.mark.parametrize("network", ["R101", "VGG16"])
def test_the_papers_detectors_on_voc(network):
    """Those on COCO, with the training of Faster R-CNN (arXiv 1506.01497, section 3) on the sets of Table 7."""
    coco, voc07, voc12 = (
        load_config(detection.get_config(), CONFIGS / f"faster_rcnn_{network}{data}.yaml")
        for data in ("", "_VOC2007", "_VOC2012")
    )
    differs = {key for key, value in flatten(voc07) if get_key(coco, key) != value}
    solver = {"REFERENCE_IMS_PER_BATCH", "IMS_PER_BATCH", "WEIGHT_DECAY", "STEPS", "MAX_ITER"}
    expected = {"MODEL.ANCHOR_GENERATOR.SIZES", "DATASETS.TRAIN", "DATASETS.TEST", "TEST.EVAL_PERIOD", "OUTPUT_DIR"}
    assert differs == expected | {f"SOLVER.{key}" for key in solver}
    again = {key for key, value in flatten(voc12) if get_key(voc07, key) != value}
    assert again == {"DATASETS.TRAIN", "DATASETS.TEST", "OUTPUT_DIR"}
    assert voc07.MODEL.ANCHOR_GENERATOR.SIZES == [[128, 256, 512]] and voc07.SOLVER.WEIGHT_DECAY == 0.0005
    multiplier = build_multiplier(voc07)
    for iteration, rate in ((1000, 1e-3), (59_999, 1e-3), (60_000, 1e-4), (79_999, 1e-4)):
        assert voc07.SOLVER.BASE_LR * multiplier(iteration / voc07.SOLVER.MAX_ITER) == pytest.approx(rate)
    assert voc07.SOLVER.MAX_ITER == 80_000 and voc07.DATASETS.TEST == ("voc_2007_test",) and voc12.DATASETS.TEST == ()


def test_the_modern_detector(detection_config, classifier, tmp_path):
    """100 epochs of COCO 2017's 118,287 images; a run in bf16, whose result is the moving average."""
    cfg = load_config(detection.get_config(), CONFIGS / MODERN)
    epochs = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / 118_287
    assert epochs == pytest.approx(100, abs=0.3)
    simple = load_config(detection.get_config(), CONFIGS / "faster_rcnn_R50_FPN.yaml").SOLVER
    assert cfg.SOLVER.BASE_LR / cfg.SOLVER.IMS_PER_BATCH == simple.BASE_LR / simple.IMS_PER_BATCH
    keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", classifier("resnet18"), "SOLVER.MAX_ITER", 2, *SMALLER)
    cfg = detection_config(MODERN, tmp_path, *keys, "DATASETS.TEST", "()")
    with recorded(cfg) as read:
        detection.run(cfg)
    assert {"SOLVER.AMP.PRECISION", "INPUT.SCALE_JITTER.RANGE"} <= read and cfg.SOLVER.AMP.PRECISION == "bf16"
    last, final = (read_checkpoint(tmp_path / f"model_{name}.pth").model for name in ("0000001", "final"))
    different = {key for key, tensor in last.items() if not torch.equal(tensor, final[key])}
    assert "roi_heads.box_predictor.cls_score.weight" in different  # the checkpoint's are the last weights


def test_the_papers_classifier():
    """Section 3.4: batch 256, 0.1 divided by 10, decay 1e-4, momentum 0.9, shorter side 256 to 480, crops of 224."""
    cfg = load_config(pretraining.get_config(), CONFIGS / "pretrain" / "imagenet.yaml")
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WEIGHT_DECAY, solver.MOMENTUM) == (256, 0.1, 1e-4, 0.9)
    sizes = {tuple(cfg.INPUT.MIN_SIZE_TRAIN), tuple(cfg.INPUT.CROP.SIZE)}
    assert sizes == {(256, 480), (224, 224)}
    epochs = solver.MAX_ITER * 256 / 1_281_167
    assert epochs == pytest.approx(90, abs=0.1)
    TrainTransform(short_side=(256, 480), crop=(224, 224), crop_type=cfg.INPUT.CROP.TYPE)
    EvalTransform(short_side=cfg.INPUT.MIN_SIZE_TEST, crop=(224, 224))
    plateau = load_config(pretraining.get_config(), CONFIGS / "pretrain" / "imagenet_plateau.yaml").SOLVER
    assert (plateau.LR_SCHEDULER_NAME, plateau.GAMMA, plateau.MAX_ITER) == ("WarmupPlateauLR", 0.1, 600_000)
    vgg = load_config(pretraining.get_config(), CONFIGS / "pretrain" / "imagenet_vgg.yaml")
    rates = [vgg.SOLVER.BASE_LR, vgg.SOLVER.WEIGHT_DECAY]
    assert rates == [0.01, 5e-4]
    epochs = vgg.SOLVER.MAX_ITER * 256 / 1_281_167
    assert epochs == pytest.approx(74, abs=0.1)
    with torch.device("meta"):
        build_network(vgg.MODEL.NETWORK.NAME)


def test_the_papers_cifar_networks():
    """Section 4.2: batch 128, 0.1 divided by 10 at 32k and 48k of 64k, decay 1e-4, 4 pixels of padding, crops of 32."""
    cfg = load_config(pretraining.get_config(), CONFIGS / "pretrain" / "cifar10.yaml")
    solver, crop = cfg.SOLVER, cfg.INPUT.CROP
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WEIGHT_DECAY, solver.MOMENTUM) == (128, 0.1, 1e-4, 0.9)
    assert (crop.TYPE, crop.PADDING, tuple(crop.SIZE)) == ("padded", 4, (32, 32))
    multiplier = build_multiplier(cfg)
    for iteration, rate in ((0, 1.0), (31_999, 1.0), (32_000, 0.1), (47_999, 0.1), (48_000, 0.01), (63_999, 0.01)):
        assert multiplier(iteration / solver.MAX_ITER) == pytest.approx(rate)
    assert solver.MAX_ITER == 64_000
    deep = load_config(pretraining.get_config(), CONFIGS / "pretrain" / "cifar10_110.yaml").SOLVER
    assert pytest.approx((80, 0.01)) == (deep.WARMUP_UNTIL_ERROR, deep.BASE_LR * deep.WARMUP_FACTOR)
    walk = load_config(pretraining.get_config(), CONFIGS / "pretrain" / "cifar10_walkthrough.yaml").SOLVER
    epochs = [iterations * 64 / 50_000 for iterations in (*walk.STEPS, walk.MAX_ITER)]
    assert epochs == pytest.approx([30, 45, 60], abs=0.01) and walk.IMS_PER_BATCH == 64


@pytest.mark.parametrize("tool", [detection, pretraining])
def test_a_written_configuration_is_that_of_another_run(tool, tmp_path):
    """A run's config.yaml sets every key, and YAML turns tuples inside of values into lists."""
    if tool is detection:
        file, task = "faster_rcnn_R50_FPN.yaml", Detection
    else:
        file, task = "pretrain/imagenet.yaml", Classification
    cfg = load_config(tool.get_config(), CONFIGS / file, ["MODEL.DEVICE", "cpu"])
    write_config(cfg, tmp_path)
    again = load_config(tool.get_config(), tmp_path / "config.yaml")
    task(again).check(eval_only=False)
