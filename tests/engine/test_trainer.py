import json
import random

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import JSONWriter
from torch import nn

from resnet_backbone.engine.hooks import Writers
from resnet_backbone.engine.trainer import NonFiniteLossError, Trainer, seed_iteration
from resnet_backbone.errors import InputError


def build(model=None, losses=None, *, optimizer=None, hooks=(), **arguments) -> Trainer:
    """A trainer whose batch is the iteration's number; `losses` maps (model, iteration) to the two dicts."""
    model = model or nn.Linear(1, 1)

    def default(model, iteration):
        return {"loss": model(torch.ones(1, 1)).sum()}, {}

    defaults = dict(images_per_batch=4, seed=1, log_period=4)
    trainer = Trainer(
        model=model,
        optimizer=optimizer or torch.optim.SGD(model.parameters(), lr=0.0),
        batches=lambda start: iter(range(start, 10**6)),
        compute=losses or default,
        **{**defaults, **arguments},
    )
    trainer.register_hooks(list(hooks))
    return trainer


class Record(HookBase):
    """What the hooks of a run are called with."""

    def __init__(self, state=lambda trainer: None):
        self.calls, self.state = [], state

    def before_train(self):
        self.calls.append(("before_train", self.trainer.iter, self.trainer.storage.iter))

    def before_step(self):
        self.calls.append(("before_step", self.trainer.iter, self.trainer.storage.iter))

    def after_step(self):
        self.calls.append(("after_step", self.trainer.iter, self.state(self.trainer)))

    def after_train(self):
        self.calls.append(("after_train", self.trainer.iter, self.trainer.storage.iter))


def test_hooks_and_iterations():
    record = Record()
    build(hooks=[record]).train(3, 5)
    assert record.calls == [
        ("before_train", 3, 3),
        ("before_step", 3, 3),
        ("after_step", 3, None),
        ("before_step", 4, 4),
        ("after_step", 4, None),
        ("after_train", 5, 5),
    ]


def test_one_step_is_the_optimizers():
    """Weights after three steps of SGD with momentum on a quadratic, by hand."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)

    def losses(model, iteration):
        return {"a": 0.5 * model.weight.square().sum(), "b": (3 * model.weight).sum()}, {"unused": model.weight.sum()}

    build(model, losses, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)).train(0, 3)
    weight, velocity = 2.0, 0.0
    for _ in range(3):
        velocity = 0.9 * velocity + (weight + 3)
        weight -= 0.1 * velocity
    assert model.weight.item() == pytest.approx(weight, rel=1e-6)


def test_metrics_are_means_over_their_window(tmp_path):
    """Values known by iteration; a checkpoint's check in between must take nothing out of the window."""

    def losses(model, i):
        return {"loss_a": model.weight.sum() * 0 + i, "loss_b": torch.tensor(2.0 * i)}, {
            "error": torch.tensor(float(i**2))
        }

    class Check(HookBase):
        def after_step(self):
            if self.trainer.iter in (1, 5):
                self.trainer.check_finite()

    writer = Writers([JSONWriter(str(tmp_path / "metrics.json"))], period=4)
    build(losses=losses, hooks=[Check(), writer]).train(0, 10)
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [3, 7, 9]
    for line, window in zip(lines, (range(4), range(4, 8), range(8, 10)), strict=True):
        mean = sum(window) / len(window)
        assert line["loss_a"] == mean and line["loss_b"] == 2 * mean and line["total_loss"] == 3 * mean
        assert line["error"] == sum(i**2 for i in window) / len(window)
        assert line["images_per_second"] > 0 and 0 <= line["data_share"] <= 1


def test_the_rate_counts_training_only(monkeypatch):
    """A clock that each event advances by known seconds: 1 for data, 2 for the step, 100 for the hooks."""
    clock = [0.0]
    monkeypatch.setattr("resnet_backbone.engine.trainer.time.perf_counter", lambda: clock[0])

    def batches(start):
        while True:
            clock[0] += 1
            yield None

    def losses(model, batch):
        clock[0] += 2
        return {"loss": model.weight.sum()}, {}

    class Slow(HookBase):
        def after_step(self):
            clock[0] += 100

    record = Record(lambda trainer: {k: v for k, (v, _) in trainer.storage.latest().items()})
    trainer = build(losses=losses, hooks=[Slow(), record])
    trainer._batches = batches
    trainer.train(0, 8)
    for call in (record.calls[8], record.calls[16]):
        assert call[0] == "after_step"
        assert call[2]["images_per_second"] == pytest.approx(4 / 3)
        assert call[2]["data_share"] == pytest.approx(1 / 3)


class TestNonFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_loss_stops_at_the_next_reading(self, value):
        def losses(model, i):
            return {"loss_a": model.weight.sum() + (value if i == 5 else 0), "loss_b": torch.tensor(1.0)}, {}

        record = Record()
        with pytest.raises(NonFiniteLossError) as caught:
            build(losses=losses, hooks=[record]).train(0, 20)
        assert record.calls[-2:] == [("before_step", 7, 7), ("after_train", 7, 7)]
        message = str(caught.value)
        for part in ("loss_a, total_loss", "iteration 7", "last 4", "learning rate 0", "SOLVER.BASE_LR"):
            assert part in message
        assert isinstance(caught.value, InputError) and "loss_b" not in message

    def test_a_check_finds_it_within_the_window(self):
        def losses(model, i):
            return {"loss": model.weight.sum() + (float("nan") if i == 5 else 0)}, {}

        class Check(HookBase):
            def after_step(self):
                self.trainer.check_finite()

        with pytest.raises(NonFiniteLossError, match="iteration 5"):
            build(losses=losses, hooks=[Check()]).train(0, 20)

    def test_a_check_finds_weights_that_a_finite_loss_spoilt(self):
        """The square root's gradient at 0 is infinite: the loss of this iteration is 0, the weights are lost."""
        model = nn.Linear(1, 1)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = build(model, lambda model, i: ({"loss": model.weight.abs().sqrt().sum()}, {}), optimizer=optimizer)

        class Check(HookBase):
            def after_step(self):
                self.trainer.check_finite()

        trainer.register_hooks([Check()])
        with pytest.raises(NonFiniteLossError, match=r"1 of 2 tensors of the model \(weight"):
            trainer.train(0, 20)
        assert trainer.iter == 0


class TestStopping:
    def test_an_input_error_leaves_no_stack_trace_in_the_log(self, caplog):
        def losses(model, i):
            raise InputError("the image x.jpg cannot be read.")

        with pytest.raises(InputError):
            build(losses=losses).train(0, 2)
        assert "Traceback" not in caplog.text

    def test_another_exception_is_logged_with_its_stack_trace_and_the_hooks_end(self, caplog):
        def losses(model, i):
            raise KeyError("bug")

        record = Record()
        with pytest.raises(KeyError):
            build(losses=losses, hooks=[record]).train(0, 2)
        assert "training stopped at iteration 0" in caplog.text and "Traceback" in caplog.text
        assert record.calls[-1] == ("after_train", 0, 0)

    def test_the_loader_is_let_go(self):
        closed = []

        def batches(start):
            try:
                while True:
                    yield start
            finally:
                closed.append(True)

        trainer = build()
        trainer._batches = batches
        trainer.train(0, 2)
        assert closed == [True]


class TestPrecision:
    @pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
    def test_forward_pass(self, precision, dtype):
        seen = []

        def losses(model, i):
            output = model(torch.ones(2, 1))
            seen.append(output.dtype)
            return {"loss": output.float().mean()}, {}

        model = nn.Linear(1, 1)
        build(model, losses, precision=precision).train(0, 1)
        assert seen == [dtype]
        assert model.weight.dtype == model.weight.grad.dtype == torch.float32

    def test_metrics_of_bf16_are_averaged_in_fp32(self):
        """256 + 1 is 256 in bf16: a sum in that type would lose the small values."""
        values = [256.0, 1.0, 1.0, 1.0]
        record = Record(lambda trainer: trainer.storage.latest().get("loss", (None,))[0])
        build(
            losses=lambda model, i: ({"loss": model.weight.sum().bfloat16() * 0 + values[i]}, {}), hooks=[record]
        ).train(0, 4)
        assert record.calls[-2][2] == sum(values) / 4


class TestRandomNumbers:
    def draw(self):
        return torch.rand(3).tolist(), np.random.rand(), random.random()

    def test_a_function_of_seed_iteration_and_rank(self):
        drawn = []
        for key in ((1, 2, 3), (1, 2, 3), (9, 2, 3), (1, 9, 3), (1, 2, 9), (2, 1, 3)):
            seed_iteration(*key)
            drawn.append(self.draw())
        assert drawn[0] == drawn[1]
        for other in drawn[2:]:
            assert all(a != b for a, b in zip(drawn[0], other, strict=True))

    def test_the_forward_pass_draws_by_iteration(self):
        def run(start):
            seen = {}

            def losses(model, i):
                seen[i] = self.draw()
                return {"loss": model.weight.sum()}, {}

            torch.rand(5), np.random.rand(7)
            build(losses=losses).train(start, 6)
            return seen

        whole, later = run(0), run(4)
        assert later == {i: whole[i] for i in (4, 5)}
        assert len({str(v) for v in whole.values()}) == 6


class TestState:
    def test_the_new_runs_settings_survive_but_momentum_is_loaded(self):
        model = nn.Linear(1, 2)
        old = build(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5))
        for group in old.optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # as the learning rate's hook does
        old.train(0, 2)
        new = build(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.8))
        new.load_state_dict(old.state_dict())
        group = new.optimizer.param_groups[0]
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.8, 0)
        assert "initial_lr" not in group
        assert group["params"][0] is model.weight
        for parameter in model.parameters():
            expected = old.optimizer.state[parameter]["momentum_buffer"]
            assert torch.equal(new.optimizer.state[parameter]["momentum_buffer"], expected)

    def test_another_number_of_groups_is_an_error(self):
        one, two = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        groups = [{"params": list(layer.parameters())} for layer in two]
        with pytest.raises(ValueError, match="parameter groups"):
            build(two, optimizer=torch.optim.SGD(groups, lr=0.1)).load_state_dict(build(one).state_dict())
