"""The comparison, end to end at a tiny size, as a user starts it."""

import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import cv2
import pytest
import torch

PROJECT = Path(__file__).parents[2] / "projects" / "coco_transfer"

PRETRAIN = """
MODEL.NETWORK.WIDTH 0.125  INPUT.MIN_SIZE_TRAIN (64,64)  INPUT.MIN_SIZE_TEST 64  INPUT.CROP.SIZE (64,64)
SOLVER.IMS_PER_BATCH 16  SOLVER.REFERENCE_IMS_PER_BATCH 0  SOLVER.MAX_ITER 40  SOLVER.CHECKPOINT_PERIOD 0
SOLVER.LOG_PERIOD 1  SOLVER.WARMUP_ITERS 1  SOLVER.AMP.ENABLED False  TEST.PRECISE_BN.NUM_ITER 2  TEST.EVAL_PERIOD 0
DATALOADER.NUM_WORKERS 0
"""
DETECTION = """
MODEL.NETWORK.WIDTH 0.125  INPUT.MIN_SIZE_TRAIN 64  INPUT.MIN_SIZE_TEST 64  SOLVER.IMS_PER_BATCH 2
SOLVER.REFERENCE_IMS_PER_BATCH 0  SOLVER.MAX_ITER 3  SOLVER.CHECKPOINT_PERIOD 2  SOLVER.LOG_PERIOD 1
SOLVER.WARMUP_ITERS 1  MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8  MODEL.RPN.POST_NMS_TOPK_TRAIN 20
MODEL.RPN.POST_NMS_TOPK_TEST 10  DATALOADER.NUM_WORKERS 0
"""


def _arguments(output, shapes, scenes, *more) -> list[str]:
    data = ["--pretrain-data", shapes, shapes, "--detection-data", scenes, scenes]
    keys = ["--pretrain", *PRETRAIN.split(), "--detection", *DETECTION.split()]
    return ["--scale", "subset", "--output", str(output), "--nets", "vgg16", "resnet18", *data, *keys, *more]


def _numbers(output: Path) -> dict:
    """What was measured of each network, and not how long it took."""
    networks = json.loads((output / "results.json").read_text())["networks"]
    for row in networks.values():
        for part in (row, row["control"]):
            del part["seconds"], part["resumed"]
    return networks


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The order in which numbers are added is that of the networks side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(run, shapes, scenes, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("transfer") / "run"
    assert run.main(_arguments(output, shapes, scenes)) == 0
    return output


def test_results_hold_every_network_and_its_control(finished):
    results = json.loads((finished / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["scale"] == "subset"
    assert results["seed"] == 1
    assert set(results["networks"]) == {"vgg16", "resnet18"}
    for row in results["networks"].values():
        for part in (row, row["control"]):
            assert 0 <= part["top1"] <= 100
            assert part["seconds"]["pretrain"] > 0
            assert {"AP", "AP50", "AP75", "APs", "APm", "APl"} <= set(part)


def test_top1_and_ap_are_those_of_the_stages(finished):
    results = json.loads((finished / "results.json").read_text())
    for net, row in results["networks"].items():
        assert row["top1"] == json.loads((finished / net / "pretrain" / "results.json").read_text())["top1"]
        control = json.loads((finished / net / "control_detection" / "results.json").read_text())["bbox"]
        assert row["control"]["AP50"] == control["AP50"]


def test_the_control_starts_from_random_weights_with_statistics_and_nothing_frozen(finished):
    import yaml

    from resnet_backbone.weights import read_checkpoint

    start = read_checkpoint(finished / "resnet18" / "control_pretrain" / "model_final.pth")
    assert start.metadata.origin["iterations"] == 0
    assert start.metadata.norm_statistics == "precise"
    cfg = yaml.safe_load((finished / "resnet18" / "control_detection" / "config.yaml").read_text())
    assert cfg["MODEL"]["BACKBONE"]["FREEZE_AT"] == 0
    own = yaml.safe_load((finished / "resnet18" / "detection" / "config.yaml").read_text())
    assert {key for key in own["SOLVER"] if own["SOLVER"][key] != cfg["SOLVER"][key]} == set()


def test_the_report_shows_a_row_for_each_and_the_papers_numbers(finished):
    report = (finished / "report.md").read_text()
    rows = [line for line in report.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["vgg16", "↳ control", "resnet18", "↳ control"]
    assert "41.5 / 21.2" in rows[2]
    assert "nan" not in report
    assert "need not be the paper's" in " ".join(report.split())
    assert "The networks have 0.125 of their channels." in report


def test_the_figures_are_pictures_with_something_on_them(finished):
    for name in ("curves.png", "detections.jpg"):
        image = cv2.imread(str(finished / name))
        assert min(image.shape[:2]) > 200
        assert image.std() > 5


def test_finished_stages_are_kept_with_the_conditions_under_which_they_ran(run, finished, shapes, scenes):
    files = sorted(finished.glob("*/*/model_final.pth"))
    before = [file.stat().st_mtime_ns for file in files], (finished / "report.md").read_text()
    assert len(files) == 8
    # How many networks run at once may differ from one start to the next.
    assert run.main(_arguments(finished, shapes, scenes, "--parallel", "2")) == 0
    assert ([file.stat().st_mtime_ns for file in files], (finished / "report.md").read_text()) == before
    (conditions,) = json.loads((finished / "results.json").read_text())["conditions"]
    assert (conditions["parallel"], conditions["stages"]) == (1, 8)
    assert f"torch {torch.__version__}" in conditions["versions"] and "threads: 1" in conditions["machine"]


def test_a_finished_run_is_extended_by_a_seed(run, finished, shapes, scenes, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    files = sorted(copy.glob("*/*/model_final.pth"))
    before = [file.stat().st_mtime_ns for file in files]
    assert run.main(_arguments(copy, shapes, scenes, "--repeat", "resnet18:2")) == 0
    assert [file.stat().st_mtime_ns for file in files] == before
    new = {str(file.parent.relative_to(copy)) for file in copy.glob("*/*/model_final.pth") if file not in files}
    assert new == {"resnet18/pretrain_seed2", "resnet18/detection_seed2"}
    assert (copy / "plan.json").read_text() == (finished / "plan.json").read_text()
    row = json.loads((copy / "results.json").read_text())["networks"]["resnet18"]
    (repeat,) = row["repeats"]
    losses = []
    for folder in ("detection", "detection_seed2"):
        lines = (copy / "resnet18" / folder / "metrics.json").read_text().splitlines()
        losses.append(json.loads(lines[0])["total_loss"])
        assert json.loads((copy / "resnet18" / folder / "stage.json").read_text())["seconds"] > 0
    assert losses[0] != losses[1], "another seed"
    stage = copy / "resnet18" / "detection_seed2" / "stage.json"
    record = json.loads(stage.read_text())
    stage.write_text(json.dumps(record | {"conditions": record["conditions"] | {"machine": "a GPU", "parallel": 3}}))
    assert run.main(_arguments(copy, shapes, scenes, "--repeat", "resnet18:2")) == 0
    report = (copy / "report.md").read_text()
    assert "- 9 of 10 stages: Python" in report and "- 1 of 10 stages: Python" in report
    assert "- a GPU, shared by 3 networks at a time; seed 1\n" in report
    second = json.loads((copy / "resnet18" / "pretrain_seed2" / "results.json").read_text())
    assert (repeat["seed"], repeat["top1"]) == (2, second["top1"])
    assert "| resnet18 (2 seeds) |" in (copy / "report.md").read_text()


def test_a_stage_that_was_stopped_goes_on_and_ends_with_the_same_numbers(run, finished, shapes, scenes, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    stage = copy / "vgg16" / "detection"
    whole = json.loads((stage / "results.json").read_text())
    for name in ("stage.json", "results.json", "model_final.pth", "model_0000002.pth"):
        (stage / name).unlink()
    (stage / "last_checkpoint").write_text("model_0000001.pth")
    (stage / "stopped.json").write_text('{"seconds": 1000.5}')
    # The copied detector started from the original folder's classifier, which is as good.
    assert run.main(_arguments(copy, shapes, scenes)) == 0
    again = json.loads((stage / "results.json").read_text())
    assert again == whole
    row = json.loads((copy / "results.json").read_text())["networks"]["vgg16"]
    assert row["resumed"] and 1000.5 < row["seconds"]["detection"] < 1100, "of both starts"


def test_networks_side_by_side_are_stopped_by_a_signal_and_go_on_to_the_same_numbers(
    run, finished, shapes, scenes, tmp_path, capfd
):
    output = tmp_path / "run"
    words = _arguments(output, shapes, scenes, "--parallel", "2")
    metrics = [output / net / "pretrain" / "metrics.json" for net in ("vgg16", "resnet18")]

    def stop() -> None:
        end = time.monotonic() + 120
        while not all(file.is_file() and file.stat().st_size for file in metrics) and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=stop)
    sender.start()
    assert run.main(words) == 75
    sender.join()
    output_of_both = capfd.readouterr()
    assert "stopped and saved: the same command goes on from there." in output_of_both.err
    assert "Traceback" not in output_of_both.err
    assert output_of_both.out == "", "each network's log is in its stages' folders"
    saved = {file.parent: json.loads(file.read_text())["seconds"] for file in output.glob("*/*/stopped.json")}
    assert saved and not (output / "report.md").exists()

    assert run.main(words) == 0
    assert _numbers(output) == _numbers(finished)
    for folder, seconds in saved.items():
        stage = json.loads((folder / "stage.json").read_text())
        assert stage["resumed"] and stage["seconds"] > seconds and not (folder / "stopped.json").exists()
    assert "2 networks at a time" in (output / "report.md").read_text()
    assert "resumed: the next iteration is" in "".join((folder / "log.txt").read_text() for folder in saved)


def test_a_network_that_fails_is_named_after_the_others_are_done(run, project, tmp_path, capsys, monkeypatch):
    done = []

    def run_stage(cfg, _run, **_):
        if cfg.MODEL.NETWORK.NAME == "vgg16":
            raise project["transfer"].InputError("the loss is not a number.")
        done.append(Path(cfg.OUTPUT_DIR).name)

    monkeypatch.setattr(project["transfer"], "run_stage", run_stage)
    monkeypatch.setattr(project["plan"].Plan, "with_data", lambda plan: plan)
    assert run.main(_arguments(tmp_path / "out", "shapes", "scenes")) == 2
    error = capsys.readouterr().err
    assert "error: vgg16: the loss is not a number.\n" in error
    assert error.splitlines()[-1].startswith("error: 1 of 2 networks stopped: vgg16.")
    assert done == ["pretrain", "detection", "control_pretrain", "control_detection"]


def test_the_status_is_read_from_the_stages_folders(project, finished, tmp_path):
    fixed = json.loads((finished / "plan.json").read_text())
    plan = project["plan"].Plan(**{**fixed, "output": tmp_path, "nets": ("vgg16",)})
    describe = project["transfer"].describe_progress
    assert describe(plan, "vgg16", 1) == "pretraining, preparing"
    shutil.copytree(finished / "vgg16", tmp_path / "vgg16")
    assert describe(plan, "vgg16", 1) == "all stages are finished"
    folder = tmp_path / "vgg16" / "control_detection"
    (folder / "stage.json").unlink()
    assert describe(plan, "vgg16", 1) == "control, detection, evaluating"
    entry = {"iteration": 0, "images_per_second": 0.25}
    (folder / "metrics.json").write_text(json.dumps(entry) + "\n" + json.dumps(entry)[:9])
    assert describe(plan, "vgg16", 1) == "control, detection, 1 of 3, 0.25 images/s, eta 0:00:16"


def test_a_key_with_a_networks_name_is_for_that_network_and_outweighs_the_shared_one(run, tmp_path):
    keys = ["--pretrain", "resnet50:SOLVER.BASE_LR", "0.3", "SOLVER.BASE_LR", "0.2", "SOLVER.MAX_ITER", "7"]
    plan = run.parse(["--scale", "demo", "--output", str(tmp_path), *keys])
    plan.check()
    step = plan.steps("vgg16", 1)[0]
    assert plan.config("vgg16", step).SOLVER.MAX_ITER == 7
    rates = {net: plan.config(net, step).SOLVER.BASE_LR for net in ("resnet50", "vgg16")}
    assert rates == {"resnet50": 0.3, "vgg16": 0.2}


def test_a_detector_that_finds_nothing_has_an_ap_of_zero(run, finished, tmp_path):
    from coco_transfer.factors import compare
    from coco_transfer.plan import Plan
    from coco_transfer.report import write_report
    from coco_transfer.results import collect_results

    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    stage = copy / "resnet18" / "control_detection" / "stage.json"
    nothing = json.loads(stage.read_text())
    nothing["bbox"] = dict.fromkeys(nothing["bbox"])
    stage.write_text(json.dumps(nothing))
    plan = Plan(**{**json.loads((copy / "plan.json").read_text()), "output": copy, "nets": ("vgg16", "resnet18")})
    results = collect_results(plan)
    assert results["networks"]["resnet18"]["control"]["AP50"] == 0
    gain = results["networks"]["resnet18"]["AP50"]
    results |= {**compare(plan, results["networks"]), "plan": plan.fixed()}
    assert f"resnet18: pretraining is worth {gain:+.1f} points" in write_report(results, tmp_path / "report.md")


def test_the_options_of_table_9_are_added_one_by_one(run, finished, shapes, scenes, tmp_path, capsys):
    import yaml

    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    assert run.main(_arguments(copy, shapes, scenes, "--options", "resnet18")) == 0
    table = (copy / "options.md").read_text()
    assert table in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")][2:]
    assert [row[0].lstrip("+ ") for row in rows] == [
        "baseline",
        "box refinement and voting",
        "global context",
        "multi-scale testing",
        "ensemble",
        "flips",
    ]
    assert rows[0][-2:] == ["1.0", "48.4 / 27.2"] and rows[-1][-1] == ""

    folder = copy / "resnet18"
    cfgs = [yaml.safe_load(file.read_text()) for file in sorted((folder / "options").glob("*/config.yaml"))]
    assert cfgs == [], "an evaluation writes none"
    contexts = [yaml.safe_load((folder / name / "config.yaml").read_text()) for name in ("context", "context_seed2")]
    assert [cfg["SEED"] for cfg in contexts] == [1, 2]
    for cfg in contexts:
        assert cfg["MODEL"]["ROI_HEADS"]["GLOBAL_CONTEXT"] is True
        assert Path(cfg["MODEL"]["WEIGHTS"]) == folder / "pretrain" / "model_final.pth"
    measured = json.loads((copy / "options.json").read_text())["rows"]
    stages = [json.loads(file.read_text()) for file in sorted((folder / "options").glob("*/stage.json"))]
    assert [row["AP50"] for row in measured] == [stage["bbox"]["AP50"] or 0 for stage in stages]
    assert stages[0]["bbox"] == json.loads((folder / "detection" / "results.json").read_text())["bbox"]
    assert all(row["seconds"] > 0 for row in measured)


def test_each_row_evaluates_with_the_options_above_it(project, finished, monkeypatch):
    options = project["options"]
    given, loaded = [], []
    monkeypatch.setattr(
        options, "run_stage", lambda cfg, *_, **__: given.append(cfg) or {"bbox": {"AP": 1.0, "AP50": 2.0}}
    )
    monkeypatch.setattr(options, "load_detector", lambda weights, opts: loaded.append((weights, opts)))
    monkeypatch.setattr(options, "_seconds", lambda detectors, _: [1.0] * len(detectors))
    monkeypatch.setattr(options, "write_json", lambda *_: None)
    fixed = json.loads((finished / "plan.json").read_text())
    plan = project["plan"].Plan(**{**fixed, "output": finished, "nets": ("resnet18",), "options": "resnet18"})
    options.measure_options(plan)
    (finished / "options.md").unlink()
    keys = {
        "refinement": [cfg.TEST.BOX_REFINEMENT and cfg.TEST.BOX_VOTING for cfg in given],
        "suppression": [cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST == 0.3 for cfg in given],
        "context": [cfg.MODEL.ROI_HEADS.GLOBAL_CONTEXT for cfg in given],
        "scales": [cfg.TEST.MULTI_SCALE.MIN_SIZES == (21, 43, 64, 85, 107) for cfg in given],
        "region": [cfg.TEST.MULTI_SCALE.REGION_SIZE == 64 for cfg in given],
        "ensemble": [
            (str(finished / "resnet18" / "context_seed2" / "model_final.pth"),) == cfg.TEST.ENSEMBLE for cfg in given
        ],
        "flip": [cfg.TEST.FLIP for cfg in given],
    }
    first = {"refinement": 1, "suppression": 1, "context": 2, "scales": 3, "region": 3, "ensemble": 4, "flip": 5}
    assert keys == {name: [row >= start for row in range(6)] for name, start in first.items()}
    weights = [Path(cfg.MODEL.WEIGHTS).parent.name for cfg in given]
    assert weights == ["detection"] * 2 + ["context"] * 4
    assert [str(file) for file, _ in loaded] == [cfg.MODEL.WEIGHTS for cfg in given]
    assert all(opts[-4:] == ["MODEL.DEVICE", given[0].MODEL.DEVICE, "MODEL.ACCELERATE", "True"] for _, opts in loaded)
    assert [opts[-6:-4] for _, opts in loaded[3:]] == [
        ["TEST.MULTI_SCALE.REGION_SIZE", "64"],
        ["TEST.ENSEMBLE", str(given[-1].TEST.ENSEMBLE)],
        ["TEST.FLIP", "True"],
    ]


def test_other_arguments_in_the_same_folder_are_refused(run, finished, shapes, scenes, capsys):
    assert run.main(_arguments(finished, shapes, scenes, "--seed", "2")) == 2
    error = capsys.readouterr().err
    assert "seed was 1, is now 2" in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--scale", "subset"], "--pretrain-data"),
        (["--scale", "demo", "--pretrain-data", "a", "b"], "--scale subset"),
        (["--scale", "demo", "--nets", "resnet100"], "resnet10"),
        (["--scale", "demo", "--detection", "resnet100:SOLVER.MAX_ITER", "5"], "resnet10"),
        (["--scale", "demo", "--detection", "SOLVER.MAX_ITERS", "5"], "SOLVER.MAX_ITER"),
        (["--scale", "demo", "--options", "vgg16"], "vgg16, which has no conv5_x"),
        (["--scale", "demo", "--options", "resnet50"], "--nets has only vgg16, resnet101"),
        (["--scale", "demo", "--parallel", "0"], "--parallel is 0"),
        (["--scale", "demo", "--detection", "SEED", "7"], "Use --seed"),
        (["--scale", "demo", "--parallel", "2", "--num-gpus", "2"], "each of the networks"),
        (
            ["--scale", "subset", "--pretrain-data", "a", "b", "--detection-data", "no.json", "no.json"],
            "there is no data set 'a'",
        ),
    ],
)
def test_bad_input_ends_in_a_sentence(run, tmp_path, capsys, arguments, expected):
    assert run.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert "Traceback" not in error


def test_another_batch_rescales_the_schedule_that_is_run_and_reported(run):
    from coco_transfer.plan import Plan
    from coco_transfer.results import _recipe

    plan = Plan(scale="paper", output=Path("unused"), detection_keys=("SOLVER.IMS_PER_BATCH", "4")).with_data()
    cfg = plan.config("resnet101", plan.steps("resnet101", 1)[1])
    # Goyal et al. 2017: a quarter of the batch, a quarter of the rate, four times the iterations.
    expected = {"iterations": 1_280_000, "batch": 4, "lr": pytest.approx(0.00025)}
    assert expected == {"iterations": cfg.SOLVER.MAX_ITER, "batch": 4, "lr": cfg.SOLVER.BASE_LR}
    assert cfg.SOLVER.REFERENCE_IMS_PER_BATCH == 4, "the run does not rescale it again"
    assert _recipe(plan, "resnet101", control=False)["schedule"]["detection"] == expected


def test_paper_scale_is_the_papers_schedule(run):
    from coco_transfer.plan import Plan

    plan = Plan(scale="paper", output=Path("unused")).with_data()
    pretrain, detection = plan.steps("resnet101", 1)[:2]
    cfg = plan.config("resnet101", pretrain)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (256, 0.1)
    assert tuple(cfg.DATASETS.TRAIN) == ("imagenet_train",)
    for net in ("vgg16", "resnet101"):
        cfg = plan.config(net, detection)
        assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (16, 320_000, (240_000,))
        assert math.isclose(cfg.SOLVER.BASE_LR, 0.001)
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
        assert tuple(cfg.DATASETS.TRAIN) == ("coco_2014_train",)
        assert net == cfg.MODEL.NETWORK.NAME
