"""A step as one CUDA graph, against the same steps without."""

import contextlib
import gc
import math
from types import SimpleNamespace

import pytest
import torch
from fvcore.common.param_scheduler import LinearParamScheduler

from resnet_backbone.engine.ema import MovingAverage
from resnet_backbone.engine.graph import EAGER_STEPS, GraphedStep
from resnet_backbone.engine.hooks import LearningRate
from resnet_backbone.engine.nonfinite import NonFiniteLossError
from resnet_backbone.engine.optimizer import build_optimizer
from resnet_backbone.engine.output import read_last_checkpoint
from resnet_backbone.engine.train import train as run_training
from tests.engine.tiny import IMAGES, TinyTask, assert_equal, build, build_model, loss_of, metrics, state_of

STEPS = 12


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Full single precision, and no search for the fastest kernel, which need not find the same one twice."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def train(cfg, *, graphed: bool, precision: str = "fp32", accumulate: int = 1, bad: int = -1, end: int = 1000):
    """State, metrics and error of a run on the GPU whose learning rate falls with each iteration, until `end`."""
    model = build_model(dropout=0.0).cuda()
    optimizer = build_optimizer(cfg, model)
    if graphed:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device="cuda")
    average = MovingAverage(model, 0.8)

    def batches(start):
        for i in range(start, end):
            images = IMAGES[i : i + 8].clone()
            if i == bad:
                images[3, 1, 2, 2] = math.nan
            yield images.cuda(), torch.full((8,), float(i), device="cuda")

    def compute(model, batch):
        return {"loss": loss_of(model, batch[0])}, {"number": batch[1].mean()}

    trainer = build(
        model,
        compute,
        optimizer=optimizer,
        batches=batches,
        precision=precision,
        accumulate=accumulate,
        average=average,
        cuda_graph=graphed,
        log_period=STEPS,
        hooks=[LearningRate(LinearParamScheduler(1.0, 0.1))],
    )
    message = ""
    try:
        trainer.train(0, STEPS)
    except NonFiniteLossError as error:
        message = str(error)
    except StopIteration:
        message = "no more batches"
    stored = {name: value for name, (value, _) in trainer.storage.latest().items()}
    return {**state_of(model, optimizer), "average": average.state_dict()}, stored, message


def assert_close(one, other) -> None:
    for key in ("model", "average"):
        for name, tensor in other[key].items():
            torch.testing.assert_close(one[key][name], tensor, rtol=1e-5, atol=1e-6, msg=f"{key} {name}")
    torch.testing.assert_close(one["momenta"], other["momenta"], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_as_without(cfg, precision, accumulate):
    """Weights, statistics, momenta, the average and the metrics; a rate that did not reach the graph would show."""
    options = dict(precision=precision, accumulate=accumulate)
    eager, expected, _ = train(cfg, graphed=False, **options)
    graphed, stored, message = train(cfg, graphed=True, **options)
    assert message == ""
    assert_close(graphed, eager)
    assert graphed["model"]["1.num_batches_tracked"] == STEPS * accumulate
    assert stored["number"] == sum(range(STEPS)) / STEPS  # each batch once, in its own step
    for name in ("loss", "total_loss", "lr"):
        assert stored[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [1, EAGER_STEPS, EAGER_STEPS + 4])
def test_a_bad_step_changes_nothing(cfg, bad):
    """One before the recording, the one that is recorded, one that is replayed."""
    found, _, message = train(cfg, graphed=True, bad=bad)
    assert message.startswith(f"iteration {bad} gave") and "the input of 0" in message
    good, _, message = train(cfg, graphed=True, end=bad)
    assert message == "no more batches"
    for part in ("model", "momenta"):
        assert_equal(found[part], good[part], part)
    assert found["model"]["1.num_batches_tracked"] == bad


@pytest.mark.gpu
def test_a_run_that_is_resumed(cfg, tmp_path):
    """Its learning rate is a tensor, which the checkpoint holds too; it falls to a tenth at iteration 6."""
    cfg.MODEL.DEVICE, cfg.SOLVER.CUDA_GRAPH = "cuda", True

    def run(folder, *, stop_at=None, resume=False):
        folder.mkdir(exist_ok=True)
        model = build_model(dropout=0.0).cuda()

        def batches(start):
            for i in range(start, 100):
                if i == stop_at:
                    raise KeyboardInterrupt
                yield (IMAGES[i : i + 8].cuda(),)

        with contextlib.nullcontext() if stop_at is None else pytest.raises(KeyboardInterrupt):
            run_training(
                cfg,
                TinyTask(batches=batches, losses=lambda model, batch: ({"loss": loss_of(model, batch[0])}, {})),
                model,
                build_optimizer(cfg, model),
                folder=folder,
                resume_from=read_last_checkpoint(folder) if resume else None,
            )
        return model.state_dict()

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", stop_at=5)
    resumed = run(tmp_path / "parts", resume=True)
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert [line["lr"] for line in metrics(tmp_path / "parts")] == pytest.approx([0.05, 0.005])
    cfg.SOLVER.CUDA_GRAPH = False
    eager = run(tmp_path / "eager")
    for name, tensor in whole.items():
        torch.testing.assert_close(eager[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.gpu
def test_the_batch_is_copied_and_its_kind_kept():
    """What is recorded reads its own copies: the loader may use a batch's memory again."""
    total = torch.zeros((), device="cuda")
    step = GraphedStep(lambda batch: total.add_(batch[0].sum() * batch[1]))
    expected = 0.0
    for i in range(EAGER_STEPS + 4):
        values, factor = torch.full((3,), float(i), device="cuda"), torch.tensor(2.0 + i, device="cuda")
        step((values, factor))
        expected += 3 * i * (2.0 + i)
        torch.cuda.synchronize()
        values.fill_(1e9)
        factor.fill_(1e9)
    assert total.item() == expected


def test_garbage_is_collected_before_the_recording_and_not_in_it(monkeypatch):
    """What a recording frees stays allocated, and the collection of a stream or an event would end it."""
    events = []

    @contextlib.contextmanager
    def record(_graph):
        events.append(("recording, collector", gc.isenabled()))
        yield

    stand_ins = {
        "Stream": lambda: SimpleNamespace(wait_stream=lambda _: None),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda _: None),
        "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: events.append("replay")),
        "graph": record,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(gc, "collect", lambda: events.append("collected"))
    step = GraphedStep(lambda batch: None)
    for _ in range(EAGER_STEPS + 2):
        step((torch.zeros(1),))
    assert events == ["collected", ("recording, collector", False), "replay", "replay"] and gc.isenabled()
