"""A detection configuration is tried, or its speed measured, and nothing of it stays."""

import re
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog

from resnet_backbone.detection import dry_run
from resnet_backbone.detection.data.datasets import register
from resnet_backbone.errors import InputError


@pytest.fixture
def small(detection_config, classifier):
    """The function `(output folder, KEY, VALUE, …)` that gives the configuration of a run that would take days."""

    def load(output, *overrides):
        keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", classifier("resnet18"), "SOLVER.MAX_ITER", 10**6)
        return detection_config("faster_rcnn_R50.yaml", output, *keys, "SOLVER.CHECKPOINT_PERIOD", 1000, *overrides)

    return load


@pytest.fixture
def output(tmp_path) -> Path:
    """OUTPUT_DIR; nothing may be left in or beside it."""
    yield tmp_path / "runs" / "run"
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_that_works(small, output, scenes, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "TEST_IMAGES", 4)
    cfg = small(output)
    before = cfg.dump()
    dry_run.try_run(cfg, iterations=4)
    printed = capsys.readouterr().out
    assert "resumed: the next iteration is 2\n" in printed
    assert re.findall(r"saved \S+/(model_\d+\.pth)", printed) == ["model_0000001.pth", "model_0000003.pth"]
    found = re.search(r"works: 4 iterations .* on (\d) images in \d+ s; at most (\S+) GiB of memory", printed)
    assert 3 <= int(found[1]) <= 4 and 0.1 < float(found[2]) < 20
    few = DatasetCatalog.get(f"some images of {scenes}")
    register(scenes)
    assert len(few) == int(found[1]) and all(record in DatasetCatalog.get(scenes) for record in few)
    assert cfg.dump() == before


def test_what_does_not_work_is_said_and_leaves_nothing(small, output):
    with pytest.raises(InputError, match=r"IN_FEATURES"):
        dry_run.try_run(small(output, "MODEL.RPN.IN_FEATURES", "p9"), iterations=2)


def test_throughput(small, output, capsys, scenes):
    dry_run.throughput(small(output), iterations=2)
    printed = capsys.readouterr().out
    assert "resnet18, batches of 2 images over 1 process(es), cpu, fp32; 2 iterations, after 2 of warm-up" in printed
    for data in (scenes, "one batch, repeated"):
        rate, waiting = re.search(rf"^{data} +([\d.]+) +([\d.]+)$", printed, re.MULTILINE).groups()
        assert float(rate) > 0 and 0 <= float(waiting) <= 100
