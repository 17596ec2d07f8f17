import io
import json
import shutil
import tarfile

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from resnet_backbone import build_network, pretraining
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.engine import precise_bn
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.trainer import Trainer
from resnet_backbone.errors import InputError
from resnet_backbone.pretraining.pipelines import build_pipeline
from resnet_backbone.pretraining.preprocessing import build_normalize
from resnet_backbone.weights import CheckpointError, read_checkpoint


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def bright_and_dark(tmp_path_factory):
    """Class folders that brightness alone tells apart."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("bright_and_dark")
    for name, low in (("bright", 170), ("dark", 0)):
        (root / name).mkdir()
        for number in range(12):
            image = rng.integers(low, low + 80, (36, 36, 3), np.uint8)
            cv2.imwrite(str(root / name / f"{number}.png"), image)
    return root


def test_learns_what_is_trivially_separable(pretrain_config, bright_and_dark, tmp_path):
    data = ("DATASETS.TRAIN", bright_and_dark, "DATASETS.TEST", bright_and_dark)
    results = pretraining.run(pretrain_config(tmp_path, *data, "SOLVER.MAX_ITER", 12, "SOLVER.BASE_LR", 0.02))
    assert results["top1"] > 90 and results["top5"] == 100 and results["images"] == 24

    checkpoint = read_checkpoint(tmp_path / "model_final.pth")
    metadata = checkpoint.metadata
    assert (metadata.kind, metadata.architecture, metadata.norm_statistics) == ("classifier", "resnet18", "precise")
    arguments = {"width": 0.125, "shortcut": "B", "stride_in_1x1": False, "norm": "BN"}
    assert metadata.arguments == {**arguments, "zero_init_last_norm": False, "res5_dilation": 1}
    assert metadata.class_names == ("bright", "dark") and metadata.crop == (32, 32)
    assert metadata.channel_order == "RGB" and metadata.pixel_mean == (123.675, 116.28, 103.53)
    assert metadata.origin["top1"] == results["top1"] and metadata.origin["iterations"] == 12
    assert metadata.norm_epsilon == nn.BatchNorm2d(1).eps
    assert checkpoint.trainer is None

    # The classifier in the file is the one that was tested: a plain loop over the file's weights gives the same.
    network = build_network("resnet18", 2, width=0.125)
    network.load_state_dict(checkpoint.model)
    network.eval()
    right = 0
    for label, name in enumerate(metadata.class_names):
        for file in sorted((bright_and_dark / name).iterdir()):
            image = cv2.imread(str(file))[2:34, 2:34, ::-1].astype(np.float32)  # the middle, within 2 pixels
            image = (image - np.float32(metadata.pixel_mean)) / np.float32(metadata.pixel_std)
            right += network(torch.from_numpy(image.transpose(2, 0, 1))[None]).argmax().item() == label
    assert 100 * right / 24 == pytest.approx(results["top1"], abs=5)
    assert json.loads((tmp_path / "results.json").read_text())["top1"] == results["top1"]


def test_a_run_that_ends_early_says_after_how_many_iterations(pretrain_config, bright_and_dark, tmp_path):
    data = ("DATASETS.TRAIN", bright_and_dark, "DATASETS.TEST", bright_and_dark, "SOLVER.BASE_LR", 0.0)
    keys = ("SOLVER.MAX_ITER", 9, "TEST.EVAL_PERIOD", 1, "TEST.PATIENCE", 1, "MODEL.RESNETS.NORM", "GN")
    keys += ("MODEL.NETWORK.WIDTH", 0.5)
    for resume in (False, True):
        pretraining.run(pretrain_config(tmp_path, *data, *keys), resume=resume)
        assert read_checkpoint(tmp_path / "model_final.pth").metadata.origin["iterations"] == 2
        assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert (tmp_path / "log.txt").read_text().count("the run is finished after 2 iterations: top1 has not risen") == 2


def test_no_iterations_give_the_initial_network_with_statistics_of_training_images(pretrain_config, tmp_path, shapes):
    cfg = pretrain_config(tmp_path, "SOLVER.MAX_ITER", 0)
    pretraining.run(cfg)
    checkpoint = read_checkpoint(tmp_path / "model_final.pth")
    assert checkpoint.metadata.norm_statistics == "precise"

    torch.manual_seed(cfg.SEED)
    fresh = build_network("resnet18", 8, width=0.125)
    for name, parameter in fresh.named_parameters():
        assert torch.equal(checkpoint.model[name], parameter), name
    # conv1's outputs over the batches that were averaged: the mean of their means (fvcore's estimate).
    from resnet_backbone.pretraining.task import _open_sources

    batches = build_pipeline(cfg, _open_sources(cfg)[0])(0)
    means = [fresh.conv1(build_normalize(cfg)(next(batches)[0])).mean((0, 2, 3)) for _ in range(2)]
    torch.testing.assert_close(checkpoint.model["bn1.running_mean"], (means[0] + means[1]) / 2)


def test_without_precise_bn_an_untrained_network_says_so(pretrain_config, tmp_path):
    pretraining.run(pretrain_config(tmp_path, "SOLVER.MAX_ITER", 0, "TEST.PRECISE_BN.ENABLED", False))
    assert read_checkpoint(tmp_path / "model_final.pth").metadata.norm_statistics == "never"


def test_a_network_without_norm_says_so(pretrain_config, tmp_path):
    keys = ("MODEL.NETWORK.NAME", "vgg16", "MODEL.NETWORK.POOL5", False, "SOLVER.MAX_ITER", 0)
    pretraining.run(pretrain_config(tmp_path, *keys))
    metadata = read_checkpoint(tmp_path / "model_final.pth").metadata
    assert metadata.norm_statistics == "none" and metadata.norm_epsilon is None
    assert metadata.arguments == {"width": 0.125, "pool5": False}


@pytest.mark.parametrize("name", ["resnet18", "vgg16"])  # batch norm's running averages; dropout
def test_a_stopped_and_resumed_run_ends_in_the_same_bits(pretrain_config, tmp_path, monkeypatch, name):
    network = ("MODEL.NETWORK.NAME", name, "MODEL.NETWORK.POOL5", name != "vgg16")
    keys = (*network, "SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.BASE_LR", 0.01)
    pretraining.run(pretrain_config(tmp_path / "whole", *keys))

    step = Trainer.run_step

    def stop(self):
        if self.iter == 3:
            raise Interrupted
        step(self)

    monkeypatch.setattr(Trainer, "run_step", stop)
    with pytest.raises(Interrupted):
        pretraining.run(pretrain_config(tmp_path / "stopped", *keys))
    monkeypatch.undo()
    assert not (tmp_path / "stopped" / "model_final.pth").exists()
    pretraining.run(pretrain_config(tmp_path / "stopped", *keys), resume=True)

    whole, resumed = (read_checkpoint(tmp_path / run / "model_final.pth") for run in ("whole", "stopped"))
    assert whole.metadata == resumed.metadata
    for key, tensor in whole.model.items():
        assert torch.equal(tensor, resumed.model[key]), key
    # It went on at iteration 2, from the checkpoint, and not from the beginning.
    assert "the next iteration is 2\n" in (tmp_path / "stopped" / "log.txt").read_text()


def test_resuming_does_not_need_the_weights_that_it_once_started_from(pretrain_config, tmp_path, classifier):
    start = tmp_path / "start.pth"
    start.write_bytes(classifier("resnet18").read_bytes())
    keys = ("MODEL.WEIGHTS", start, "SOLVER.CHECKPOINT_PERIOD", 1)
    pretraining.run(pretrain_config(tmp_path / "run", *keys))
    start.unlink()
    pretraining.run(pretrain_config(tmp_path / "run", *keys, "SOLVER.MAX_ITER", 3), resume=True)
    assert read_checkpoint(tmp_path / "run" / "model_final.pth").metadata.origin["iterations"] == 3


def test_a_class_with_another_name_is_not_resumed(pretrain_config, bright_and_dark, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(bright_and_dark, data)
    keys = ("DATASETS.TRAIN", data, "DATASETS.TEST", data, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 2)
    pretraining.run(pretrain_config(tmp_path / "run", *keys))
    (data / "bright").rename(data / "light")
    with pytest.raises(ConfigError, match=r"started with 2 classes, and the data have 2: .* was bright and is dark"):
        pretraining.run(pretrain_config(tmp_path / "run", *keys[:-1], 4), resume=True)


def test_eval_only_of_a_run_evaluates_the_average_as_the_run_does(pretrain_config, tmp_path):
    keys = ("SOLVER.MAX_ITER", 4, "SOLVER.EMA_DECAY", 0.9, "TEST.PRECISE_BN.ENABLED", False)
    trained = pretraining.run(pretrain_config(tmp_path, *keys))
    assert pretraining.run(pretrain_config(tmp_path, *keys), resume=True, eval_only=True) == trained


def test_a_classifier_is_fine_tuned_on_other_classes(pretrain_config, classifier, bright_and_dark, tmp_path):
    data = ("DATASETS.TRAIN", bright_and_dark, "DATASETS.TEST", bright_and_dark)
    keys = (*data, "MODEL.WEIGHTS", classifier("resnet18"))
    with pytest.raises(CheckpointError, match=r"fc\.weight.*MODEL\.NETWORK\.ALLOW_MISSING"):
        pretraining.run(pretrain_config(tmp_path / "no", *keys))
    results = pretraining.run(pretrain_config(tmp_path / "yes", *keys, "MODEL.NETWORK.ALLOW_MISSING", "('fc.',)"))
    assert results["images"] == 24


def test_eval_only_tests_the_given_weights_and_writes_no_checkpoint(pretrain_config, tmp_path):
    trained = pretraining.run(pretrain_config(tmp_path / "run", "SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 3))
    keys = ("MODEL.WEIGHTS", tmp_path / "run" / "model_final.pth")
    tested = pretraining.run(pretrain_config(tmp_path / "test", *keys), eval_only=True)
    assert tested == trained
    assert {file.name for file in (tmp_path / "test").iterdir()} == {".lock", "log.txt"}

    # Together with resume, the run's own last checkpoint, which has no precise statistics yet.
    last = read_checkpoint(tmp_path / "run" / "model_0000002.pth").metadata
    assert last.norm_statistics == "running" and last.origin["iterations"] == 3
    again = pretraining.run(pretrain_config(tmp_path / "run"), resume=True, eval_only=True)
    assert again["images"] == 64


def test_eval_only_takes_the_pooling_from_the_weights(pretrain_config, tmp_path, classifier):
    cfg = pretrain_config(tmp_path, "MODEL.NETWORK.NAME", "vgg16", "MODEL.WEIGHTS", classifier("vgg16"))
    pretraining.run(cfg, eval_only=True)
    assert cfg.MODEL.NETWORK.POOL5 is False


def test_a_numbered_gpu_becomes_the_current_one(pretrain_config, tmp_path, monkeypatch):
    """Triton's kernels and CUDA graphs run on the current one."""

    def set_device(device):
        raise Interrupted(device)

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Interrupted, match=r"^cuda:1$"):
        pretraining.run(pretrain_config(tmp_path, "MODEL.DEVICE", "cuda:1"))


def test_bf16_trains_float32_weights(pretrain_config, tmp_path):
    pretraining.run(pretrain_config(tmp_path, "SOLVER.AMP.ENABLED", True))
    model = read_checkpoint(tmp_path / "model_final.pth").model
    assert all(t.dtype == torch.float32 for n, t in model.items() if not n.endswith("num_batches_tracked"))
    assert all(t.isfinite().all() for t in model.values())
    assert json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])["total_loss"] > 0


def test_bf16_differs_from_float32_in_the_first_loss(pretrain_config, tmp_path):
    losses = []
    for enabled in (False, True):
        folder = tmp_path / str(enabled)
        pretraining.run(pretrain_config(folder, "SOLVER.AMP.ENABLED", enabled, "SOLVER.MAX_ITER", 1))
        losses.append(json.loads((folder / "metrics.json").read_text().splitlines()[0])["loss_cls"])
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.05)


def test_training_steps_alone_are_compiled(pretrain_config, tmp_path, compiled, caplog):
    """An evaluation or precise BN would be compiled anew, for a minute on a GPU."""
    keys = ("SOLVER.COMPILE", True, "SOLVER.AMP.ENABLED", True, "TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER", 3)
    pretraining.run(pretrain_config(tmp_path, *keys))
    assert len(compiled) == 1
    assert read_checkpoint(tmp_path / "model_final.pth").metadata.norm_statistics == "precise"


def test_precise_bn_runs_in_the_precision_of_training(pretrain_config, tmp_path, monkeypatch):
    seen = set()
    estimate = precise_bn.estimate_norm_statistics

    def watched(model, *arguments, **named):
        handle = model.conv1.register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
        layers = estimate(model, *arguments, **named)
        handle.remove()
        return layers

    monkeypatch.setattr(precise_bn, "estimate_norm_statistics", watched)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        keys = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", precision, "SOLVER.MAX_ITER", 0)
        pretraining.run(pretrain_config(tmp_path / precision, *keys))
        assert seen == {dtype}


def test_every_parameter_learns(pretrain_config, tmp_path, monkeypatch):
    """The first loss is the one that torchvision's own network, at full width, has with the same weights and images."""
    seen = []
    step = Trainer.run_step

    def watch(self):
        state = {k: v.clone() for k, v in self.model.state_dict().items()}
        batch = self._batches(self.iter)
        seen.append((state, next(iter(batch))))
        step(self)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in self.model.parameters())

    monkeypatch.setattr(Trainer, "run_step", watch)
    cfg = pretrain_config(tmp_path, "MODEL.NETWORK.WIDTH", 1.0, "SOLVER.MAX_ITER", 1, "TEST.PRECISE_BN.ENABLED", False)
    pretraining.run(cfg)
    state, (images, labels, _) = seen[0]
    reference = resnet18(num_classes=8)
    reference.load_state_dict(state)
    loss = nn.functional.cross_entropy(reference(build_normalize(cfg)(images)), labels)
    found = json.loads((tmp_path / "metrics.json").read_text().splitlines()[0])["loss_cls"]
    assert found == pytest.approx(loss.item(), rel=1e-4)
    after = read_checkpoint(tmp_path / "model_final.pth").model
    assert not any(torch.equal(after[name], state[name]) for name, _ in reference.named_parameters())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("MODEL.NETWORK.NAME", "resnet19"), ("resnet19", "resnet18")),
        (("MODEL.NETWORK.WIDTH", "-1"), ("MODEL.NETWORK.WIDTH is -1", "above 0")),
        (("MODEL.RESNETS.NORM", "XN"), ("MODEL.RESNETS.NORM is XN", "BN")),
        (("MODEL.RESNETS.NORM", "FrozenBN"), ("FrozenBN", "command line", "BN")),
        (("MODEL.NETWORK.NUM_CLASSES", 5), ("NUM_CLASSES is 5", "8")),
        (("DATASETS.TRAIN", "/nowhere/at/all"), ("/nowhere/at/all", "does not exist")),
        (("DATASETS.TRAIN", ()), ("DATASETS.TRAIN is empty", "one entry")),
        (("DATASETS.TEST", ("a", "b")), ("DATASETS.TEST", "one entry")),
        (("DATASETS.TEST", (), "DATASETS.HOLD_OUT", 9), ("DATASETS.HOLD_OUT is 9", "DATASETS.TEST is empty")),
        (
            ("DATASETS.TEST", (), "SOLVER.LR_SCHEDULER_NAME", "WarmupPlateauLR", "TEST.EVAL_PERIOD", 1),
            ("follows the evaluations", "EVAL_PERIOD is 0 (DATASETS.TEST is empty)"),
        ),
        (("TEST.PRECISE_BN.NUM_ITER", 0), ("TEST.PRECISE_BN.NUM_ITER is 0", "a whole number from 1")),
        (("INPUT.CROP.TYPE", "relative_range"), ("relative_range", "absolute")),
        (("INPUT.CROP.SIZE", (0.9, 0.9)), ("INPUT.CROP.SIZE", "pixels")),
        (("INPUT.CROP.SIZE", (64, 64)), ("64x64", "32")),
        (("INPUT.FORMAT", "L"), ("INPUT.FORMAT is L", "RGB")),
        (("SOLVER.NESTEROV", True, "SOLVER.MOMENTUM", 0.0), ("SOLVER.NESTEROV is True", "MOMENTUM is 0.0")),
        (("INPUT.RANDOM_FLIP", "vertical"), ("vertical", "horizontal")),
        (("MODEL.PIXEL_MEAN", (1.0,)), ("MODEL.PIXEL_MEAN is [1.0]", "3 values")),
        (("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "fp8"), ("fp8", "bf16")),
    ],
)
def test_what_cannot_be_used_stops_before_the_first_iteration(pretrain_config, tmp_path, overrides, words):
    with pytest.raises(InputError) as error:
        pretraining.run(pretrain_config(tmp_path, *overrides))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.pth"))


def test_without_a_test_set_a_run_trains_and_says_so(pretrain_config, tmp_path):
    keys = ("DATASETS.TEST", (), "TEST.EVAL_PERIOD", 1)
    assert pretraining.run(pretrain_config(tmp_path, *keys)) == {}
    assert "DATASETS.TEST is empty: no evaluation" in (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "results.json").read_text()) == {}
    assert not (tmp_path / "model_best.pth").exists()
    assert '"top1"' not in (tmp_path / "metrics.json").read_text()
    metadata = read_checkpoint(tmp_path / "model_final.pth").metadata
    assert metadata.norm_statistics == "precise" and "top1" not in metadata.origin and metadata.describe()
    with pytest.raises(ConfigError, match=r"DATASETS.TEST is empty, so --eval-only has nothing"):
        final = ("MODEL.WEIGHTS", tmp_path / "model_final.pth")
        pretraining.run(pretrain_config(tmp_path, *keys, *final), eval_only=True)
    assert pretraining.run(pretrain_config(tmp_path, *keys, "SOLVER.MAX_ITER", 3), resume=True) == {}


def test_data_sets_of_different_classes_stop(pretrain_config, tmp_path, bright_and_dark):
    with pytest.raises(ConfigError, match="differ"):
        pretraining.run(pretrain_config(tmp_path, "DATASETS.TEST", bright_and_dark))


@pytest.mark.parametrize(
    ("key", "value", "theirs"),
    [
        ("INPUT.FORMAT", "BGR", "RGB"),
        ("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0], "123.675"),
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0], "58.395"),
        ("MODEL.NETWORK.NAME", "resnet34", "resnet18"),
        ("MODEL.NETWORK.WIDTH", 0.25, "0.125"),
    ],
)
def test_weights_fed_otherwise_stop(pretrain_config, tmp_path, classifier, key, value, theirs):
    cfg = pretrain_config(tmp_path, "MODEL.WEIGHTS", classifier("resnet18"), key, value)
    with pytest.raises(ConfigError) as error:
        pretraining.run(cfg, eval_only=True)
    assert key in str(error.value) and theirs in str(error.value)


def test_eval_only_refuses_random_weights_and_other_classes(pretrain_config, tmp_path, classifier, bright_and_dark):
    with pytest.raises(ConfigError, match=r"TEST.BEST_METRIC is test_loss .* or top1 or top5"):
        pretraining.run(pretrain_config(tmp_path, "TEST.BEST_METRIC", "test_loss"))
    with pytest.raises(ConfigError, match="is empty, so --eval-only"):
        pretraining.run(pretrain_config(tmp_path), eval_only=True)
    root = tmp_path / "eight"
    for letter in "abcdefgh":
        (root / letter).mkdir(parents=True)
        cv2.imwrite(str(root / letter / "0.png"), np.zeros((40, 40, 3), np.uint8))
    data = ("DATASETS.TRAIN", root, "DATASETS.TEST", root)
    with pytest.raises(ConfigError, match="same class names"):
        pretraining.run(pretrain_config(tmp_path, *data, "MODEL.WEIGHTS", classifier("resnet18")), eval_only=True)
    data = ("DATASETS.TRAIN", bright_and_dark, "DATASETS.TEST", bright_and_dark)
    with pytest.raises(CheckpointError, match="8"):
        pretraining.run(pretrain_config(tmp_path, *data, "MODEL.WEIGHTS", classifier("resnet18")))


@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_a_cut_off_test_image_is_found_before_training(pretrain_config, tmp_path, kind):
    image = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8))[1].tobytes()
    (root := tmp_path / "data").mkdir()
    contents = [image, image + bytes(100), image, image[:700]]  # the second has something behind its end
    if kind == "folder":
        for number, content in enumerate(contents):
            (root / "ab"[number % 2]).mkdir(exist_ok=True)
            (root / "ab"[number % 2] / f"{number}.jpg").write_bytes(content)
        data, name = str(root), "b/3.jpg"
    else:
        data, name = str(root / "a-000000.tar"), "a-000000.tar:3"
        with tarfile.open(data, "w") as archive:
            for number, content in enumerate(contents):
                for suffix, part in (("jpg", content), ("cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(part)
                    archive.addfile(member, io.BytesIO(part))
    keys = ("DATASETS.TRAIN", data, "DATASETS.TEST", data, "DATALOADER.ON_CORRUPT", "skip")
    with pytest.raises(DatasetError, match=rf"{name}.* is unreadable"):
        pretraining.run(pretrain_config(tmp_path / "run", *keys))
    assert not (tmp_path / "run" / "metrics.json").exists()
