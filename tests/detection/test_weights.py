import contextlib
import copy
import gc
import logging
import os
import pickle
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import build_backbone, build_model

from resnet_backbone import detection
from resnet_backbone.detection import add_network_config, weights
from resnet_backbone.detection.data import datasets
from resnet_backbone.engine.config import ConfigError, load_config
from resnet_backbone.engine.network_config import fill_from_metadata
from resnet_backbone.weights import CheckpointError, convert, read_checkpoint, write_checkpoint

ROOT = Path(__file__).parents[2]


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
    for file, word in (("", "MODEL.WEIGHTS is empty"), (str(never), "never estimated")):
        own_script.MODEL.WEIGHTS = file
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


@pytest.fixture
def opened(monkeypatch):
    """The files that torch has read since, Detectron2's readings among them."""
    files, load = [], torch.load

    def counting(file, *args, **kwargs):
        files.append(os.fspath(file))
        return load(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", counting)
    return files


def test_a_script_reads_the_file_once_and_detectron2_once_more(own_script, opened):
    trainer = DefaultTrainer(own_script)
    assert opened == [own_script.MODEL.WEIGHTS]
    trainer.resume_or_load(resume=False)
    assert opened == [own_script.MODEL.WEIGHTS] * 2


def test_the_tool_reads_the_file_once(detection_config, classifier, tmp_path, opened):
    start = str(classifier("resnet18"))
    keys = ("MODEL.NETWORK.NAME", "resnet18", "SOLVER.MAX_ITER", 0)
    detection.run(detection_config("faster_rcnn_R50.yaml", tmp_path / "run", *keys, "MODEL.WEIGHTS", start))
    assert opened == [start]
    final = str(tmp_path / "run" / "model_final.pth")
    cfg = detection_config("faster_rcnn_R50.yaml", tmp_path / "test", *keys, "MODEL.WEIGHTS", final)
    detection.run(cfg, eval_only=True)
    assert opened == [start, final]


def test_the_configuration_is_compared_once(own_script, monkeypatch):
    compared = []
    keys = weights.preprocessing_keys
    monkeypatch.setattr(weights, "preprocessing_keys", lambda metadata: compared.append(metadata) or keys(metadata))
    build_model(own_script)
    assert len(compared) == 1


@pytest.fixture
def alive(monkeypatch):
    """The function that counts the tensors of files read since that still take memory."""
    read, references = weights.read_with_overrides, []

    def remembering(*args):
        checkpoint = read(*args)
        references.extend(weakref.ref(tensor) for tensor in checkpoint.model.values())
        return checkpoint

    def count():
        gc.collect()
        return sum(reference() is not None for reference in references)

    monkeypatch.setattr(weights, "read_with_overrides", remembering)
    return count


def test_the_files_tensors_are_let_go_when_the_model_is_built(own_script, alive):
    model = build_model(own_script)
    assert alive() == 0
    assert_holds_classifier(model, own_script.MODEL.WEIGHTS)


def test_the_files_tensors_go_with_a_backbone_that_is_built_alone(own_script, alive):
    backbone = build_backbone(own_script)
    assert alive() > 0  # the head, which nobody is going to build, might ask for its own
    del backbone
    assert alive() == 0


def test_the_files_tensors_are_let_go_when_a_part_fails(own_script, alive):
    own_script.MODEL.NETWORK.NAME = "resnet34"
    with pytest.raises(ConfigError):
        build_model(own_script)
    assert alive() == 0


def test_a_changed_file_is_read_again(own_script, tmp_path):
    checkpoint = read_checkpoint(own_script.MODEL.WEIGHTS)
    own_script.MODEL.WEIGHTS = str(tmp_path / "changing.pth")
    for build in (lambda: build_model(own_script).backbone, lambda: build_backbone(own_script)):
        backbones = []
        for factor in (1, 2):
            scaled = {name: tensor * factor for name, tensor in checkpoint.model.items()}
            write_checkpoint(own_script.MODEL.WEIGHTS, replace(checkpoint, model=scaled))
            os.utime(own_script.MODEL.WEIGHTS, (0, 0))  # the same length and age as before
            backbones.append(build())
            assert torch.equal(backbones[-1].network.conv1.weight, checkpoint.model["conv1.weight"] * factor)


def test_a_changed_configuration_is_compared_again(own_script):
    backbone = build_backbone(own_script)
    own_script.INPUT.FORMAT = "BGR"
    with pytest.raises(ConfigError, match=r"INPUT\.FORMAT is BGR"):
        build_backbone(own_script)
    assert backbone is not None


@pytest.mark.parametrize(
    ("file", "words"),
    [("detectron2://ImageNetPretrained/MSRA/R-50.pkl", ("nothing is downloaded", "path")), ("/no/such.pth", ("/no",))],
)
def test_weights_that_are_not_there_stop(own_script, file, words):
    own_script.MODEL.WEIGHTS = file
    with pytest.raises(CheckpointError) as error:
        build_model(own_script)
    assert all(word in str(error.value) for word in words)


def test_a_torch_file_that_is_no_network_stops(own_script, tmp_path):
    torch.save({"conv1.weight": torch.zeros(8, 3, 7, 7)}, tmp_path / "plain.pth")
    own_script.MODEL.WEIGHTS = str(tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match=r"plain\.pth fits no network"):
        build_model(own_script)


def hear(caplog):
    """Give `caplog` the log that a run of the tools, which a fixture may just have been, keeps to itself."""
    caplog.set_level("INFO")
    for name in ("fvcore", "resnet_backbone"):
        logging.getLogger(name).propagate = True
        logging.getLogger(name).setLevel("INFO")


def weights_lines(text):
    """What a log says about weights, in order."""
    return [line for line in text.splitlines() if re.search("tensors|checkpoint|not found|weights", line)]


def test_detectron2s_checkpointer_leaves_the_loaded_classifier_alone(own_script, caplog):
    hear(caplog)
    model = build_model(own_script)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        caplog.clear()
        DetectionCheckpointer(again).load(own_script.MODEL.WEIGHTS)
        assert all(torch.equal(before[name], tensor) for name, tensor in again.state_dict().items())
        # RPN: three layers of two tensors; predictor: two.
        counts = f"75 of 75 backbone tensors, 25 of 25 head tensors from {own_script.MODEL.WEIGHTS}"
        assert f"{counts}; the other 10 tensors are new" in weights_lines(caplog.text)[-1]
        assert not [record for record in caplog.records if record.levelname != "INFO"]


@pytest.mark.parametrize(
    ("file", "name", "counts"),
    [
        # 13 convolutions, fc6 and fc7, each of weight and bias; 3 layers of the RPN and 2 of the predictor.
        (
            "faster_rcnn_VGG16.yaml",
            "vgg16",
            "26 of 26 backbone tensors, 4 of 4 head tensors from {}; the other 10 tensors",
        ),
        # 4 lateral and 4 output convolutions, 3 layers of the RPN, 2 of the box head and 2 of the predictor.
        ("faster_rcnn_R50_FPN.yaml", "resnet18", "100 of 100 backbone tensors from {}; the other 30 tensors"),
    ],
)
def test_other_layouts_say_it_too(detection_config, classifier, tmp_path, caplog, file, name, counts):
    path = str(classifier(name))
    checkpoint = read_checkpoint(path)
    cfg = detection_config(file, tmp_path, "MODEL.NETWORK.NAME", name, "MODEL.WEIGHTS", path)
    fill_from_metadata(cfg, checkpoint.metadata, path)
    hear(caplog)
    model = build_model(cfg)
    caplog.clear()
    DetectionCheckpointer(model).load(path)
    assert counts.format(path) in weights_lines(caplog.text)[-1]
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    bottom_up = getattr(model.backbone, "bottom_up", model.backbone)
    for key, tensor in bottom_up.network.state_dict().items():
        assert torch.equal(tensor, checkpoint.model[key]), key


def test_a_file_under_detectron2s_names_keeps_its_words_and_tensors(own_script, tmp_path, caplog):
    classifier = own_script.MODEL.WEIGHTS
    own_script.MODEL.WEIGHTS = str(tmp_path / "R-18.pkl")
    convert(classifier, own_script.MODEL.WEIGHTS)
    hear(caplog)
    model = build_model(own_script)
    DetectionCheckpointer(model).load(own_script.MODEL.WEIGHTS)
    assert_holds_classifier(model, classifier)
    said = [record.getMessage() for record in caplog.records if record.name == weights.__name__]
    assert said[-1] == f"75 of 75 backbone tensors, 25 of 25 head tensors from {own_script.MODEL.WEIGHTS}"


def test_a_backbone_that_was_built_alone_is_not_counted_with_the_next_model(own_script, caplog):
    hear(caplog)
    alone = [build_backbone(own_script), build_backbone(own_script)]
    model = build_model(own_script)
    del alone
    DetectionCheckpointer(model).load(own_script.MODEL.WEIGHTS)
    counts = f"75 of 75 backbone tensors, 25 of 25 head tensors from {own_script.MODEL.WEIGHTS}"
    assert f"{counts}; the other 10 tensors are new" in weights_lines(caplog.text)[-1]


def test_another_classifier_is_not_taken_for_the_loaded_one(own_script, tmp_path, caplog):
    model = build_model(own_script)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpoint = read_checkpoint(own_script.MODEL.WEIGHTS)
    other = {**checkpoint.model, "layer4.1.conv2.weight": checkpoint.model["layer4.1.conv2.weight"] + 1}
    write_checkpoint(tmp_path / "other.pth", replace(checkpoint, model=other))
    caplog.clear()
    DetectionCheckpointer(model).load(str(tmp_path / "other.pth"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert "not found in the checkpoint" in caplog.text and "of 75 backbone" not in caplog.text


def test_a_resumed_scripts_last_words_are_about_the_resumed_checkpoint(own_script, caplog):
    first = DefaultTrainer(own_script)
    first.resume_or_load()
    first.train()
    hear(caplog)
    resumed = DefaultTrainer(own_script)
    resumed.resume_or_load()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    said = [record.getMessage() for record in caplog.records if record.name == weights.__name__]
    assert said[-1] == "75 of 75 backbone tensors, 35 of 35 head tensors from a detector's checkpoint"


@pytest.fixture
def own_detector(own_script, detection_config, tmp_path):
    """`own_script` with the checkpoint of a detector that the tool wrote."""
    keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", own_script.MODEL.WEIGHTS, "SOLVER.MAX_ITER", 0)
    keys += ("MODEL.ANCHOR_GENERATOR.SIZES", own_script.MODEL.ANCHOR_GENERATOR.SIZES)
    detection.run(detection_config("faster_rcnn_R50.yaml", tmp_path / "tool", *keys))
    own_script.MODEL.WEIGHTS = str(tmp_path / "tool" / "model_final.pth")
    return own_script


@pytest.mark.parametrize("make", [DefaultTrainer, DefaultPredictor])
def test_a_detector_of_ours_loads_in_a_script_and_the_log_says_so(own_detector, caplog, make):
    hear(caplog)
    loader = make(own_detector)
    if make is DefaultTrainer:
        loader.resume_or_load(resume=False)
    for name, tensor in read_checkpoint(own_detector.MODEL.WEIGHTS).model.items():
        assert torch.equal(loader.model.state_dict()[name], tensor), name
    said = [record.getMessage() for record in caplog.records if record.name == weights.__name__]
    assert said[0].startswith(f"{own_detector.MODEL.WEIGHTS}: detector resnet18(")
    assert said[-1] == "75 of 75 backbone tensors, 35 of 35 head tensors from a detector's checkpoint"
    assert not [r for r in caplog.records if r.levelname == "WARNING" and r.name.startswith("fvcore")]


def test_the_tool_evaluates_and_goes_on_from_a_detector_of_detectron2s_trainer(own_script, tmp_path):
    own_script.SOLVER.MAX_ITER = 1
    trainer = DefaultTrainer(own_script)
    trainer.resume_or_load(resume=False)
    trainer.train()
    own_script.MODEL.WEIGHTS = str(tmp_path / "own" / "model_final.pth")
    (tmp_path / "own.yaml").write_text(own_script.dump())

    def load(output, *keys):
        keys = ("OUTPUT_DIR", str(output), "MODEL.WEIGHTS", own_script.MODEL.WEIGHTS, *keys)
        return load_config(detection.get_config(), tmp_path / "own.yaml", keys)

    found = detection.run(load(tmp_path / "test"), eval_only=True)
    expected = inference_on_dataset(
        trainer.model,
        build_detection_test_loader(own_script, own_script.DATASETS.TEST[0]),
        COCOEvaluator(own_script.DATASETS.TEST[0], output_dir=str(tmp_path / "theirs"), use_fast_impl=False),
    )
    assert found["bbox"] == pytest.approx(expected["bbox"], nan_ok=True)
    log = (tmp_path / "test" / "log.txt").read_text()
    assert log.count("does not say how it was fed") == 1
    assert "detector: all 110 of 110 tensors loaded from" in log
    detection.run(load(tmp_path / "on", "SOLVER.MAX_ITER", "1"))

    other = load(tmp_path / "other", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True")
    with pytest.raises(CheckpointError, match=r"roi_heads\.box_predictor\.bbox_pred\.weight is"):
        detection.run(other, eval_only=True)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_damaged_checkpoint_of_detectron2s_own_parts_is_found(detection_config, tmp_path, damaged):
    """torch and Detectron2 compare no checksums."""
    small = ("MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.NORM", "BN")
    small += ("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.BACKBONE.FREEZE_AT", 0, "SOLVER.MAX_ITER", 1, "MODEL.WEIGHTS", "")
    file = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    detection.run(detection_config(file, tmp_path / "run", *small))
    checkpoint = tmp_path / "run" / "model_final.pth"
    assert read_checkpoint(checkpoint).metadata.kind == "detector"
    if damaged:
        data = bytearray(checkpoint.read_bytes())
        data[len(data) // 2] ^= 64
        checkpoint.write_bytes(data)
    keys = (*small, "MODEL.WEIGHTS", checkpoint)
    with pytest.raises(CheckpointError, match="was altered") if damaged else contextlib.nullcontext():
        detection.run(detection_config(file, tmp_path / "again", *keys))


def test_a_detectors_frozen_norms_without_statistics_stop_in_every_way_in(own_detector, detection_config, tmp_path):
    checkpoint = read_checkpoint(own_detector.MODEL.WEIGHTS)
    never = tmp_path / "never.pth"
    write_checkpoint(never, replace(checkpoint, metadata=replace(checkpoint.metadata, norm_statistics="never")))
    own_detector.MODEL.WEIGHTS = str(never)
    keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", never)
    tool = detection_config("faster_rcnn_R50.yaml", tmp_path / "test", *keys)
    for build in (lambda: build_model(own_detector), lambda: detection.run(tool, eval_only=True)):
        with pytest.raises(ConfigError, match=r"never\.pth never estimated them"):
            build()


SMALL = """
cfg.MODEL.DEVICE = "cpu"
cfg.MODEL.NETWORK.NAME, cfg.MODEL.NETWORK.WIDTH = "resnet18", 0.125
cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8, 8
cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50, 20
cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (64,), 96
cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (SCENES,), ()
cfg.DATALOADER.NUM_WORKERS = 0
cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, 1, ()
cfg.OUTPUT_DIR = FOLDER
import os; os.makedirs(FOLDER)
from resnet_backbone.detection.data import datasets; datasets.register(SCENES)
"""


@pytest.mark.parametrize("fvcore", [False, True], ids=["no logging set up", "fvcore's log too"])
def test_the_readmes_script_ends_with_true_words_about_weights(scenes, classifier, tmp_path, fvcore):
    """As it is printed there, but for the file names and, before the trainer, the sizes."""
    readme = (ROOT / "README.md").read_text()
    script = re.search(r"```python\n([^`]*DefaultTrainer[^`]*)```", readme)[1]
    path = str(classifier("resnet18"))
    script = script.replace('"output/resnet101/model_final.pth"', repr(path))
    small = SMALL.replace("SCENES", repr(scenes)).replace("FOLDER", repr(str(tmp_path / "run")))
    if fvcore:
        small += 'from detectron2.utils.logger import setup_logger; setup_logger(name="fvcore")\n'
    head, trainer, rest = script.partition("trainer = ")
    assert trainer and path in head
    (tmp_path / "script.py").write_text(head + small + trainer + rest)
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, cwd=tmp_path, env=os.environ
    )
    assert done.returncode == 0, done.stdout
    about = [line for line in weights_lines(done.stdout) if "Saving checkpoint" not in line]
    assert f"75 of 75 backbone tensors, 25 of 25 head tensors from {path}" in about[-1], about
    assert "not found in the checkpoint" not in done.stdout and "not used by the model" not in done.stdout
    if fvcore:
        assert f"[Checkpointer] Loading from {path}" in about[-2]
