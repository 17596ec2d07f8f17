import logging
import re

import pytest
import torch
from detectron2.utils.events import EventStorage, EventWriter
from fvcore.common.param_scheduler import LinearParamScheduler
from torch import nn

from resnet_backbone.engine import hooks
from resnet_backbone.engine.trainer import NonFiniteLossError, Trainer


def run(hook_list, *, start=0, stop=10, lr=0.5, loss=None) -> Trainer:
    model = nn.Linear(1, 1)
    trainer = Trainer(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        batches=lambda start: iter(range(start, 10**6)),
        compute=lambda model, i: ({"loss_x": model.weight.sum() * 0 + (loss(i) if loss else 1.0)}, {}),
        images_per_batch=2,
        seed=0,
        log_period=4,
    )
    trainer.register_hooks(hook_list)
    trainer.train(start, stop)
    return trainer


class Recorder(EventWriter):
    def __init__(self):
        self.written, self.closed = [], 0

    def write(self):
        from detectron2.utils.events import get_event_storage

        self.written.append(get_event_storage().iter)

    def close(self):
        self.closed += 1


def test_learning_rate_is_a_function_of_the_iteration():
    seen = []

    class See(hooks.HookBase):
        def after_step(self):
            stored = self.trainer.storage.latest()["lr"][0]
            seen.append((self.trainer.optimizer.param_groups[0]["lr"], stored))

    run([hooks.LearningRate(LinearParamScheduler(1.0, 0.0)), See()], start=6, stop=10)
    assert [lr for lr, _ in seen] == pytest.approx([0.5 * 0.4, 0.5 * 0.3, 0.5 * 0.2, 0.5 * 0.1])
    assert all(lr == stored for lr, stored in seen)


@pytest.mark.parametrize(
    ("period", "start", "expected"),
    [(4, 0, [3, 7, 9]), (5, 0, [4, 9]), (0, 0, [9]), (-1, 0, [9]), (100, 0, [9]), (4, 5, [7, 9])],
)
def test_checkpoints_by_period_and_at_the_end(period, start, expected):
    saved = []
    run([hooks.Checkpoints(saved.append, period)], start=start)
    assert saved == expected


def test_no_checkpoint_after_a_loss_that_is_no_number():
    saved = []
    with pytest.raises(NonFiniteLossError):
        run([hooks.Checkpoints(saved.append, 2)], loss=lambda i: float("nan") if i >= 4 else 1.0)
    assert saved == [1, 3]


def test_only_the_main_process_saves(monkeypatch):
    saved = []
    monkeypatch.setattr("resnet_backbone.engine.hooks.comm.is_main_process", lambda: False)
    run([hooks.Checkpoints(saved.append, 2)])
    assert saved == []


@pytest.mark.parametrize(("period", "expected"), [(0, []), (3, [2, 5, 8]), (5, [4]), (10, [])])
def test_evaluation_by_period_but_not_after_the_last(period, expected):
    seen = []

    class See(hooks.HookBase):
        def after_step(self):
            latest = self.trainer.storage.latest()
            if "bbox/AP" in latest:
                seen.append(latest["bbox/AP"])

    evaluated = []

    def evaluate():
        evaluated.append(True)
        return {"bbox": {"AP": 10.0 * len(evaluated)}}

    run([hooks.Evaluation(evaluate, period), See()])
    assert sorted(set(seen)) == [(10.0 * (i + 1), iteration) for i, iteration in enumerate(expected)]
    assert len(evaluated) == len(expected)


def test_weights_that_are_no_numbers_are_not_evaluated():
    evaluated = []
    with pytest.raises(NonFiniteLossError):
        run([hooks.Evaluation(lambda: evaluated.append(1) or {}, 2)], loss=lambda i: float("inf"))
    assert not evaluated


def test_writers_by_period_at_the_end_and_closed():
    recorder = Recorder()
    run([hooks.Writers([recorder], 4)])
    assert recorder.written[:3] == [3, 7, 9] and recorder.closed == 1


def test_writers_are_closed_after_an_exception_that_comes_through():
    recorder = Recorder()

    def fail(i):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run([hooks.Writers([recorder, hooks.Progress(10, 0)], 4)], loss=fail)
    assert recorder.closed == 1


class TestProgress:
    @pytest.fixture
    def clock(self, monkeypatch):
        clock = [100.0]
        monkeypatch.setattr("resnet_backbone.engine.hooks.time.perf_counter", lambda: clock[0])
        return clock

    def test_a_line_by_hand(self, clock, caplog):
        """10 iterations from 20 in 30 s, 70 to go: 3 s each, 3 min 30 s left."""
        caplog.set_level(logging.INFO)
        with EventStorage(20) as storage:
            progress = hooks.Progress(100, 20)
            clock[0] += 30
            storage.iter = 29
            storage.put_scalars(loss_cls=1.23456, total_loss=2.5, top1_error=75.0, lr=0.001, smoothing_hint=False)
            storage.put_scalars(images_per_second=755.25, data_share=0.125, smoothing_hint=False)
            progress.write()
            progress.write()  # nothing new: no second line
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith("30/100  left 0:03:30  ")
        for part in ("loss_cls 1.235", "total_loss 2.500", "top1_error 75", "lr 0.001", "755.2 images/s"):
            assert part in line
        assert line.endswith("waiting for data 12%")

    def test_before_the_first_reading_there_is_no_line(self, clock, caplog):
        caplog.set_level(logging.INFO)
        with EventStorage(0) as storage:
            storage.put_scalar("lr", 0.1, smoothing_hint=False)
            hooks.Progress(10, 0).write()
        assert not caplog.records

    def test_in_a_run(self, caplog):
        caplog.set_level(logging.INFO)
        run([hooks.LearningRate(LinearParamScheduler(1.0, 0.0)), hooks.Writers([hooks.Progress(10, 0)], 4)])
        lines = [r.getMessage() for r in caplog.records if "images/s" in r.getMessage()]
        assert [line.split()[0] for line in lines] == ["4/10", "8/10", "10/10"]
        assert all(re.search(r"left 0:00:00  loss_x 1\.000  total_loss 1\.000  lr \S+  \S+ images/s", x) for x in lines)
