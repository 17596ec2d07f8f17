"""tools/visualize_data.py as a user calls it."""

from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import DETECTION_SMALL

TOOL = Path(__file__).parents[2] / "tools" / "visualize_data.py"


@pytest.fixture(scope="module")
def main(load_script):
    return load_script(TOOL).main


def test_pictures(main, scenes, tmp_path, capsys):
    words = ["--config-file", "faster_rcnn_R50.yaml", *DETECTION_SMALL.split(), "DATASETS.TRAIN", scenes, "SEED", "1"]
    assert main([*words, "--output", str(tmp_path / "a"), "--images", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"wrote {tmp_path}/a/iteration_0_001.png: 3 images of iterations 0 to 1, seed 1\n"
    assert Image.open(tmp_path / "a" / "iteration_0_001.png").format == "PNG"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config-file", "faster_rcnn_R50.yaml", "--output", "{}/a"], "DATASETS.TRAIN is empty"),
        (["--config-file", "no.yaml", "--output", "{}/a"], "no config file no.yaml"),
        (["--config-file", "faster_rcnn_R50.yaml", "--output", "{}/a", "INPUT.FORMT", "RGB"], "INPUT.FORMT"),
        (["--config-file", "faster_rcnn_R50.yaml", "--output", "{}/file"], "file cannot be read or written"),
    ],
)
def test_bad_input_gives_a_sentence(main, tmp_path, capsys, words, said):
    (tmp_path / "file").write_text("")
    words = [word.replace("{}", str(tmp_path)) for word in words]
    assert main([*words, "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""
