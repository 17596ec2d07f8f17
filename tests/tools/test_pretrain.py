"""tools/pretrain.py as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from resnet_backbone import list_networks
from resnet_backbone.weights import read_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = """
MODEL.NETWORK.NAME resnet18 MODEL.NETWORK.WIDTH 0.125 MODEL.DEVICE cpu
INPUT.MIN_SIZE_TRAIN (32,36) INPUT.MIN_SIZE_TEST 32 INPUT.CROP.SIZE (32,32)
SOLVER.REFERENCE_IMS_PER_BATCH 0 SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 2 SOLVER.STEPS () SOLVER.CHECKPOINT_PERIOD 1
TEST.PRECISE_BN.NUM_ITER 2 TEST.EVAL_PERIOD 0 DATALOADER.NUM_WORKERS 0 SEED 1
"""


@pytest.fixture(scope="module")
def main(load_script):
    """The tool's `main`, called in this process: an import of everything takes seconds."""
    return load_script(ROOT / "tools" / "pretrain.py").main


@pytest.fixture
def command(shapes, tmp_path):
    """The function `(KEY, VALUE, …, flags=…)` that gives the words of a command line."""

    def words(*overrides, flags=(), config=ROOT / "configs" / "pretrain" / "imagenet.yaml"):
        data = ("DATASETS.TRAIN", shapes, "DATASETS.TEST", shapes, "OUTPUT_DIR", tmp_path / "run")
        return list(map(str, ("--config-file", config, *flags, *SMALL.split(), *data, *overrides)))

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
    for name in ("config.yaml", "log.txt", "metrics.json", "results.json", "last_checkpoint"):
        assert (out / name).is_file(), name

    assert "--resume" in fails(main, command(), capsys)
    assert {file.name: file.read_bytes() for file in out.glob("*.pth")} == kept

    assert main(command("SOLVER.MAX_ITER", 3, flags=["--resume"])) == 0
    assert read_checkpoint(out / "model_final.pth").metadata.origin["iterations"] == 3
    assert main(command("MODEL.WEIGHTS", out / "model_final.pth", flags=["--eval-only"])) == 0
    assert json.loads((out / "results.json").read_text())["images"] == 64


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(2))])
def test_two_processes_write_one_checkpoint(command, tmp_path, device):
    words = command("INPUT.RANDOM_FLIP", "none", "MODEL.DEVICE", device, flags=["--num-gpus", "2"])
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "pretrain.py", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "run"
    assert sorted(p.name for p in out.glob("*.pth")) == ["model_0000000.pth", "model_0000001.pth", "model_final.pth"]
    metadata = read_checkpoint(out / "model_final.pth").metadata
    assert metadata.norm_statistics == "precise" and metadata.origin["iterations"] == 2
    # Every image was tested once over both.
    assert json.loads((out / "results.json").read_text())["images"] == 64
    assert len((out / "metrics.json").read_text().splitlines()) >= 1


def test_two_processes_end_in_a_sentence_too(command):
    words = command("DATASETS.TEST", "/no/where", flags=["--num-gpus", "2"])
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "pretrain.py", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "error: /no/where does not exist" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("DATASETS.TRAIN", "/no/where"), ("/no/where does not exist", "expected")),
        (("DATASETS.TRAIN", "imagenet_trian"), ("imagenet_trian", "'imagenet_train' is the nearest")),
        (("DATASETS.TRAIN", "/no/train-{000..001}.tar"), ("/no/train-",)),
        (("MODEL.NETWORK.NAME", "resnet102"), ("resnet102", "resnet10")),
        (("MODEL.NETWORK.NAM", "resnet50"), ("MODEL.NETWORK.NAM", "nearest is MODEL.NETWORK.NAME")),
        (("SOLVER.MAX_ITER", "many"), ("SOLVER.MAX_ITER", "many", "int")),
        (("SOLVER.MAX_ITER",), ("pairs",)),
        (("MODEL.WEIGHTS", "/no/model_final.pth"), ("no checkpoint /no/model_final.pth",)),
        (("OUTPUT_DIR", "/proc/nope"), ("/proc/nope", "cannot be written")),
    ],
)
def test_bad_words_end_in_one_sentence(main, command, capsys, overrides, words):
    message = fails(main, command(*overrides), capsys)
    assert all(word in message for word in words), message


def test_a_config_file_that_is_not_there(main, command, capsys):
    message = fails(main, command(config=ROOT / "configs" / "pretrain" / "imagnet.yaml"), capsys)
    assert "imagnet.yaml" in message and "nearest" in message and "imagenet.yaml" in message


@pytest.mark.parametrize("content", ["nothing", "empty class", "no classes", "not an image", "cut image"])
def test_a_folder_that_cannot_be_used(main, command, tmp_path, capsys, content):
    root = tmp_path / "data"
    root.mkdir()
    if content != "nothing":
        for name in ("a", "b") if content != "no classes" else ():
            (root / name).mkdir()
        image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
        cv2.imwrite(str(root / ("x.jpg" if content == "no classes" else "a/x.jpg")), image)
    if content == "not an image":
        (root / "b" / "y.jpg").write_bytes(b"hello")
    if content == "cut image":
        (root / "b" / "y.jpg").write_bytes((root / "a" / "x.jpg").read_bytes()[:300])
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    message = fails(main, command("DATASETS.TRAIN", root, "DATASETS.TEST", root, "SOLVER.IMS_PER_BATCH", 2), capsys)
    assert str(root) in message
    assert {"empty class": "b", "not an image": "y.jpg", "cut image": "y.jpg"}.get(content, "") in message
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
    assert not list((tmp_path / "run").glob("*.pth"))


@pytest.mark.parametrize("damage", ["cut", "empty", "other network", "plain", "pickle"])
def test_a_checkpoint_that_cannot_be_used(main, command, classifier, tmp_path, capsys, damage):
    path = tmp_path / "weights.pth"
    path.write_bytes(classifier("resnet18").read_bytes())
    overrides = ()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other network":
        overrides = ("MODEL.NETWORK.NAME", "resnet34")
    elif damage == "plain":
        torch.save({"fc.weight": torch.zeros(2)}, path)
    else:
        path.write_bytes(b"\x80\x04K\x01.")
    before = path.read_bytes()
    message = fails(main, command("MODEL.WEIGHTS", path, *overrides), capsys)
    assert str(path) in message
    if damage == "other network":
        assert "resnet34" in message and "resnet18" in message
    assert path.read_bytes() == before


def test_a_damaged_last_checkpoint_names_an_earlier_one(main, command, tmp_path, capsys):
    assert main(command()) == 0
    last = tmp_path / "run" / "model_0000001.pth"
    last.write_bytes(last.read_bytes()[:2000])
    message = fails(main, command("SOLVER.MAX_ITER", 3, flags=["--resume"]), capsys)
    assert "cannot resume" in message and "model_0000000.pth" in message


class TestFlags:
    def test_list_networks_needs_no_configuration(self, main, capsys):
        with pytest.raises(SystemExit, match="0"):
            main(["--list-networks"])
        lines = capsys.readouterr().out.splitlines()
        names = [line.split()[0].rstrip(",") for line in lines if not line.startswith("--")]
        names = names[names.index("resnet18") :]  # below the header
        assert list(dict.fromkeys(names)) == list_networks()
        row = next(line for line in lines if line.startswith("resnet50 "))
        assert "25,557,032" in row and "4.09e9" in row  # torchvision's documentation of ResNet50_Weights

    def test_print_config(self, main, command, tmp_path, capsys):
        assert main(command("SOLVER.MAX_ITER", 9, flags=["--print-config"])) == 0
        printed = capsys.readouterr().out
        assert "  MAX_ITER: 9  # from command line\n" in printed
        assert f"  MOMENTUM: 0.9  # from {ROOT}/configs/pretrain/imagenet.yaml\n" in printed
        assert yaml.safe_load(printed)["SOLVER"]["MOMENTUM"] == 0.9
        assert not (tmp_path / "run").exists()

    def test_try_leaves_nothing(self, main, command, tmp_path, capsys):
        assert main(command(flags=["--try", "2"])) == 0
        assert "works: 2 iterations" in capsys.readouterr().out.splitlines()[-1]
        assert list(tmp_path.iterdir()) == []

    def test_try_finds_what_does_not_work(self, main, command, tmp_path, capsys):
        message = fails(main, command("DATASETS.TEST", "/no/where", flags=["--try", "2"]), capsys)
        assert "/no/where does not exist" in message and list(tmp_path.iterdir()) == []

    def test_throughput_of_two_processes(self, command, tmp_path):
        words = command("INPUT.RANDOM_FLIP", "none", flags=["--num-gpus", "2", "--throughput", "2"])
        done = subprocess.run(
            [sys.executable, ROOT / "tools" / "pretrain.py", *words], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()[-5:]
        assert "batches of 4 images over 2 process(es)" in lines[0]
        assert lines[-1].startswith("one batch, repeated") and list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "flags",
        [
            ("--try", "2", "--resume"),
            ("--throughput", "2", "--eval-only"),
            ("--try", "2", "--throughput", "2"),
            ("--try", "two"),
        ],
    )
    def test_flags_that_do_not_go_together(self, main, command, tmp_path, capsys, flags):
        with pytest.raises(SystemExit, match="2"):
            main(command(flags=flags))
        assert "--try" in capsys.readouterr().err and not (tmp_path / "run").exists()
