"""Both detectors of a pair compute the same, on the same work, and only their seconds are compared."""

import contextlib
import io
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2 import model_zoo
from detectron2.modeling import FastRCNNOutputLayers
from detectron2.modeling.backbone import ResNet as Detectron2ResNet
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.utils.events import EventStorage
from torch.nn.modules.module import register_module_forward_pre_hook

from benchmarks import detect
from benchmarks.detect import FP16, OURS, OURS_FLOAT32, STOCK, TUNED, compare_detectors
from benchmarks.detectors import DetectionWork, Pair, build_pair, difference_of_losses, make_inputs
from benchmarks.pretrain import Conduct
from resnet_backbone.detection import NetworkBackbone, VGGBoxHead
from resnet_backbone.errors import InputError, Interrupted
from resnet_backbone.weights.names import map_keys

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
SIDES = [OURS, OURS_FLOAT32, STOCK, TUNED]
# What --tiny takes.
ROIS, PROPOSALS, ROUNDS, WARM_UP = 4, 10, 2, 1
TURNS = WARM_UP + ROUNDS


def tiny(**changes) -> DetectionWork:
    arguments = {"batch": 1, "size": (64, 96), "rois": ROIS, "proposals": PROPOSALS, "iterations": 1}
    return DetectionWork(**arguments | changes)


def conduct(**changes) -> Conduct:
    return Conduct(**{"device": "cpu", "rounds": 1, "warm_up": 1} | changes)


def pair_of(name: str, **changes) -> Pair:
    return build_pair(name, tiny(**changes), configs=CONFIGS, device="cpu")


def our_name(theirs: str) -> str:
    """Our detector's name for a tensor of stock's: that of the converter for Detectron2's files, put in its place."""
    mapped = map_keys("detectron2", [theirs]).mapped.get(theirs)
    if mapped is None:
        return theirs
    if mapped.startswith("layer4.") and theirs.startswith("roi_heads."):
        return mapped.replace("layer4.", "roi_heads.res5.")
    return ("backbone.bottom_up" if theirs.startswith("backbone.bottom_up") else "backbone") + f".network.{mapped}"


def assert_same_weights(pair: Pair, name=our_name) -> None:
    ours, stock = pair.ours.state_dict(), pair.stock.state_dict()
    assert {name(theirs) for theirs in stock} == set(ours) and len(stock) == len(ours)
    for theirs, tensor in stock.items():
        assert torch.equal(tensor, ours[name(theirs)]), theirs


@pytest.mark.parametrize(
    ("name", "stride_in_1x1", "tensors"),
    # ResNet-50: 53 convolutions with a norm of four tensors each. RPN 6, predictor 4; FPN 16, two layers of the head 4.
    [("R50-C4", True, 53 * 5 + 10), ("R50-C4", False, 53 * 5 + 10), ("R50-FPN", True, 53 * 5 + 10 + 16 + 4)],
)
def test_both_have_the_same_weights_and_losses(name, stride_in_1x1, tensors):
    pair = pair_of(name, stride_in_1x1=stride_in_1x1)
    assert len(pair.stock.state_dict()) == tensors
    assert_same_weights(pair)
    assert difference_of_losses(pair, ROIS) < 1e-5
    pair.ours.proposal_generator.fixed_size = pair.ours.roi_heads.fixed_size = True  # as on a GPU
    assert difference_of_losses(pair, ROIS) < 1e-5
    assert pair.ours.proposal_generator.fixed_size
    with torch.no_grad():
        pair.stock.proposal_generator.rpn_head.conv.weight.mul_(1.01)
    assert difference_of_losses(pair, ROIS) > 1e-5


def test_a_vgg_as_a_user_would_build_it():
    pair = pair_of("VGG16")
    assert isinstance(pair.ours.roi_heads.box_head, VGGBoxHead)
    assert isinstance(pair.stock.roi_heads.box_head, FastRCNNConvFCHead)
    renamed = {"features": "network.features", "fc1": "fc6", "fc2": "fc7"}
    assert_same_weights(pair, lambda name: ".".join(renamed.get(part, part) for part in name.split(".")))
    assert difference_of_losses(pair, ROIS) < 1e-5
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (pair.ours, pair.stock)]
    assert trained[0] == trained[1] < sum(p.numel() for p in pair.ours.parameters())


def test_stock_is_detectron2s_own_by_its_own_configuration():
    pair = pair_of("R50-C4")
    assert type(pair.stock.backbone) is Detectron2ResNet and type(pair.ours.backbone) is NetworkBackbone
    theirs = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml")
    for node in ("RESNETS", "ANCHOR_GENERATOR", "BACKBONE", "PROPOSAL_GENERATOR", "ROI_BOX_HEAD"):
        assert pair.stock_cfg.MODEL[node] == theirs.MODEL[node]
    for node, changed in {"RPN": {"POST_NMS_TOPK_TEST"}, "ROI_HEADS": {"BATCH_SIZE_PER_IMAGE"}}.items():
        differing = {key for key, value in theirs.MODEL[node].items() if pair.stock_cfg.MODEL[node][key] != value}
        assert differing == changed
    assert {key: pair.stock_cfg.INPUT[key] for key in theirs.INPUT} == theirs.INPUT  # ours has more keys
    assert theirs.MODEL.RESNETS.STRIDE_IN_1X1


def test_with_drawn_rois_both_take_the_number_that_is_asked_for():
    pair, losses = pair_of("R50-C4", rois=12), []
    for model in (pair.ours, pair.stock):
        torch.manual_seed(5)
        with EventStorage() as storage, torch.no_grad():
            losses.append({name: loss.item() for name, loss in model.train()(pair.inputs).items()})
            counts = storage.latest()
        assert counts["roi_head/num_fg_samples"][0] + counts["roi_head/num_bg_samples"][0] == 12
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_images_and_boxes_are_the_same_again_and_lie_in_the_image():
    first, again = make_inputs(tiny(batch=2)), make_inputs(tiny(batch=2))
    assert not torch.equal(first[0]["image"], first[1]["image"])
    for one, other in zip(first, again, strict=True):
        assert one["image"].dtype == torch.uint8 and one["image"].shape == (3, 64, 96)
        assert torch.equal(one["image"], other["image"])
        boxes = one["instances"].gt_boxes
        assert torch.equal(boxes.tensor, other["instances"].gt_boxes.tensor) and len(boxes) == 8
        assert boxes.inside_box((64, 96)).all() and boxes.nonempty(threshold=4).all()


@contextlib.contextmanager
def watched():
    """What backbones compute with, and on how many boxes heads work, in training and inference."""
    given, boxes = Counter(), Counter()

    def note(module, arguments):
        if isinstance(module, (NetworkBackbone, Detectron2ResNet)):
            kind = "ours" if isinstance(module, NetworkBackbone) else "stock"
            weight = next(p for p in module.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1)
            layout = "channels_last" if weight.is_contiguous(memory_format=torch.channels_last) else "NCHW"
            autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            if torch.is_grad_enabled() or not module.training:  # not the comparison of losses
                given[kind, layout, autocast, module.training] += 1
        elif isinstance(module, FastRCNNOutputLayers):
            boxes[module.training, (len(arguments[0]),)] += 1  # of one image

    handle = register_module_forward_pre_hook(note)
    yield given, boxes
    handle.remove()


@pytest.fixture(scope="module")
def command(load_script, tmp_path_factory):
    """The shortest form of the command: what it printed and wrote, and what was computed meanwhile."""
    main, folder = load_script(ROOT / "tools" / "benchmark.py").main, tmp_path_factory.mktemp("detect")
    pairs, runs, build, train = [], [], detect.build_pair, detect.train

    def building(*arguments, **named):
        pairs.append(build(*arguments, **named))
        return pairs[-1]

    def training(cfg, *arguments, folder, resume_from):
        try:
            return train(cfg, *arguments, folder=folder, resume_from=resume_from)
        finally:
            runs.append(SimpleNamespace(cfg=cfg, files={path.name for path in folder.iterdir()}, folder=folder))

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, watched() as (given, boxes):
        patch.setattr(detect, "build_pair", building)
        patch.setattr(detect, "train", training)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert main(["detect", "--tiny", "--json", str(folder / "results.json")]) == 0
    results = json.loads((folder / "results.json").read_text())
    page, lines = out.getvalue(), err.getvalue().splitlines()
    return SimpleNamespace(results=results, page=page, lines=lines, pairs=pairs, runs=runs, given=given, boxes=boxes)


def test_the_page_and_the_file_have_all_sides(command):
    training, inference = command.results["comparisons"]
    assert training["task"] == "R50-C4, training, 1×3×64×96" and inference["task"] == "R50-C4, inference, 1×3×64×96"
    for comparison in (training, inference):
        assert [side["name"] for side in comparison["sides"]] == SIDES
        assert (comparison["first"], comparison["unit"], comparison["work"]) == (OURS, "images/s", 1)
        assert f"| {comparison['task']} " in command.page
        first = comparison["sides"][0]["rates"]
        for side in comparison["sides"]:
            assert side["shape"] == [1, 3, 64, 96] and len(side["rates"]) == ROUNDS and min(side["rates"]) > 0
            ratios = [one / other for one, other in zip(first, side["rates"], strict=True)]
            assert side["first_is_faster"]["median"] == pytest.approx(sum(ratios) / 2)
            assert side["first_is_faster"]["max"] == pytest.approx(max(ratios))
            assert f"| {side['name']} " in command.page and f"- {side['name']}: {side['settings']}" in command.page
    assert len(command.results["skipped"]) == 1 and "GPU" in command.results["skipped"][0]
    assert command.lines[0] == "R50-C4" and command.lines[1].startswith("losses of R50-C4 differ from stock's by ")


def test_every_side_worked_on_the_number_of_rois_that_is_told(command):
    training, inference = command.results["comparisons"]
    assert all(f"{ROIS} RoIs an image" in side["settings"] for side in training["sides"])
    assert all(f"{PROPOSALS} proposals an image, " in side["settings"] for side in inference["sides"])
    train, test = ({count for is_training, count in command.boxes if is_training == mode} for mode in (True, False))
    assert test == {(PROPOSALS,)}
    # With all of the best instead of drawn ones, losses are compared on the ground truth too.
    assert train == {(ROIS,), (ROIS + 8,)} and command.boxes[True, (ROIS + 8,)] == 2
    assert command.boxes[True, (ROIS,)] == len(SIDES) * TURNS + 4  # and the profiles


def test_the_sides_differ_in_precision_and_layout_alone(command):
    once = {
        ("ours", "channels_last", torch.bfloat16),
        ("ours", "channels_last", torch.float32),
        ("stock", "NCHW", torch.float32),
        ("stock", "channels_last", torch.bfloat16),
    }
    training = {(kind, layout, dtype): n for (kind, layout, dtype, mode), n in command.given.items() if mode}
    assert set(training) == once
    # Our sides once more before and in the profile of a step.
    assert {n for (kind, *_), n in training.items() if kind == "ours"} == {TURNS + 2}
    assert {n for (kind, *_), n in training.items() if kind == "stock"} == {TURNS}
    # And once outside of the turns, to choose the threshold of the scores.
    inference = {(kind, layout, dtype): n for (kind, layout, dtype, mode), n in command.given.items() if not mode}
    assert set(inference) == once
    extra = ("ours", "channels_last", torch.float32)
    assert inference.pop(extra) == TURNS + 3 and inference.pop(("ours", "channels_last", torch.bfloat16)) == TURNS + 2
    assert set(inference.values()) == {TURNS}
    for comparison in command.results["comparisons"]:
        for side in comparison["sides"]:
            share = re.search(r", (\d+)% of the time in convolutions and matrix products", side["settings"])
            assert (share is not None) == (side["name"] in (OURS, OURS_FLOAT32))
            assert share is None or 0 < int(share[1]) <= 100
    found = {side["settings"].rpartition(", ")[2] for side in command.results["comparisons"][1]["sides"]}
    assert all(0 < int(detections.split()[0]) <= 100 for detections in found)


def test_our_side_is_the_training_loop_and_nothing_of_it_stays(command):
    (run,) = command.runs
    assert run.cfg.SOLVER.AMP.ENABLED and run.cfg.SOLVER.LOG_PERIOD == 1 and run.cfg.SOLVER.BASE_LR == 0
    assert "metrics.json" in run.files and any("tfevents" in name for name in run.files)
    assert not any(name.endswith(".pth") for name in run.files) and not run.folder.exists()


def test_no_step_changes_a_weight(command):
    (pair,) = command.pairs
    assert_same_weights(pair)
    assert difference_of_losses(pair, ROIS) < 1e-5
    fresh = pair_of("R50-C4").ours.state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in pair.ours.state_dict().items())
    assert any(p.grad is not None and p.grad.any() for p in pair.ours.parameters())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rois": 400}, r"R50-C4: ours worked on \d+ RoIs an image, expected 400; lower --rois, or give a larger"),
        (
            {"proposals": 400, "rois": 2},
            r"R50-C4: ours worked on \d+ proposals an image, expected 400; give a larger --size",
        ),
    ],
)
def test_too_few_boxes_stop_the_comparison(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        list(compare_detectors(["R50-C4"], tiny(size=(16, 16), **changes), conduct(), CONFIGS, print))


def test_a_batch_that_the_memory_does_not_hold(monkeypatch):
    def building(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(detect, "build_pair", building)
    with pytest.raises(InputError, match="R50-C4: the GPU's memory does not hold --batch 1; lower it"):
        list(compare_detectors(["R50-C4"], tiny(), conduct(), CONFIGS, print))


def test_a_signal_ends_it_without_a_promise_to_resume(monkeypatch):
    def train(*arguments, **named):
        raise Interrupted("SIGTERM: saved after 3 of 5 iterations. Go on with --resume.")

    monkeypatch.setattr(detect, "train", train)
    with pytest.raises(Interrupted, match=r"^stopped by a signal; nothing was written$"):
        list(compare_detectors(["R50-C4"], tiny(), conduct(), CONFIGS, print))


@pytest.mark.gpu
def test_on_a_gpu_backbones_are_compiled_and_memory_is_told():
    work = tiny(batch=2, size=(128, 160), rois=16, proposals=40)
    comparisons = list(compare_detectors(["R50-C4"], work, conduct(device="cuda", warm_up=3), CONFIGS, print))
    assert len(comparisons) == 2
    for comparison in comparisons:
        assert list(comparison.sides) == [*SIDES, FP16]
        assert all("GiB" in side.settings for side in comparison.sides.values())
        compiled = {name for name, side in comparison.sides.items() if "compiled" in side.settings}
        assert compiled == {OURS, OURS_FLOAT32, TUNED}
        assert all(min(rates) > 0 for rates in comparison.rates.values())
