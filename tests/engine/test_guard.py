"""Bad steps change nothing: bit for bit, in each precision, with each optimizer, in parts and in two processes."""

import math

import pytest
import torch
from torch import nn

from resnet_backbone.engine.distributed import unwrap, wrap_for_processes
from resnet_backbone.engine.nonfinite import NonFiniteGuard, NonFiniteLossError
from resnet_backbone.engine.trainer import Trainer
from tests.engine.tiny import Reads, assert_equal, build_model, in_two_processes, loss_of, state_of

BAD = 5  # the step that goes wrong


def images_of(iteration: int, rank: int = 0) -> torch.Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(100 * rank + iteration))


def root_at_zero(model: nn.Module) -> torch.Tensor:
    """0, with a gradient that is not a number."""
    total = unwrap(model)[0].weight.sum()
    return (total - total.detach()).abs().sqrt()


FAULTS = {
    "a pixel": lambda loss, model: loss,
    "a loss that is not a number": lambda loss, model: loss + math.nan,
    "an infinite loss": lambda loss, model: loss - math.inf,
    "a gradient": lambda loss, model: loss + root_at_zero(model),
}
# A loss scale takes a gradient for an overflow: see TestLossScale.
KINDS = [(f, p) for f in FAULTS for p in ("fp32", "bf16", "fp16") if (f, p) != ("a gradient", "fp16")]


def train(
    stop: int,
    fault: str | None,
    *,
    precision: str = "fp32",
    fused: bool = True,
    accumulate: int = 1,
    rank: int = 0,
    log_period: int = 100,
) -> tuple[dict, str, Trainer]:
    """The state after the iterations before `stop`, the message of an error, and the trainer."""
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, fused=fused)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def batches(start):
        for iteration in range(start, 1000):
            images = images_of(iteration, rank)
            if iteration == BAD and fault == "a pixel":
                images[5, 1, 2, 3] = math.nan
            yield [(iteration, image) for image in images]

    def compute(model, pairs):
        loss = loss_of(model, torch.stack([image for _, image in pairs]))
        is_bad = fault is not None and pairs[0][0] == BAD
        return {"loss": FAULTS[fault](loss, model) if is_bad else loss}, {}

    trainer = Trainer(
        model=wrap_for_processes(model),
        optimizer=optimizer,
        batches=batches,
        loss_fn=compute,
        images_per_batch=8,
        seed=3,
        precision=precision,
        log_period=log_period,
        accumulate=accumulate,
        names=lambda iteration: [f"image {iteration}.{number} of rank {rank}" for number in range(8)],
    )
    message = ""
    try:
        trainer.train(0, stop)
    except NonFiniteLossError as error:
        message = str(error)
    return state_of(model, optimizer), message, trainer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("fault", "precision"), KINDS)
def test_nothing_of_a_bad_step_or_of_those_after_it_reaches_the_model(fault, precision, fused, accumulate):
    options = dict(precision=precision, fused=fused, accumulate=accumulate)
    good, message, _ = train(BAD, None, **options)
    assert message == ""
    for stop in (BAD + 1, BAD + 5):  # read at once, and after four more steps
        found, message, _ = train(stop, fault, **options)
        assert_equal(found, good)
        assert message.startswith(f"iteration {BAD} gave") and f"image {BAD}.0" in message
    assert good["model"]["1.num_batches_tracked"] == BAD * accumulate
    further, _, _ = train(BAD + 1, None, **options)
    for name, tensor in good["model"].items():  # the step would have changed them all
        assert not torch.equal(tensor, further["model"][name]), name


def test_a_step_after_the_reading_of_a_good_window_is_watched_too():
    good, _, _ = train(BAD, None, log_period=2)
    found, message, trainer = train(20, "a gradient", log_period=2)
    assert_equal(found, good)
    assert trainer.iter == 5 and message.startswith("iteration 5 ")


def test_gradient_clipping_does_not_hide_it(cfg):
    """Clipping divides by the norm, which makes every gradient a number that is none."""
    from resnet_backbone.engine.optimizer import build_optimizer

    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    model = build_model()
    optimizer = build_optimizer(cfg, model)
    before = state_of(model, optimizer)

    def compute(model, i):
        return {"loss": loss_of(model, images_of(i)) + root_at_zero(model)}, {}

    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        batches=lambda start: iter(range(100)),
        loss_fn=compute,
        images_per_batch=8,
        seed=0,
    )
    with pytest.raises(NonFiniteLossError):
        trainer.train(0, 2)
    assert_equal(state_of(model, optimizer), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_value_comes_to_the_host_between_readings(monkeypatch, precision, accumulate):
    reads, by_iteration = Reads(), []
    for name in ("tolist", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *arguments, original=original, **named):
            reads.count += 1
            return original(tensor, *arguments, **named)

        monkeypatch.setattr(torch.Tensor, name, counted)

    step = Trainer.run_step

    def watched(trainer):
        reads.count = 0
        with reads:
            step(trainer)
        by_iteration.append(reads.count)

    monkeypatch.setattr(Trainer, "run_step", watched)
    _, message, _ = train(8, None, precision=precision, accumulate=accumulate, log_period=4)
    assert message == ""
    assert [by_iteration[i] for i in (0, 1, 2, 4, 5, 6)] == [0] * 6
    assert by_iteration[3] > 0 and by_iteration[7] > 0  # the reading itself, which proves that reads are seen
    by_iteration.clear()
    train(3, None, fused=False)
    assert by_iteration[:2] == [1, 1]  # as the documentation says of optimizers that are not fused


def test_steps_are_counted_from_begin_and_the_first_bad_one_stays():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    guard = NonFiniteGuard(model)
    guard.judge(torch.tensor(1.0))
    guard.begin()
    for value in (1.0, 2.0, math.inf, 3.0, math.nan):
        guard.judge(torch.tensor(value))
    assert guard.first_bad == 2 and guard.stopped == 1.0


def test_statistics_set_from_outside_are_those_that_a_run_begins_with():
    """As a resumed run's are, which are loaded after the guard was made."""
    model = nn.Sequential(nn.BatchNorm1d(2))
    guard = NonFiniteGuard(model)
    model[0].running_mean.fill_(7.0)
    model[0].num_batches_tracked.fill_(70)
    guard.begin()
    model(torch.randn(4, 2))
    guard.judge(torch.tensor(math.nan))
    assert model[0].running_mean.tolist() == [7.0, 7.0] and model[0].num_batches_tracked == 70


def test_a_network_without_batch_norm_and_one_with_frozen_layers():
    for model in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))):
        guard = NonFiniteGuard(model)
        model(torch.ones(1, 2)).sum().backward()
        guard.judge(torch.tensor(1.0))
        assert guard.first_bad == -1
        next(reversed(list(model.parameters()))).grad[0] = math.inf
        guard.judge(torch.tensor(1.0))
        assert guard.first_bad == 1


CASES = [(*kind, accumulate) for kind in KINDS for accumulate in (1, 2) if kind[1] != "bf16"]


def _cases() -> list[tuple[dict, dict, str]]:
    """Of each case: the state after the good steps, that of a run in which only rank 1 meets the fault, its message."""
    rank = torch.distributed.get_rank()
    found = []
    for fault, precision, accumulate in CASES:
        options = dict(precision=precision, accumulate=accumulate, rank=rank)
        good, _, _ = train(BAD, None, **options)
        state, message, _ = train(BAD + 3, fault if rank == 1 else None, **options)
        found.append((good, state, message))
    return found


def test_in_two_processes_of_which_one_has_the_bad_image(tmp_path):
    for case, zero, one in zip(CASES, *in_two_processes(_cases, tmp_path), strict=True):
        for good, state, message in (zero, one):
            assert_equal(state, good, str(case))
            assert message.startswith(f"iteration {BAD} gave"), case
            assert f"image {BAD}.0 of rank 1" in message and "rank 0" not in message, case
        # Their weights are the same, their statistics their own.
        assert torch.equal(zero[0]["model"]["0.weight"], one[0]["model"]["0.weight"])
        assert not torch.equal(zero[0]["model"]["1.running_mean"], one[0]["model"]["1.running_mean"])


def by_hand(steps: int, factor: float, device: str) -> tuple[nn.Module, list[float]]:
    """The weights after `steps` of torch's own recipe for fp16, and the scale after each."""
    model = build_model(norm=False, dropout=0.0).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    scaler, scales = torch.amp.GradScaler(device), []
    for i in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = factor * loss_of(model, images_of(i).to(device))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return model, scales


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
class TestLossScale:
    """fp16: gradients above 65504 overflow until the scale has come down."""

    def train(self, device, steps, losses, *, log_period=1):
        model = build_model(norm=False, dropout=0.0).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9, fused=True)
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        scales, states = [], []

        trainer = Trainer(
            model=model,
            optimizer=optimizer,
            batches=lambda start: iter(range(start, 1000)),
            loss_fn=losses,
            images_per_batch=8,
            seed=0,
            precision="fp16",
            log_period=log_period,
        )
        after_step = trainer.after_step

        def look():
            if "loss_scale" in trainer.storage.latest():
                scales.append(trainer.storage.latest()["loss_scale"][0])
            states.append(state_of(model, optimizer))
            after_step()

        trainer.after_step = look
        trainer.train(0, steps)
        return model, scales, states

    def test_as_torchs_own_recipe(self, device):
        factor = 30.0
        expected, scales = by_hand(14, factor, device)
        model, found, states = self.train(
            device, 14, lambda model, i: ({"loss": factor * loss_of(model, images_of(i).to(device))}, {})
        )
        assert found == scales
        assert found[0] == 32768.0 and found[-1] == found[-2]  # some steps overflow, then none do
        # On a GPU, one gradient that rounds to another number of 16 bits is enough.
        tolerance = {"cpu": {"rtol": 1e-6, "atol": 1e-7}, "cuda": {"rtol": 1e-3, "atol": 1e-5}}[device]
        for a, b in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a, b, **tolerance)
        initial = build_model(norm=False, dropout=0.0).to(device)
        assert_equal(states[0]["model"], initial.state_dict())  # skipped
        assert all(not momentum.any() for momentum in states[0]["momenta"])
        assert not torch.equal(model[0].weight, initial[0].weight)  # and then trained

    def test_a_loss_that_is_not_a_number_is_no_matter_of_the_scale(self, device):
        def losses(model, i):
            return {"loss": loss_of(model, images_of(i).to(device)) + (math.nan if i == 4 else 0.0)}, {}

        with pytest.raises(NonFiniteLossError, match=r"iteration 4 gave .* in the loss loss"):
            self.train(device, 8, losses)

    def test_gradients_that_no_scale_mends_end_the_run(self, device):
        """torch would halve the scale for ever, and train nothing."""

        def losses(model, i):
            return {"loss": loss_of(model, images_of(i).to(device)) + root_at_zero(model)}, {}

        with pytest.raises(NonFiniteLossError, match=r"the gradient of 0\.weight"):
            self.train(device, 60, losses, log_period=10)
