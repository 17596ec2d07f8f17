import pytest
import torch
from detectron2.utils.events import EventWriter, get_event_storage
from fvcore.common.param_scheduler import ConstantParamScheduler, LinearParamScheduler
from torch import nn

from resnet_backbone.engine import hooks
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.nonfinite import NonFiniteLossError
from resnet_backbone.engine.schedule import Plateau, WarmUpUntil
from resnet_backbone.engine.trainer import Trainer
from resnet_backbone.engine.writers import Progress


def run(hook_list, *, start=0, stop=10, lr=0.5, loss=None) -> Trainer:
    model = nn.Linear(1, 1)
    trainer = Trainer(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        batches=lambda start: iter(range(start, 10**6)),
        loss_fn=lambda model, i: ({"loss_x": model.weight.sum() * 0 + (loss(i) if loss else 1.0)}, {}),
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


@pytest.mark.parametrize(
    ("period", "start", "expected"),
    [(0, 0, []), (3, 0, [3, 6, 9]), (5, 0, [5]), (10, 0, []), (3, 4, [6, 9]), (3, 6, [6, 9]), (3, 3, [3, 6, 9])],
)
def test_evaluation_by_period_but_not_after_the_last(period, start, expected):
    """Stamped with the number of finished iterations; a run that starts where one is due begins with it."""
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

    run([hooks.Evaluation(evaluate, period), See()], start=start)
    assert sorted(set(seen)) == [(10.0 * (i + 1), iteration) for i, iteration in enumerate(expected)]
    assert len(evaluated) == len(expected)


def test_weights_that_are_no_numbers_are_not_evaluated():
    evaluated = []
    with pytest.raises(NonFiniteLossError):
        run([hooks.Evaluation(lambda: evaluated.append(1) or {}, 2)], loss=lambda i: float("inf"))
    assert not evaluated


class TestWriters:
    def test_after_each_reading_and_closed(self):
        recorder = Recorder()
        run([hooks.LearningRate(ConstantParamScheduler(1.0)), hooks.Writers([recorder])])
        assert recorder.written == [3, 7, 9] and recorder.closed == 1

    def test_after_each_evaluation(self):
        """At once: a run that is killed and resumed does not evaluate again."""
        recorder = Recorder()
        run([hooks.Evaluation(lambda: {"AP": 1.0}, 3), hooks.Writers([recorder])])
        assert recorder.written == [3, 6, 7, 9]

    def test_what_each_iteration_stores_is_no_reason(self):
        """Detectron2's models count anchors and RoIs in each of them."""
        recorder = Recorder()

        def count_anchors(i):
            get_event_storage().put_scalar("rpn/num_pos_anchors", i)
            return 1.0

        run([hooks.Writers([recorder])], loss=count_anchors)
        assert recorder.written == [3, 7, 9]

    @pytest.mark.parametrize(("stop", "expected"), [(6, [3, 6]), (5, [3]), (4, [3])])
    def test_what_was_measured_before_an_exception_is_written_and_nothing_twice(self, stop, expected):
        def fail(i):
            if i == stop:
                raise ZeroDivisionError
            return 1.0

        recorder = Recorder()
        writers = hooks.Writers([recorder, Progress(10, 0)])
        with pytest.raises(ZeroDivisionError):
            run([hooks.Evaluation(lambda: {"AP": 1.0}, 3), writers], loss=fail)
        assert recorder.written == expected and recorder.closed == 1


PLATEAU = dict(gamma=0.5, patience=0, threshold=0.0)


class TestBest:
    """Of four evaluations, after 2, 4, 6 and 8 iterations; the end's is the caller's."""

    def evaluate(self, scores, metric="bbox/AP", **arguments):
        given = iter(scores)
        return hooks.Evaluation(lambda: {"bbox": {"AP": next(given), "AR": 1.0}}, 2, metric=metric, **arguments)

    def test_each_new_best_is_saved_with_its_results(self):
        saved = []
        hook = self.evaluate([3.0, 5.0, 5.0, 6.0], save_best=saved.append)
        run([hook])
        assert [results["bbox/AP"] for results in saved] == [3.0, 5.0, 6.0] and saved[0]["bbox/AR"] == 1.0
        assert hook.state_dict() == {"metric": hook.metric, "best": 6.0, "waited": 0, "evaluated": 8}

    def test_a_restored_best_is_not_beaten_by_less(self):
        saved = []
        hook = self.evaluate([3.0, 5.0, 4.0, 4.0], save_best=saved.append)
        hook.load_state_dict({"best": 4.5})
        run([hook])
        assert [results["bbox/AP"] for results in saved] == [5.0]

    def test_a_score_that_is_no_number_is_never_the_best(self):
        saved = []
        hook = self.evaluate([float("nan"), 2.0, float("nan"), 1.0], save_best=saved.append)
        run([hook])
        assert [results["bbox/AP"] for results in saved] == [2.0] and hook.best == 2.0

    def test_a_metric_that_there_is_not_stops(self):
        saved = []
        hook = self.evaluate([1.0] * 4, metric="segm/AP", save_best=saved.append, plateau=Plateau(**PLATEAU))
        with pytest.raises(ConfigError, match=r"TEST.BEST_METRIC is segm/AP, which .* the nearest is bbox/AP\."):
            run([hook])
        assert saved == []

    def test_the_main_process_saves(self, monkeypatch):
        monkeypatch.setattr("resnet_backbone.engine.hooks.comm.is_main_process", lambda: False)
        saved = []
        hook = self.evaluate([1.0] * 4, save_best=saved.append)
        run([hook])
        assert saved == [] and hook.best == 1.0


class Rates(hooks.HookBase):
    def __init__(self):
        self.seen = []

    def after_step(self):
        self.seen.append(self.trainer.optimizer.param_groups[0]["lr"])


def test_a_plateau_lowers_the_rate_of_the_iteration_that_follows_the_evaluation():
    plateau, scores, rates = Plateau(**PLATEAU), iter([5.0, 5.0, 6.0, 5.0]), Rates()
    evaluation = hooks.Evaluation(lambda: {"AP": next(scores)}, 2, metric="AP", plateau=plateau)
    run([evaluation, hooks.LearningRate(ConstantParamScheduler(1.0), plateau=plateau), rates], lr=0.8)
    assert rates.seen == [0.8] * 4 + [0.4] * 4 + [0.2] * 2


def test_warm_up_ends_with_the_reading_below_the_limit():
    """Readings after 4, 8 and 10 iterations; the error is that of the window's mean, and rises again."""
    errors = [90, 90, 90, 10, 90, 40, 40, 90, 99, 99]  # means 70, 65, 99
    for limit, expected in ((60, 10), (66, 8), (71, 4)):
        rates, warm_up = Rates(), WarmUpUntil(metric="loss_x", limit=limit, low=0.1)
        run(
            [hooks.LearningRate(ConstantParamScheduler(1.0), warm_up=warm_up), rates],
            loss=lambda i: float(errors[i]),
        )
        assert rates.seen == pytest.approx([0.05] * expected + [0.5] * (10 - expected))


def test_a_second_checkpoint_of_the_same_iteration_is_not_written():
    saved = []
    checkpoints = hooks.Checkpoints(saved.append, 2)

    class Again(hooks.HookBase):
        def after_step(self):
            checkpoints.save(self.trainer.iter)

    run([checkpoints, Again()], stop=4)
    assert saved == [0, 1, 2, 3]
