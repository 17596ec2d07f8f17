"""Lines of progress, and Weights & Biases by a stand-in for its client."""

import logging
import re
import sys
import types

import pytest
from detectron2.utils.events import EventStorage
from fvcore.common.param_scheduler import LinearParamScheduler

from resnet_backbone.engine import hooks
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.writers import Progress, WeightsAndBiases
from tests.engine.tiny import Run, build, metrics


class TestProgress:
    @pytest.fixture
    def clock(self, monkeypatch):
        clock = [100.0]
        monkeypatch.setattr("resnet_backbone.engine.writers.time.perf_counter", lambda: clock[0])
        return clock

    def test_a_line_by_hand(self, clock, caplog):
        """10 iterations from 20 in 30 s, 70 to go: 3 s each, 3 min 30 s left."""
        caplog.set_level(logging.INFO)
        with EventStorage(20) as storage:
            progress = Progress(100, 20)
            clock[0] += 30
            storage.iter = 25
            storage.put_scalars(test_loss=9.0, smoothing_hint=False)
            storage.iter = 29
            storage.put_scalars(loss_cls=1.23456, total_loss=2.5, top1_error=75.0, lr=0.001, smoothing_hint=False)
            storage.put_scalars(images_per_second=755.25, data_share=0.125, loss_scale=65536.0, smoothing_hint=False)
            progress.write()
            progress.write()  # nothing new: no second line
            storage.iter = 30
            storage.put_scalars(AP=20.0, lr=0.001, smoothing_hint=False)
            progress.write()  # an evaluation has lines of its own
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith("30/100  eta 0:03:30  ")
        for part in ("loss_cls 1.235", "total_loss 2.500", "top1_error 75", "lr 0.001", "755.2 images/s"):
            assert part in line
        assert line.endswith("waiting for data 12%") and "loss_scale" not in line and "test_loss" not in line

    def test_before_the_first_reading_there_is_no_line(self, clock, caplog):
        caplog.set_level(logging.INFO)
        with EventStorage(0) as storage:
            storage.put_scalar("lr", 0.1, smoothing_hint=False)
            Progress(10, 0).write()
        assert not caplog.records

    def test_in_a_run(self, caplog):
        caplog.set_level(logging.INFO)
        build(
            losses=lambda model, i: ({"loss_x": model.weight.sum() * 0 + 1.0}, {}),
            hooks=[hooks.LearningRate(LinearParamScheduler(1.0, 0.0)), hooks.Writers([Progress(10, 0)])],
        ).train(0, 10)
        lines = [r.getMessage() for r in caplog.records if "images/s" in r.getMessage()]
        assert [line.split()[0] for line in lines] == ["4/10", "8/10", "10/10"]
        assert all(re.search(r"eta 0:00:00  loss_x 1\.000  total_loss 1\.000  lr \S+  \S+ images/s", x) for x in lines)


class FakeClient(types.ModuleType):
    """The part of wandb that is used, with its rule that steps never go back: what is older is dropped."""

    def __init__(self):
        super().__init__("wandb")
        self.asked, self.logged, self.finished = [], [], 0

    def init(self, *, project, name, dir, config, id, resume):
        self.asked.append(dict(project=project, name=name, dir=dir, config=config, id=id, resume=resume))
        self.id = id or "abc123"
        self.step = -1
        return self

    def log(self, values, *, step):
        assert step > self.step, f"step {step} after {self.step} would be dropped"
        self.step = step
        assert all(isinstance(value, float) for value in values.values())
        self.logged.append((step, dict(values)))

    def finish(self):
        self.finished += 1


@pytest.fixture
def client(monkeypatch):
    client = FakeClient()
    monkeypatch.setitem(sys.modules, "wandb", client)
    return client


class TestWeightsAndBiases:
    def test_each_metric_once_at_its_iteration(self, client, tmp_path):
        with EventStorage(0) as storage:
            writer = WeightsAndBiases("depth", tmp_path, {"SEED": "3"})
            storage.put_scalar("loss", 1.0, smoothing_hint=False)
            writer.write()
            writer.write()
            storage.iter = 5
            storage.put_scalar("AP", 2.0, smoothing_hint=False)
            storage.iter = 7
            storage.put_scalars(loss=3.0, lr=0.1, smoothing_hint=False)
            writer.write()
            writer.close()
        assert client.logged == [(0, {"loss": 1.0}), (5, {"AP": 2.0}), (7, {"loss": 3.0, "lr": 0.1})]
        assert client.finished == 1

    def test_a_run_is_reported_as_in_metrics_json(self, client, cfg, tmp_path):
        cfg.WANDB_PROJECT = "depth"
        cfg.TEST.EVAL_PERIOD = 3
        Run(cfg, tmp_path / "run")
        (asked,) = client.asked
        assert (asked["project"], asked["name"], asked["dir"]) == ("depth", "run", str(tmp_path / "run"))
        assert asked["id"] is None and asked["resume"] == "allow"
        assert asked["config"]["SOLVER.BASE_LR"] == "0.05"
        logged = [{"iteration": step, **values} for step, values in client.logged]
        assert logged == metrics(tmp_path / "run")
        assert client.finished == 1

    def test_a_resumed_run_is_the_same_one(self, client, cfg, tmp_path):
        cfg.WANDB_PROJECT = "depth"
        Run(cfg, tmp_path / "run", stop_at=6)
        Run(cfg, tmp_path / "run", resume=True)
        assert [asked["id"] for asked in client.asked] == [None, "abc123"]
        assert client.finished == 2

    def test_without_a_project_the_client_is_left_alone(self, client, cfg, tmp_path):
        Run(cfg, tmp_path / "run")
        assert client.asked == []

    def test_a_missing_client(self, monkeypatch, cfg, tmp_path):
        monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
        cfg.WANDB_PROJECT = "depth"
        with pytest.raises(ConfigError, match=r"WANDB_PROJECT is depth, but wandb .*pip install wandb"):
            Run(cfg, tmp_path / "run")
        assert not list((tmp_path / "run").glob("*.pth"))
