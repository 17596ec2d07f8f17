"""tools/evaluate.py as a user calls it."""

import json
from pathlib import Path

import pycocotools.mask
import pytest

from tests.detection.evaluation.imitated import imitated_detections, imitated_truth

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"


@pytest.fixture(scope="module")
def main(load_script):
    return load_script(TOOL).main


@pytest.fixture
def truth():
    return imitated_truth(0, images=12, categories=3, crowds=True)


@pytest.fixture
def found(truth):
    return imitated_detections(truth, 1)


@pytest.fixture
def call(main, tmp_path):
    """The function `(detections, ground truth, flag, …)` that gives the exit code; text is written as it is."""

    def run(found, truth, *flags):
        for name, content in (("found", found), ("truth", truth)):
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{name}.json").write_text(text)
        return main([*(str(tmp_path / f"{n}.json") for n in ("found", "truth")), "--output", f"{tmp_path}/out", *flags])

    return run


def test_boxes(call, found, truth, tmp_path, capsys):
    assert call(found, truth) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("bbox: AP ") and f"report: {tmp_path}/out/report.md" in printed.out
    assert (tmp_path / "out" / "report.md").read_text().startswith("# found.json on truth.json\n")
    assert len(list((tmp_path / "out").glob("bbox_*.png"))) == 4


def with_keypoints(items):
    for item in items:
        x, y, width, height = item["bbox"]
        item["keypoints"] = [x, y, 2, x + width, y + height, 1]
    return items


def with_masks(items, *, encoded):
    for item in items:
        x, y, width, height = item["bbox"]
        outline = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        mask = pycocotools.mask.frPyObjects(outline, 200, 240)[0]
        item["segmentation"] = {"size": mask["size"], "counts": mask["counts"].decode()} if encoded else outline
    return items


def test_what_the_detections_have_is_evaluated(call, found, truth, tmp_path, capsys):
    with_keypoints(truth["annotations"])
    with_masks(truth["annotations"], encoded=False)
    assert call(with_masks(with_keypoints(found), encoded=True), truth, "--oks-sigmas", "0.1", "0.2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["bbox", "segm", "keypoints", "report"]
    for one in found:
        del one["bbox"], one["keypoints"]
    assert call(found, truth) == 0
    assert capsys.readouterr().out.startswith("segm: AP ")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Masks" in text and "## Boxes" not in text


def first(**changes):
    return lambda found, truth: found[0].update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            first(image_id=99),
            "detection number 1 of {n} has the image_id 99, which none of the 12 annotated images",
        ),
        (first(image_id=[1]), "has the image_id [1], which none"),
        (first(category_id=7), "has the category_id 7, which is none of the 3 categories of the ground truth"),
        (first(score=float("nan")), "has the score nan; expected a finite number"),
        (first(score="0.5"), "has the score '0.5'; expected a finite number"),
        (first(bbox=[1, 2, 3]), "has the box [1, 2, 3]; expected x, y, width and height in pixels"),
        (first(bbox=[1, 2, 3, -4]), "has the box [1, 2, 3, -4]; expected x, y, width"),
        (first(bbox=[1, 2, 3, float("inf")]), "has the box [1, 2, 3, inf]; expected x, y, width"),
        (lambda found, truth: found[2].pop("bbox"), "detection number 3 of {n} has the box None; expected"),
        (lambda found, truth: [one.pop("bbox") for one in found], "expected one of bbox, segmentation, keypoints"),
        (lambda found, truth: with_masks(found, encoded=False), "expected run lengths as pycocotools.mask.encode"),
        (lambda found, truth: with_masks(found, encoded=True)[1]["segmentation"].update(size=[3, 4]), "size [3, 4]"),
        (lambda found, truth: with_masks(found, encoded=True), "have no segmentation, and the detections in"),
        (lambda found, truth: with_keypoints(found)[0]["keypoints"].pop(), "expected x, y and a third number for each"),
        (
            lambda found, truth: (with_keypoints(found), with_keypoints(truth["annotations"])),
            "detections have 2 keypoints, annotations have 2, and there are 17 sigmas",
        ),
        (lambda found, truth: found.clear(), "holds no detections"),
        (lambda found, truth: found.append(3), "is a list with other things; expected a list of detections"),
        (lambda found, truth: truth.update(annotations=[]), "the ground truth {truth} has no annotations"),
        (lambda found, truth: truth.update(images=[], annotations=[]), "the ground truth {truth} has no images"),
        (lambda found, truth: truth.pop("categories"), "is not in COCO form: it has no categories"),
        (lambda found, truth: truth["annotations"][0].update(bbox=[1, 2, 3]), "[1, 2, 3]"),
    ],
)
def test_bad_input_is_one_sentence(call, found, truth, tmp_path, capsys, change, words):
    number = len(found)
    change(found, truth)
    assert call(found, truth) == 2
    printed = capsys.readouterr()
    assert words.format(n=number, truth=tmp_path / "truth.json") in printed.err
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and printed.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (lambda found, truth: (truth, found), "found.json is ground truth, and {folder}/truth.json is a list"),
        (lambda found, truth: (truth, truth), "found.json is a dict; expected a list of detections"),
        (lambda found, truth: (found, found), "is not in COCO form: it is a list"),
        (lambda found, truth: (json.dumps(found)[:-50], truth), "found.json is not a complete JSON file"),
        (lambda found, truth: (found, json.dumps(truth)[:-50]), "truth.json is not a complete JSON file"),
        (lambda found, truth: ("", truth), "found.json is not a complete JSON file"),
    ],
)
def test_wrong_files(call, found, truth, tmp_path, capsys, files, words):
    assert call(*files(found, truth)) == 2
    assert words.format(folder=tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_detections_that_cannot_be_used_are_counted(call, found, truth, capsys):
    for one in found[3:]:
        one["image_id"] = 99
    assert call(found, truth) == 2
    assert f"detection number 4 of {len(found)} has" in (text := capsys.readouterr().err)
    assert f"{len(found) - 4} more detections cannot be used, either." in text


def test_files_and_folders_that_are_not_there_or_in_the_way(call, main, found, truth, tmp_path, capsys):
    assert main([str(tmp_path / "no.json"), str(tmp_path / "no.json")]) == 2
    assert "there is no file" in capsys.readouterr().err
    (tmp_path / "out").write_text("")
    assert call(found, truth) == 2
    assert "cannot be read or written" in capsys.readouterr().err


@pytest.mark.parametrize("sigma", ["0", "nan", "-1"])
def test_sigmas_are_above_zero(call, found, truth, sigma):
    with pytest.raises(SystemExit, match="2"):
        call(found, truth, "--oks-sigmas", sigma)
