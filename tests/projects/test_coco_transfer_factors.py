"""Repeats, and the comparison factor by factor, of runs whose results are written here."""

import json
import math
import statistics
from pathlib import Path

import cv2
import numpy as np
import pytest

PROJECT = Path(__file__).parents[2] / "projects" / "coco_transfer"

SIX = ("vgg16", "vgg16_bn", "plain34", "resnet34", "resnet50", "resnet101")
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def words(output: Path, scenes: str, *more: str, nets: tuple[str, ...] = SIX) -> list[str]:
    data = ["--pretrain-data", scenes, scenes, "--detection-data", scenes, scenes]
    return ["--scale", "quarter", "--output", str(output), "--nets", *nets, *data, *more]


def finish(plan, net: str, step, *, top1: float, ap50: float, detections: list[dict] | None = None) -> None:
    """Write what a step leaves of itself: its results, its metrics and a detector's detections."""
    folder = plan.folder(net, step)
    folder.mkdir(parents=True)
    conditions = {"versions": "torch", "machine": "a machine", "parallel": 2}
    stage = {"seconds": 10.0 * step.seed, "resumed": False, "conditions": conditions}
    if step.stage == "pretrain":
        stage["top1"] = top1
    else:
        stage["bbox"] = {**dict.fromkeys(METRICS, ap50 / 2), "AP50": ap50}
        if detections is not None:
            file = folder / "inference" / "scenes" / "coco_instances_results.json"
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps(detections))
    (folder / "stage.json").write_text(json.dumps(stage))
    metrics = [{"iteration": n, "top1_error": 90 - n, "total_loss": 2.0, "images_per_second": 1} for n in (0, 1)]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in metrics))


def perfect(scenes: str) -> list[dict]:
    """Return detections that are all right."""
    items = json.loads(Path(scenes).read_text())["annotations"]
    return [{key: item[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for item in items]


@pytest.fixture(scope="module")
def six(run, scenes, tmp_path_factory) -> Path:
    """Six finished networks, of which plain34 finds nothing, resnet34 everything; vgg16 and resnet101 have 3 seeds."""
    output = tmp_path_factory.mktemp("six") / "run"
    given = words(output, scenes, "--repeat", "vgg16:3", "resnet101:3")
    plan = run.parse(given)
    everything = perfect(scenes)
    for number, net in enumerate(SIX):
        found = {"plain34": [], "resnet34": everything}.get(net, everything[::2])
        for seed in plan.seeds(net):
            for step in plan.steps(net, seed):
                ap50 = 10 * number + 2 * seed - 8 * step.control
                finish(plan, net, step, top1=20 + number + seed, ap50=ap50, detections=found)
    assert run.main(given) == 0
    return output


@pytest.fixture(scope="module")
def results(six) -> dict:
    return json.loads((six / "results.json").read_text(), parse_constant=pytest.fail)


def test_networks_have_the_papers_depths_and_traits(results):
    traits = {net: (one["layers"], one["norm"], one["shortcuts"]) for net, one in results["traits"].items()}
    assert traits == {
        "vgg16": (16, None, False),
        "vgg16_bn": (16, "batch norm", False),
        "plain34": (34, "batch norm", False),
        "resnet34": (34, "batch norm", True),
        "resnet50": (50, "batch norm", True),
        "resnet101": (101, "batch norm", True),
    }


def test_pairs_differ_in_one_factor_and_one_pair_in_all(results):
    assert [(one["factor"], one["first"], one["second"]) for one in results["comparisons"]] == [
        ("batch norm", "vgg16", "vgg16_bn"),
        ("shortcuts", "plain34", "resnet34"),
        ("depth, 34 to 50 layers, with bottlenecks for basic blocks", "resnet34", "resnet50"),
        ("depth, 50 to 101 layers", "resnet50", "resnet101"),
        ("all at once", "vgg16", "resnet101"),
    ]


@pytest.mark.parametrize(
    ("nets", "expected"),
    [
        (("vgg19", "vgg16"), [("depth, 16 to 19 layers", "vgg16", "vgg19")]),
        (("resnet18", "plain18"), [("shortcuts", "plain18", "resnet18")]),
        (("resnet50", "resnext50_32x4d", "wide_resnet50_2", "preact_resnet50"), []),  # as deep, other blocks
        (("vgg16_bn", "resnet101"), []),  # batch norm in both, but not the depth alone
        (("vgg16", "resnet18"), [("all at once", "vgg16", "resnet18")]),
        (("vgg19", "resnet18"), []),  # not deeper
    ],
)
def test_pairs_of_other_networks(run, project, tmp_path, nets, expected):
    plan = run.parse(["--scale", "demo", "--output", str(tmp_path), "--nets", *nets])
    factors = project["factors"]
    assert factors.find_pairs({net: factors.find_traits(plan, net) for net in nets}) == expected


def test_a_norm_that_the_configuration_sets_is_called_by_its_name(run, project, tmp_path):
    given = ["--scale", "demo", "--output", str(tmp_path), "--nets", "vgg16", "vgg16_bn"]
    plan = run.parse([*given, "--pretrain", "vgg16_bn:MODEL.RESNETS.NORM", "GN"])
    factors = project["factors"]
    pairs = factors.find_pairs({net: factors.find_traits(plan, net) for net in plan.nets})
    assert pairs == [("group norm", "vgg16", "vgg16_bn")]


def test_differences_are_of_means_over_seeds(results):
    norm, shortcuts, *_, everything = results["comparisons"]
    # AP50 is 10 × the network's number + 2 × the seed: with seeds 1 to 3, 4 in the mean, with seed 1 alone, 2.
    assert (norm["AP50"], shortcuts["AP50"], everything["AP50"]) == (pytest.approx(8), 10, 50)
    assert (norm["AP"], norm["top1"], everything["top1"]) == (pytest.approx(4), 0, 5)


def test_intervals_are_of_the_detections(results):
    intervals = {one["second"]: one["intervals"]["AP50"] for one in results["comparisons"][:-1]}
    assert intervals["vgg16_bn"] == pytest.approx([0, 0], abs=1e-9)  # the same detections
    assert intervals["resnet34"] == pytest.approx([100, 100])
    low, high = intervals["resnet50"]  # half of the objects instead of all
    assert -100 < low < high < 0
    assert (results["test_images"], results["resamples"]) == (6, 1000)


def test_settings_that_differ_are_those_of_the_configurations(results):
    norm, shortcuts, depth, *_ = results["comparisons"]
    assert norm["settings"] == {
        "pretrain": {"SOLVER.BASE_LR": [0.02, 0.05], "SOLVER.CLIP_GRADIENTS.ENABLED": [True, False]},
        "detection": {"SOLVER.BASE_LR": [0.005, 0.01]},
    }
    assert shortcuts["settings"] == {"pretrain": {}, "detection": {"SOLVER.BASE_LR": [0.005, 0.01]}}
    assert depth["settings"] == {"pretrain": {}, "detection": {}}


def test_settings_that_one_network_is_given_are_among_those_that_differ(run, project, scenes, tmp_path):
    given = words(tmp_path, scenes, nets=("resnet34", "resnet50"))
    plan = run.parse([*given, "--detection", "resnet50:MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.DEVICE", "cpu"])
    settings = project["factors"]._settings(plan, "resnet34", "resnet50")
    frozen = plan.config("resnet34", plan.steps("resnet34", 1)[1]).MODEL.BACKBONE.FREEZE_AT
    assert settings == {"pretrain": {}, "detection": {"MODEL.BACKBONE.FREEZE_AT": [frozen, 0]}}
    assert frozen != 0


def test_the_report_has_means_and_deviations_and_what_they_are(six):
    report = (six / "report.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("|")]
    vgg, control, vgg_bn = rows[2:5]
    deviation = statistics.stdev([2, 4, 6])
    assert vgg[0] == "vgg16 (3 seeds)"
    assert vgg[3] == f"4.0 ± {deviation:.1f}" == "4.0 ± 2.0"
    assert vgg[1] == "22.0 ± 1.0"
    assert vgg[-1] == "20 + 20"
    assert (control[0], control[3]) == ("↳ control", "-6.0")
    assert (vgg_bn[0], vgg_bn[3]) == ("vgg16_bn", "12.0")
    assert "mean ± sample standard deviation" in report
    assert "vgg16: pretraining is worth +10.0 points" in report
    assert "ResNet-101 against VGG-16: +50.0 points of AP50 and +25.0 of AP here" in report
    assert report.count("; also with seed 2 and 3.") == 2
    assert "nan" not in report and "None" not in report


def test_the_report_tells_what_the_test_images_can_tell(six):
    lines = (six / "report.md").read_text().splitlines()
    assert any(line.startswith("# Backbones in Faster R-CNN") for line in lines)
    (excludes,) = (line for line in lines if "excludes 0:" in line)
    (holds,) = (line for line in lines if "cannot tell" in line)
    assert "plain34 → resnet34 (+10.0)" in excludes and "resnet34 → resnet50" in excludes
    assert "vgg16 → vgg16_bn (+8.0)" in holds and "vgg16 → resnet101 (+50.0)" in holds
    (limits,) = (line for line in lines if line.startswith("**What may be concluded.**"))
    assert "fc6 and fc7 on 7×7 to conv5_x on 4×4" in limits
    assert "the ± in the first table" in limits
    assert any("BASE_LR 0.02 → 0.05, CLIP_GRADIENTS.ENABLED True → False" in line for line in lines)


def test_the_figure_has_something_on_it(six):
    image = cv2.imread(str(six / "factors.png"))
    assert min(image.shape[:2]) > 200
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 100
    assert "](factors.png)" in (six / "report.md").read_text()


def test_an_image_shows_confident_detections_or_the_best_one(project, tmp_path):
    scores = {7: [0.2, 0.9, 0.5], 8: [0.1, 0.3, 0.05], 9: [0.49]}
    items = [
        {"image_id": image, "category_id": 3, "bbox": [0, 0, 9, 9], "score": score}
        for image, several in scores.items()
        for score in several
    ]
    (tmp_path / "found.json").write_text(json.dumps(items))
    found = project["figures"]._detections(tmp_path / "found.json", {3: 1})
    assert {image: [score for _, _, score in several] for image, several in found.items()} == {
        7: [0.9, 0.5],
        8: [0.3],
        9: [0.49],
    }
    assert all(category == 1 for several in found.values() for _, category, _ in several)


@pytest.mark.parametrize(("readings", "points"), [(0, 0), (1, 1), (100, 100), (250, 100)])
def test_long_curves_are_averaged(project, tmp_path, readings, points):
    lines = [{"iteration": 20 * n, "total_loss": 3.0 - n} for n in range(readings)]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    axes = project["figures"].plt.figure().add_subplot()
    project["figures"]._curve(axes, tmp_path, "total_loss", label="a network")
    (line,) = axes.get_lines()
    assert len(line.get_xdata()) == points
    assert line.get_ydata() == pytest.approx(3.0 - line.get_xdata() / 20)  # a mean over a line lies on it
    assert readings == 0 or (line.get_xdata()[0] <= 20 and line.get_xdata()[-1] >= 20 * (readings - 2))


def test_intervals_are_of_the_mean_over_seeds(run, scenes, tmp_path):
    nets = ("plain34", "resnet34")
    given = words(tmp_path / "run", scenes, "--no-control", "--repeat", "resnet34:2", nets=nets)
    plan = run.parse(given)
    for net in nets:
        for seed in plan.seeds(net):
            found = perfect(scenes) if (net, seed) == ("resnet34", 2) else []
            for step in plan.steps(net, seed):
                finish(plan, net, step, top1=10, ap50=100 * bool(found), detections=found)
    assert run.main(given) == 0
    (one,) = json.loads((tmp_path / "run" / "results.json").read_text())["comparisons"]
    assert (one["AP50"], one["intervals"]["AP50"]) == (50, pytest.approx([50, 50]))


def test_without_detections_in_cocos_form_there_are_no_intervals(run, scenes, tmp_path, capsys):
    nets = ("plain34", "resnet34")
    given = words(tmp_path / "run", scenes, "--no-control", nets=nets)
    plan = run.parse(given)
    for net in nets:
        for step in plan.steps(net, 1):
            finish(plan, net, step, top1=10, ap50=12 if net == "plain34" else 15)
    assert run.main(given) == 0
    report = capsys.readouterr().out
    assert "plain34 → resnet34" in report and "There are no intervals" in report
    assert "95%" not in report
    assert not (tmp_path / "run" / "factors.png").exists()
    (one,) = json.loads((tmp_path / "run" / "results.json").read_text())["comparisons"]
    assert one["AP50"] == 3 and "intervals" not in one


def test_two_networks_that_differ_in_everything_have_a_sentence_and_no_section(run, scenes, tmp_path, capsys):
    nets = ("vgg16", "resnet101")
    given = words(tmp_path / "run", scenes, "--no-control", nets=nets)
    plan = run.parse(given)
    everything = perfect(scenes)
    for net, found in (("vgg16", []), ("resnet101", everything)):
        for step in plan.steps(net, 1):
            finish(plan, net, step, top1=10, ap50=100.0 * bool(found), detections=found)
    assert run.main(given) == 0
    report = capsys.readouterr().out
    assert "ResNet-101 against VGG-16: +100.0 points of AP50" in report
    assert "Of 1,000 resamples of the 6 test images, 95% give differences from +100.0 to +100.0" in report
    assert "Factor by factor" not in report


def test_seeds_go_on_from_the_first_and_have_folders_of_their_own(run, scenes, tmp_path):
    plan = run.parse(words(tmp_path, scenes, "--seed", "5", "--repeat", "2", "resnet50:3"))
    plan.check()
    assert [list(plan.seeds(net)) for net in ("vgg16", "resnet50")] == [[5, 6], [5, 6, 7]]
    folders = [[plan.folder("vgg16", step).name for step in plan.steps("vgg16", seed)] for seed in (5, 6)]
    assert folders == [
        ["pretrain", "detection", "control_pretrain", "control_detection"],
        ["pretrain_seed6", "detection_seed6"],
    ]
    pretrain, detection = (plan.config("vgg16", step) for step in plan.steps("vgg16", 6))
    assert (pretrain.SEED, detection.SEED) == (6, 6)
    assert str(tmp_path / "vgg16" / "pretrain_seed6" / "model_final.pth") == detection.MODEL.WEIGHTS
    assert str(tmp_path / "vgg16" / "detection_seed6") == detection.OUTPUT_DIR


def test_a_run_begun_without_repeats_can_be_extended(run, six, scenes):
    keys = {"scale", "seed", "processes", "control", "pretrain_data", "detection_data"}
    keys |= {"pretrain_keys", "detection_keys"}
    assert set(json.loads((six / "plan.json").read_text())) == keys
    plain, repeated = (run.parse(words(six, scenes, *more)) for more in ((), ("--repeat", "3")))
    assert plain.fixed() == repeated.fixed()


def test_the_first_seeds_of_all_networks_come_first_each_in_a_job_of_its_own(
    run, project, scenes, tmp_path, monkeypatch
):
    stages = project["transfer"]
    ran, titles = [], []

    def run_jobs(jobs, **_):
        titles.extend(job.title for job in jobs)
        assert jobs[-1].status() == "pretraining, preparing"
        for job in jobs:
            job.call()
        return jobs[-1:]

    monkeypatch.setattr(stages, "run_jobs", run_jobs)
    monkeypatch.setattr(
        stages, "run_stage", lambda cfg, *_, **__: ran.append(Path(cfg.OUTPUT_DIR).relative_to(tmp_path))
    )
    given = words(tmp_path, scenes, "--repeat", "2", "--no-control", nets=("vgg16", "resnet18"))
    assert run.main(given) == 2
    assert titles == ["vgg16", "resnet18", "vgg16 seed 2", "resnet18 seed 2"]
    assert list(map(str, ran)) == [
        f"{net}/{stage}{seed}"
        for seed in ("", "_seed2")
        for net in ("vgg16", "resnet18")
        for stage in ("pretrain", "detection")
    ]


def test_generated_data_stay_those_of_the_first_seed(run, project, tmp_path, monkeypatch):
    seeds = []
    for name in ("write_classification", "write_detection"):
        monkeypatch.setattr(project["plan"], name, lambda path, *, images, seed: seeds.append(seed) or str(path))
    run.parse(["--scale", "demo", "--output", str(tmp_path), "--repeat", "3"]).with_data()
    assert seeds == [1, 1001, 2001, 3001]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--repeat", "0"), "'0'; expected a number of seeds from 1 on"),
        (("--repeat", "vgg16:x"), "'vgg16:x'; expected a number"),
        (("--repeat", "vgg16:"), "'vgg16:'; expected a number"),
        (("--repeat", "-2"), "'-2'; expected a number"),
        (("--repeat", "resnet100:2"), "resnet10"),
        (("--repeat", "resnet18:2"), "'resnet18:2', but --nets has only vgg16, vgg16_bn"),
        (("--repeat", "2", "--pretrain", "vgg16:SEED", "7"), "SEED would give all of a network's runs the same seed"),
    ],
)
def test_bad_repeats_end_in_a_sentence(run, scenes, tmp_path, capsys, more, expected):
    given = words(tmp_path / "out", scenes, *more)
    assert run.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert expected in error


def test_a_summary_is_mean_and_sample_deviation(project):
    summarize = project["results"].summarize
    row = {"AP50": 10.0, "APs": None, "repeats": [{"AP50": 12.0, "APs": None}, {"AP50": 17.0, "APs": 1.0}]}
    found = summarize(row, "AP50")
    assert found.mean == 13
    assert found.deviation == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert str(found) == "13.0 ± 3.6"
    assert str(summarize({"AP50": 10.0}, "AP50")) == "10.0"
    assert summarize(row, "APs") is None
