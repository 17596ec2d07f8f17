"""tools/check_dataset.py as a user calls it."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_dataset.py"


@pytest.fixture(scope="module")
def main(load_script):
    return load_script(TOOL).main


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a/0.png", "a/1.png", "b/2.png"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), rng.integers(0, 256, (12, 10, 3), np.uint8))
    return tmp_path / "set"


def test_clean(main, folder, shapes, capsys):
    assert main([str(folder), "--workers", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{folder}\n  3 images, 2 classes with 1 (b) to 2 (a)\n") and captured.err == ""
    assert main([shapes, "--workers", "2"]) == 0
    assert "64 images" in capsys.readouterr().out


def test_what_would_stop_a_run(main, folder, tmp_path, capsys):
    (folder / "b" / "3.png").write_bytes(b"")
    file = tmp_path / "found.json"
    assert main([str(folder), str(folder), "--workers", "0", "--json", str(file)]) == 1
    assert "b/3.png is empty (0 bytes); replace or remove it" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert len(found["data_sets"]) == 2 and len(found["in_both"]) == 3
    one = found["data_sets"][0]
    assert (one["images"], one["would_stop_a_run"], one["classes"]) == (4, 1, [["a", 2], ["b", 2]])
    assert one["findings"]["empty"] == [str(folder / "b" / "3.png")]
    assert found["in_both"][0] == [str(folder / "a" / "0.png")] * 2


def test_no_data_set(main, tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_a_file_that_could_not_be_written_is_found_at_the_start(main, folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(folder), "--json", str(tmp_path / "nothing" / "found.json")])
    assert "nothing does not exist" in capsys.readouterr().err


def test_a_folder_is_no_file_to_write(main, folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(folder), "--json", str(tmp_path)])
    assert f"argument --json: {tmp_path} is a folder; name a file in it" in capsys.readouterr().err


def test_a_loop_of_links(main, folder, tmp_path, capsys):
    """Two in the data and one that is the data set: a sentence that names it."""
    for link, target in ((folder / "b" / "up", folder), (folder / "a" / "loop", folder / "a" / "loop")):
        link.symlink_to(target)
        assert main([str(folder), "--workers", "0"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {link}") and "Too many levels of symbolic links" in error
        assert error.count("\n") == 1
        link.unlink()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert main([str(tmp_path / "loop")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_some_of_it(main, folder, capsys):
    assert main([str(folder), "--limit", "2", "--workers", "0"]) == 0
    assert "2 of them were looked at" in capsys.readouterr().out


def test_detection_data(main, scenes, tmp_path, capsys):
    file, figure = tmp_path / "found.json", tmp_path / "figure.png"
    assert main([scenes, scenes, "--workers", "0", "--json", str(file), "--figure", str(figure)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{scenes}\n  6 images, ") and captured.err == ""
    found = json.loads(file.read_text())
    assert len(found["data_sets"]) == 2 and len(found["in_both"]) == 6 and found["classes_agree"]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_faulty_detection_data(main, scenes, tmp_path, capsys):
    content = json.loads(Path(scenes).read_text())
    content["annotations"][0]["bbox"][2] = -1
    content["images"].append({"id": 999, "file_name": "\ud800.png", "width": 5, "height": 5})  # no text in UTF-8
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "images").symlink_to(Path(scenes).parent / "images")
    assert main([str(tmp_path / "a.json"), "--workers", "0", "--json", str(tmp_path / "found.json")]) == 1
    assert "1  boxes of negative size" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["data_sets"][0]["would_stop_a_run"] == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not a complete JSON file"),
        ("[]", "is not in COCO form"),
        ("[" * 10**5, "is not a complete JSON file"),
        ('{"images": [], "annotations": [], "categories": []}', "has no images"),
    ],
)
def test_detection_data_that_cannot_be_opened(main, tmp_path, capsys, text, words):
    (tmp_path / "images").mkdir()
    (tmp_path / "a.json").write_text(text)
    assert main([str(tmp_path / "a.json")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_figure_is_of_detection_data_and_two_kinds_do_not_go_together(main, folder, scenes, tmp_path, capsys):
    assert main([str(folder), "--figure", str(tmp_path / "a.png")]) == 2
    assert "--figure draws objects" in capsys.readouterr().err
    assert main([str(folder), scenes]) == 2
    assert "one has images to classify" in capsys.readouterr().err
