"""tools/train_net.py as a user calls it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from detectron2 import model_zoo

from resnet_backbone.weights import read_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = """
MODEL.NETWORK.NAME resnet18 MODEL.DEVICE cpu MODEL.ROI_HEADS.NUM_CLASSES 8 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8
MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.POST_NMS_TOPK_TRAIN 20
MODEL.RPN.PRE_NMS_TOPK_TEST 50 MODEL.RPN.POST_NMS_TOPK_TEST 10
INPUT.MIN_SIZE_TRAIN (64,) INPUT.MAX_SIZE_TRAIN 96 INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 96
SOLVER.REFERENCE_IMS_PER_BATCH 0 SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 2 SOLVER.STEPS () SOLVER.CHECKPOINT_PERIOD 1
TEST.EVAL_PERIOD 0 DATALOADER.NUM_WORKERS 0 SEED 1
"""


@pytest.fixture(scope="module")
def main(load_script):
    """The tool's `main`, called in this process: an import of everything takes seconds."""
    return load_script(ROOT / "tools" / "train_net.py").main


@pytest.fixture
def command(scenes, classifier, tmp_path):
    """The function `(KEY, VALUE, …, flags=…)` that gives the words of a command line."""

    def words(*overrides, flags=(), config=ROOT / "configs" / "faster_rcnn_R50.yaml"):
        data = ("DATASETS.TRAIN", scenes, "DATASETS.TEST", scenes, "OUTPUT_DIR", tmp_path / "run")
        weights = ("MODEL.WEIGHTS", classifier("resnet18"))
        return list(map(str, ("--config-file", config, *flags, *SMALL.split(), *data, *weights, *overrides)))

    return words


def fails(main, words, capsys) -> str:
    """The one sentence that a failing command prints."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.out + captured.err
    return captured.err


def test_trains_resumes_and_refuses_to_overwrite(main, command, tmp_path, capsys):
    assert main(command()) == 0
    out = tmp_path / "run"
    kept = {file.name: file.read_bytes() for file in out.glob("*.pth")}
    assert set(kept) == {"model_0000000.pth", "model_0000001.pth", "model_final.pth"}
    assert "--resume" in fails(main, command(), capsys)
    assert {file.name: file.read_bytes() for file in out.glob("*.pth")} == kept

    assert main(command("SOLVER.MAX_ITER", 3, flags=["--resume"])) == 0
    metadata = read_checkpoint(out / "model_final.pth").metadata
    assert metadata.origin["iterations"] == 3
    assert metadata.origin["pretrained"]["dataset"].endswith(".tar")  # kept over the resumption
    assert main(command("MODEL.WEIGHTS", out / "model_final.pth", flags=["--eval-only"])) == 0


def test_print_config(main, command, tmp_path, capsys):
    words = command("SOLVER.MAX_ITER", 9, flags=["--print-config"])
    capsys.readouterr()
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "  MAX_ITER: 9  # from command line\n" in printed
    assert "\nVIS_PERIOD: 0\n" in printed  # Detectron2's default
    assert yaml.safe_load(printed)["MODEL"]["NETWORK"]["NAME"] == "resnet18"
    assert not (tmp_path / "run").exists()


def test_two_processes_write_one_checkpoint(command, tmp_path):
    words = command(flags=["--num-gpus", "2"])
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "train_net.py", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "run"
    assert sorted(p.name for p in out.glob("*.pth")) == ["model_0000000.pth", "model_0000001.pth", "model_final.pth"]
    assert "bbox" in json.loads((out / "results.json").read_text())


def test_a_stock_configuration_of_the_zoo_starts_by_its_name(main, command, tmp_path):
    name = "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
    assert Path(model_zoo.get_config_file(name)).is_file()
    ours = ("MODEL.BACKBONE.NAME", "build_network_backbone", "MODEL.ROI_HEADS.NAME", "NetworkRes5ROIHeads")
    assert main(command(*ours, config=name)) == 0
    assert (tmp_path / "run" / "model_final.pth").is_file()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("DATASETS.TRAIN", "/no/where.json"), ("no COCO file /no/where.json",)),
        (("DATASETS.TRAIN", "coco_2014_trian"), ("nearest registered name is coco_2014_train",)),
        (("DATASETS.TEST", "coco_2014_val"), ("coco_2014_val", "DETECTRON2_DATASETS")),
        (("MODEL.ROI_HEADS.NUM_CLASSES", 80), ("NUM_CLASSES is 80 (command line)", "8 categories", "to 8")),
        (("MODEL.NETWORK.NAME", "resnet34"), ("resnet34", "resnet18")),
        (("MODEL.NETWORK.NAME", "resnet51", "MODEL.WEIGHTS", ""), ("resnet51", "did you mean 'resnet50'")),
        (("MODEL.NETWORK.NAME", "vgg16", "MODEL.WEIGHTS", ""), ("res4", "vgg16", "conv5")),
        (("MODEL.NETWRK.NAME", "resnet50"), ("MODEL.NETWRK.NAME", "nearest is MODEL.NETWORK.NAME")),
        (("INPUT.FORMAT", "BGR"), ("INPUT.FORMAT is BGR (command line)", "RGB")),
        (("MODEL.WEIGHTS", ""), ("MODEL.WEIGHTS is empty", "ALLOW_UNTRAINED_FROZEN_BN")),
        (("MODEL.WEIGHTS", "/no/model_final.pth"), ("no checkpoint /no/model_final.pth",)),
        (("MODEL.BACKBONE.NAME", "build_resnet_backbone"), ("tools/pretrain.py", "build_network_backbone")),
    ],
)
def test_bad_words_end_in_one_sentence(main, command, tmp_path, capsys, overrides, words):
    message = fails(main, command(*overrides), capsys)
    assert all(word in message for word in words), message
    assert not list((tmp_path / "run").glob("*.pth"))


def test_a_checkpoint_of_another_network(main, command, classifier, capsys):
    message = fails(main, command("MODEL.WEIGHTS", classifier("resnet34")), capsys)
    assert "resnet18" in message and "resnet34" in message


@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_a_truncated_checkpoint(main, command, classifier, tmp_path, capsys, flags):
    path = tmp_path / "cut.pth"
    path.write_bytes(classifier("resnet18").read_bytes()[:-999])
    before = path.read_bytes()
    message = fails(main, command("MODEL.WEIGHTS", path, flags=flags), capsys)
    assert str(path) in message and "cut off" in message and path.read_bytes() == before


@pytest.mark.parametrize("damage", ["missing image", "cut image", "empty", "foreign category", "cut file"])
def test_a_detection_set_that_cannot_be_used(main, command, scenes, tmp_path, capsys, damage):
    folder = tmp_path / "set"
    shutil.copytree(Path(scenes).parent, folder)
    file = folder / "annotations.json"
    content = json.loads(file.read_text())
    image = folder / "images" / content["images"][0]["file_name"]
    if damage == "missing image":
        image.unlink()
    elif damage == "cut image":
        for path in (folder / "images").iterdir():
            path.write_bytes(path.read_bytes()[:700])
    elif damage == "empty":
        file.write_text(json.dumps({**content, "images": [], "annotations": []}))
    elif damage == "foreign category":
        content["annotations"][0]["category_id"] = 99
        file.write_text(json.dumps(content))
    else:
        file.write_text(file.read_text()[:-50])
    before = file.read_bytes()
    message = fails(main, command("DATASETS.TRAIN", file), capsys)
    assert str(folder) in message
    assert {"missing image": image.name, "foreign category": "99", "empty": "no images"}.get(damage, "") in message
    assert file.read_bytes() == before and not list((tmp_path / "run").glob("*.pth"))
