"""Aggregation, Table 6 and Figure 6 from made-up records."""

import json
import shutil
import statistics
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.projects.records import made_record, table_row, write_records

PROJECT = Path(__file__).parents[2] / "projects" / "cifar10"


# ---- aggregation


def test_mean_and_deviation_are_those_of_the_papers_five_runs(project):
    """Five made-up runs as Table 6 has them for 110 layers: the best 6.43, 6.61 on average, deviation with n − 1."""
    values = [6.43, 6.50, 6.61, 6.68, 6.83]
    summary = project["results"].summarize(values)
    assert (summary.count, summary.least) == (5, 6.43)
    assert summary.mean == pytest.approx(6.61)
    assert summary.deviation == pytest.approx(np.std(values, ddof=1))
    assert round(summary.deviation, 2) == 0.16
    assert project["results"].summarize([5.0]).deviation is None
    assert project["results"].summarize([5.0, None]) is None


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


def test_the_papers_column_is_table_6(project, tmp_path):
    depths = {20: ("0.27M", "8.75"), 32: ("0.46M", "7.51"), 44: ("0.66M", "7.17"), 56: ("0.85M", "6.97")}
    depths |= {110: ("1.7M", "6.43 (6.61 ± 0.16)"), 1202: ("19.4M", "7.93")}
    output = write_records(
        tmp_path, *(made_record(f"cifar_resnet{depth}") for depth in depths), made_record("cifar_plain110")
    )
    report = project["report"].write_report(output)
    for depth, (weights, error) in depths.items():
        row = table_row(report, f"cifar_resnet{depth}")
        assert float(row[1].removesuffix("M")) == pytest.approx(float(weights.removesuffix("M")), abs=0.05), depth
        assert row[6] == error
    assert "above 60" in table_row(report, "cifar_plain110")[6]
    assert table_row(report, "cifar_resnet56")[7] == "+1.03"  # 8.00 made up, 6.97 in the paper


def test_the_report_says_what_depth_does(project, tmp_path):
    errors = {"cifar_plain20": 10.0, "cifar_plain56": 14.5, "cifar_resnet20": 8.0, "cifar_resnet56": 5.25}
    for folder, changed, expected in (
        ("as", {}, "As in the paper"),
        ("part", {"cifar_resnet56": 9.0}, "In part as in the paper"),
        ("not", {"cifar_plain56": 9.5, "cifar_resnet56": 9.0}, "Not as in the paper"),
        ("both gain", {"cifar_plain56": 9.5}, "Not as in the paper"),
    ):
        records = [made_record(name, training_error=error) for name, error in {**errors, **changed}.items()]
        report = project["report"].write_report(write_records(tmp_path / folder, *records))
        assert f"- {expected}" in report
    report = (tmp_path / "as" / "report.md").read_text()
    assert "- Plain: training error 10.00% with 20 layers, 14.50% with 56: +4.50 points." in report
    assert "- Residual: training error 8.00% with 20 layers, 5.25% with 56: -2.75 points." in report


def test_a_network_with_several_seeds_has_best_mean_and_deviation(project, tmp_path):
    runs = [
        made_record("cifar_resnet110", seed, test_error=error, training_error=seed)
        for seed, error in zip((1, 2, 3), (6.5, 6.6, 7.0))
    ]
    row = table_row(project["report"].write_report(write_records(tmp_path, *runs)), "cifar_resnet110")
    assert row[2:4] == ["1 2 3", "2.00 ± 1.00"]
    assert row[5] == "6.50 (6.70 ± 0.26)"
    assert row[7] == "+0.09"


def test_differences_from_the_paper_are_those_there_are(project, tmp_path):
    lines = project["report"].differences({"cifar_resnet20": [made_record("cifar_resnet20")]})
    assert not any(word in line for line in lines for word in ("in the paper ", "JPEG", "Mixed"))
    settings = {"batch": 32, "iterations": 4000, "steps": [2000, 3000], "precision": "bf16", "training_images": 10_000}
    record = made_record("cifar_resnet20", scale="cpu", title="CIFAR-10 (JPEG copies), a part", settings=settings)
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
    report = project["report"].write_report(write_records(tmp_path, record))
    assert report.startswith("# Plain and residual networks by depth: CIFAR-10 (JPEG copies), a part\n")
    assert "difference" not in report.split("Errors in percent")[0], "only the full schedule is compared with the paper"


def test_jpeg_copies_and_original_pixels_are_not_mixed(run, tmp_path, capsys):
    write_records(
        tmp_path, made_record("cifar_resnet20"), made_record("cifar_resnet56", title="CIFAR-10 (JPEG copies)")
    )
    assert run.main(["--report", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "CIFAR-10 (scale paper)" in error and "CIFAR-10 (JPEG copies) (scale paper)" in error


def test_the_figure_shows_each_curve_in_its_panel(project, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(project["figure"].plt, "close", figures.append)
    records = {
        "cifar_plain20": [
            made_record("cifar_plain20", 1),
            made_record("cifar_plain20", 2, test_curve=[[2000, 45], [4000, 27]]),
        ],
        "cifar_resnet20": [made_record("cifar_resnet20")],
        "cifar_resnet56": [made_record("cifar_resnet56")],
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
    project["figure"].draw({name: [made_record(name)] for name in networks}, tmp_path / "figure6.png")
    axes = figures[0].axes
    assert [each.get_title() for each in axes] == panels
    assert sum(len(each.lines) for each in axes) == 2 * len(networks)
    if panels[-1] == "others":
        assert [text.get_text() for text in axes[-1].get_legend().get_texts()] == ["cifar_resnet18"]


def test_kept_reports_are_those_of_the_kept_runs(project, tmp_path):
    for kept in sorted((PROJECT / "results").glob("*/report.md")):
        copy = tmp_path / kept.parent.name
        shutil.copytree(kept.parent / "runs", copy / "runs")
        assert project["report"].write_report(copy) == kept.read_text()
        assert sum(file.stat().st_size for file in kept.parent.rglob("*") if file.is_file()) < 500_000
