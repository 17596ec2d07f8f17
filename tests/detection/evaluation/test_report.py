import re

import numpy as np
import pytest
from PIL import Image

from resnet_backbone.detection.evaluation.advice import advise
from resnet_backbone.detection.evaluation.average_precision import evaluate
from resnet_backbone.detection.evaluation.curves import by_size, find_curves
from resnet_backbone.detection.evaluation.report import analyze, write_report
from tests.detection.evaluation.imitated import imitated_detections, imitated_truth, index


@pytest.fixture(scope="module")
def content():
    return imitated_truth(20, images=60, categories=5, crowds=True)


@pytest.fixture(scope="module")
def results(content):
    return imitated_detections(content, 21)


def report_on(content, results, folder, *, task="bbox", **options) -> str:
    text = write_report({task: evaluate(index(content), results, task, **options)}, folder, "found").read_text()
    figures = set(re.findall(r"\]\((.+?\.png)\)", text))
    assert figures == {file.name for file in folder.glob("*.png")}
    for figure in figures:
        shape = np.array(Image.open(folder / figure).convert("L"))
        assert min(shape.shape) > 200 and shape.min() < 50 < 250 < shape.max()
    return text


def rows(text: str, title: str) -> list[list[str]]:
    """Return the cells of the first table below a title, without its header."""
    section = text[text.index(title) :]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_its_numbers(content, results, tmp_path):
    evaluation = evaluate(index(content), results, "bbox")
    text = report_on(content, results, tmp_path / "new" / "folder")
    objects = [item for item in content["annotations"] if not item["iscrowd"]]
    assert f"60 images with {len(objects)} objects of 5 categories; {len(results):,} detections." in text
    assert rows(text, "## Boxes")[0] == [
        f"{evaluation.metrics[name]:.1f}" for name in ("AP", "AP50", "AP75", "AR1", "AR10", "AR100")
    ]
    table = rows(text, "### By category")
    precision = evaluation.counted.eval["precision"][:, :, :, 0, -1]
    assert [float(row[1]) for row in table] == sorted(float(row[1]) for row in table)
    for name, ap, ap50, number, found in table:
        k = int(name.removeprefix("category ")) - 1
        assert float(ap) == pytest.approx(100 * precision[:, :, k].mean(), abs=0.051)
        assert float(ap50) == pytest.approx(100 * precision[0, :, k].mean(), abs=0.051)
        assert int(number) == sum(item["category_id"] == k + 1 for item in objects)
        assert int(found) == sum(one["category_id"] == k + 1 for one in results)
    for name, ap, ar, number in rows(text, "### By size"):
        low, high = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}[name]
        assert int(number) == sum(low <= item["area"] <= high for item in objects)
        assert [ap, ar] == [f"{evaluation.metrics[key + name[0]]:.1f}" for key in ("AP", "AR")]
    assert len(rows(text, "### Where the AP is lost")) == 6
    assert (tmp_path / "new" / "folder" / "bbox_confusion.png").is_file()


def test_curves_have_the_ap_as_their_mean(content, results):
    evaluation = evaluate(index(content), results, "bbox")
    curves = find_curves(evaluation)
    assert curves.ap.mean() == pytest.approx(evaluation.metrics["AP"])
    assert 100 * curves.at_50.mean() == pytest.approx(evaluation.metrics["AP50"])
    assert 100 * curves.at_75.mean() == pytest.approx(evaluation.metrics["AP75"])
    assert (np.diff(curves.at_50, axis=1) <= 0).all()


def test_categories_without_objects_are_last_and_have_no_ap(content, results, tmp_path):
    more = content | {"categories": [{"id": 9, "name": "a|b\nc"}, *content["categories"]]}
    one = {"image_id": 1, "category_id": 9, "bbox": [1, 1, 9, 9], "score": 0.3}
    text = report_on(more, [*results, one], tmp_path)
    assert re.fullmatch(r"\| a\\\|b c +\| +– \| +– \| +0 \| +1 \|", text.splitlines()[-1])


def test_many_categories_with_long_names(tmp_path):
    content = imitated_truth(30, images=150, categories=70, crowds=False)
    for category in content["categories"]:
        category["name"] += " $x^ of a very long name that does not end"
    text = report_on(content, imitated_detections(content, 31), tmp_path)
    assert "The 30 categories that are confused most with others." in text
    assert "The 6 categories with the lowest AP, and the 6 with the highest:" in text
    sizes = [Image.open(tmp_path / f"bbox_{name}.png").size for name in ("confusion", "categories")]
    assert max(max(size) for size in sizes) < 2000


def with_keypoints(items):
    for item in items:
        x, y, width, height = item["bbox"]
        item |= {"keypoints": [x, y, 2, x + width, y + height, 1], "num_keypoints": 2}
    return items


def test_of_keypoints(content, tmp_path):
    one = {"annotations": with_keypoints([dict(item) for item in content["annotations"] if item["category_id"] == 1])}
    one = content | one | {"categories": content["categories"][:1]}
    results = with_keypoints(imitated_detections(one, 22))
    text = report_on(one, results, tmp_path, task="keypoints", sigmas=(0.1, 0.2))
    assert "where an OKS of 0.5 is enough" in text and "TIDE" not in text and "confus" not in text
    assert "small" not in text and [file.name for file in tmp_path.glob("*.png")] == ["keypoints_curves.png"]


@pytest.mark.parametrize("what", ["no object", "crowds alone", "one detection", "nothing right", "one category"])
def test_of_little(content, results, tmp_path, what):
    if what == "no object":
        content = content | {"annotations": []}
    elif what == "crowds alone":
        content = content | {"annotations": [item | {"iscrowd": 1} for item in content["annotations"]]}
    elif what == "one detection":
        results = results[:1]
    elif what == "nothing right":
        results = [one | {"bbox": [0, 0, 1, 1]} for one in results]
    else:
        content = content | {"categories": content["categories"][:1]}
        content["annotations"] = [item for item in content["annotations"] if item["category_id"] == 1]
        results = [one for one in results if one["category_id"] == 1]
    text = report_on(content, results, tmp_path)
    said = {"no object": "no object to find", "crowds alone": "no object to find"}
    said |= {"one detection": "Almost nothing is right", "nothing right": "Almost nothing is right"}
    assert said.get(what, "Most is lost to") in text and "nan" not in text


def test_it_names_the_largest_loss(content):
    """Here what was done to annotations that are perfect detections otherwise."""
    perfect = [
        {"image_id": item["image_id"], "category_id": item["category_id"], "bbox": item["bbox"], "score": 0.9}
        for item in content["annotations"]
        if not item["iscrowd"]
    ]
    rng = np.random.default_rng(0)
    some = rng.random(len(perfect)) < 0.5
    changes = {
        "the wrong category": lambda one: [one | {"category_id": one["category_id"] % 5 + 1}],
        "overlap their object too little": lambda one: [one | {"bbox": [*one["bbox"][:3], one["bbox"][3] * 0.4]}],
        "overlooked": lambda one: [],
        "more than once": lambda one: [one] * 4,
        "where nothing is annotated": lambda one: [one, *[one | {"bbox": [230, 190, 9, 9], "score": 1.0}] * 3],
    }
    for words, change in changes.items():
        results = [new for one, it in zip(perfect, some) for new in (change(one) if it else [one])]
        text = write_words(content, results)
        assert re.search(f"Most is lost to [^:]*{words}", text), (words, text)
    assert "No type of error costs more than 1 point" in write_words(content, perfect)


def write_words(content, results) -> str:
    analysis = analyze(evaluate(index(content), results, "bbox"))
    sizes = {name: count for name, _, _, count in by_size(analysis.evaluation)}
    return advise(analysis.evaluation.metrics, sizes, analysis.errors, measure="IoU")
