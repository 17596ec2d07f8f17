"""tools/benchmark.py as a user calls it, in its shortest form."""

import json
from pathlib import Path

import pytest

from benchmarks import data, pretrain

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def main(load_script):
    return load_script(ROOT / "tools" / "benchmark.py").main


@pytest.mark.parametrize(
    ("words", "tasks", "unit"),
    [
        (["pretrain", "--networks", "resnet18"], ["resnet18, 4×3×32×32"], "images/s"),
        (
            ["data"],
            [
                "crop of random area, 64×48",
                "the paper's crop, 64×48",
                "a detector's images, 64×48",
                "crop of random area, 200×160",
                "the paper's crop, 200×160",
                "a detector's images, 200×160",
                "training resnet18 on 64×48",
            ],
            "images/s per core",
        ),
        (["evaluate"], ["evaluation, 20×10 detections", "counting, 20×10 detections"], "images/s"),
    ],
)
def test_the_page_and_the_file(main, capsys, tmp_path, words, tasks, unit):
    assert main([*words, "--tiny", "--json", str(tmp_path / "out" / "results.json")]) == 0
    printed = capsys.readouterr()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results) == {"setup", "comparisons", "skipped"} and len(results["skipped"]) == (words != ["evaluate"])
    assert [comparison["task"] for comparison in results["comparisons"]] == tasks
    assert results["comparisons"][0]["unit"] == unit
    for comparison in results["comparisons"]:
        assert set(comparison) == {"task", "unit", "first", "work", "sides"}
        assert f"| {comparison['task']} " in printed.out
        assert len({tuple(side["shape"]) for side in comparison["sides"]}) == 1
        for side in comparison["sides"]:
            assert set(side) == {"name", "settings", "shape", "rates", "rate", "first_is_faster"}
            assert len(side["rates"]) == 2 and min(side["rates"]) > 0 and side["first_is_faster"]["min"] > 0
            assert f"- {side['name']}: {side['settings']}" in printed.out
    assert all(f"Skipped: {line}" in printed.out for line in results["skipped"])
    assert printed.err.splitlines()[0] in ("resnet18", "loading 64×48", "evaluating 20×10 detections")


def test_a_folder_is_no_file_to_write(main, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["data", "--tiny", "--json", str(tmp_path)])
    assert f"argument --json: {tmp_path} is a folder; name a file in it" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "meaning"), [("pretrain", pretrain.MEANING), ("data", data.MEANING)])
def test_help_says_what_each_side_is(main, capsys, command, meaning):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert meaning and all(f"{side}: {text}" in printed for side, text in meaning.items())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pretrain", "--networks", "resnet51"], "no network is named 'resnet51'"),
        (["pretrain", "--rounds", "0"], "--rounds is 0; expected at least 1"),
        (["data", "--images", "nowhere", "--tiny"], "nowhere is no folder"),
    ],
)
def test_what_cannot_be_measured_ends_in_one_sentence(main, capsys, words, sentence):
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and sentence in error
