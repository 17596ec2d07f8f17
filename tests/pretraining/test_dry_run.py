import re
import time
from pathlib import Path

import pytest

from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.sources import open_source, register_source
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.dry_run import _shortened
from resnet_backbone.errors import InputError
from resnet_backbone.pretraining import dry_run

SECONDS = 0.01  # that reading an image takes from a slow disk


class SlowSource(ClassificationSource):
    def __init__(self, pattern):
        self.source = open_source(pattern)
        super().__init__(self.source.class_names, self.source.labels)

    def read(self, index):
        time.sleep(SECONDS)
        return self.source.read(index)

    def describe(self, index):
        return self.source.describe(index)


class BadSource(SlowSource):
    def read(self, index):
        return b"no image"


@pytest.fixture
def output(tmp_path) -> Path:
    """OUTPUT_DIR; nothing may be left in or beside it."""
    yield tmp_path / "runs" / "run"
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_that_works(pretrain_config, output, capsys):
    cfg = pretrain_config(output, "SOLVER.MAX_ITER", 10**6, "SOLVER.CHECKPOINT_PERIOD", 1000)
    before = cfg.dump()
    dry_run.try_run(cfg, iterations=5)
    printed = capsys.readouterr().out
    assert "resumed: the next iteration is 2\n" in printed
    saved = re.findall(r"saved \S+/(model_\d+\.pth)", printed)
    assert saved == ["model_0000001.pth", "model_0000004.pth"]
    # In the middle of the first half, once in the second, and after each.
    assert printed.count("of 16 images") >= 4  # two batches of the 64
    found = re.search(r"works: 5 iterations .* on 16 images in \d+ s; at most (\S+) GiB of memory", printed)
    assert 0.1 < float(found[1]) < 20  # more than an interpreter, less than a server's
    assert cfg.dump() == before


def test_a_configuration_without_a_test_set_works(pretrain_config, output, capsys):
    dry_run.try_run(pretrain_config(output, "DATASETS.TEST", ()), iterations=2)
    assert re.search(r"works: 2 iterations .* and no evaluation in \d+ s", capsys.readouterr().out)


def test_it_tests_on_images_from_the_whole_test_set(pretrain_config, shapes, output):
    cfg = pretrain_config(output, "TEST.IMS_PER_BATCH", 5)
    dry_run._test_on_few(cfg)
    source, few = open_source(shapes), open_source(cfg.DATASETS.TEST[0])
    assert len(few) == 10 and few.class_names == source.class_names
    assert few.indices.tolist() == [0, 7, 14, 21, 28, 35, 42, 49, 56, 63]
    assert few.read(3) == source.read(21) and few.labels[3] == source.labels[21]


@pytest.mark.parametrize(
    ("warm_up", "rate"),
    [
        (("SOLVER.WARMUP_ITERS", 0), 0.05),
        (("SOLVER.WARMUP_ITERS", 100, "SOLVER.WARMUP_FACTOR", 0.01), 0.0005),
        (("SOLVER.WARMUP_ITERS", 100, "SOLVER.WARMUP_FACTOR", 0.01, "SOLVER.WARMUP_UNTIL_ERROR", 80), 0.05),
    ],
)
def test_the_learning_rate_is_that_of_the_first_iteration(pretrain_config, output, warm_up, rate):
    cfg = pretrain_config(output, "SOLVER.BASE_LR", 0.05, *warm_up)
    short = _shortened(cfg, output, {"SOLVER.MAX_ITER": 3})
    found = short.SOLVER.BASE_LR
    assert found == pytest.approx(rate)
    assert (short.SOLVER.WARMUP_ITERS, short.SOLVER.MAX_ITER) == (0, 3)


def test_what_does_not_work_is_said_and_leaves_nothing(pretrain_config, shapes, output):
    register_source("bad images", lambda _: BadSource(shapes))
    with pytest.raises(InputError, match="is unreadable"):
        dry_run.try_run(pretrain_config(output, "DATASETS.TEST", "bad images"), iterations=2)


def test_throughput_of_slow_data(pretrain_config, shapes, output, capsys):
    register_source("slow images", lambda _: SlowSource(shapes))
    dry_run.throughput(pretrain_config(output, "DATASETS.TRAIN", "slow images"), iterations=3)
    head, *table = capsys.readouterr().out.splitlines()
    assert head == ("resnet18, batches of 8 images over 1 process(es), cpu, fp32; 3 iterations, after 3 of warm-up")
    slow, repeated = (re.fullmatch(r"(.*?) {2,}([\d.]+) +([\d.]+)", line).groups() for line in table[2:])
    assert slow[0] == "slow images" and repeated[0] == "one batch, repeated"
    # Of the time for a batch, 8 × 10 ms go by in reading.
    rate, share = float(slow[1]), float(slow[2])
    assert rate < 1 / SECONDS and share == pytest.approx(100 * SECONDS * rate, rel=0.5)
    assert share >= 100 * SECONDS * rate * 0.98
    assert float(repeated[1]) > rate and float(repeated[2]) < 5


@pytest.mark.parametrize(("check", "iterations"), [(dry_run.try_run, 1), (dry_run.throughput, 0)])
def test_too_few_iterations(pretrain_config, output, check, iterations):
    with pytest.raises(ConfigError, match=f"is {iterations}, expected at least {iterations + 1}"):
        check(pretrain_config(output), iterations=iterations)


def test_a_folder_that_cannot_be_written(pretrain_config):
    with pytest.raises(ConfigError, match="/proc, for OUTPUT_DIR /proc/nope, cannot be written"):
        dry_run.try_run(pretrain_config("/proc/nope"), iterations=2)


@pytest.mark.gpu
def test_on_a_gpu(pretrain_config, output, capsys):
    cfg = pretrain_config(output, "MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", True)
    dry_run.try_run(cfg, iterations=4)
    assert "GPU memory" in capsys.readouterr().out
    dry_run.throughput(cfg, iterations=3)
    assert "cuda, bf16" in capsys.readouterr().out
