import json
import logging
import os

import pytest
import torch
from detectron2.solver import build_optimizer
from torch import nn

from resnet_backbone.data.sampler import BatchSampler
from resnet_backbone.engine.config import ConfigError, set_key
from resnet_backbone.engine.output import read_last_checkpoint, save_training_checkpoint
from resnet_backbone.engine.train import check_batch, check_solver, choose_seed, train
from resnet_backbone.engine.trainer import NonFiniteLossError, seed_iteration
from resnet_backbone.errors import InputError
from resnet_backbone.weights import Checkpoint, CheckpointError, Metadata, read_checkpoint

IMAGES = torch.randn(37, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def metadata(iterations: int) -> Metadata:
    return Metadata(
        kind="classifier",
        architecture="tiny",
        arguments={},
        channel_order="RGB",
        pixel_mean=(0.0, 0.0, 0.0),
        pixel_std=(1.0, 1.0, 1.0),
        norm_statistics="running",
        norm_epsilon=1e-5,
        class_names=("a", "b"),
        origin={"iterations": iterations},
    )


def build_model(channels: int = 4) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(channels * 16, 2),
    ).to(memory_format=torch.channels_last)


class Run:
    """One run of a tiny convolutional network with batch normalisation and dropout, on batches by the sampler."""

    def __init__(self, cfg, folder, *, resume=False, stop_at=None, model=None, factor=lambda i: 1.0):
        folder.mkdir(exist_ok=True)
        self.model = model or build_model()
        self.optimizer = build_optimizer(cfg, self.model)
        self.seen = []
        last = read_last_checkpoint(folder) if resume else None
        torch.rand(11 if resume else 0)  # whatever drew from the generator before must not matter

        def batches(start):
            for number, pairs in enumerate(BatchSampler(37, 4, seed=cfg.SEED, start_iteration=start), start):
                if number == stop_at:
                    raise KeyboardInterrupt
                self.seen.append(pairs)
                yield number, IMAGES[[index for _, index in pairs]]

        def compute(model, batch):
            number, images = batch
            logits = model(images) * factor(number)
            return {"loss_cls": logits.square().mean()}, {"top1_error": logits.mean().detach()}

        self.evaluations = 0

        def evaluate():
            self.evaluations += 1
            torch.rand(3)
            return {"bbox": {"AP": 1.5}}

        try:
            train(
                cfg,
                model=self.model,
                optimizer=self.optimizer,
                batches=batches,
                compute=compute,
                evaluate=evaluate,
                metadata=metadata,
                num_images=37,
                folder=folder,
                resume_from=last,
            )
        except KeyboardInterrupt:
            assert stop_at is not None

    def momenta(self) -> list[torch.Tensor]:
        return [self.optimizer.state[p]["momentum_buffer"] for p in self.model.parameters()]


def assert_same(one: Run, other: Run) -> None:
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
    for a, b in zip(one.momenta(), other.momenta(), strict=True):
        assert torch.equal(a, b)


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


@pytest.mark.parametrize("stop_at", [4, 6, 8, 9])
def test_a_resumed_run_equals_the_uninterrupted_bit_for_bit(cfg, tmp_path, stop_at):
    cfg.TEST.EVAL_PERIOD = 3
    whole = Run(cfg, tmp_path / "whole")
    Run(cfg, tmp_path / "parts", stop_at=stop_at)
    resumed = Run(cfg, tmp_path / "parts", resume=True)
    start = stop_at // 4 * 4
    assert resumed.seen[: 10 - start] == whole.seen[start:10]
    assert_same(whole, resumed)


def test_momentum_matters_here(cfg, tmp_path):
    """The test above would notice an optimizer that is not restored."""
    whole = Run(cfg, tmp_path / "whole")
    Run(cfg, tmp_path / "parts", stop_at=8)
    path = tmp_path / "parts" / "model_0000007.pth"
    payload = torch.load(path, weights_only=True)
    payload["trainer"]["optimizer"]["state"] = {}
    torch.save(payload, path)
    resumed = Run(cfg, tmp_path / "parts", resume=True)
    with pytest.raises(AssertionError):
        assert_same(whole, resumed)


def test_a_resumed_run_takes_a_changed_learning_rate(cfg, tmp_path):
    """As if the rate had been changed in the running process at that iteration."""
    changed = cfg.clone()
    changed.SOLVER.BASE_LR = 0.5
    Run(cfg, tmp_path / "run", stop_at=8)
    start = read_last_checkpoint(tmp_path / "run")
    resumed = Run(changed, tmp_path / "run", resume=True)

    model = build_model()
    model.load_state_dict(start.model)
    optimizer = build_optimizer(changed, model)
    optimizer.load_state_dict(start.trainer["optimizer"])
    model.train()
    for iteration, rate in ((8, 0.05), (9, 0.05)):  # 0.5, a tenth after step 6
        for group in optimizer.param_groups:
            group["lr"] = rate
        seed_iteration(cfg.SEED, iteration, 0)
        optimizer.zero_grad()
        pairs = BatchSampler(37, 4, seed=cfg.SEED).batch(iteration)
        model(IMAGES[[index for _, index in pairs]]).square().mean().backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, resumed.model.state_dict()[name], atol=1e-7), name
    assert metrics(tmp_path / "run")[-1]["lr"] == pytest.approx(0.05)


def test_what_a_run_writes(cfg, tmp_path):
    cfg.TEST.EVAL_PERIOD = 5
    run = Run(cfg, tmp_path / "run")
    names = set(os.listdir(tmp_path / "run"))
    checkpoints = {"model_0000003.pth", "model_0000007.pth", "model_0000009.pth"}
    assert checkpoints | {"last_checkpoint", "metrics.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert run.evaluations == 1  # after iteration 4; the end's is the caller's
    first = read_checkpoint(tmp_path / "run" / "model_0000003.pth")
    assert first.iteration == 3 and first.metadata.origin["iterations"] == 4 and first.trainer["seed"] == 5
    assert [line["iteration"] for line in metrics(tmp_path / "run")] == [4, 9]
    assert metrics(tmp_path / "run")[0]["bbox/AP"] == 1.5


def test_metrics_equal_means_by_hand(cfg, tmp_path):
    """With a learning rate of 0 the model does not change: each iteration's loss can be computed alone."""
    cfg.SOLVER.BASE_LR = 0.0
    run = Run(cfg, tmp_path / "run")
    losses = []
    model = build_model().train()
    for iteration in range(10):
        pairs = BatchSampler(37, 4, seed=cfg.SEED).batch(iteration)
        seed_iteration(cfg.SEED, iteration, 0)
        losses.append(model(IMAGES[[index for _, index in pairs]]).square().mean().item())
    assert len(run.seen) == 10
    first, second = metrics(tmp_path / "run")
    assert first["loss_cls"] == pytest.approx(sum(losses[:5]) / 5, rel=1e-6)
    assert second["loss_cls"] == pytest.approx(sum(losses[5:]) / 5, rel=1e-6)
    assert first["total_loss"] == pytest.approx(first["loss_cls"])


def test_metrics_hold_each_iteration_once_after_a_resume(cfg, tmp_path):
    cfg.SOLVER.LOG_PERIOD = 2
    Run(cfg, tmp_path / "run", stop_at=7)
    with (tmp_path / "run" / "metrics.json").open("a") as file:
        file.write('{"iteration": 6, "loss_')
    Run(cfg, tmp_path / "run", resume=True)
    assert [line["iteration"] for line in metrics(tmp_path / "run")] == [1, 3, 5, 7, 9]


def test_a_finished_run_has_nothing_to_do(cfg, tmp_path):
    whole = Run(cfg, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    again = Run(cfg, tmp_path / "run", resume=True)
    assert again.seen == []
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before


def test_a_diverged_run_writes_no_bad_weights(cfg, tmp_path):
    with pytest.raises(NonFiniteLossError):
        Run(cfg, tmp_path / "run", factor=lambda i: float("nan") if i >= 6 else 1.0)
    assert read_last_checkpoint(tmp_path / "run").iteration == 3
    assert sorted(p.name for p in (tmp_path / "run").glob("*.pth")) == ["model_0000003.pth"]


def test_the_schedule_is_printed_before_the_first_iteration(cfg, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    Run(cfg, tmp_path / "run")
    messages = [record.getMessage() for record in caplog.records]
    assert "SOLVER.BASE_LR" in messages[0] and "37 training images" in messages[0]
    assert any(message.startswith("5/10  left 0:00:0") for message in messages)


def test_impossible_metadata_is_found_before_the_first_iteration(cfg, tmp_path, monkeypatch):
    monkeypatch.setitem(metadata.__globals__, "metadata", lambda iterations: Metadata.from_dict({}))
    with pytest.raises(InputError, match="metadata lacks"):
        Run(cfg, tmp_path / "run")
    assert os.listdir(tmp_path / "run") == []


class TestResumeOfSomethingElse:
    def test_another_network_with_more_tensors(self, cfg, tmp_path):
        Run(cfg, tmp_path / "run", stop_at=6)
        with pytest.raises(CheckpointError, match=r"4 tensors that the model does not have \(4\.|5\."):
            Run(cfg, tmp_path / "run", resume=True, model=build_model()[:3])

    def test_another_width(self, cfg, tmp_path):
        Run(cfg, tmp_path / "run", stop_at=6)
        with pytest.raises(CheckpointError, match="8×3×3×3 here, 4×3×3×3 in the file"):
            Run(cfg, tmp_path / "run", resume=True, model=build_model(8))

    def test_other_frozen_layers(self, cfg, tmp_path):
        Run(cfg, tmp_path / "run", stop_at=6)
        model = build_model()
        model[0].requires_grad_(False)
        with pytest.raises(CheckpointError, match="optimizer's state does not fit"):
            Run(cfg, tmp_path / "run", resume=True, model=model)

    def test_weights_alone(self, cfg, tmp_path):
        model = build_model()
        save_training_checkpoint(tmp_path, Checkpoint(model.state_dict(), metadata(0), 3))
        with pytest.raises(CheckpointError, match="no optimizer state"):
            Run(cfg, tmp_path, resume=True)


class TestSeed:
    def test_the_users_stays(self, cfg):
        choose_seed(cfg, None)
        assert cfg.SEED == 5

    def test_one_is_drawn(self, cfg):
        drawn = set()
        for _ in range(3):
            cfg.SEED = -1
            choose_seed(cfg, None)
            drawn.add(cfg.SEED)
        assert len(drawn) == 3 and min(drawn) >= 0

    def test_the_resumed_runs_is_taken(self, cfg):
        last = Checkpoint({}, metadata(1), 3, {"seed": 11})
        cfg.SEED = -1
        choose_seed(cfg, last)
        assert cfg.SEED == 11
        choose_seed(cfg, last)

    def test_a_contradiction_stops(self, cfg):
        set_key(cfg, "SEED", 6, "a.yaml")
        with pytest.raises(ConfigError, match=r"SEED is 6 \(a\.yaml\), but the run to resume was started with 11"):
            choose_seed(cfg, Checkpoint({}, metadata(1), 3, {"seed": 11}))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("SOLVER.AMP.PRECISION", "fp16", "'fp16', expected fp32 or bf16"),
        ("SOLVER.LOG_PERIOD", 0, "LOG_PERIOD is 0, expected at least 1"),
        ("SOLVER.MAX_ITER", -1, "MAX_ITER is -1, expected at least 0"),
    ],
)
def test_impossible_solver_keys(cfg, key, value, words):
    cfg.SOLVER.AMP.ENABLED = True
    check_solver(cfg)
    set_key(cfg, key, value, "test")
    with pytest.raises(ConfigError, match=words):
        check_solver(cfg)


@pytest.mark.parametrize(("images", "processes"), [(0, 1), (-4, 2), (3, 2)])
def test_impossible_batches(cfg, monkeypatch, images, processes):
    monkeypatch.setattr("resnet_backbone.engine.train.comm.get_world_size", lambda: processes)
    check_batch(cfg)
    cfg.SOLVER.IMS_PER_BATCH = images
    with pytest.raises(ConfigError, match=f"IMS_PER_BATCH is {images}"):
        check_batch(cfg)
