"""The figure of detection data: it can be drawn of any data, and shows the classes and sizes that there are."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from resnet_backbone.detection.data import figure
from resnet_backbone.detection.data.check import check_entry


@pytest.fixture
def drawn(scenes, tmp_path, monkeypatch):
    """The function `(change(content), …)` that draws changed scenes, and gives the axes."""

    def draw(*changes):
        reports = []
        for number, change in enumerate(changes):
            content = json.loads(Path(scenes).read_text())
            change(content)
            file = tmp_path / f"{number}.json"
            file.write_text(json.dumps(content))
            entry = f"{file}:{Path(scenes).parent / 'images'}"
            reports.append(check_entry(entry, workers=0, limit=1, progress=None))
        kept = []
        monkeypatch.setattr(figure, "Figure", lambda **how: kept.append(Figure(**how)) or kept[-1])
        figure.draw(reports, tmp_path / "figure.png")
        assert Image.open(tmp_path / "figure.png").format == "PNG"
        monkeypatch.undo()
        return kept[0].axes

    return draw


def test_bars_are_the_objects_and_images_of_each_class(drawn, scenes):
    above, *_ = drawn(lambda content: None)
    content = json.loads(Path(scenes).read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    objects = dict.fromkeys(names.values(), 0)
    images = {name: set() for name in names.values()}
    for annotation in content["annotations"]:
        objects[names[annotation["category_id"]]] += 1
        images[names[annotation["category_id"]]].add(annotation["image_id"])
    order = [label.get_text() for label in above.get_xticklabels()]
    bars = [[bar.get_height() for bar in container] for container in above.containers]
    assert bars == [[objects[name] for name in order], [len(images[name]) for name in order]]
    assert bars[0] == sorted(bars[0], reverse=True)


def test_very_uneven_classes_have_a_logarithmic_axis(drawn):
    def uneven(content):
        first = content["annotations"][0]
        content["annotations"] += [{**first, "id": 10**6 + n} for n in range(500)]

    assert drawn(uneven)[0].get_yscale() == "log" and drawn(lambda content: None)[0].get_yscale() == "linear"


def test_shares_of_sizes_add_up_for_both_data_sets(drawn):
    def larger(content):
        for annotation in content["annotations"]:
            annotation["bbox"] = [0, 0, 96, 96]

    _, sizes, _ = drawn(lambda content: None, larger)
    totals = [sum(patch.get_height() for patch in container) for container in sizes.containers]
    assert np.allclose([total for total in totals if total], 100)
    assert any("0% small, 0% medium, 100% large" in text.get_text() for text in sizes.get_legend().get_texts())


def test_data_without_objects(drawn):
    drawn(lambda content: content["annotations"].clear())


def test_many_classes_stay_readable(drawn):
    def many(content):
        content["categories"] += [{"id": 1000 + n, "name": f"a longer name {n}"} for n in range(80)]

    above, *_ = drawn(many)
    above.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in above.get_xticklabels()]
    assert len(boxes) == 88 and all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes))
