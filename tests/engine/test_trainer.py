import json
import logging
import random
import sys

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import JSONWriter
from fvcore.common.param_scheduler import LinearParamScheduler
from torch import nn

from resnet_backbone.engine.hooks import LearningRate, Writers
from resnet_backbone.engine.nonfinite import NonFiniteLossError
from resnet_backbone.engine.trainer import seed_iteration
from resnet_backbone.errors import InputError
from tests.engine.tiny import assert_equal, build


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

    writer = Writers([JSONWriter(str(tmp_path / "metrics.json"))])
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


def nan_at(iteration, name="loss_a"):
    """Losses of which one is not a number in this iteration."""

    def losses(model, i):
        loss = model(torch.full((1, 1), float(i))).sum()
        bad = float("nan") if i == iteration else 0.0
        return {
            "loss_a": loss + (bad if name == "loss_a" else 0),
            "loss_b": loss * 0 + (bad if name != "loss_a" else 0),
        }, {}

    return losses


class Check(HookBase):
    """As before a checkpoint."""

    def after_step(self):
        self.trainer.check_finite()


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
        for part in ("iteration 5 gave", "learning rate 0.", "in the loss loss_a (all layers", "SOLVER.BASE_LR"):
            assert part in message
        assert isinstance(caught.value, InputError) and "loss_b" not in message and "images" not in message

    def test_the_message_is_of_the_iteration_not_of_the_reading(self, caplog):
        """The rate at that iteration, its images by name, in full in the log."""
        hook = LearningRate(LinearParamScheduler(1.0, 0.0))
        model = nn.Linear(1, 1)
        trainer = build(
            model,
            nan_at(5, "loss_b"),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.2),
            hooks=[hook],
            names=lambda i: [f"image{i}{letter}.jpg" for letter in "abcdef"],
        )
        with caplog.at_level(logging.ERROR), pytest.raises(NonFiniteLossError) as caught:
            trainer.train(2, 20)
        message = str(caught.value)
        assert "iteration 5 gave" in message and "at learning rate 0.15." in message
        assert "in the loss loss_b" in message
        assert "Its images: image5a.jpg, image5b.jpg, image5c.jpg, image5d.jpg and 2 more (in the log)." in message
        assert (
            "images of iteration 5: image5a.jpg, image5b.jpg, image5c.jpg, image5d.jpg, image5e.jpg, image5f.jpg"
            in (caplog.text)
        )

    def test_a_layer_is_named(self):
        """The second run has the iteration's own random numbers: the same values are dropped."""

        class Reciprocal(nn.Module):
            def forward(self, x):
                return 1 / x

        model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5), Reciprocal())
        with pytest.raises(NonFiniteLossError, match=r"It appeared first in the output of 2\. ") as caught:
            build(model, lambda model, i: ({"loss": model(torch.ones(1, 1)).sum()}, {})).train(0, 100)
        assert "nothing" not in str(caught.value)

    def test_a_check_finds_it_within_the_window(self):
        with pytest.raises(NonFiniteLossError, match="iteration 5 gave"):
            build(losses=nan_at(5), hooks=[Check()]).train(0, 20)

    def test_a_gradient_that_a_finite_loss_has(self):
        """The square root's gradient at 0 is infinite: the loss of this iteration is 0."""
        model = nn.Linear(1, 1)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = build(model, lambda model, i: ({"loss": model.weight.abs().sqrt().sum()}, {}), optimizer=optimizer)
        with pytest.raises(NonFiniteLossError, match=r"iteration 0 gave .* in the gradient of weight\."):
            trainer.train(0, 20)
        assert model.weight.item() == 0

    def test_a_check_finds_weights_that_a_finite_step_spoilt(self):
        """A gradient of 1e30 times a rate of 1e20 is beyond single precision."""
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e20)
        trainer = build(
            model, lambda m, i: ({"loss": m.weight.sum() * 1e18 * 10}, {}), optimizer=optimizer, hooks=[Check()]
        )
        nn.init.zeros_(model.weight)
        with pytest.raises(NonFiniteLossError, match=r"1 of 2 tensors of the model \(weight"):
            trainer.train(0, 20)
        assert trainer.iter == 0

    def test_detectron2s_own_refusal_says_the_same(self, caplog):
        """Its proposals raise FloatingPointError at once, with words that name no iteration."""
        model = nn.Sequential(nn.Linear(1, 1))

        def losses(model, i):
            model(torch.full((1, 1), float("nan") if i == 5 else 1.0))
            if i == 5:
                raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")
            return {"loss": model(torch.ones(1, 1)).sum()}, {}

        with pytest.raises(NonFiniteLossError, match=r"iteration 5 gave .* in the input of 0\. Its images: 5\.jpg"):
            build(model, losses, names=lambda i: [f"{i}.jpg"]).train(0, 20)
        assert "Traceback" not in caplog.text


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
    @pytest.mark.parametrize(
        ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
    )
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


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_hooks_see_the_whole_gradient_after_the_backward_pass(precision):
    """Once an iteration, of all micro-batches together, without a loss scale, before the step."""
    seen = []

    class See(HookBase):
        def after_backward(self):
            (weight,) = self.trainer.model.parameters()
            seen.append((self.trainer.iter, weight.grad.item(), weight.item()))

    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    build(
        model,
        lambda model, batch: ({"loss": (model.weight * batch[0]).mean()}, {}),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5, fused=True),
        batches=lambda start: ((torch.tensor([[1.0], [3.0]]),) for _ in iter(int, 1)),
        precision=precision,
        accumulate=2,
        hooks=[See()],
    ).train(0, 2)
    assert seen == [(0, 2.0, 1.0), (1, 2.0, 0.0)]


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

    def test_the_numbers_are_torchs(self):
        """As `torch.manual_seed` gives them, which seeds every kind of device that torch was built for."""
        word = int(np.random.SeedSequence((1, 2, 3)).generate_state(1, np.uint64)[0])
        torch.manual_seed(word)
        expected = torch.rand(5)
        seed_iteration(1, 2, 3)
        assert torch.equal(torch.rand(5), expected)

    def test_the_device_is_seeded_too(self, monkeypatch):
        generators = (torch.Generator(), torch.Generator())
        monkeypatch.setattr(torch.cuda, "default_generators", generators)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        before = generators[0].initial_seed()
        seed_iteration(1, 2, 3, "cuda")
        assert generators[1].initial_seed() == torch.initial_seed() and generators[0].initial_seed() == before
        seed_iteration(1, 2, 4, "cuda:0")
        assert generators[0].initial_seed() == torch.initial_seed() != generators[1].initial_seed()

    def test_seeding_costs_less_than_torchs_alone(self):
        """Counted in calls, which a busy machine does not change."""

        def calls(run) -> int:
            count = 0

            def see(_frame, event, _argument):
                nonlocal count
                count += event in ("call", "c_call")

            run()  # imports and caches
            sys.setprofile(see)
            try:
                run()
            finally:
                sys.setprofile(None)
            return count

        assert calls(lambda: seed_iteration(1, 2, 3)) < calls(lambda: torch.manual_seed(1))

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

    def test_a_window_goes_on_where_it_was_cut(self):
        """Read after 4 iterations, of which two were before the stop."""

        def losses(model, i):
            return {"loss": model.weight.sum() * 0 + i}, {"error": torch.tensor(10.0 * i)}

        record = Record(lambda trainer: {k: v for k, (v, _) in trainer.storage.latest().items()})
        old = build(losses=losses)
        old.train(0, 4)
        assert "metrics" not in old.state_dict()  # nothing is left over after a reading
        with pytest.raises(StopIteration):
            build_until(old, 6)
        state = old.state_dict()
        new = build(losses=losses, hooks=[record])
        new.load_state_dict(state)
        new.train(6, 8)
        assert record.calls[-2][2]["loss"] == (4 + 5 + 6 + 7) / 4 and record.calls[-2][2]["error"] == 55.0

    def test_a_loss_scale_is_loaded(self):
        def trainer():
            model = nn.Linear(1, 1)
            return build(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, fused=True), precision="fp16")

        old, new = trainer(), trainer()
        old.train(0, 3)
        scale = old.storage.latest()["loss_scale"][0]
        assert scale < 2**16  # a loss of 1 at the initial scale is above what fp16 holds
        new.load_state_dict(old.state_dict())
        assert new.state_dict()["scaler"]["scale"] == scale
        assert_equal(new.state_dict(), old.state_dict())


def build_until(trainer, stop):
    """Go on from iteration 4, and run out of batches before `stop`."""
    trainer._batches = lambda start: iter(range(start, stop))
    trainer.train(4, 100)
