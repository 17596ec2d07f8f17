"""The experiment on CIFAR-10: the paper's recipe and numbers, aggregation, the report, and the command end to end."""

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

PROJECT = Path(__file__).parents[2] / "projects" / "cifar10"
RECIPES = Path(__file__).parents[2] / "configs" / "pretrain"
JPEG_COPIES = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10_jpeg.tar.xz"


@pytest.fixture(scope="module")
def project(run):
    """The modules of the package by name."""
    return {name: sys.modules[f"cifar10.{name}"] for name in ("plan", "dataset", "runs", "results", "report", "figure")}


@pytest.fixture(scope="module")
def smoke(run, tmp_path_factory) -> Path:
    """The output of `--scale smoke` with two seeds of one network, two at a time, and a key over its own."""
    output = tmp_path_factory.mktemp("cifar10") / "smoke"
    words = ["--scale", "smoke", "--networks", "cifar_resnet20", "--seeds", "1", "2", "--parallel", "2"]
    assert run.main([*words, "--output", str(output), "SOLVER.BASE_LR", "0.05"]) == 0
    return output


def _record(network: str, seed: int = 1, **entries) -> dict:
    """A made-up record of the paper's schedule."""
    settings = {
        "training_images": 50_000,
        "test_images": 10_000,
        "width": 1.0,
        "batch": 128,
        "learning_rate": 0.1,
        "steps": [32_000, 48_000],
        "iterations": 64_000,
        "warm_up_until_error": 0.0,
        "weight_decay": 1e-4,
        "precision": "fp32",
    }
    record = {
        "network": network,
        "seed": seed,
        "scale": "paper",
        "title": "CIFAR-10",
        "training_error": 1.0,
        "training_error_of_final_weights": 0.5,
        "test_error": 8.0,
        "settings": {**settings, **entries.pop("settings", {})},
        "keys": [],
        "versions": "Python 3.11.7, torch 2.11.0",
        "machine": "a machine",
        "parallel": 1,
        "seconds": 100,
        "resumed": False,
        "training_curve": [[2000, 30.0], [4000, 20.0]],
        "test_curve": [[2000, 35.0], [4000, 25.0]],
    }
    return {**record, **entries}


def _write(output: Path, *records: dict) -> Path:
    for record in records:
        file = output / "runs" / f"{record['network']}-{record['seed']}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record))
    return output


def _row(report: str, network: str) -> list[str]:
    line = next(line for line in report.splitlines() if line.startswith(f"| {network} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


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


def test_the_papers_column_is_table_6(project, tmp_path):
    depths = {20: ("0.27M", "8.75"), 32: ("0.46M", "7.51"), 44: ("0.66M", "7.17"), 56: ("0.85M", "6.97")}
    depths |= {110: ("1.7M", "6.43 (6.61 ± 0.16)"), 1202: ("19.4M", "7.93")}
    output = _write(tmp_path, *(_record(f"cifar_resnet{depth}") for depth in depths), _record("cifar_plain110"))
    report = project["report"].write_report(output)
    for depth, (weights, error) in depths.items():
        row = _row(report, f"cifar_resnet{depth}")
        assert float(row[1].removesuffix("M")) == pytest.approx(float(weights.removesuffix("M")), abs=0.05), depth
        assert row[6] == error
    assert "above 60" in _row(report, "cifar_plain110")[6]
    assert _row(report, "cifar_resnet56")[7] == "+1.03"  # 8.00 made up, 6.97 in the paper


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


# ---- aggregation


def test_mean_and_deviation_are_those_of_the_papers_five_runs(project):
    """Five made-up runs as Table 6 has them for 110 layers: the best 6.43, 6.61 on average, deviation with n − 1."""
    values = [6.43, 6.50, 6.61, 6.68, 6.83]
    summary = project["results"].summarise(values)
    assert (summary.count, summary.least) == (5, 6.43)
    assert summary.mean == pytest.approx(6.61)
    assert summary.deviation == pytest.approx(np.std(values, ddof=1))
    assert round(summary.deviation, 2) == 0.16
    assert project["results"].summarise([5.0]).deviation is None
    assert project["results"].summarise([5.0, None]) is None


def test_curves_are_read_by_finished_iterations_and_the_later_reading_counts(project, tmp_path):
    lines = [
        {"iteration": 0, "top1_error": 90.0},
        {"iteration": 1, "top1_error": 80.0},
        {"iteration": 1, "top1_error": 70.0},
        {"iteration": 2, "top1": 40.0, "top1_error": 60.0},
    ]
    file = tmp_path / "metrics.json"
    file.write_text("\n".join(map(json.dumps, lines)) + '\n{"iteration": 3, "top')
    curves = project["results"].read_curves(file)
    assert curves.training == [(1, 90.0), (2, 70.0), (3, 60.0)]
    assert curves.test == [(2, 60.0)]


def test_the_last_epoch_is_its_iterations_alone(project):
    curve = [(iteration, float(iteration)) for iteration in range(1, 101)]
    assert project["results"].last_epoch(curve, 100, 10.0) == statistics.fmean(range(91, 101))
    assert project["results"].last_epoch([], 0, 10.0) is None


@pytest.mark.parametrize("points", [0, 1, 199, 200, 201, 3200])
def test_a_thinned_curve_keeps_its_mean_and_end(project, points):
    errors = np.random.default_rng(0).uniform(0, 100, points)
    thinned = project["results"].thin([(20 * (i + 1), error) for i, error in enumerate(errors)])
    assert len(thinned) <= 200 and len(thinned) == len({iteration for iteration, _ in thinned})
    if points:
        assert thinned[-1][0] == 20 * points
    if points == 3200:
        assert len(thinned) == 200
        assert [error for _, error in thinned] == pytest.approx(errors.reshape(200, 16).mean(1), abs=0.005)
    if points == 200:
        assert [error for _, error in thinned] == pytest.approx(errors, abs=0.005)


# ---- the report


def test_the_report_says_what_depth_does(project, tmp_path):
    errors = {"cifar_plain20": 10.0, "cifar_plain56": 14.5, "cifar_resnet20": 8.0, "cifar_resnet56": 5.25}
    for folder, changed, expected in (
        ("as", {}, "As in the paper"),
        ("part", {"cifar_resnet56": 9.0}, "In part as in the paper"),
        ("not", {"cifar_plain56": 9.5, "cifar_resnet56": 9.0}, "Not as in the paper"),
        ("both gain", {"cifar_plain56": 9.5}, "Not as in the paper"),
    ):
        records = [_record(name, training_error=error) for name, error in {**errors, **changed}.items()]
        report = project["report"].write_report(_write(tmp_path / folder, *records))
        assert f"- {expected}" in report
    report = (tmp_path / "as" / "report.md").read_text()
    assert "- Plain: training error 10.00 % with 20 layers, 14.50 % with 56: +4.50 points." in report
    assert "- Residual: training error 8.00 % with 20 layers, 5.25 % with 56: -2.75 points." in report


def test_a_network_with_several_seeds_has_best_mean_and_deviation(project, tmp_path):
    runs = [
        _record("cifar_resnet110", seed, test_error=error, training_error=seed)
        for seed, error in zip((1, 2, 3), (6.5, 6.6, 7.0))
    ]
    row = _row(project["report"].write_report(_write(tmp_path, *runs)), "cifar_resnet110")
    assert row[2:4] == ["1 2 3", "2.00 ± 1.00"]
    assert row[5] == "6.50 (6.70 ± 0.26)"
    assert row[7] == "+0.09"


def test_differences_from_the_paper_are_those_there_are(project, tmp_path):
    lines = project["report"].differences({"cifar_resnet20": [_record("cifar_resnet20")]})
    assert not any(word in line for line in lines for word in ("in the paper ", "JPEG", "Mixed"))
    settings = {"batch": 32, "iterations": 4000, "steps": [2000, 3000], "precision": "bf16", "training_images": 10_000}
    record = _record("cifar_resnet20", scale="cpu", title="CIFAR-10 (JPEG copies), a part", settings=settings)
    lines = "\n".join(project["report"].differences({"cifar_resnet20": [record]}))
    for expected in (
        "JPEG copies",
        "Batch: 32; in the paper 128.",
        "Iterations: 4,000; in the paper 64,000.",
        "Steps: 2,000 and 3,000; in the paper 32,000 and 48,000.",
        "Training images: 10,000; in the paper 50,000.",
        "Mixed precision (bf16)",
    ):
        assert expected in lines
    report = project["report"].write_report(_write(tmp_path, record))
    assert report.startswith("# Plain and residual networks by depth: CIFAR-10 (JPEG copies), a part\n")
    assert "difference" not in report.split("Errors in per cent")[0], (
        "only the full schedule is compared with the paper"
    )


def test_jpeg_copies_and_original_pixels_are_not_mixed(run, tmp_path, capsys):
    _write(tmp_path, _record("cifar_resnet20"), _record("cifar_resnet56", title="CIFAR-10 (JPEG copies)"))
    assert run.main(["--report", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "CIFAR-10 (scale paper)" in error and "CIFAR-10 (JPEG copies) (scale paper)" in error


def test_the_figure_shows_each_curve_in_its_panel(project, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(project["figure"].plt, "close", figures.append)
    records = {
        "cifar_plain20": [
            _record("cifar_plain20", 1),
            _record("cifar_plain20", 2, test_curve=[[2000, 45], [4000, 27]]),
        ],
        "cifar_resnet20": [_record("cifar_resnet20")],
        "cifar_resnet56": [_record("cifar_resnet56")],
    }
    project["figure"].draw(records, tmp_path / "figure6.png")
    plain, residual = figures[0].axes
    assert [(axes.get_title(), len(axes.lines)) for axes in (plain, residual)] == [("plain", 2), ("residual", 4)]
    training, test = plain.lines
    assert (training.get_linestyle(), test.get_linestyle()) == ("--", "-")
    assert test.get_xdata() == pytest.approx([0.2, 0.4]), "in units of ten thousand iterations"
    assert test.get_ydata() == pytest.approx([40.0, 26.0]), "the mean of both seeds"
    assert cv2.imread(str(tmp_path / "figure6.png")).shape[1] == 800


@pytest.mark.parametrize(
    ("networks", "panels"),
    [
        (["cifar_resnet18"], ["others"]),
        (["cifar_resnet18", "cifar_resnet56", "cifar_resnet20"], ["residual", "others"]),
        (["cifar_plain20"], ["plain"]),
    ],
)
def test_every_network_has_a_panel_and_every_panel_a_network(project, tmp_path, monkeypatch, networks, panels):
    figures = []
    monkeypatch.setattr(project["figure"].plt, "close", figures.append)
    project["figure"].draw({name: [_record(name)] for name in networks}, tmp_path / "figure6.png")
    axes = figures[0].axes
    assert [each.get_title() for each in axes] == panels
    assert sum(len(each.lines) for each in axes) == 2 * len(networks)
    if panels[-1] == "others":
        assert [text.get_text() for text in axes[-1].get_legend().get_texts()] == ["cifar_resnet18"]


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
    assert _row(report, "cifar_plain20")[2] == "1" and _row(report, "cifar_resnet20")[2] == "1 2"


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
        project["results"].write_record(_record(network, seed, scale="smoke"), plan.record(network, seed))

    monkeypatch.setattr(project["runs"], "carry_out_run", carry_out_run)
    words = ["--scale", "smoke", "--networks", "cifar_plain20", "--seeds", "1", "2", "--output", str(tmp_path / "out")]
    assert run.main(words) == 2
    error = capsys.readouterr().err
    assert "it diverged" in error and "1 of 2 runs stopped: cifar_plain20, seed 1." in error
    assert _row((tmp_path / "out" / "report.md").read_text(), "cifar_plain20")[2] == "2"


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


def test_kept_reports_are_those_of_the_kept_runs(project, tmp_path):
    for kept in sorted((PROJECT / "results").glob("*/report.md")):
        copy = tmp_path / kept.parent.name
        shutil.copytree(kept.parent / "runs", copy / "runs")
        assert project["report"].write_report(copy) == kept.read_text()
        assert sum(file.stat().st_size for file in kept.parent.rglob("*") if file.is_file()) < 500_000
