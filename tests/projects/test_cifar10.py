"""The experiment on CIFAR-10: the recipes, the data, and the command end to end."""

import contextlib
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from resnet_backbone import pretraining
from resnet_backbone.engine.config import load_config
from resnet_backbone.engine.schedule import build_multiplier, build_warm_up
from tests.projects.records import made_record, table_row

PROJECT = Path(__file__).parents[2] / "projects" / "cifar10"
RECIPES = Path(__file__).parents[2] / "configs" / "pretrain"
JPEG_COPIES = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10_jpeg.tar.xz"


@pytest.fixture(scope="module")
def smoke(run, tmp_path_factory) -> Path:
    """The output of `--scale smoke` with two seeds of one network, two at a time, and a key over its own."""
    output = tmp_path_factory.mktemp("cifar10") / "smoke"
    words = ["--scale", "smoke", "--networks", "cifar_resnet20", "--seeds", "1", "2", "--parallel", "2"]
    assert run.main([*words, "--output", str(output), "SOLVER.BASE_LR", "0.05"]) == 0
    return output


# ---- the paper's recipe and numbers


def test_the_recipe_is_section_4_2():
    cfg = load_config(pretraining.get_config(), RECIPES / "cifar10.yaml")
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.MOMENTUM, solver.MAX_ITER) == (128, 0.9, 64_000)
    assert solver.WEIGHT_DECAY == solver.WEIGHT_DECAY_NORM == 1e-4 and solver.WEIGHT_DECAY_BIAS in (None, 1e-4)
    multiplier = build_multiplier(cfg)
    for iteration, rate in ((0, 0.1), (31_999, 0.1), (32_000, 0.01), (47_999, 0.01), (48_000, 0.001), (63_999, 0.001)):
        assert solver.BASE_LR * multiplier(iteration / solver.MAX_ITER) == pytest.approx(rate)
    crop = cfg.INPUT.CROP
    assert (crop.TYPE, crop.PADDING, tuple(crop.SIZE), cfg.INPUT.RANDOM_FLIP) == ("padded", 4, (32, 32), "horizontal")
    assert build_warm_up(cfg) is None


def test_with_110_layers_the_rate_is_a_tenth_until_the_training_error_is_below_80():
    cfg = load_config(pretraining.get_config(), RECIPES / "cifar10_110.yaml")
    warm_up, multiplier = build_warm_up(cfg), build_multiplier(cfg)
    assert cfg.MODEL.NETWORK.NAME == "cifar_resnet110"
    for error, rate in ((90.0, 0.01), (80.0, 0.01), (79.9, 0.1), (85.0, 0.1)):
        warm_up.update(error)
        assert cfg.SOLVER.BASE_LR * multiplier(0.001) * warm_up.factor == pytest.approx(rate)


def test_the_walk_through_is_60_epochs_with_steps_after_30_and_45():
    cfg = load_config(pretraining.get_config(), RECIPES / "cifar10_walkthrough.yaml")
    assert (cfg.MODEL.NETWORK.NAME, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == ("cifar_resnet18", 64, 0.1)
    epochs = [iterations * 64 / 50_000 for iterations in (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)]
    assert epochs == pytest.approx([30, 45, 60], abs=0.001)


@pytest.mark.skipif(not JPEG_COPIES.is_file(), reason="no JPEG copies of CIFAR-10 beside the repository")
def test_mean_and_deviation_are_cifars():
    """Against every tenth image of the JPEG copies' test part, which lies first in the archive."""
    cfg = load_config(pretraining.get_config(), RECIPES / "cifar10.yaml")
    pixels = []
    with tarfile.open(JPEG_COPIES) as archive:
        for member in archive:
            if member.name.startswith("train"):
                break
            if member.name.endswith("7.jpg"):
                encoded = np.frombuffer(archive.extractfile(member).read(), np.uint8)
                pixels.append(cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1].reshape(-1, 3))
    pixels = np.concatenate(pixels).astype(np.float64)
    assert len(pixels) == 1000 * 1024
    # The sample's mean has a standard error of about 1; red and blue differ by 11.
    assert pixels.mean(0) == pytest.approx(np.array(cfg.MODEL.PIXEL_MEAN), abs=3.0)
    assert pixels.std(0) == pytest.approx(np.array(cfg.MODEL.PIXEL_STD), abs=2.0)


# ---- data


def _class_folders(folder: Path, extension: str, images: int = 4) -> Path:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("airplane", "automobile"):
            (folder / part / name).mkdir(parents=True)
            for number in range(images):
                cv2.imwrite(str(folder / part / name / f"{number:04d}{extension}"), rng.integers(0, 256, (32, 32, 3)))
    return folder


def test_jpegs_are_called_copies_and_lossless_images_are_not(project, tmp_path):
    for extension, title in ((".jpg", "CIFAR-10 (JPEG copies)"), (".png", "CIFAR-10")):
        folder = _class_folders(tmp_path / extension, extension)
        plan = project["plan"].Plan(scale="paper", output=tmp_path / "out", data=str(folder))
        dataset = project["dataset"].open_dataset(plan)
        assert (dataset.title, dataset.images) == (title, (8, 8))
        assert dataset.names() == (str(folder / "train"), str(folder / "test"))


def test_the_cpu_size_takes_the_first_images_of_each_class(project, tmp_path, monkeypatch):
    from resnet_backbone.data.sources import open_source

    folder = _class_folders(tmp_path / "data", ".jpg")
    small = project["plan"].SCALES["cpu"]._replace(train_images=3, test_images=1)
    monkeypatch.setitem(project["plan"].SCALES, "cpu", small)
    plan = project["plan"].Plan(scale="cpu", output=tmp_path / "out", data=str(folder))
    dataset = project["dataset"].open_dataset(plan)
    assert dataset.title == "CIFAR-10 (JPEG copies), the first 3 training and 1 test images of each class"
    train, test = (open_source(name) for name in dataset.names())
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [0, 1]
    names = [f"{name}/{number:04d}.jpg" for name in ("airplane", "automobile") for number in range(3)]
    assert [train.describe(index) for index in range(6)] == [str(folder / "train" / name) for name in names]


def test_an_archive_is_unpacked_once_beside_the_output(project, tmp_path):
    folder = _class_folders(tmp_path / "data", ".jpg")
    archive = tmp_path / "copies.tar.xz"
    with tarfile.open(archive, "w:xz") as file:
        for part in ("train", "test"):
            file.add(folder / part, part)
    plan = project["plan"].Plan(scale="paper", output=tmp_path / "runs" / "one", data=str(archive))
    dataset = project["dataset"].open_dataset(plan)
    assert dataset.entries == (str(tmp_path / "runs" / "copies" / "train"), str(tmp_path / "runs" / "copies" / "test"))
    assert dataset.images == (8, 8)
    archive.unlink()
    archive.write_bytes(b"")
    assert project["dataset"].open_dataset(plan) == dataset, "what was unpacked is used again"


def test_an_archive_that_reaches_out_of_its_folder_is_refused(run, tmp_path, capsys):
    archive = tmp_path / "hostile.tar"
    with tarfile.open(archive, "w") as file:
        member = tarfile.TarInfo("../outside.txt")
        member.size = 1
        file.addfile(member, io.BytesIO(b"x"))
    output = tmp_path / "runs" / "one"
    assert run.main(["--scale", "cpu", "--data", str(archive), "--output", str(output)]) == 2
    assert "outside.txt" in capsys.readouterr().err
    assert not list(tmp_path.rglob("outside.txt")) and not (tmp_path / "runs" / "hostile").exists()


# ---- the command


def test_the_command_trains_and_reports(smoke):
    runs = [json.loads((smoke / "runs" / f"cifar_resnet20-{seed}.json").read_text()) for seed in (1, 2)]
    for seed, record in enumerate(runs, 1):
        folder = smoke / f"cifar_resnet20-{seed}"
        top1 = json.loads((folder / "results.json").read_text())["top1"]
        assert record["test_error"] == pytest.approx(100 - top1)
        assert [iteration for iteration, _ in record["training_curve"]] == [1, 2, 3]
        assert [iteration for iteration, _ in record["test_curve"]] == [2, 3]
        assert record["training_error"] == pytest.approx(
            statistics.fmean(error for _, error in record["training_curve"]), abs=0.01
        )
        assert 0 <= record["training_error_of_final_weights"] <= 100
        assert (record["seed"], record["parallel"], record["keys"]) == (seed, 2, ["SOLVER.BASE_LR", "0.05"])
        assert record["settings"]["width"] == 0.5 and record["settings"]["learning_rate"] == 0.05
    assert runs[0]["training_curve"] != runs[1]["training_curve"], "two seeds"
    report = (smoke / "report.md").read_text()
    assert "generated shapes" in report and "SOLVER.BASE_LR 0.05" in report and "torch" in report
    assert cv2.imread(str(smoke / "figure6.png")) is not None


@pytest.mark.parametrize("hold_out", [0, 8])
def test_the_final_weights_are_tried_on_the_training_images_too(project, tmp_path, monkeypatch, hold_out):
    plan = project["plan"].Plan(scale="smoke", output=tmp_path, keys=("DATASETS.HOLD_OUT", str(hold_out)))
    dataset = project["dataset"].open_dataset(plan)
    seen = []

    def pretrain(cfg, *, resume=False, eval_only=False):
        seen.append((cfg.DATASETS.TEST[0], cfg.MODEL.WEIGHTS, eval_only))
        return {"top1": 90.0 if cfg.DATASETS.TEST[0] == dataset.entries[0] else 60.0}

    monkeypatch.setattr(project["runs"].pretraining, "run", pretrain)
    project["runs"].carry_out_run(plan, dataset, "cifar_resnet20", 1)
    record = json.loads((tmp_path / "runs" / "cifar_resnet20-1.json").read_text())
    final = str(tmp_path / "cifar_resnet20-1" / "model_final.pth")
    train, test = dataset.entries
    assert record["test_error"] == 40.0
    if hold_out:
        # Those that are held out would be in it.
        assert record["training_error_of_final_weights"] is None and len(seen) == 1
        assert record["title"] == "generated shapes, 8 training images held out to test on"
        assert (record["settings"]["training_images"], record["settings"]["test_images"]) == (32, 8)
    else:
        assert record["training_error_of_final_weights"] == 10.0
        assert seen == [(test, "", False), (train, final, True)]


def test_finished_runs_are_skipped_and_a_network_is_added(run, smoke):
    files = sorted(smoke.glob("cifar_resnet20-*/model_final.pth"))
    before = [file.stat().st_mtime_ns for file in files]
    assert len(files) == 2
    words = ["--scale", "smoke", "--networks", "cifar_resnet20", "cifar_plain20", "--seeds", "1"]
    assert run.main([*words, "--output", str(smoke), "SOLVER.BASE_LR", "0.05"]) == 0
    assert [file.stat().st_mtime_ns for file in files] == before
    report = (smoke / "report.md").read_text()
    assert table_row(report, "cifar_plain20")[2] == "1" and table_row(report, "cifar_resnet20")[2] == "1 2"


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_numbers(run, smoke, tmp_path):
    copy = tmp_path / "smoke"
    shutil.copytree(smoke, copy)
    whole = json.loads((copy / "runs" / "cifar_resnet20-2.json").read_text())
    folder = copy / "cifar_resnet20-2"
    for file in (copy / "runs" / "cifar_resnet20-2.json", folder / "model_final.pth", folder / "model_0000002.pth"):
        file.unlink()
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    words = ["--scale", "smoke", "--networks", "cifar_resnet20", "--seeds", "2", "--output", str(copy)]
    assert run.main([*words, "SOLVER.BASE_LR", "0.05"]) == 0
    again = json.loads((copy / "runs" / "cifar_resnet20-2.json").read_text())
    assert again["resumed"] and not whole["resumed"]
    for key in ("training_error", "training_error_of_final_weights", "test_error", "training_curve", "test_curve"):
        assert again[key] == whole[key], key


def test_a_signal_saves_a_run_in_a_process_of_its_own(tmp_path):
    words = ["--scale", "smoke", "--networks", "cifar_plain20", "--parallel", "2"]
    keys = ["SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "0", "TEST.EVAL_PERIOD", "0"]
    command = [sys.executable, str(PROJECT / "run.py"), *words, "--output", str(tmp_path / "out"), *keys]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT.parents[1]), "OMP_NUM_THREADS": "1"}
    metrics = tmp_path / "out" / "cifar_plain20-1" / "metrics.json"
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not metrics.is_file() or not metrics.stat().st_size:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing is left of them
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75
    assert "goes on" in errors and "Traceback" not in errors
    assert (metrics.parent / "last_checkpoint").is_file()


def test_a_run_that_fails_leaves_the_others_alone(run, project, tmp_path, capsys, monkeypatch):
    def carry_out_run(plan, dataset, network, seed):
        if seed == 1:
            raise project["runs"].InputError("it diverged")
        project["results"].write_record(made_record(network, seed, scale="smoke"), plan.record(network, seed))

    monkeypatch.setattr(project["runs"], "carry_out_run", carry_out_run)
    words = ["--scale", "smoke", "--networks", "cifar_plain20", "--seeds", "1", "2", "--output", str(tmp_path / "out")]
    assert run.main(words) == 2
    error = capsys.readouterr().err
    assert "it diverged" in error and "1 of 2 runs stopped: cifar_plain20, seed 1." in error
    assert table_row((tmp_path / "out" / "report.md").read_text(), "cifar_plain20")[2] == "2"


def test_other_arguments_in_the_same_folder_are_refused(run, smoke, capsys):
    assert run.main(["--scale", "smoke", "--output", str(smoke), "SOLVER.BASE_LR", "0.2"]) == 2
    assert "keys was ['SOLVER.BASE_LR', '0.05'], is now ['SOLVER.BASE_LR', '0.2']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--scale", "smoke", "--networks", "cifar_resnet21"], "cifar_resnet2"),
        (["--scale", "smoke", "--data", "somewhere"], "--scale smoke makes its own data"),
        (["--scale", "smoke", "--parallel", "0"], "--parallel"),
        (["--scale", "cpu", "--data", "nowhere"], "--data is nowhere"),
        (["--scale", "smoke", "SOLVER.MAX_ITERS", "3"], "SOLVER.MAX_ITER"),
        (["--report"], "no finished run"),
    ],
)
def test_bad_input_ends_in_a_sentence(run, tmp_path, capsys, arguments, expected):
    assert run.main([*arguments[:2], "--output", str(tmp_path / "out"), *arguments[2:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected in error and "Traceback" not in error
    assert not (tmp_path / "out" / "plan.json").exists(), "the corrected command would be refused"


@pytest.mark.parametrize("scale", ["cpu", "paper", "smoke"])
def test_every_network_of_a_scale_has_a_configuration(project, scale, tmp_path):
    plan = project["plan"].Plan(scale=scale, output=tmp_path)
    for network, seed in plan.jobs():
        cfg = plan.config(network, seed=seed)
        assert network == cfg.MODEL.NETWORK.NAME and cfg.SEED == 1
        assert cfg.SOLVER.REFERENCE_IMS_PER_BATCH == cfg.SOLVER.IMS_PER_BATCH, "nothing is rescaled"
        # The paper divides by 10 at a half and at three quarters; the smallest size has one step.
        shares = [step / cfg.SOLVER.MAX_ITER for step in cfg.SOLVER.STEPS]
        assert shares == [0.5, 0.75] or scale == "smoke"
        assert (cfg.SOLVER.WARMUP_UNTIL_ERROR == 80) == (network == "cifar_resnet110")
    assert len(plan.jobs()) == len(project["plan"].SCALES[scale].networks)
