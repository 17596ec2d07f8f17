"""The evaluator beside Detectron2's own: the same metrics, tables and files."""

import contextlib
import copy
import io
import json
import logging

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from resnet_backbone.detection.evaluation.coco import FastCOCOEvaluator

SIGMAS = (0.05, 0.2)
CATEGORIES = ((7, "cat"), (3, "dog"), (11, "never annotated"))
FILES = ("coco_instances_results.json", "instances_predictions.pth")


@pytest.fixture
def content():
    """COCO's form with boxes, masks and keypoints of 12 images."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for number in range(40):
        x, y, width, height = (torch.rand(4, generator=generator) * 40 + 5).round().tolist()
        outline = [x, y, x + width, y, x + width, y + height, x, y + height]
        items.append(
            {
                "id": number + 1,
                "image_id": number % 11 + 1,
                "category_id": CATEGORIES[number % 2][0],
                "bbox": [x, y, width, height],
                "area": width * height,
                "iscrowd": 0,
                "segmentation": [outline],
                "keypoints": [x, y, 2, x + width, y + height, number % 3],
                "num_keypoints": 2 - (number % 3 == 0),
            }
        )
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 96, "width": 100} for n in range(1, 13)],
        "categories": [{"id": key, "name": name} for key, name in CATEGORIES],
        "annotations": items,
    }


@pytest.fixture
def data_set(content, tmp_path):
    (tmp_path / "truth.json").write_text(json.dumps(content))
    MetadataCatalog.get("evaluated").set(
        json_file=str(tmp_path / "truth.json"),
        thing_classes=[name for _, name in CATEGORIES],
        thing_dataset_id_to_contiguous_id={key: number for number, (key, _) in enumerate(CATEGORIES)},
    )
    yield "evaluated"
    MetadataCatalog.remove("evaluated")
    assert "evaluated" not in DatasetCatalog


def detect(content, image: int, heads: tuple[str, ...]) -> dict[str, Instances]:
    """Return an image's annotations a little moved, some of them twice, with the heads' outputs."""
    generator = torch.Generator().manual_seed(image)
    items = [item for item in content["annotations"] if item["image_id"] == image] * 2
    found = Instances((96, 100))
    boxes = torch.tensor([item["bbox"] for item in items]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes += torch.randn(boxes.shape, generator=generator) * 2
    if "proposals" in heads:
        found.proposal_boxes, found.objectness_logits = Boxes(boxes), torch.rand(len(items), generator=generator)
        return {"proposals": found}
    found.pred_boxes, found.scores = Boxes(boxes), torch.rand(len(items), generator=generator)
    found.pred_classes = torch.randint(0, 3, (len(items),), generator=generator)
    if "masks" in heads:
        rows, columns = torch.arange(96)[:, None], torch.arange(100)
        x1, y1, x2, y2 = boxes.reshape(-1, 4).T[..., None, None]
        found.pred_masks = (rows >= y1) & (rows < y2) & (columns >= x1) & (columns < x2)
    if "keypoints" in heads:
        points = torch.tensor([item["keypoints"] for item in items]).reshape(-1, 2, 3)
        found.pred_keypoints = points + torch.rand(points.shape, generator=generator)
    return {"instances": found}


def run(evaluator: COCOEvaluator, content, heads) -> dict:
    evaluator.reset()
    for image in content["images"]:
        evaluator.process([{"image_id": image["id"]}], [detect(content, image["id"], heads)])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()


@pytest.mark.parametrize("heads", [(), ("masks",), ("keypoints",), ("masks", "keypoints"), ("proposals",)], ids=str)
def test_metrics_tables_and_files_are_detectron2s(data_set, content, tmp_path, caplog, heads):
    found = {}
    for name, kind, options in (("theirs", COCOEvaluator, {"use_fast_impl": False}), ("ours", FastCOCOEvaluator, {})):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            evaluator = kind(data_set, output_dir=str(tmp_path / name), kpt_oks_sigmas=SIGMAS, **options)
            results = run(evaluator, content, heads)
        tables = [record.message for record in caplog.records if "|" in record.message]
        found[name] = results, tables, evaluator
    assert list(found["ours"][0]) == list(found["theirs"][0])
    assert found["ours"][1] == found["theirs"][1]
    for task, metrics in found["theirs"][0].items():
        assert found["ours"][0][task] == pytest.approx(metrics, abs=1e-12, nan_ok=True)
        assert task == "box_proposals" or metrics["AP"] > 5
    files = FILES if "proposals" not in heads else ("box_proposals.pkl",)
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), file
    tasks = set(found["theirs"][0]) - {"box_proposals"}
    assert set(found["ours"][2].evaluations) == tasks


def test_average_recall_is_in_the_log(data_set, content, caplog):
    with caplog.at_level(logging.INFO):
        evaluator = FastCOCOEvaluator(data_set, output_dir=None, kpt_oks_sigmas=())
        run(evaluator, content, ())
    recall = evaluator.evaluations["bbox"].metrics["AR100"]
    assert f"AR100  {recall:.2f}" in caplog.text


def test_without_detections(data_set, content):
    evaluator = FastCOCOEvaluator(data_set, output_dir=None, kpt_oks_sigmas=())
    evaluator.reset()
    nothing = detect(content | {"annotations": []}, 1, ())
    evaluator.process([{"image_id": 1}], [nothing])
    results = evaluator.evaluate()
    assert list(results) == ["bbox"] and all(value != value for value in results["bbox"].values())
    assert not evaluator.evaluations


def test_detections_stay_as_they_are(data_set, content):
    """Detectron2's evaluator moves the keypoints of what it is given."""
    outputs = [detect(content, 1, ("masks", "keypoints"))]
    before = copy.deepcopy(outputs[0]["instances"].get_fields())
    evaluator = FastCOCOEvaluator(data_set, output_dir=None, kpt_oks_sigmas=SIGMAS)
    evaluator.reset()
    evaluator.process([{"image_id": 1}], outputs)
    evaluator.evaluate()
    after = outputs[0]["instances"].get_fields()
    for key, value in before.items():
        assert torch.equal(*(v.tensor if isinstance(v, Boxes) else v for v in (value, after[key])))
