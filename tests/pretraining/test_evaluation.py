import dataclasses
import itertools
import json
import logging
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms import functional as reference

from resnet_backbone import build_network
from resnet_backbone.data.sources import open_source
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.pretraining import evaluation
from resnet_backbone.pretraining.evaluation import Member, build_evaluator, evaluate_classifier, load_ensemble
from resnet_backbone.pretraining.preprocessing import build_normalize
from resnet_backbone.weights import Checkpoint, Metadata, write_checkpoint

CLASSES = ("cat", "dog", "owl")
RGB_MEAN, RGB_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BGR_MEAN, BGR_STD = (103.9, 116.8, 123.7), (1.0, 2.0, 3.0)


def accuracy(predictions: list[torch.Tensor], labels: list[int]) -> dict:
    """Top-1, top-5 and cross entropy of probabilities, image by image."""
    top1 = top5 = loss = 0
    for probabilities, label in zip(predictions, labels, strict=True):
        order = probabilities.argsort(descending=True).tolist()
        top1 += order[0] == label
        top5 += label in order[:5]
        loss -= probabilities[label].log().item()
    count = len(labels)
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "test_loss": loss / count, "images": count}


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """A smooth image, `(height, width, 3)` uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def network(name: str = "resnet18", *, seed: int = 0, **arguments) -> nn.Module:
    """Random weights of three classes, with logits of mean 0 and standard deviation 2 over a few images."""
    torch.manual_seed(seed)
    net = build_network(name, len(CLASSES), width=0.125, **arguments).eval()
    last = net.fc if hasattr(net, "fc") else net.classifier.get_submodule("6")
    images = torch.cat([fed(torch.from_numpy(smooth(36, 36, number)).permute(2, 0, 1)) for number in range(9)])
    with torch.no_grad():
        logits = net(images)
        scale = 2 / logits.std(0)
        last.weight *= scale[:, None]
        last.bias.copy_(-logits.mean(0) * scale)
    return net


def metadata(name: str, *, order="RGB", mean=RGB_MEAN, std=RGB_STD, kind="classifier", classes=CLASSES, **arguments):
    return Metadata(
        kind=kind,
        architecture=name,
        arguments={"width": 0.125, **arguments},
        channel_order=order,
        pixel_mean=mean,
        pixel_std=std,
        norm_statistics="running",
        norm_epsilon=1e-5,
        class_names=classes,
    )


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """A folder of 7 images of several shapes, whose shorter side is 36, in three classes."""
    root = tmp_path_factory.mktemp("seven")
    sizes = [(36, 36), (36, 50), (50, 36), (36, 50), (36, 51), (48, 36), (36, 36)]
    for number, (height, width) in enumerate(sizes):
        (root / CLASSES[number % 3]).mkdir(exist_ok=True)
        cv2.imwrite(str(root / CLASSES[number % 3] / f"{number}.png"), smooth(height, width, 100 + number))
    return root


@pytest.fixture
def config(pretrain_config, tmp_path, seven):
    def make(*overrides):
        keys = ("DATASETS.TEST", seven, "INPUT.MIN_SIZE_TEST", 36, "INPUT.CROP.SIZE", (32, 32), *overrides)
        return pretrain_config(tmp_path, *keys)

    return make


def fed(image: Image.Image | torch.Tensor, *, bgr=False, mean=RGB_MEAN, std=RGB_STD) -> torch.Tensor:
    """The input `(1, 3, H, W)` float32, as a textbook has it."""
    pixels = (reference.pil_to_tensor(image) if isinstance(image, Image.Image) else image).float()
    pixels = pixels[[2, 1, 0]] if bgr else pixels
    return ((pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])[None]


def images_of(folder: Path) -> tuple[list[Image.Image], list[int]]:
    files = [(label, file) for label, name in enumerate(CLASSES) for file in sorted((folder / name).iterdir())]
    return [Image.open(file) for _, file in files], [label for label, _ in files]


class TestEvaluateClassifier:
    @pytest.mark.parametrize("classes", [3, 5, 11])
    def test_equals_a_plain_loop_over_single_images(self, classes):
        generator = torch.Generator().manual_seed(classes)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes), nn.Dropout(0.9)).train()
        images = torch.randint(0, 256, (23, 3, 2, 2), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, classes, (23,), generator=generator)
        member = Member(model, lambda x: x.float() / 255)
        found = evaluate_classifier([member], zip(images.split(5), labels.split(5)))
        assert model.training

        model.eval()
        logits = model(images.float() / 255)
        expected = accuracy(list(logits.softmax(1)), labels.tolist())
        assert found == pytest.approx(expected, rel=1e-5)
        assert found["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        if classes <= 5:
            assert found["top5"] == 100

    def test_an_ensemble_is_the_mean_of_its_members_probabilities(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (40, 3, 2, 2), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 7, (40,), generator=generator)
        members, probabilities = [], []
        for scale in (0.1, 1.0, 9.0):
            model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7)).requires_grad_(False)
            nn.init.normal_(model[1].weight, std=scale, generator=generator)
            members.append(Member(model, lambda x, scale=scale: x.float() / (100 * scale)))
            probabilities.append(model(images.float() / (100 * scale)).double().softmax(1))
        mean = torch.stack(probabilities).mean(0)
        found = evaluate_classifier(members, zip(images.split(16), labels.split(16)))
        assert found == pytest.approx(accuracy(list(mean), labels.tolist()), rel=1e-6)
        alone = [accuracy(list(one), labels.tolist())["test_loss"] for one in probabilities]
        assert all(abs(found["test_loss"] - loss) > 0.01 for loss in alone)

    def test_the_loss_of_a_certain_error_is_a_number(self):
        model = nn.Linear(1, 1)
        model.forward = lambda x: torch.tensor([[1000.0, 0.0]]).expand(len(x), -1)
        found = evaluate_classifier(
            [Member(model, torch.Tensor.float)], [(torch.zeros(2, 3, 2, 2), torch.tensor([0, 1]))]
        )
        assert found["test_loss"] == pytest.approx(500) and found["top1"] == 50

    @pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
    def test_precision_is_that_of_the_layers(self, precision, dtype):
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        seen = []
        model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        images, labels = torch.rand(6, 3, 2, 2), torch.tensor([0, 1, 2, 3, 0, 1])
        found = evaluate_classifier([Member(model, lambda x: x)], [(images, labels)], precision=precision)
        assert seen == [dtype]
        assert found["test_loss"] == pytest.approx(F.cross_entropy(model(images), labels).item(), rel=0.02)

    @pytest.mark.gpu
    @pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.08), ("fp16", 0.01)])
    @pytest.mark.parametrize("dense", [False, True])
    def test_a_gpu_says_what_the_cpu_says(self, precision, tolerance, dense, monkeypatch):
        """Over 24 draws of images, the CPU's own loss moves by up to 0.026 in bf16 and 0.003 in fp16."""
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which moves a loss in fp32 by 4e-4
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (9, 3, 64, 48), dtype=torch.uint8, generator=generator)
        labels = torch.arange(9) % 3
        results = []
        for device, kind in (("cpu", "fp32"), ("cuda", precision)):
            model = network().to(device, memory_format=torch.channels_last)
            member = Member(model, lambda x, device=device: x.to(device).float() / 128 - 1)
            batches = zip(images.split(4), labels.split(4))
            results.append(evaluate_classifier([member], batches, dense=dense, max_pixels=9000, precision=kind))
        assert results[1]["images"] == 9
        assert results[1]["test_loss"] == pytest.approx(results[0]["test_loss"], rel=tolerance)


class TestEvaluator:
    def test_a_compiled_network_runs_uncompiled(self, config, seven):
        """Compiled for training's shapes, it would be compiled anew."""
        cfg, compiled, model = config(), [], network()
        model.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward)
        build_evaluator(cfg, open_source(seven), build_normalize(cfg))(model)
        assert compiled == []
        model(torch.zeros(1, 3, 32, 32))
        assert compiled

    @pytest.mark.parametrize("batch", [1, 3, 7])
    def test_one_crop(self, config, seven, batch):
        cfg = config("TEST.IMS_PER_BATCH", batch)
        model = network()
        found = build_evaluator(cfg, open_source(seven), build_normalize(cfg))(model)
        images, labels = images_of(seven)
        with torch.no_grad():
            expected = [model(fed(reference.center_crop(image, 32)))[0].softmax(0) for image in images]
        assert torch.stack(expected).std(0).max() > 0.05
        assert found == pytest.approx(accuracy(expected, labels), rel=1e-4)

    @pytest.mark.parametrize("order", ["RGB", "BGR"])
    def test_ten_crops(self, config, seven, order):
        cfg = config("TEST.CROPS", 10, "INPUT.FORMAT", order)
        model = network()
        found = build_evaluator(cfg, open_source(seven), build_normalize(cfg))(model)
        images, labels = images_of(seven)
        with torch.no_grad():
            expected = [
                torch.stack([model(fed(c, bgr=order == "BGR"))[0].softmax(0) for c in reference.ten_crop(i, 32)]).mean(
                    0
                )
                for i in images
            ]
        assert found == pytest.approx(accuracy(expected, labels), rel=1e-4)

    @pytest.mark.parametrize("name", ["resnet18", "vgg16"])
    def test_scales(self, config, seven, name):
        # Shorter sides at which nothing is interpolated between gray levels: 36, and with VGG its fourfold.
        arguments = {"pool5": False} if name == "vgg16" else {}
        scales = (144,) if name == "vgg16" else (36,)
        cfg = config("TEST.SCALES", scales, "TEST.IMS_PER_BATCH", 5)
        model = network(name, **arguments)
        source = open_source(seven)
        found = build_evaluator(cfg, source, build_normalize(cfg))(model)
        images, labels = images_of(seven)
        expected = []
        with torch.no_grad():
            for image in images:
                view = fed(reference.resize(image, scales[0]))
                expected.append(torch.stack([self.scores(model, v).softmax(0) for v in (view, view.flip(-1))]).mean(0))
        # Pillow's resizing is within one gray level of ours.
        assert found == pytest.approx(accuracy(expected, labels), rel=1e-4 if name == "resnet18" else 0.02)

    @staticmethod
    def scores(model, image):
        """Logits of a whole image: VGG's are the mean over its 7×7 windows."""
        if hasattr(model, "fc"):
            return model(image)[0]
        features = model.forward_features(image, ["conv5"])["conv5"]
        corners = itertools.product(range(features.shape[2] - 6), range(features.shape[3] - 6))
        windows = [features[:, :, row : row + 7, column : column + 7] for row, column in corners]
        return torch.cat([model.classifier(window.flatten(1)) for window in windows]).mean(0)

    @pytest.mark.parametrize(("crops", "steps"), [(1, [4, 3]), (10, [2] * 30 + [1] * 10)])
    def test_many_crops_are_loaded_for_fewer_images_at_once(self, config, seven, monkeypatch, crops, steps):
        monkeypatch.setattr(evaluation, "LOAD_BYTES", 2 * 10 * 3 * 32 * 32)
        cfg = config("TEST.CROPS", crops, "TEST.IMS_PER_BATCH", 4)
        normalize, seen = build_normalize(cfg), []

        def watch(images):
            seen.append(len(images))
            return normalize(images)

        build_evaluator(cfg, open_source(seven), watch)(network())
        assert seen == steps

    def test_workers_change_nothing(self, config, seven):
        results = []
        for workers in (0, 2):
            cfg = config("TEST.SCALES", (32, 40), "TEST.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", workers)
            results.append(build_evaluator(cfg, open_source(seven), build_normalize(cfg))(network()))
        assert results[0] == results[1]

    def test_what_does_not_fit_shows_on_the_first_two_images(self, config, seven):
        cfg = config("TEST.SCALES", (100, 200))
        evaluator = build_evaluator(cfg, open_source(seven), build_normalize(cfg))
        with pytest.raises(ValueError, match="at least 112 pixels"):
            evaluator.try_two_images(network("vgg16", pool5=False))

    def test_the_log_says_how(self, config, seven, caplog):
        cfg = config("TEST.CROPS", 10, "SOLVER.AMP.ENABLED", True)
        model = network()
        normalize = build_normalize(cfg)
        evaluator = build_evaluator(cfg, open_source(seven), normalize, ensemble=[Member(model, normalize)])
        with caplog.at_level(logging.INFO):
            results = evaluator(model)
        assert f"top-1 {results['top1']:.2f}%" in caplog.text
        assert "of 7 images (10 crops, bf16, 2 networks)" in caplog.text
        assert all(isinstance(value, float) for value in results.values())


def test_two_processes_with_uneven_shards_equal_one(config, tmp_path, seven):
    (tmp_path / "one" / "cat").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "one" / "cat" / "a.png"), smooth(40, 36, 5))
    several = [
        ("DATASETS.TEST", str(seven), "TEST.IMS_PER_BATCH", "4"),
        ("DATASETS.TEST", str(seven), "TEST.CROPS", "10"),
        ("DATASETS.TEST", str(seven), "TEST.SCALES", "(32,40)"),
        ("DATASETS.TEST", str(tmp_path / "one"), "TEST.CROPS", "10"),  # nothing for the first process to do
    ]
    model = network()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    command = [sys.executable, str(Path(__file__).with_name("launched_evaluation.py")), str(tmp_path / "weights.pt")]
    done = subprocess.run(command, input=json.dumps(several), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for overrides, results in zip(several, first, strict=True):
        cfg = config(*overrides)
        source = open_source(cfg.DATASETS.TEST[0])
        assert results["images"] == len(source)
        assert results == pytest.approx(build_evaluator(cfg, source, build_normalize(cfg))(model), rel=1e-5)
    assert len({round(results["test_loss"], 4) for results in first}) == 4


class TestLoadEnsemble:
    @pytest.fixture
    def save(self, tmp_path):
        def save(model, meta, name="member.pth"):
            write_checkpoint(tmp_path / name, Checkpoint(model.state_dict(), meta))
            return str(tmp_path / name)

        return save

    @pytest.mark.parametrize("order", ["RGB", "BGR"])
    def test_each_member_is_fed_as_its_file_says(self, config, save, seven, order):
        # Another architecture, another order, another normalization; a third like the first.
        other = network("preact_resnet50", seed=1)
        third = network(seed=2, stride_in_1x1=False)
        files = (
            save(other, metadata("preact_resnet50", order="BGR", mean=BGR_MEAN, std=BGR_STD), "other.pth"),
            save(third, metadata("resnet18"), "third.pth"),
        )
        cfg = config("TEST.ENSEMBLE", files, "TEST.CROPS", 10, "INPUT.FORMAT", order)
        source = open_source(seven)
        model = network()
        members = load_ensemble(cfg, source.class_names)
        found = build_evaluator(cfg, source, build_normalize(cfg), ensemble=members)(model)

        images, labels = images_of(seven)
        feeds = [
            (model, dict(bgr=order == "BGR")),
            (other, dict(bgr=True, mean=BGR_MEAN, std=BGR_STD)),
            (third, {}),
        ]
        with torch.no_grad():
            expected = [
                torch.stack([n(fed(c, **how))[0].softmax(0) for n, how in feeds for c in reference.ten_crop(i, 32)])
                for i in images
            ]
        assert found == pytest.approx(accuracy([one.mean(0) for one in expected], labels), rel=1e-4)

    def test_vgg_keeps_the_pooling_that_it_was_trained_with(self, config, save):
        model = network("vgg16", pool5=False)
        cfg = config("TEST.ENSEMBLE", save(model, metadata("vgg16", pool5=False)))
        (member,) = load_ensemble(cfg, CLASSES)
        assert member.model.stage_names == model.stage_names and not member.model.training

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (dict(classes=("cat", "dog", "fox")), "'fox' as class 2, not the 'owl' of DATASETS.TEST"),
            (dict(classes=("cat", "dog")), "2 classes, not the 3 of DATASETS.TEST"),
            (dict(kind="detector"), "holds a detector, expected a classifier"),
        ],
    )
    def test_what_cannot_be_averaged(self, config, save, changes, words):
        file = save(network(), metadata("resnet18", **changes))
        with pytest.raises(ConfigError, match=words) as error:
            load_ensemble(config("TEST.ENSEMBLE", file), CLASSES)
        assert "TEST.ENSEMBLE" in str(error.value) and file in str(error.value)

    def test_a_file_that_does_not_say_how_it_was_fed(self, config, tmp_path):
        torch.save(network("plain18").state_dict(), tmp_path / "bare.pth")
        with pytest.raises(ConfigError, match=r"TEST.ENSEMBLE: .*bare.pth.* tools/convert_weights.py"):
            load_ensemble(config("TEST.ENSEMBLE", tmp_path / "bare.pth"), CLASSES)

    def test_unnamed_classes_of_a_converted_file_are_taken_in_order(self, config, save, caplog):
        unnamed = ("class 0", "class 1", "class 2")
        meta = dataclasses.replace(metadata("resnet18", classes=unnamed), origin={"converted_from": "x.pth"})
        file = save(network(), meta)
        with caplog.at_level(logging.INFO):
            assert len(load_ensemble(config("TEST.ENSEMBLE", file), CLASSES)) == 1
        assert "does not name its classes" in caplog.text


def test_progress_is_logged_about_every_ten_seconds(monkeypatch, caplog):
    clock = itertools.count(0, 4)
    monkeypatch.setattr(evaluation.time, "monotonic", lambda: next(clock))
    batches = [(torch.zeros(2, 3, 2, 2), torch.zeros(2, dtype=torch.long))] * 10
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    with caplog.at_level(logging.INFO):
        evaluate_classifier([Member(model, lambda x: x)], batches, images=20)
    # A batch of 2 takes 4 seconds: after 12 seconds 6 are done, and 14 are left at 2 seconds each.
    assert [record.getMessage() for record in caplog.records] == [
        "evaluation: 6 of 20 images of this process, eta 0:00:28",
        "evaluation: 12 of 20 images of this process, eta 0:00:16",
        "evaluation: 18 of 20 images of this process, eta 0:00:04",
    ]
