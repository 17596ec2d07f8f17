import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, LVISEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from torch import nn

from resnet_backbone.detection.data import datasets
from resnet_backbone.detection.evaluation import evaluate as module
from resnet_backbone.detection.evaluation.coco import FastCOCOEvaluator
from resnet_backbone.detection.evaluation.evaluate import evaluate, try_two_images
from resnet_backbone.detection.evaluation.registry import build_evaluator
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.errors import InputError


class Oracle(nn.Module):
    """A detector that knows the annotations, except for the classes that it is told to miss."""

    def __init__(self, entry: str, miss: tuple[int, ...] = ()):
        super().__init__()
        self.records = {record["image_id"]: record for record in DatasetCatalog.get(entry)}
        self.miss = miss
        self.seen = []

    def forward(self, inputs):
        return [{"instances": self.detect(i["image_id"], i["height"], i["width"])} for i in inputs]

    def detect(self, image_id, height, width) -> Instances:
        self.seen.append(image_id)
        found = [a for a in self.records[image_id]["annotations"] if a["category_id"] not in self.miss]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in found]
        result = Instances((height, width))
        result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        result.scores = torch.full((len(found),), 0.9)
        result.pred_classes = torch.tensor([a["category_id"] for a in found], dtype=torch.long)
        return result


@pytest.fixture
def cfg(detection_config, tmp_path, scenes):
    datasets.register(scenes)
    return detection_config("faster_rcnn_R50.yaml", tmp_path)


def test_a_perfect_detector_has_100_ap(cfg, scenes, tmp_path):
    model = Oracle(scenes)
    results = evaluate(cfg, model, tmp_path)
    assert results["bbox"]["AP"] == results["bbox"]["AP50"] == pytest.approx(100)
    assert sorted(model.seen) == sorted(model.records)
    assert (tmp_path / "inference" / "annotations" / "coco_instances_results.json").is_file()
    assert all(type(value) is float for value in results["bbox"].values())


def test_a_report_is_written_where_it_is_asked_for(cfg, scenes, tmp_path):
    evaluate(cfg, Oracle(scenes), tmp_path)
    assert not (tmp_path / "evaluation").exists()
    results = evaluate(cfg, Oracle(scenes, miss=(0, 1)), tmp_path, report=True)
    text = (tmp_path / "evaluation" / "report.md").read_text()
    assert text.startswith(f"# Detections on {scenes}\n") and f"AP is {results['bbox']['AP']:.1f}" in text
    assert "Most is lost to objects that are overlooked" in text
    assert (tmp_path / "evaluation" / "bbox_errors.png").is_file()


def test_a_report_that_fails_costs_no_metrics_and_a_full_disk_ends_the_run(cfg, scenes, tmp_path, monkeypatch, caplog):
    def fail(error):
        def write(*_):
            raise error

        monkeypatch.setattr(module, "write_report", write)
        return evaluate(cfg, Oracle(scenes), tmp_path, report=True)

    assert fail(ZeroDivisionError("nothing to divide by"))["bbox"]["AP"] == pytest.approx(100)
    assert "the report failed; the metrics are complete" in caplog.text and "nothing to divide by" in caplog.text
    with pytest.raises(OSError, match="full"):
        fail(OSError(28, "full"))


def test_with_workers_it_is_the_same(cfg, scenes, tmp_path):
    model = Oracle(scenes)
    cfg.DATALOADER.NUM_WORKERS = 2
    assert evaluate(cfg, model, tmp_path)["bbox"]["AP"] == pytest.approx(100)
    assert model.seen == [record["image_id"] for record in DatasetCatalog.get(scenes)]


def test_a_compiled_detector_runs_uncompiled(cfg, scenes, tmp_path):
    """Compiled for training, it would be compiled anew for each image's shape."""
    model, compiled = Oracle(scenes), []
    model.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward)
    evaluate(cfg, model, tmp_path)
    assert model.seen and compiled == []
    model([{"image_id": model.seen[0], "height": 9, "width": 9}])
    assert compiled


def test_a_missed_class_costs_its_share(cfg, scenes, tmp_path):
    present = {a["category_id"] for r in DatasetCatalog.get(scenes) for a in r["annotations"]}
    missed = min(present)
    results = evaluate(cfg, Oracle(scenes, miss=(missed,)), tmp_path)
    assert results["bbox"]["AP"] == pytest.approx(100 * (len(present) - 1) / len(present))


def test_several_data_sets_keep_their_metrics_and_detections_apart(cfg, scenes, tmp_path):
    again = f"{scenes}:{Path(scenes).parent / 'images'}"  # the same file under a second name
    datasets.register(again)
    cfg.DATASETS.TEST = (scenes, again)
    results = evaluate(cfg, Oracle(scenes), tmp_path)
    assert set(results) == {scenes, again} and results[again]["bbox"]["AP50"] == pytest.approx(100)
    assert sorted(p.name for p in (tmp_path / "inference").iterdir()) == ["annotations", "annotations_2"]


def test_two_images_are_tried_without_a_word_or_a_file(cfg, scenes, tmp_path, capsys):
    model = Oracle(scenes)
    try_two_images(cfg, model)
    assert model.seen == sorted(model.records)[:2]
    assert capsys.readouterr().out == "" and not list(tmp_path.rglob("*.json"))


def test_two_images_find_what_would_fail_later(cfg, scenes):
    class Broken(Oracle):
        def detect(self, image_id, height, width):
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        try_two_images(cfg, Broken(scenes))


@pytest.fixture
def voc(tmp_path) -> str:
    """A registered data set in Pascal VOC's layout: 2 images with one object each."""
    from detectron2.data.datasets import register_pascal_voc

    root = tmp_path / "VOC"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets" / "Main" / "val.txt").write_text("000\n001\n")
    for number in range(2):
        Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(root / "JPEGImages" / f"{number:03d}.jpg")
        (root / "Annotations" / f"{number:03d}.xml").write_text(
            "<annotation><size><width>60</width><height>50</height></size><object><name>cat</name><pose>x</pose>"
            "<truncated>0</truncated><difficult>0</difficult>"
            "<bndbox><xmin>10</xmin><ymin>10</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object></annotation>"
        )
    register_pascal_voc("tiny_voc", str(root), "val", 2012, ("cat",))
    MetadataCatalog.get("tiny_voc").evaluator_type = "pascal_voc"
    yield "tiny_voc"
    DatasetCatalog.remove("tiny_voc")
    MetadataCatalog.remove("tiny_voc")


def test_pascal_voc_is_evaluated_by_its_own_rules_and_gives_plain_numbers(cfg, voc, tmp_path):
    assert isinstance(build_evaluator(cfg, voc, None), PascalVOCDetectionEvaluator)
    cfg.DATASETS.TEST = (voc,)
    results = evaluate(cfg, Oracle(voc), tmp_path)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert all(type(value) is float for value in results["bbox"].values())


def test_a_users_own_data_set_without_a_json_file_is_tried_and_evaluated(cfg, scenes, tmp_path):
    records = DatasetCatalog.get(scenes)
    DatasetCatalog.register("own_scenes", lambda: records)
    MetadataCatalog.get("own_scenes").set(thing_classes=MetadataCatalog.get(scenes).thing_classes)
    try:
        cfg.DATASETS.TEST = ("own_scenes",)
        try_two_images(cfg, Oracle("own_scenes"))
        assert evaluate(cfg, Oracle("own_scenes"), tmp_path)["bbox"]["AP"] == pytest.approx(100)
        assert json.loads(Path(MetadataCatalog.get("own_scenes").json_file).read_text())["images"]
    finally:
        DatasetCatalog.remove("own_scenes")
        MetadataCatalog.remove("own_scenes")


def test_the_evaluator_follows_the_type(cfg, scenes, monkeypatch):
    assert isinstance(build_evaluator(cfg, scenes, None), COCOEvaluator)
    made = []
    monkeypatch.setattr(LVISEvaluator, "__init__", lambda self, *args, **kwargs: made.append(args))
    build_evaluator(cfg, "lvis_v1_val", None)
    assert made == [("lvis_v1_val",)]
    with pytest.raises(
        ConfigError, match=r"'cityscapes_sem_seg', .*coco, coco_panoptic_seg, sem_seg, pascal_voc, lvis"
    ):
        build_evaluator(cfg, "cityscapes_fine_sem_seg_val", None)


class Painter(nn.Module):
    """A model that sees every pixel as the tiny panoptic images have it, but for the ball, where it paints `ball`.

    Args:
        ball: the ball's semantic class: 0 for a thing, 1 for sky, 2 for sea.
    """

    def __init__(self, ball: int = 0):
        super().__init__()
        self.ball = ball

    def forward(self, inputs):
        return [self.paint(image) for image in inputs]

    def paint(self, image):
        seen = torch.full((64, 80), 1)
        seen[40:] = 2
        seen[10:30, 20:50] = self.ball
        output = {"sem_seg": nn.functional.one_hot(seen, 3).permute(2, 0, 1), "instances": Instances((64, 80))}
        found = self.ball == 0
        output["instances"].pred_boxes = Boxes(torch.tensor([[20.0, 10, 50, 30]] * found).reshape(-1, 4))
        output["instances"].scores = torch.ones(int(found))
        output["instances"].pred_classes = torch.zeros(int(found), dtype=torch.long)
        segments = [{"id": n + 1, "isthing": n == 0, "category_id": n} for n in (0, 1, 2) if n or found]
        return {**output, "panoptic_seg": (seen + 1, segments)}


def test_semantic_segmentation_is_scored(cfg, panoptic, tmp_path):
    cfg.DATASETS.TEST = ("tiny_stuffonly",)
    perfect = evaluate(cfg, Painter(), tmp_path)
    assert perfect["sem_seg"]["mIoU"] == perfect["sem_seg"]["pACC"] == 100
    # The ball covers 600 pixels, 2,600 of sky and 1,920 of sea remain.
    found = evaluate(cfg, Painter(ball=1), tmp_path)["sem_seg"]
    assert found["mIoU"] == pytest.approx(100 * (0 + 2600 / 3200 + 1) / 3)
    assert found["pACC"] == pytest.approx(100 * (2600 + 1920) / 5120)
    assert found["IoU-things"] == 0 and type(found["IoU-sky"]) is float
    try_two_images(cfg, Painter())


def test_panoptic_quality_is_scored_beside_boxes_and_labels(cfg, panoptic, tmp_path):
    pytest.importorskip("panopticapi")
    cfg.DATASETS.TEST = (panoptic,)
    perfect = evaluate(cfg, Painter(), tmp_path)
    assert set(perfect) == {"sem_seg", "bbox", "panoptic_seg"}
    assert perfect["panoptic_seg"]["PQ"] == perfect["bbox"]["AP50"] == perfect["sem_seg"]["mIoU"] == pytest.approx(100)
    # Painted sea, the ball is missed; as stuff, the sky has an IoU of 1 and the sea of 1920 / 2520.
    found = evaluate(cfg, Painter(ball=2), tmp_path)["panoptic_seg"]
    assert found["PQ_th"] == 0 and found["PQ_st"] == pytest.approx(100 * (1 + 1920 / 2520) / 2)
    assert found["PQ"] == pytest.approx(2 / 3 * found["PQ_st"])
    assert (tmp_path / "inference" / panoptic / "predictions.json").is_file()
    try_two_images(cfg, Painter())  # of three, which panoptic quality alone would refuse


def test_without_a_test_set_there_are_no_metrics(cfg, scenes, tmp_path):
    cfg.DATASETS.TEST = ()
    assert evaluate(cfg, Oracle(scenes), tmp_path) == {} and not (tmp_path / "inference").exists()
    try_two_images(cfg, Oracle(scenes))


class Untrained(nn.Module):
    """A detector that finds nothing, with masks, keypoints or proposals if it has such heads."""

    def __init__(self, *, masks=False, keypoints=0, proposals=False):
        super().__init__()
        self.masks, self.keypoints, self.proposals = masks, keypoints, proposals

    def forward(self, inputs):
        return [self.detect(i["height"], i["width"]) for i in inputs]

    def detect(self, height, width):
        found = Instances((height, width))
        if self.proposals:
            found.proposal_boxes, found.objectness_logits = Boxes(torch.zeros(0, 4)), torch.zeros(0)
            return {"proposals": found}
        found.pred_boxes, found.scores = Boxes(torch.zeros(0, 4)), torch.zeros(0)
        found.pred_classes = torch.zeros(0, dtype=torch.long)
        if self.masks:
            found.pred_masks = torch.zeros(0, height, width, dtype=torch.bool)
        if self.keypoints:
            found.pred_keypoints = torch.zeros(0, self.keypoints, 3)
        return {"instances": found}


@pytest.fixture
def changed(scenes, tmp_path):
    """The function `(change)` that writes the scenes' COCO file after a change in place; it returns the entry."""

    def write(change, name="changed"):
        content = json.loads(Path(scenes).read_text())
        change(content)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        entry = f"{tmp_path / f'{name}.json'}:{Path(scenes).parent / 'images'}"
        datasets.register(entry)
        return entry

    return write


def with_masks_and_keypoints(content):
    content["categories"][0] |= {"keypoints": ["head", "tail"], "skeleton": []}
    for item in content["annotations"]:
        left, top, width, height = item["bbox"]
        right, bottom = left + width, top + height
        item["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
        item |= {"keypoints": [left, top, 2, right, bottom, 2], "num_keypoints": 2}


HEADS = [{}, {"masks": True}, {"keypoints": 2}, {"proposals": True}]


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_an_untrained_detectors_evaluation_is_tried_and_leaves_nothing(cfg, changed, tmp_path, heads, monkeypatch):
    cfg.DATASETS.TEST = (changed(with_masks_and_keypoints),)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.1]
    results, theirs = [], FastCOCOEvaluator.evaluate
    monkeypatch.setattr(FastCOCOEvaluator, "evaluate", lambda self: results.append(theirs(self)) or results[-1])
    before = sorted(tmp_path.rglob("*"))
    try_two_images(cfg, Untrained(**heads))
    tasks = {"box_proposals"} if "proposals" in heads else {"bbox"}
    tasks |= {"segm"} if "masks" in heads else {"keypoints"} if "keypoints" in heads else set()
    assert set(results[0]) == tasks
    assert all(np.isfinite(metrics.get("AP", metrics.get("AR@100"))) for metrics in results[0].values())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("heads", "key", "words"),
    [
        ({}, "area", "KeyError: 'area'"),
        ({}, "iscrowd", "KeyError: 'iscrowd'"),
        ({"masks": True}, "segmentation", "KeyError: 'segmentation'"),
        ({"keypoints": 2}, "num_keypoints", "KeyError: 'num_keypoints'"),
        ({"proposals": True}, "area", "KeyError: 'area'"),
    ],
    ids=str,
)
def test_an_evaluation_that_would_fail_after_training_fails_before(cfg, changed, monkeypatch, heads, key, words):
    """Here, on ground truth that nothing has completed."""
    monkeypatch.setattr("resnet_backbone.detection.evaluation.coco.complete", lambda truth: None)

    def change(content):
        with_masks_and_keypoints(content)
        for item in content["annotations"]:
            del item[key]

    entry = changed(change)
    cfg.DATASETS.TEST, cfg.TEST.KEYPOINT_OKS_SIGMAS = (entry,), [0.1, 0.1]
    with pytest.raises(ConfigError, match="fails on a detection made up to try it") as error:
        try_two_images(cfg, Untrained(**heads))
    assert words in str(error.value) and entry in str(error.value) and "\n" not in str(error.value)


def test_wrong_sigmas_are_found_before_training(cfg, changed):
    cfg.DATASETS.TEST, cfg.TEST.KEYPOINT_OKS_SIGMAS = (changed(with_masks_and_keypoints),), [0.1] * 3
    words = "detections have 2 keypoints, annotations have 2, and there are 3 sigmas .*KEYPOINT_OKS_SIGMAS"
    with pytest.raises(InputError, match=words):
        try_two_images(cfg, Untrained(keypoints=2))


def test_the_voc_evaluator_is_tried_on_annotations_that_only_it_reads(cfg, voc):
    cfg.DATASETS.TEST = (voc,)
    root = Path(MetadataCatalog.get(voc).dirname)
    (root / "Annotations" / "001.xml").write_text("<annotation><object><name>cat</name></object></annotation>")
    records = [{"file_name": str(root / "JPEGImages" / "000.jpg"), "image_id": "000", "height": 50, "width": 60}]
    DatasetCatalog.remove(voc)
    DatasetCatalog.register(voc, lambda: records)
    with pytest.raises(ConfigError, match=f"the evaluation on {voc} fails on a detection made up .*AttributeError"):
        try_two_images(cfg, Untrained())


def test_what_coco_needs_is_derived(cfg, changed, tmp_path):
    """The numbers are those of the complete file; without `area`, the evaluation by size is the mask's."""

    def incomplete(content):
        with_masks_and_keypoints(content)
        for number, item in enumerate(content["annotations"]):
            del item["area"], item["num_keypoints"], item["iscrowd"]
            item["segmentation"].append([1, 1, 2, 2])  # dropped on reading
            item["id"] = number  # pycocotools takes a match with number 0 for none

    def complete(content):
        with_masks_and_keypoints(content)
        for item in content["annotations"]:
            item |= {"area": item["bbox"][2] * item["bbox"][3], "iscrowd": 0}

    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.1]
    found = []
    for change, name in ((incomplete, "incomplete"), (complete, "complete")):
        entry = changed(change, name)
        cfg.DATASETS.TEST = (entry,)
        datasets.check(cfg, entry)
        found.append(evaluate(cfg, Oracle(entry), tmp_path)["bbox"])
    assert found[0] == pytest.approx(found[1], nan_ok=True) and found[0]["AP"] == pytest.approx(100)


def test_boxes_beyond_the_image_stay_as_they_are_for_the_evaluation(cfg, changed, tmp_path):
    """So that a file's numbers are pycocotools' own."""

    def change(content):
        for item in content["annotations"]:
            item["bbox"][0] = -2
        content["annotations"][0]["bbox"][0] = -1.5

    entry = changed(change)
    cfg.DATASETS.TEST = (entry,)
    evaluator = build_evaluator(cfg, entry, None)
    assert all(item["bbox"][0] in (-2, -1.5) for item in evaluator._coco_api.anns.values())
