"""tools/analyze_model.py as a user calls it, and the page that it made."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_backbone.networks import list_networks

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "networks.md"


@pytest.fixture(scope="module")
def main(load_script):
    module = load_script(ROOT / "tools" / "analyze_model.py")
    # Two tests ask for all networks, which takes seconds.
    module.analyze_catalogue = functools.cache(module.analyze_catalogue)
    return module.main


def output(main, capsys, *words) -> str:
    assert main(list(words)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_the_papers_table_1(main, capsys):
    text = output(main, capsys, "resnet50", "resnet101", "resnet152", "--stride-in-1x1")
    row = next(line for line in text.splitlines() if "3.86e9" in line)
    assert row.split()[1:] == ["3.86e9", "7.57e9", "11.28e9"]
    row = next(line for line in text.splitlines() if "11.3e9" in line)
    assert row.split() == ["paper", "3.8e9", "7.6e9", "11.3e9"]


def test_json_is_one_network_a_line(main, capsys):
    text = output(main, capsys, "--json", "resnet50", "vgg16", "cifar_resnet20")
    resnet50, vgg16, cifar = json.loads(text)
    assert len(text.splitlines()) == 2 + 3
    assert (resnet50["parameters"], vgg16["multiply_adds"], cifar["image_size"]) == (25_557_032, 15_470_264_320, 32)
    assert [stage["stride"] for stage in resnet50["stages"]] == [4, 4, 8, 16, 32, None]


def test_flags_reach_the_network(main, capsys):
    words = ("--json", "--width", "0.25", "--image-size", "64", "--stride-in-1x1", "resnet50", "vgg16", "resnet18")
    resnet50, vgg16, resnet18 = json.loads(output(main, capsys, *words))
    assert resnet50["stages"][1]["output_shape"] == [64, 16, 16] and vgg16["stages"][0]["output_shape"] == [16, 64, 64]
    # The others have no 1×1 convolution that could take the stride.
    assert (resnet50["stride_in_1x1"], vgg16["stride_in_1x1"], resnet18["stride_in_1x1"]) == (True, None, None)


def test_the_golden_table_comes_from_this_command(main, capsys):
    assert output(main, capsys, "--all", "--json") == (ROOT / "tests" / "analysis" / "golden.json").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["resnet51"], "no network is named 'resnet51', did you mean 'resnet5"),
        (["resnet50", "resnet_101"], "'resnet101'"),
        (["resnet50", "--width", "0"], "width is 0.0, expected a positive factor"),
        (["resnet50", "--image-size", "31"], "image_size is 31, expected at least 32"),
        (["vgg16", "--image-size", "0"], "image_size is 0, expected at least 32"),
    ],
)
def test_what_cannot_be_analysed_ends_in_one_sentence(main, capsys, words, expected):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and expected in captured.err


@pytest.mark.parametrize(
    "words", [[], ["--json"], ["--all", "resnet50"], ["--all", "--width", "0.5"], ["--all", "--image-size", "0"]]
)
def test_names_or_all(main, capsys, words):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "expected names of networks, or --all" in capsys.readouterr().err


def test_runs_from_anywhere_without_detectron2(tmp_path):
    tool = str(ROOT / "tools" / "analyze_model.py")
    script = (
        f"import runpy, sys; sys.modules['detectron2'] = None; sys.argv = ['analyze_model.py', 'resnet18']; "
        f"runpy.run_path({tool!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "11,689,512" in done.stdout


def commands() -> list[tuple[list[str], str]]:
    """The page's commands, and what it shows under each, up to the next heading or command."""
    parts = re.split(r"^```\npython tools/analyze_model\.py (.*) --markdown\n```\n\n", PAGE.read_text(), flags=re.M)
    return [([*words.split(), "--markdown"], shown) for words, shown in zip(parts[1::2], parts[2::2], strict=True)]


@pytest.mark.parametrize(("words", "shown"), commands(), ids=lambda value: value[0] if isinstance(value, list) else "")
def test_the_page_is_what_its_commands_print(main, capsys, words, shown):
    assert shown.startswith(output(main, capsys, *words))


def test_the_page_names_every_network():
    assert len(commands()) >= 4
    missing = [name for name in list_networks() if not re.search(rf"\| {name} +\|", PAGE.read_text())]
    assert missing == []
