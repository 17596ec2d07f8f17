import json
import sys
from pathlib import Path

import cv2
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from torch import nn

from resnet_backbone import detection
from resnet_backbone.detection import add_network_config
from resnet_backbone.detection.task import Detection, describe_frozen
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.trainer import Trainer
from resnet_backbone.errors import InputError
from resnet_backbone.weights import CheckpointError, read_checkpoint
from tests.engine.tiny import assert_equal
from tests.engine.tiny import metrics as metrics_of

R50 = "faster_rcnn_R50.yaml"
ALLOW = ("MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN", True)


class Interrupted(Exception):
    pass


@pytest.fixture
def small(detection_config, classifier, tmp_path):
    """The function `(folder, KEY, VALUE, …)` that gives ResNet-18-C4 from a classifier."""

    def load(folder="run", *overrides):
        keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", classifier("resnet18"), *overrides)
        return detection_config(R50, tmp_path / folder, *keys)

    return load


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def losses(folder: Path, name: str = "total_loss") -> list[float]:
    lines = (folder / "metrics.json").read_text().splitlines()
    return [json.loads(line)[name] for line in lines if name in line]


def test_what_a_run_leaves_behind(small, tmp_path, classifier):
    cfg = small("run", "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1)
    results = detection.run(cfg)
    folder = tmp_path / "run"
    assert set(results) == {"bbox"} and "AP50" in results["bbox"]

    source, metadata = (read_checkpoint(p).metadata for p in (classifier("resnet18"), folder / "model_final.pth"))
    assert (metadata.kind, metadata.architecture, len(metadata.class_names)) == ("detector", "resnet18", 8)
    for name in ("channel_order", "pixel_mean", "pixel_std", "norm_statistics", "norm_epsilon", "arguments"):
        ours, theirs = getattr(metadata, name), getattr(source, name)
        if name == "arguments":  # frozen here, trained there
            ours, theirs = {**ours, "norm": None}, {**theirs, "norm": None}
        assert ours == theirs, name
    assert metadata.origin["pretrained"] == source.origin and metadata.origin["iterations"] == 2
    assert metadata.origin["AP50"] == pytest.approx(results["bbox"]["AP50"], nan_ok=True)

    # The evaluation after the first iteration is in the metrics, the keys left alone were filled and written down.
    assert any("bbox/AP" in line for line in (folder / "metrics.json").read_text().splitlines())
    written = get_cfg()
    add_network_config(written)
    written.merge_from_file(str(folder / "config.yaml"))
    network = written.MODEL.NETWORK
    assert [written.INPUT.FORMAT, network.NAME, network.WIDTH] == ["RGB", "resnet18", 0.125]
    means = written.MODEL.PIXEL_MEAN
    assert means == pytest.approx([123.675, 116.28, 103.53])
    text = log(folder)
    assert "frozen: stages stem, res2;" in text
    assert f"75 of 75 backbone tensors, 25 of 25 head tensors from {classifier('resnet18')}\n" in text
    assert "SOLVER.BASE_LR" in text


def test_the_result_loads_in_detectron2s_own_predictor(small, tmp_path, scenes):
    cfg = small()
    detection.run(cfg)
    folder = tmp_path / "run"

    own = get_cfg()
    add_network_config(own)
    own.merge_from_file(str(folder / "config.yaml"))
    own.MODEL.WEIGHTS = str(folder / "model_final.pth")
    own.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    predictor = DefaultPredictor(own)
    predictor.model.to(memory_format=torch.channels_last)  # as ours: another layout rounds otherwise
    cfg.MODEL.WEIGHTS = own.MODEL.WEIGHTS
    from resnet_backbone.detection.build import build_detector

    ours = build_detector(cfg, read_checkpoint(own.MODEL.WEIGHTS), own.MODEL.WEIGHTS).eval()
    image = cv2.imread(str(next((Path(scenes).parent / "images").iterdir())))
    found = predictor(image)["instances"]
    rgb = image[:, :, ::-1].copy()
    tensor = torch.from_numpy(predictor.aug.get_transform(rgb).apply_image(rgb).copy())
    with torch.no_grad():
        expected = ours([{"image": tensor.permute(2, 0, 1), "height": image.shape[0], "width": image.shape[1]}])
    expected = expected[0]["instances"]
    assert len(found) > 0
    # Ours is accelerated.
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.pred_classes, expected.pred_classes)


def test_eval_only_gives_what_the_run_gave(small, tmp_path):
    trained = detection.run(small("run", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0))
    keys = ("MODEL.WEIGHTS", tmp_path / "run" / "model_final.pth", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    tested = detection.run(small("test", *keys), eval_only=True)
    assert tested["bbox"] == pytest.approx(trained["bbox"], nan_ok=True)
    assert not list((tmp_path / "test").glob("*.pth"))
    reports = [(tmp_path / name / "evaluation" / "report.md").read_text() for name in ("run", "test")]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("name", ["resnet18", "vgg16"])
def test_a_stopped_and_resumed_run_ends_in_the_same_bits(detection_config, classifier, tmp_path, monkeypatch, name):
    file = R50 if name == "resnet18" else "faster_rcnn_VGG16.yaml"
    start = tmp_path / "start.pth"
    start.write_bytes(classifier(name).read_bytes())

    def config(folder):
        keys = ("MODEL.NETWORK.NAME", name, "MODEL.WEIGHTS", start, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2)
        return detection_config(file, tmp_path / folder, *keys)

    detection.run(config("whole"))
    step = Trainer.run_step

    def stop(self):
        if self.iter == 3:
            raise Interrupted
        step(self)

    monkeypatch.setattr(Trainer, "run_step", stop)
    with pytest.raises(Interrupted):
        detection.run(config("stopped"))
    monkeypatch.undo()
    start.unlink()  # a resumed run needs its own folder alone
    (tmp_path / "stopped" / "last_checkpoint").unlink()  # as if killed before it was written for the first time
    detection.run(config("stopped"), resume=True)
    whole, resumed = (read_checkpoint(tmp_path / run / "model_final.pth") for run in ("whole", "stopped"))
    for key, tensor in whole.model.items():
        assert torch.equal(tensor, resumed.model[key]), key
    assert repr(whole.metadata) == repr(resumed.metadata)  # as text, since an AP may be no number
    assert "the next iteration is 2\n" in log(tmp_path / "stopped")


def test_everything_that_draws_or_counts_resumes_in_the_same_bits(small, outlined, tmp_path, monkeypatch):
    """Broken off in a step, and again in an evaluation; the run ends early, for lack of patience."""
    keys = (
        "DATASETS.TRAIN",
        outlined,
        "DATASETS.TEST",
        outlined,
        "MODEL.MASK_ON",
        True,
        "INPUT.MASK_FORMAT",
        "bitmask",
    )
    keys += ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 1.0)
    keys += ("INPUT.SCALE_JITTER.ENABLED", True, "INPUT.SCALE_JITTER.SIZE", 96, "INPUT.COPY_PASTE", 0.7)
    keys += ("SOLVER.EMA_DECAY", 0.5, "SOLVER.MAX_ITER", 20, "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.BASE_LR", 0.005)
    keys += ("TEST.EVAL_PERIOD", 2, "TEST.PATIENCE", 2, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8)
    detection.run(small("whole", *keys))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    iterations = read_checkpoint(whole / "model_final.pth").metadata.origin["iterations"]
    assert 6 <= iterations < 20 and iterations % 2 == 0

    step, evaluate = Trainer.run_step, Detection.evaluate

    def stopping(method, when):
        def stop(self, *arguments):
            if when(self):
                raise Interrupted
            return method(self, *arguments)

        return stop

    for attribute, method, when in (
        ((Trainer, "run_step"), step, lambda trainer: trainer.iter == 4),
        ((Detection, "evaluate"), evaluate, lambda task: (parts / "model_0000005.pth").exists()),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(*attribute, stopping(method, when))
            with pytest.raises(Interrupted):
                detection.run(small("parts", *keys), resume=parts.exists())
    detection.run(small("parts", *keys), resume=True)
    assert [f"the next iteration is {n}\n" in log(parts) for n in (3, 6)] == [True, True]
    for folder in (whole, parts):
        assert f"the run is finished after {iterations} iterations: bbox/AP has not risen" in log(folder)
    names = {file.name for file in whole.glob("*.pth")}
    assert {"model_best.pth", "model_final.pth", f"model_{iterations - 1:07}.pth"} <= names
    for name in names:
        one, other = (read_checkpoint(folder / name) for folder in (whole, parts))
        assert_equal(dict(one.model), dict(other.model), name)
        assert repr(one.metadata) == repr(other.metadata)
        if one.trainer is not None:
            states = [{k: v for k, v in c.trainer.items() if not k.startswith("config")} for c in (one, other)]
            assert_equal(*states, name)
    assert metrics_of(whole, times=False) == metrics_of(parts, times=False)


def test_frozen_stages_stay_bit_identical(small, tmp_path, classifier):
    # All that FREEZE_AT covers, and every norm's statistics, scale and bias.
    detection.run(small("run", "SOLVER.MAX_ITER", 3, "SOLVER.BASE_LR", 0.01, "SOLVER.WEIGHT_DECAY", 0.1))
    before, after = (read_checkpoint(p).model for p in (classifier("resnet18"), tmp_path / "run" / "model_final.pth"))
    moved = set()
    for name, tensor in before.items():
        if name.startswith("fc.") or name.endswith("num_batches_tracked"):
            continue
        in_head = name.startswith("layer4.")
        part = "roi_heads.res5." + name.removeprefix("layer4.") if in_head else f"backbone.network.{name}"
        if not torch.equal(after[part], tensor):
            moved.add(name)
    assert moved == {n for n, t in before.items() if t.ndim == 4 and not n.startswith(("conv1.", "layer1."))}


def test_describe_frozen_of_other_models(detection_config, tmp_path):
    assert describe_frozen(nn.Linear(2, 2)).startswith("frozen: no stage; 0 of 2 parameter tensors")
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    text = describe_frozen(build_model(cfg))
    assert text.startswith("frozen: stages stem, res2;") and "20 batch normalizations" in text
    cfg = detection_config("faster_rcnn_VGG16.yaml", tmp_path, "MODEL.NETWORK.WIDTH", 0.125)
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["pool5"]
    text = describe_frozen(build_model(cfg))
    assert text.startswith("frozen: stages conv1, conv2; 8 of") and "pool5" not in text


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_the_metadata_say_whether_statistics_were_ever_estimated(detection_config, tmp_path, norm):
    keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.NETWORK.WIDTH", 0.125, "MODEL.RESNETS.NORM", norm)
    detection.run(detection_config(R50, tmp_path, *keys, "MODEL.BACKBONE.FREEZE_AT", 0, *ALLOW))
    statistics = read_checkpoint(tmp_path / "model_final.pth").metadata.norm_statistics
    assert statistics == ("never" if norm == "FrozenBN" else "running")


def test_of_several_test_sets_the_first_decides_or_the_one_that_a_key_names(small, tmp_path, scenes):
    again = f"{scenes}:{Path(scenes).parent / 'images'}"  # the same file under a second name
    keys = ("DATASETS.TEST", (scenes, again), "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1)
    keys += ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    results = detection.run(small("run", *keys))
    assert f"{scenes}/bbox/AP selects the best checkpoint" in log(tmp_path / "run")
    reports = sorted((tmp_path / "run" / "evaluation").glob("*/report.md"))
    assert [file.parent.name for file in reports] == ["annotations", "annotations_2"]
    assert log(tmp_path / "run").count(": report in ") == 2  # not after each TEST.EVAL_PERIOD
    best = read_checkpoint(tmp_path / "run" / "model_best.pth").metadata.origin
    assert best[f"{scenes}/bbox/AP"] == best[f"{again}/bbox/AP"]
    origin = read_checkpoint(tmp_path / "run" / "model_final.pth").metadata.origin
    assert {name: origin[name] for name in ("AP", "AP50")} == {
        name: results[scenes]["bbox"][name] for name in ("AP", "AP50")
    }
    detection.run(small("other", *keys, "TEST.BEST_METRIC", f"{again}/bbox/AP75"))
    assert f"{again}/bbox/AP75 selects the best checkpoint" in log(tmp_path / "other")
    assert read_checkpoint(tmp_path / "other" / "model_final.pth").metadata.origin["AP75"] >= 0
    with pytest.raises(ConfigError, match=r"TEST.BEST_METRIC is .*/bbox/AP49, which .* the nearest is .*/bbox/AP"):
        detection.run(small("none", *keys, "TEST.BEST_METRIC", "bbox/AP49"))
    assert not (tmp_path / "none" / "metrics.json").exists()  # before the first iteration


def test_frozen_stages_with_random_batch_norm_stop(detection_config, tmp_path):
    keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.NETWORK.WIDTH", 0.125, "MODEL.RESNETS.NORM", "BN")
    with pytest.raises(ConfigError, match="backbone has 5 frozen batch normalizations without statistics"):
        detection.run(detection_config(R50, tmp_path, *keys, "MODEL.BACKBONE.FREEZE_AT", 2))


def test_parts_of_a_batch_and_the_average_of_the_weights(small, tmp_path):
    """After two steps with decay d the average is d · first + (1 − d) · second; the final file holds it."""
    keys = ("SOLVER.ACCUMULATE", 2, "SOLVER.EMA_DECAY", 0.25, "SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1)
    detection.run(small("run", *keys, "TEST.EVAL_PERIOD", 1, "SOLVER.BASE_LR", 0.001))
    folder = tmp_path / "run"
    first, second, final = (
        read_checkpoint(folder / f"model_{name}.pth").model for name in ("0000000", "0000001", "final")
    )
    name = "proposal_generator.rpn_head.conv.weight"
    assert not torch.equal(first[name], second[name])
    torch.testing.assert_close(final[name], 0.25 * first[name] + 0.75 * second[name], rtol=0, atol=1e-7)
    assert (folder / "model_best.pth").is_file()


def test_a_loss_that_is_no_number_names_the_images_and_the_layer(small, scenes):
    cfg = small("run", "SOLVER.MAX_ITER", 3)
    poison = Trainer.before_train

    def before_train(self):
        poison(self)
        self.model.backbone.network.layer2[0].conv1.weight.data[0, 0, 0, 0] = float("inf")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "before_train", before_train)
        with pytest.raises(InputError, match=r"iteration 0 gave .*layer2\.0\.conv1.*images: .*scenes.*\.jpg"):
            detection.run(cfg)


def test_bf16_trains_float32_weights(small, tmp_path):
    detection.run(small("run", "SOLVER.AMP.ENABLED", True, "SOLVER.MAX_ITER", 2))
    model = read_checkpoint(tmp_path / "run" / "model_final.pth").model
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in model.values())
    detection.run(small("single", "SOLVER.MAX_ITER", 2))
    # The same anchors are sampled; RoIs need not be, since scores that are near each other change places.
    first, reference = (losses(tmp_path / run, "loss_rpn_cls")[0] for run in ("run", "single"))
    assert first != reference and first == pytest.approx(reference, rel=0.05)


@pytest.mark.parametrize(
    ("key", "value", "theirs"),
    [
        ("INPUT.FORMAT", "BGR", "RGB"),
        ("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675], "[123.675, 116.28, 103.53]"),
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0], "[58.395, 57.12, 57.375]"),
        ("MODEL.RESNETS.STRIDE_IN_1X1", True, "False"),
        ("MODEL.NETWORK.NAME", "resnet34", "resnet18"),
        ("MODEL.NETWORK.WIDTH", 0.5, "0.125"),
    ],
)
def test_a_contradiction_to_the_weights_stops_and_names_both(small, tmp_path, key, value, theirs):
    with pytest.raises(ConfigError) as error:
        detection.run(small("run", key, value))
    assert key in str(error.value) and theirs in str(error.value) and "command line" in str(error.value)
    assert not list((tmp_path / "run").glob("*.pth"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("MODEL.ROI_HEADS.NAME", "Res5ROIHeads"), ("NetworkRes5ROIHeads",)),
        (("MODEL.ROI_HEADS.NAME", "NetworkRes5Heads"), ("nearest is NetworkRes5ROIHeads",)),
        (("MODEL.BACKBONE.NAME", "build_network_bakbone"), ("nearest is build_network_backbone",)),
        (("MODEL.META_ARCHITECTURE", "FasterRCNN"), ("nearest is GeneralizedRCNN",)),
        (("MODEL.BACKBONE.NAME", "build_resnet_backbone"), ("tools/pretrain.py", "build_network_backbone")),
        (("MODEL.RPN.IN_FEATURES", ["res3"]), ("res3", "IN_FEATURES")),
        (("MODEL.ROI_HEADS.NUM_CLASSES", 80), ("NUM_CLASSES is 80", "8 categories")),
        (("DATASETS.TRAIN", ()), ("DATASETS.TRAIN is empty", "FOLDER:SPLIT")),
        (("MODEL.KEYPOINT_ON", True), ("MODEL.KEYPOINT_ON is True", "NetworkRes5ROIHeads", "StandardROIHeads")),
        (("MODEL.MASK_ON", True), ("MODEL.MASK_ON is True", "no segmentation")),
        (("MODEL.LOAD_PROPOSALS", True), ("MODEL.LOAD_PROPOSALS is True", "PROPOSAL_FILES_TRAIN has 0 files")),
        (("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"), ("MODEL.LOAD_PROPOSALS is False",)),
        (("MODEL.META_ARCHITECTURE", "PanopticFPN"), ("6 of 6 images", "sem_seg_file_name")),
        (("MODEL.META_ARCHITECTURE", "SemanticSegmentor"), ("6 of 6 images", "sem_seg_file_name")),
        (("DATASETS.TRAIN", "/no/where.json"), ("no COCO file /no/where.json",)),
        (("DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"), ("TrainingSampler",)),
        (("MODEL.WEIGHTS", "/no/model_final.pth"), ("no checkpoint /no/model_final.pth",)),
        (("MODEL.WEIGHTS", ""), ("MODEL.WEIGHTS is empty", "ALLOW_UNTRAINED_FROZEN_BN")),
        (("MODEL.RESNETS.RES5_DILATION", 4), ("MODEL.RESNETS.RES5_DILATION is 4 (command line)", "1 or 2")),
        (("SOLVER.WARMUP_UNTIL_ERROR", 80), ("WARMUP_UNTIL_ERROR is 80", "no training error", "Leave it at 0.0")),
        (("SOLVER.CUDA_GRAPH", True), ("SOLVER.CUDA_GRAPH",)),
        (("INPUT.FORMAT", "rgb"), ("INPUT.FORMAT is rgb (command line), expected RGB or BGR.",)),
        (("MODEL.RPN.IOU_THRESHOLDS", "[0.5]"), ("MODEL.RPN.IOU_LABELS is [0, -1, 1]", "one label more")),
        (("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0]"), ("MODEL.ROI_HEADS.IOU_THRESHOLDS is [0]", "above 0")),
        (("INPUT.MAX_SIZE_TEST", 32), ("INPUT.MAX_SIZE_TEST is 32", "INPUT.MIN_SIZE_TEST is 64")),
        (("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute"), ("CROP.SIZE is [0.9, 0.9]", "whole number")),
        (("MODEL.ANCHOR_GENERATOR.SIZES", "[[32], [64]]"), ("ANCHOR_GENERATOR.SIZES is", "1 list or 1, one for each")),
        (("MODEL.ROI_HEADS.NAME", "StandardROIHeads"), ("MODEL.ROI_BOX_HEAD.NAME is empty",)),
        (("MODEL.ROI_HEADS.NAME", "RROIHeads"), ("POOLER_TYPE is ROIAlignV2", "expected ROIAlignRotated")),
    ],
)
def test_what_cannot_be_used_stops_before_the_first_iteration(small, tmp_path, overrides, words):
    with pytest.raises(InputError) as error:
        detection.run(small("run", *overrides))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_eval_only_refuses_what_is_no_detector(small):
    with pytest.raises(ConfigError, match="holds a classifier"):
        detection.run(small(), eval_only=True)
    with pytest.raises(ConfigError, match="is empty, so --eval-only"):
        detection.run(small("run", "MODEL.WEIGHTS", "", *ALLOW), eval_only=True)


def test_a_detectors_classes_must_be_the_data_sets(small, tmp_path, scenes):
    detection.run(small())
    content = json.loads(Path(scenes).read_text())
    content["categories"][0]["name"] = "other"
    (tmp_path / "a.json").write_text(json.dumps(content))
    entry = f"{tmp_path / 'a.json'}:{Path(scenes).parent / 'images'}"
    keys = ("DATASETS.TEST", entry, "MODEL.WEIGHTS", tmp_path / "run" / "model_final.pth")
    with pytest.raises(ConfigError, match="same categories"):
        detection.run(small("test", *keys), eval_only=True)


STOCK = model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml")


def damp_stock(monkeypatch):
    """Frozen BN without statistics is the identity: damp the residual branches, or activations explode."""
    module = sys.modules[detection.run.__module__]  # the package's `run` is the function
    build = module.build_detector

    def damped(*args):
        model = build(*args)
        for name, tensor in model.state_dict().items():
            if name.endswith(("conv3.norm.weight", "bn3.weight")):
                tensor.fill_(0.25)
        return model

    monkeypatch.setattr(module, "build_detector", damped)


def test_a_stock_configuration_with_stock_names_trains_resumes_and_evaluates(detection_config, tmp_path, monkeypatch):
    damp_stock(monkeypatch)
    keys = ("MODEL.WEIGHTS", "", "MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32)
    keys += ("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "SOLVER.CHECKPOINT_PERIOD", 1)
    with pytest.raises(ConfigError, match="ALLOW_UNTRAINED_FROZEN_BN"):
        detection.run(detection_config(STOCK, tmp_path / "no", *keys))
    with pytest.raises(ConfigError, match=r"MODEL.NETWORK.NAME is resnet18 .* build_resnet_backbone, which does not"):
        detection.run(detection_config(STOCK, tmp_path / "no", *keys, "MODEL.NETWORK.NAME", "resnet18"))
    detection.run(detection_config(STOCK, tmp_path / "run", *keys, *ALLOW))
    assert "frozen: stages stem, res2;" in log(tmp_path / "run")
    detection.run(detection_config(STOCK, tmp_path / "run", *keys, *ALLOW, "SOLVER.MAX_ITER", 2), resume=True)
    metadata = read_checkpoint(tmp_path / "run" / "model_final.pth").metadata
    assert metadata.architecture == "build_resnet_backbone" and metadata.norm_statistics == "never"
    assert metadata.channel_order == "BGR" and metadata.origin["iterations"] == 2
    assert len(losses(tmp_path / "run")) == 2

    # Its own checkpoint says how it was fed, too.
    again = ("MODEL.WEIGHTS", tmp_path / "run" / "model_final.pth", *keys[2:], *ALLOW)
    detection.run(detection_config(STOCK, tmp_path / "test", *again), eval_only=True)
    with pytest.raises(ConfigError, match=r"INPUT.FORMAT is RGB .*BGR"):
        detection.run(detection_config(STOCK, tmp_path / "test", *again, "INPUT.FORMAT", "RGB"), eval_only=True)


def test_a_stock_configuration_with_our_names_takes_its_depth(detection_config, tmp_path, monkeypatch):
    names = ("MODEL.BACKBONE.NAME", "build_network_backbone", "MODEL.ROI_HEADS.NAME", "NetworkRes5ROIHeads")
    damp_stock(monkeypatch)
    cfg = detection_config(STOCK, tmp_path, *names, "MODEL.WEIGHTS", "", "MODEL.NETWORK.WIDTH", 0.125, *ALLOW)
    detection.run(cfg)
    assert losses(tmp_path)[0] < 1000
    metadata = read_checkpoint(tmp_path / "model_final.pth").metadata
    assert metadata.architecture == "resnet50" and metadata.arguments["stride_in_1x1"] is True  # Detectron2's


def test_a_stock_configuration_with_our_names_follows_the_weights(tmp_path, detection_config, classifier):
    names = ("MODEL.BACKBONE.NAME", "build_network_backbone", "MODEL.ROI_HEADS.NAME", "NetworkRes5ROIHeads")
    path = classifier("resnet18")
    with pytest.raises(ConfigError, match=r"MODEL.NETWORK.NAME is resnet50 \(MODEL.RESNETS.DEPTH .*resnet18"):
        detection.run(detection_config(STOCK, tmp_path / "a", *names, "MODEL.WEIGHTS", path))
    cfg = detection_config(STOCK, tmp_path / "b", *names, "MODEL.WEIGHTS", path, "MODEL.NETWORK.NAME", "resnet18")
    detection.run(cfg)
    assert (cfg.INPUT.FORMAT, cfg.MODEL.RESNETS.STRIDE_IN_1X1) == ("RGB", False)


@pytest.mark.parametrize("weights", ["/no/R-50.pkl", "cut"])
def test_stock_weights_that_do_not_load_stop(detection_config, tmp_path, classifier, weights):
    if weights == "cut":
        weights = tmp_path / "cut.pth"
        weights.write_bytes(classifier("resnet18").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot be loaded by Detectron2"):
        detection.run(detection_config(STOCK, tmp_path / "run", "MODEL.WEIGHTS", weights))


def test_retinanet_trains(tmp_path, detection_config, classifier):
    file = model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    keys = ("MODEL.BACKBONE.NAME", "build_network_retinanet_fpn_backbone", "MODEL.RETINANET.NUM_CLASSES", 8)
    keys += ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", classifier("resnet18"), "MODEL.FPN.OUT_CHANNELS", 16)
    # Large enough for p6 to be more than 1×1: on that, torch 2.11's bfloat16 convolution with stride 2 gives weight
    # gradients from unset memory on CPUs.
    keys += ("INPUT.MIN_SIZE_TRAIN", 160, "INPUT.MAX_SIZE_TRAIN", 200)
    detection.run(detection_config(file, tmp_path / "run", *keys, "MODEL.RETINANET.NUM_CONVS", 1))
    assert "frozen: stages stem, res2;" in log(tmp_path / "run")
    keys += ("SOLVER.AMP.ENABLED", True)
    detection.run(detection_config(file, tmp_path / "bf16", *keys, "MODEL.RETINANET.NUM_CONVS", 1))
    assert losses(tmp_path / "bf16")[0] == pytest.approx(losses(tmp_path / "run")[0], rel=0.1)


def test_a_configuration_of_ours_may_be_frozen(detection_config, classifier, tmp_path):
    """`fill_from_metadata` and the builders work on what a script froze after loading."""
    keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", classifier("resnet18"))
    cfg = detection_config(R50, tmp_path, *keys)
    cfg.freeze()
    detection.run(cfg)
    assert (tmp_path / "model_final.pth").is_file()
