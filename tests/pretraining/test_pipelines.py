"""From DATALOADER and INPUT keys to batches, through whole runs where the pipelines must agree."""

import cv2
import numpy as np
import pytest
import torch

from resnet_backbone import pretraining
from resnet_backbone.data.sources import open_source
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.errors import InputError
from resnet_backbone.pretraining.pipelines import DevicePipeline, ResidentPipeline, WorkersPipeline, build_pipeline
from resnet_backbone.weights import read_checkpoint

SMALL = ("MODEL.NETWORK.NAME", "cifar_resnet20", "MODEL.NETWORK.WIDTH", 0.5, "SOLVER.BASE_LR", 0.02)
PADDED = ("INPUT.CROP.TYPE", "padded", "INPUT.CROP.SIZE", (32, 32), "INPUT.PCA_COLOR_STD", 0.0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Class folders of 24 JPEGs of 90 × 120 smooth pixels; one of class b, `broken.jpg`, is cut off."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(1)
    for number in range(24):
        folder = root / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        image = cv2.resize(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8), (120, 90), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{number:02}.jpg"), image)
    return root


@pytest.fixture
def one_broken(photographs, tmp_path):
    for path in photographs.rglob("*.jpg"):
        target = tmp_path / "data" / path.relative_to(photographs)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    broken = tmp_path / "data" / "b" / "03.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    return tmp_path / "data"


def weights(folder) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "model_final.pth").model


def test_resident_images_train_to_the_same_bits_as_loaded_ones(pretrain_config, tmp_path):
    for pipeline, workers in (("workers", 1), ("resident", 0)):
        keys = (*SMALL, *PADDED, "DATALOADER.PIPELINE", pipeline, "DATALOADER.NUM_WORKERS", workers)
        keys += ("SOLVER.MAX_ITER", 10, "TEST.EVAL_PERIOD", 4)
        pretraining.run(pretrain_config(tmp_path / pipeline, *keys))
    one, other = weights(tmp_path / "workers"), weights(tmp_path / "resident")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_images_augmented_on_the_device_are_those_of_the_workers(pretrain_config, photographs, tmp_path):
    data = ("DATASETS.TRAIN", photographs, "DATASETS.TEST", photographs, "INPUT.REDUCED_DECODING", False)
    found = []
    for pipeline in ("workers", "device"):
        cfg = pretrain_config(tmp_path, *data, "DATALOADER.PIPELINE", pipeline, "INPUT.MIN_SIZE_TRAIN", (40, 60))
        pipeline = build_pipeline(cfg, open_source(photographs))
        found.append([pipeline.images_of(batch) for batch, _ in zip(pipeline(2), range(3))])
    for (images, labels), (other, same) in zip(*found, strict=True):
        assert torch.equal(labels, same)
        difference = (images.int() - other.int()).abs()
        assert difference.float().mean() < 0.3 and difference.max() <= 2
    results = pretraining.run(pretrain_config(tmp_path, *data, *SMALL, "DATALOADER.PIPELINE", "device"))
    assert results["images"] == 24


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (("DATALOADER.PIPELINE", "workers"), WorkersPipeline),
        (("DATALOADER.PIPELINE", "device"), DevicePipeline),
        (("DATALOADER.PIPELINE", "resident", *PADDED), ResidentPipeline),
    ],
)
def test_names_are_those_of_the_images_in_the_batch(pretrain_config, photographs, tmp_path, keys, kind):
    cfg = pretrain_config(tmp_path, "DATASETS.TRAIN", photographs, "DATASETS.TEST", photographs, *keys)
    pipeline = build_pipeline(cfg, open_source(photographs))
    assert isinstance(pipeline, kind) and pipeline.num_images == 24
    for iteration, batch in zip(range(1, 8), pipeline(1)):
        images, labels = pipeline.images_of(batch)
        assert images.shape == (len(labels), 3, 32, 32) and images.dtype == torch.uint8
        assert labels.tolist() == [0 if "/a/" in name else 1 for name in pipeline.names(iteration)]


def test_held_out_images_are_tested_on_and_not_trained_on(pretrain_config, shapes, tmp_path, monkeypatch):
    seen = set()
    names = WorkersPipeline.names

    def watch(self, start):
        for number, batch in enumerate(original(self, start), start):
            seen.update(names(self, number))
            yield batch

    original = WorkersPipeline.__call__
    monkeypatch.setattr(WorkersPipeline, "__call__", watch)
    keys = ("DATASETS.HOLD_OUT", 16, "SOLVER.MAX_ITER", 12, "TEST.PRECISE_BN.ENABLED", False)
    results = pretraining.run(pretrain_config(tmp_path, *keys))
    assert results["images"] == 16
    assert len(seen) == 48  # twelve batches of eight are two epochs of what is left of 64


class TestUnreadable:
    @pytest.fixture
    def keys(self, one_broken, photographs):
        # Evaluation never skips, so it looks at the whole ones.
        return (*SMALL, "DATASETS.TRAIN", one_broken, "DATASETS.TEST", photographs, "SOLVER.MAX_ITER", 6)

    def test_stops_by_default(self, pretrain_config, tmp_path, keys):
        with pytest.raises(InputError, match=r"b/03.jpg"):
            pretraining.run(pretrain_config(tmp_path / "run", *keys))

    def test_skip_replaces_and_says_so(self, pretrain_config, tmp_path, keys):
        cfg = pretrain_config(tmp_path / "run", *keys, "DATALOADER.ON_CORRUPT", "skip")
        pretraining.run(cfg)
        assert "b/03.jpg" in (tmp_path / "run" / "log.txt").read_text()

    def test_more_than_the_limit_stops(self, pretrain_config, tmp_path, keys):
        skip = ("DATALOADER.ON_CORRUPT", "skip", "DATALOADER.MAX_CORRUPT", 0.0)
        with pytest.raises(InputError, match=r"\d of the \d+ images.*check_dataset"):
            pretraining.run(pretrain_config(tmp_path / "run", *keys, *skip))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("DATALOADER.PIPELINE", "gpu"), r"gpu \(command line\), expected workers or device or resident"),
        (("DATALOADER.PIPELINE", "resident"), "INPUT.CROP.TYPE padded, not absolute"),
        (
            ("DATALOADER.PIPELINE", "resident", "DATALOADER.ON_CORRUPT", "skip", *PADDED),
            "no DATALOADER.ON_CORRUPT skip",
        ),
        ((*PADDED, "INPUT.PCA_COLOR_STD", 0.5), r"PCA_COLOR_STD is 0.5 \(command line\), but INPUT.CROP.TYPE padded"),
        (("DATALOADER.PIPELINE", "device", *PADDED), "Set PIPELINE to workers"),
        (("DATALOADER.PIPELINE", "device", "DATALOADER.ON_CORRUPT", "skip"), "Set PIPELINE to workers"),
        (("DATALOADER.ON_CORRUPT", "ignore"), r"ignore \(command line\), expected stop or skip"),
        (("DATALOADER.MAX_CORRUPT", 1.5), "DATALOADER.MAX_CORRUPT"),
        (("INPUT.CROP.TYPE", "padding"), "padding"),
        (("INPUT.RANDOM_FLIP", "vertical"), "expected horizontal or none"),
        (("DATASETS.HOLD_OUT", 64), "hold out"),
        (("SOLVER.CUDA_GRAPH", True), "MODEL.DEVICE is cpu"),
    ],
)
def test_keys_that_do_not_fit(pretrain_config, tmp_path, keys, words):
    with pytest.raises(InputError, match=words):
        pretraining.run(pretrain_config(tmp_path, *keys))


def test_a_graph_needs_resident_images(pretrain_config, shapes, tmp_path):
    with pytest.raises(ConfigError, match="PIPELINE is workers"):
        build_pipeline(pretrain_config(tmp_path, "SOLVER.CUDA_GRAPH", True), open_source(shapes))
