from dataclasses import replace

import pytest
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.modeling import build_model

from resnet_backbone.detection import add_network_config, datasets
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.weights import CheckpointError, read_checkpoint, write_checkpoint


@pytest.fixture
def own_script(classifier, scenes, tmp_path):
    """The configuration of somebody's own Detectron2 script: a zoo file, the two added lines, our names."""
    datasets.register(scenes)
    cfg = get_cfg()
    add_network_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_network_backbone"
    cfg.MODEL.ROI_HEADS.NAME = "NetworkRes5ROIHeads"
    cfg.MODEL.NETWORK.NAME, cfg.MODEL.NETWORK.WIDTH = "resnet18", 0.125
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.WEIGHTS = str(classifier("resnet18"))
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8, 8
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50, 20
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50, 10
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (64,), 96
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (scenes,), (scenes,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, 2, ()
    cfg.OUTPUT_DIR = str(tmp_path / "own")
    (tmp_path / "own").mkdir()
    return cfg


def assert_holds_classifier(model, path):
    state, classifier = model.state_dict(), read_checkpoint(path).model
    for name, tensor in classifier.items():
        if name.startswith("fc.") or name.endswith("num_batches_tracked"):
            continue
        in_head = name.startswith("layer4.")
        part = "roi_heads.res5." + name.removeprefix("layer4.") if in_head else f"backbone.network.{name}"
        assert torch.equal(state[part], tensor), part


def test_default_trainer_starts_from_the_classifier_and_its_result_is_loaded_back(own_script):
    trainer = DefaultTrainer(own_script)
    trainer.resume_or_load(resume=False)
    assert_holds_classifier(trainer.model, own_script.MODEL.WEIGHTS)
    trainer.train()

    # Detectron2's own checkpoint has no metadata: taken as the configuration says.
    own_script.MODEL.WEIGHTS = f"{own_script.OUTPUT_DIR}/model_final.pth"
    predictor = DefaultPredictor(own_script)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(predictor.model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("key", "value", "theirs"),
    [
        ("INPUT.FORMAT", "BGR", "RGB"),
        ("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675], "[123.675, 116.28, 103.53]"),
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0], "58.395"),
        ("MODEL.RESNETS.STRIDE_IN_1X1", True, "False"),
        ("MODEL.NETWORK.NAME", "resnet34", "resnet18"),
        ("MODEL.NETWORK.WIDTH", 0.25, "0.125"),
    ],
)
def test_a_script_that_feeds_the_weights_otherwise_stops(own_script, key, value, theirs):
    own_script.merge_from_list([key, value])
    with pytest.raises(ConfigError) as error:
        DefaultTrainer.build_model(own_script)
    message = str(error.value)
    assert key in message and theirs in message and str(value) in message


def test_stock_heads_over_our_backbone_stop(own_script):
    own_script.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    with pytest.raises(ConfigError, match="to NetworkRes5ROIHeads"):
        build_model(own_script)


def test_frozen_norms_without_statistics_stop_unless_asked_for(own_script, classifier, tmp_path):
    never = classifier("resnet18", "TEST.PRECISE_BN.ENABLED", False)
    for weights, word in (("", "MODEL.WEIGHTS is empty"), (str(never), "never estimated")):
        own_script.MODEL.WEIGHTS = weights
        with pytest.raises(ConfigError, match=word) as error:
            build_model(own_script)
        assert "ALLOW_UNTRAINED_FROZEN_BN" in str(error.value)
        allowed = own_script.clone()
        allowed.MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN = True
        build_model(allowed)
        trained = own_script.clone()
        trained.MODEL.RESNETS.NORM, trained.MODEL.BACKBONE.FREEZE_AT = "BN", 0
        build_model(trained)


def test_missing_tensors_stop_unless_their_prefix_is_allowed(own_script, tmp_path):
    checkpoint = read_checkpoint(own_script.MODEL.WEIGHTS)
    rest = {name: tensor for name, tensor in checkpoint.model.items() if not name.startswith("layer4.1.")}
    own_script.MODEL.WEIGHTS = str(tmp_path / "rest.pth")
    write_checkpoint(own_script.MODEL.WEIGHTS, replace(checkpoint, model=rest))
    with pytest.raises(CheckpointError, match=r"roi_heads\.res5: 10 of 25 tensors.*layer4\.1\.conv1\.weight"):
        build_model(own_script)
    own_script.MODEL.NETWORK.ALLOW_MISSING = ("layer4.1.",)
    model = build_model(own_script)
    assert torch.equal(model.roi_heads.res5[0].conv1.weight, rest["layer4.0.conv1.weight"])


def test_the_file_is_read_once_for_backbone_and_head(own_script, monkeypatch):
    from resnet_backbone.detection import pretrained

    read, reads = pretrained.read_with_overrides, []
    pretrained.forget_pretrained()
    monkeypatch.setattr(pretrained, "read_with_overrides", lambda path, given: reads.append(path) or read(path, given))
    build_model(own_script)
    assert reads == [own_script.MODEL.WEIGHTS]


def test_a_changed_file_is_read_again(own_script, tmp_path):
    checkpoint = read_checkpoint(own_script.MODEL.WEIGHTS)
    own_script.MODEL.WEIGHTS = str(tmp_path / "changing.pth")
    for factor in (1, 2):
        scaled = {name: tensor * factor for name, tensor in checkpoint.model.items()}
        write_checkpoint(own_script.MODEL.WEIGHTS, replace(checkpoint, model=scaled))
        weight = build_model(own_script).backbone.network.conv1.weight
        assert torch.equal(weight, checkpoint.model["conv1.weight"] * factor)


@pytest.mark.parametrize(
    ("weights", "words"),
    [("detectron2://ImageNetPretrained/MSRA/R-50.pkl", ("nothing is downloaded", "path")), ("/no/such.pth", ("/no",))],
)
def test_weights_that_are_not_there_stop(own_script, weights, words):
    own_script.MODEL.WEIGHTS = weights
    with pytest.raises(CheckpointError) as error:
        build_model(own_script)
    assert all(word in str(error.value) for word in words)


def test_a_torch_file_that_is_no_network_stops(own_script, tmp_path):
    torch.save({"conv1.weight": torch.zeros(8, 3, 7, 7)}, tmp_path / "plain.pth")
    own_script.MODEL.WEIGHTS = str(tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match=r"plain\.pth fits no network"):
        build_model(own_script)


def test_detectron2s_checkpointer_leaves_the_loaded_classifier_alone(own_script):
    model = build_model(own_script)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    DetectionCheckpointer(model).load(own_script.MODEL.WEIGHTS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
