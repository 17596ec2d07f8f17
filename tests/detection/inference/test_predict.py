"""Predictions on files, folders, patterns and videos, whole and damaged."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from resnet_backbone.detection import load_detector
from resnet_backbone.detection.inference import predict as module
from resnet_backbone.detection.inference.ids import ids_of
from resnet_backbone.detection.inference.predict import detect_on, predict
from resnet_backbone.detection.inference.sources import Source, find_sources
from resnet_backbone.errors import InputError

TOOL = Path(__file__).parents[3] / "tools" / "predict.py"


@pytest.fixture(scope="module")
def detector(detector_file):
    return load_detector(detector_file)


@pytest.fixture
def tool(load_script, detector_file):
    def run(*words) -> int:
        return load_script(TOOL).main([str(word) for word in ("--weights", detector_file, *words)])

    return run


def video(file: Path, pictures: list[Path], code: str = "MJPG", size: tuple[int, int] = (96, 64)) -> Path:
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*code), 5.0, size)
    for picture in pictures:
        writer.write(cv2.resize(cv2.imread(str(picture)), size))
    writer.release()
    return file


def read(output: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(output / "images.json").loadRes(str(output / "detections.json"))


def test_a_folder_gives_pictures_and_coco_results_equal_to_the_detectors(detector, pictures, tool, tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "deep er").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for target in ("b.jpg", "deep er/b.jpg", "deep er/ñ.JPG", ".hidden/c.jpg"):
        shutil.copy(pictures[0], folder / target)
    Image.open(pictures[1]).convert("RGBA").save(folder / "deep er" / "b.png")
    (folder / "notes.txt").write_text("no image")
    assert tool("--output", tmp_path / "out", folder) == 0
    assert "4 images; " in capsys.readouterr().out
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert written == {"detections.json", "images.json", "b.jpg", "deep er/b.jpg", "deep er/b.png", "deep er/ñ.JPG"}
    for path in ("b.jpg", "deep er/b.png"):
        assert Image.open(tmp_path / "out" / path).size == Image.open(folder / path).size

    results = read(tmp_path / "out")
    assert [c["name"] for c in results.loadCats(results.getCatIds())] == list(detector.class_names)
    for image in results.loadImgs(results.getImgIds()):
        expected = detector(image["file_name"])
        assert (image["height"], image["width"]) == expected.image_size
        found = results.loadAnns(results.getAnnIds(image["id"]))
        assert [each["category_id"] - 1 for each in found] == expected.pred_classes.tolist()
        np.testing.assert_allclose([each["score"] for each in found], expected.scores, atol=1e-5)
        corners = np.array([each["bbox"] for each in found]) @ np.array(
            [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]]
        )
        np.testing.assert_allclose(corners, expected.pred_boxes.tensor, atol=1e-3)


def test_objects_are_drawn_from_the_threshold_on(detector, pictures, tmp_path):
    scores = detector(pictures[0]).scores
    middle = float(scores[2] + scores[3]) / 2
    summary = detect_on(find_sources([str(pictures[0])]), detector, tmp_path, threshold=middle)
    assert (summary.images, summary.objects) == (1, 3)
    assert len(json.loads((tmp_path / "detections.json").read_text())) == len(scores)
    none = detect_on(find_sources([str(pictures[0])]), detector, tmp_path / "none", threshold=1.0)
    assert none.objects == 0
    difference = np.int16(Image.open(tmp_path / "none" / pictures[0].name)) - np.int16(Image.open(pictures[0]))
    assert np.abs(difference).mean() < 3  # JPEG again, and nothing drawn


def test_what_cannot_be_read_is_named_and_skipped(pictures, tool, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(pictures[0], folder / "good.jpg")
    (folder / "cut.jpg").write_bytes(pictures[0].read_bytes()[:-500])
    (folder / "text.png").write_text("no image")
    (folder / "empty.jpg").touch()
    (folder / "no_video.mp4").write_text("no video")
    assert tool("--output", tmp_path / "out", folder) == 0
    captured = capsys.readouterr()
    for name in ("cut.jpg", "text.png", "empty.jpg", "no_video.mp4"):
        assert f"in/{name} cannot be read" in captured.out
    assert "annotations" not in captured.out and "object at 0x" not in captured.out
    assert "1 images, 4 skipped" in captured.out
    (folder / "good.jpg").unlink()
    assert tool("--output", tmp_path / "none", folder) == 1
    assert json.loads((tmp_path / "none" / "detections.json").read_text()) == []


def test_videos_become_videos_frame_by_frame(detector, pictures, tmp_path):
    file = video(tmp_path / "a.avi", pictures[:5])
    shutil.copy(pictures[5], tmp_path / "z.jpg")
    sources = find_sources([str(file), str(tmp_path / "z.jpg")])
    summary = detect_on(sources, detector, tmp_path / "out", threshold=0.0)
    assert (summary.images, summary.exit_code) == (6, 0)
    drawn = cv2.VideoCapture(str(tmp_path / "out" / "a.mp4"))
    assert (drawn.get(cv2.CAP_PROP_FRAME_COUNT), drawn.get(cv2.CAP_PROP_FPS)) == (5, 5)
    images = read(tmp_path / "out").dataset["images"]
    assert [image.get("frame") for image in images] == [0, 1, 2, 3, 4, None]
    frame = cv2.VideoCapture(str(file)).read()[1]
    first = json.loads((tmp_path / "out" / "detections.json").read_text())[0]
    expected = detector(frame, channel_order="BGR")
    assert (first["image_id"], first["category_id"] - 1) == (1, expected.pred_classes[0])
    np.testing.assert_allclose(first["score"], expected.scores[0], atol=1e-5)


def test_a_video_that_ends_early_is_said_and_what_was_finished_stays(pictures, tool, tmp_path, capsys):
    whole = video(tmp_path / "whole.avi", pictures)
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert tool("--output", tmp_path / "out", cut, pictures[0]) == 2
    out = capsys.readouterr().out
    assert "cut.avi ends after " in out and f" of {len(pictures)} frames" in out
    frames = [image for image in read(tmp_path / "out").dataset["images"] if "frame" in image]
    assert 0 < len(frames) < len(pictures)
    assert cv2.VideoCapture(str(tmp_path / "out" / "cut.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == len(frames)
    assert (tmp_path / "out" / pictures[0].name).is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_interruption_what_was_finished_is_there(detector, pictures, tmp_path, monkeypatch, error):
    calls = []

    def detect(inputs):
        calls.append(inputs)
        if len(calls) > 2:
            raise error
        return type(detector).detect(detector, inputs)

    monkeypatch.setattr(detector, "detect", detect)
    with pytest.raises(error):
        detect_on(find_sources([str(pictures[0].parent)]), detector, tmp_path, threshold=0.5)
    done = len(calls[0]) + len(calls[1])
    assert 0 < done == len(read(tmp_path).dataset["images"]) < len(pictures)
    assert len(list(tmp_path.glob("*.jpg"))) == done
    assert not list(tmp_path.glob(".*"))


def test_results_with_the_ids_of_a_coco_file_can_be_evaluated_against_it(detector, scenes, tool, tmp_path, capsys):
    content = json.loads(Path(scenes).read_text())
    for image in content["images"]:
        image["id"] *= 100
    for category in content["categories"]:
        category["id"] *= 7
    for each in content["annotations"]:
        each["image_id"], each["category_id"] = each["image_id"] * 100, each["category_id"] * 7
    content["categories"].reverse()
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(content))
    images = Path(scenes).parent / "images"
    assert tool("--output", tmp_path / "out", images, "--ids", truth) == 0
    results = read(tmp_path / "out")
    assert sorted(results.imgs) == [image["id"] for image in content["images"]]
    for image in content["images"]:
        found = results.loadAnns(results.getAnnIds(image["id"]))
        expected = detector(images / image["file_name"]).pred_classes
        assert [each["category_id"] for each in found] == [7 * (number + 1) for number in expected.tolist()]

    capsys.readouterr()
    shutil.copy(next(images.iterdir()), tmp_path / "other.jpg")
    truth_without_a_class = tmp_path / "less.json"
    truth_without_a_class.write_text(json.dumps({**content, "categories": content["categories"][1:]}))
    (tmp_path / "list.json").write_text("[]")
    for words, message in (
        ((tmp_path / "other.jpg", "--ids", truth), "other.jpg is not among the 6 images of"),
        ((images, "--ids", truth_without_a_class), "has no category"),
        ((images, "--ids", tmp_path / "list.json"), "is not a COCO file"),
        ((images, "--ids", tmp_path / "none.json"), "cannot be read"),
    ):
        assert tool("--output", tmp_path / "no", *words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_an_image_gets_the_id_of_the_longest_name_that_its_path_ends_with(tmp_path):
    def content(*names: str) -> Path:
        images = [{"file_name": name, "id": number} for number, name in enumerate(names, 1)]
        file = tmp_path / "truth.json"
        file.write_text(json.dumps({"images": images, "categories": [{"id": 5, "name": "thing"}]}))
        return file

    files = [tmp_path / "a.jpg", tmp_path / "day2" / "a.jpg"]
    sources = [Source(file, Path(file.name)) for file in files]
    assert ids_of(content("a.jpg", "day2/a.jpg"), sources, ["thing"]) == (dict(zip(files, (1, 2), strict=True)), [5])
    with pytest.raises(InputError, match=r"would both be a\.jpg of .*truth\.json, with the same id"):
        ids_of(content("a.jpg"), sources, ["thing"])


def test_a_file_that_is_named_twice_is_there_once(pictures, tmp_path, monkeypatch):
    folder = pictures[0].parent
    monkeypatch.chdir(folder)
    sources = find_sources([str(folder), pictures[0].name, "*"])
    assert [source.file for source in sources] == [folder / picture.name for picture in pictures]


def test_patterns_and_files_of_one_name(pictures, tmp_path):
    for day in ("day1", "day2"):
        (tmp_path / day).mkdir()
        shutil.copy(pictures[0], tmp_path / day / "a.jpg")
        shutil.copy(pictures[0], tmp_path / day / "photograph")
    sources = find_sources([str(tmp_path / "day*" / "a.jpg"), str(tmp_path / "day1" / "photograph")])
    assert [str(source.picture) for source in sources] == ["a.jpg", "a_2.jpg", "photograph.png"]
    assert [source.file for source in sources] == [tmp_path / d / n for d, n in (
        ("day1", "a.jpg"), ("day2", "a.jpg"), ("day1", "photograph"))]  # fmt: skip


def test_inputs_are_refused_before_anything_is_loaded(tool, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "load_detector", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "empty").mkdir()
    shutil.copy(pictures[0], tmp_path / "a.jpg")
    for words, message in (
        ((tmp_path / "none.jpg",), "there is no "),
        ((tmp_path / "empty",), "has no images or videos in it"),
        ((tmp_path / "*.tiff",), "no file matches"),
        ((tmp_path / "a.jpg", "--output", tmp_path), "would be overwritten"),
        ((tmp_path, "--output", tmp_path / "found"), "lies in the input"),
        ((tmp_path / "a.jpg", "--output", tmp_path / "a.jpg"), "is a file, expected a folder"),
    ):
        assert tool("--output", tmp_path / "out", *words) == 2
        assert message in capsys.readouterr().err
    for bad in ("-0.1", "nan", "high"):
        with pytest.raises(SystemExit):
            tool("--output", tmp_path / "out", tmp_path / "a.jpg", "--threshold", bad)
        assert "--threshold" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_detector_that_cannot_be_loaded_is_said_before_anything_is_written(pictures, tmp_path, classifier):
    with pytest.raises(InputError, match="holds a classifier"):
        predict([str(pictures[0])], weights=classifier("resnet18"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
