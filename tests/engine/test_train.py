import gc
import logging
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from detectron2.solver import build_optimizer
from torch import nn

from resnet_backbone.data.sampler import BatchSampler
from resnet_backbone.engine.config import COMMAND_LINE, ConfigError, set_key
from resnet_backbone.engine.nonfinite import NonFiniteLossError
from resnet_backbone.engine.output import read_last_checkpoint, save_training_checkpoint
from resnet_backbone.engine.train import check_batch, check_solver, choose_seed
from resnet_backbone.engine.trainer import seed_iteration
from resnet_backbone.errors import InputError
from resnet_backbone.weights import Checkpoint, CheckpointError, Metadata, read_checkpoint
from tests.engine import tiny
from tests.engine.tiny import IMAGES, Run, assert_equal, assert_same, assert_same_files, build_model, metadata, metrics


def test_a_resumed_run_lets_go_of_the_checkpoint(cfg, tmp_path):
    """Its caller holds it to the end."""
    Run(cfg, tmp_path, stop_at=8)
    alive = []

    def look(_iteration):
        gc.collect()
        alive.append([reference() for reference in references])

    checkpoint = read_last_checkpoint(tmp_path)
    assert checkpoint.model and checkpoint.trainer
    references = []
    original = tiny.read_last_checkpoint

    def read(folder):
        found = original(folder)
        references.extend(weakref.ref(tensor) for tensor in found.model.values())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "read_last_checkpoint", read)
        run = Run(cfg, tmp_path, resume=True, during_step=look)
    assert references and run.last is not None
    assert alive and all(tensor is None for tensors in alive for tensor in tensors)


def test_another_number_of_images_is_said(cfg, tmp_path, caplog):
    Run(cfg, tmp_path, stop_at=8)
    Run(cfg, tmp_path, resume=True, num_images=36)
    assert "the training set had 37 images and has 36 now" in caplog.text


@pytest.mark.parametrize("stop_at", [4, 6, 8, 9])
def test_a_resumed_run_equals_the_uninterrupted_bit_for_bit(cfg, tmp_path, stop_at):
    cfg.TEST.EVAL_PERIOD = 3
    whole = Run(cfg, tmp_path / "whole")
    Run(cfg, tmp_path / "parts", stop_at=stop_at)
    resumed = Run(cfg, tmp_path / "parts", resume=True)
    start = stop_at // 4 * 4
    assert resumed.seen[: 10 - start] == whole.seen[start:10]
    assert_same(whole, resumed)


def everything(cfg, precision):
    """A configuration in which a run keeps all that it can keep from one iteration to the next.

    Checkpoints (every 4 iterations), readings (3) and evaluations (5) fall apart. Warm-up ends with the reading after 9
    iterations, the evaluation after 10 is the best, that after 15 lowers the learning rate.
    """
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.PRECISION = precision != "fp32", precision
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.LOG_PERIOD, cfg.TEST.EVAL_PERIOD = 20, 4, 3, 5
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.GAMMA = "WarmupPlateauLR", 0.5
    cfg.SOLVER.PLATEAU_PATIENCE, cfg.SOLVER.PLATEAU_THRESHOLD = 0, 0.0
    cfg.SOLVER.WARMUP_UNTIL_ERROR, cfg.SOLVER.WARMUP_FACTOR = 50.0, 0.1
    cfg.SOLVER.EMA_DECAY, cfg.SOLVER.CHECKPOINT_KEEP = 0.7, 2
    return dict(error=lambda i: 100.0 - 10 * i, scores={5: 3.0, 10: 4.0, 15: 2.0}.get)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_killed_at_any_moment_and_resumed(cfg, tmp_path, precision):
    """A kill leaves the files as they are at that moment, so one run gives them for each step and each evaluation."""
    behavior, folder, left = everything(cfg, precision), tmp_path / "whole", tmp_path / "left"
    whole = Run(
        cfg,
        folder,
        during_step=lambda i: shutil.copytree(folder, left / f"step {i:02}"),
        during_evaluation=lambda i: shutil.copytree(folder, left / f"evaluation {i:02}"),
        **behavior,
    )
    moments = sorted(left.iterdir())
    assert len(moments) == 20 + 3
    for moment in moments:
        resumed = Run(cfg, moment, resume=True, **behavior)
        assert_same(whole, resumed)
        assert_same_files(moment, folder)
        start = int(moment.name.split()[1]) // 4 * 4
        assert resumed.evaluated == [i for i in (5, 10, 15) if i >= start]  # none twice

    last = read_checkpoint(folder / "model_0000019.pth").trainer
    assert last["plateau"]["drops"] == 1 and last["warm_up"] == {"over": True}
    assert last["evaluation"] == {"metric": "bbox/AP", "best": 4.0, "waited": 1, "evaluated": 15}
    assert "metrics" not in last  # all are read at the end
    assert read_checkpoint(folder / "model_best.pth").metadata.origin["bbox/AP"] == 4.0
    assert ("scaler" in last) == (precision == "fp16")
    rates = {line["iteration"]: line["lr"] for line in metrics(folder)}
    low, lowered = dict.fromkeys((2, 5, 8), 0.005), dict.fromkeys((15, 17, 19), 0.025)
    assert rates == pytest.approx({**low, **dict.fromkeys((10, 11, 14), 0.05), **lowered})
    assert [p.name for p in sorted(folder.glob("model_0*"))] == ["model_0000015.pth", "model_0000019.pth"]


@pytest.mark.parametrize(
    ("part", "iterations"),
    [("average", 8), ("scaler", 4), ("plateau", 16), ("warm_up", 12), ("evaluation", 12), ("metrics", 8)],
)
def test_each_part_of_the_state_matters_here(cfg, tmp_path, part, iterations):
    """The test above would notice if one of them were not restored."""
    behavior = everything(cfg, "fp16")
    Run(cfg, tmp_path / "whole", **behavior)
    Run(cfg, tmp_path / "parts", stop_at=iterations, **behavior)
    path = tmp_path / "parts" / f"model_{iterations - 1:07}.pth"
    payload = torch.load(path, weights_only=True)
    del payload["trainer"][part]
    torch.save(payload, path)
    Run(cfg, tmp_path / "parts", resume=True, **behavior)
    with pytest.raises(AssertionError):
        assert_same_files(tmp_path / "parts", tmp_path / "whole")


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
    assert run.evaluated == [5]  # after iteration 4; the end's is the caller's
    first = read_checkpoint(tmp_path / "run" / "model_0000003.pth")
    assert first.iteration == 3 and first.metadata.origin["iterations"] == 4 and first.trainer["seed"] == 5
    assert [line["iteration"] for line in metrics(tmp_path / "run")] == [4, 5, 9]
    assert metrics(tmp_path / "run")[1] == {"iteration": 5, "bbox/AP": 1.5, "bbox/sum": run.sums, "lr": 0.05}
    best = read_checkpoint(tmp_path / "run" / "model_best.pth")
    assert best.trainer is None and best.metadata.origin == {"iterations": 5, "bbox/AP": 1.5, "bbox/sum": run.sums}


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
    assert any(message.startswith("5/10  eta 0:00:0") for message in messages)


def test_impossible_metadata_is_found_before_the_first_iteration(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "metadata", lambda iterations: Metadata.from_dict({}))
    with pytest.raises(InputError, match="metadata lacks"):
        Run(cfg, tmp_path / "run")
    assert os.listdir(tmp_path / "run") == []


class TestAverage:
    """SOLVER.EMA_DECAY: what is trained goes on, what is evaluated and kept is the average."""

    def test_the_result_the_evaluations_and_the_best_are_of_the_average(self, cfg, tmp_path):
        cfg.SOLVER.EMA_DECAY, cfg.TEST.EVAL_PERIOD = 0.9, 8
        run = Run(cfg, tmp_path / "run")
        assert run.result is not run.model
        assert not torch.equal(run.result[0].weight, run.model[0].weight)
        after_8 = read_checkpoint(tmp_path / "run" / "model_0000007.pth")
        best = read_checkpoint(tmp_path / "run" / "model_best.pth")
        assert_equal(best.model, after_8.trainer["average"])
        assert not torch.equal(best.model["0.weight"], after_8.model["0.weight"])
        model = build_model().eval()
        model.load_state_dict(best.model)
        with torch.no_grad():
            assert model(IMAGES[:2]).sum().item() == pytest.approx(run.sums, rel=1e-6)

    def test_training_is_not_changed_by_it(self, cfg, tmp_path):
        plain = Run(cfg, tmp_path / "plain")
        cfg.SOLVER.EMA_DECAY = 0.9
        averaged = Run(cfg, tmp_path / "averaged")
        assert_equal(plain.model.state_dict(), averaged.model.state_dict())
        assert plain.result is plain.model

    def test_a_finished_run_gives_its_average_again(self, cfg, tmp_path):
        cfg.SOLVER.EMA_DECAY = 0.9
        whole = Run(cfg, tmp_path / "run")
        again = Run(cfg, tmp_path / "run", resume=True)
        assert again.seen == []
        assert_same(whole, again)


class TestCompiled:
    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with g++")
    @pytest.mark.slow
    def test_as_eager(self, cfg, tmp_path):
        cfg.TEST.EVAL_PERIOD = 5
        eager = Run(cfg, tmp_path / "eager", model=build_model(dropout=0.0))
        set_key(cfg, "SOLVER.COMPILE", True, COMMAND_LINE)
        calls = []  # not compiled
        compiled = Run(cfg, tmp_path / "compiled", model=Eager(*build_model(dropout=0.0), calls=calls))
        for name, tensor in eager.model.state_dict().items():
            torch.testing.assert_close(compiled.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
        assert calls == []
        assert compiled.sums == pytest.approx(eager.sums, abs=1e-4)
        assert read_last_checkpoint(tmp_path / "compiled").model.keys() == eager.model.state_dict().keys()

    def test_a_cpu_is_left_out_unless_the_command_line_says_so(self, cfg, tmp_path, caplog, monkeypatch):
        caplog.set_level(logging.INFO)
        compiled = []
        monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
        set_key(cfg, "SOLVER.COMPILE", True, "a.yaml")
        Run(cfg, tmp_path / "left out")
        assert compiled == [] and "ignored on a CPU unless it is set on the command line" in caplog.text
        set_key(cfg, "SOLVER.COMPILE", True, COMMAND_LINE)
        run = Run(cfg, tmp_path / "compiled")
        assert compiled == [run.model] and "compile the network, which takes a minute" in caplog.text


class Eager(nn.Sequential):
    """Notes the batch size of each forward pass that is not compiled."""

    def __init__(self, *layers: nn.Module, calls: list[int]):
        super().__init__(*layers)
        self.calls = calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.calls.append(len(x))
        return super().forward(x)


class TestOtherConfiguration:
    def resume(self, cfg, tmp_path, caplog):
        Run(cfg, tmp_path / "run", stop_at=8)
        set_key(cfg, "SOLVER.BASE_LR", 0.01, COMMAND_LINE)
        set_key(cfg, "SOLVER.STEPS", (5, 7), "new.yaml")
        set_key(cfg, "OUTPUT_DIR", str(tmp_path / "moved"), COMMAND_LINE)
        Run(cfg, tmp_path / "run", resume=True)
        return [r.getMessage() for r in caplog.records if "another configuration" in r.getMessage()]

    def test_each_difference_is_logged(self, cfg, tmp_path, caplog):
        assert self.resume(cfg, tmp_path, caplog) == [
            "resumed with another configuration: SOLVER.BASE_LR was 0.05, is 0.01 (command line)",
            "resumed with another configuration: SOLVER.STEPS was (6,), is (5, 7) (new.yaml)",
        ]

    def test_the_same_one_is_not_mentioned(self, cfg, tmp_path, caplog):
        Run(cfg, tmp_path / "run", stop_at=8)
        Run(cfg, tmp_path / "run", resume=True)
        assert "another configuration" not in caplog.text


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


def test_a_run_of_an_earlier_version_goes_on_to_the_same_bits(cfg, tmp_path):
    """The file was written after 4 of 10 iterations by commit e53298c, whose loop had other modules.

    It was torch 2.11; another version may round otherwise.
    """
    cfg.SOLVER.EMA_DECAY = 0.9
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = "norm", 0.5
    folder = tmp_path / "run"
    shutil.copytree(Path(__file__).with_name("written_before"), folder)
    (folder / "last_checkpoint").write_text("model_0000003.pth")
    resumed = Run(cfg, folder, resume=True)
    assert [line["iteration"] for line in metrics(folder)] == [4, 9]
    whole = Run(cfg, tmp_path / "whole")
    if torch.__version__.startswith("2.11."):
        assert_same(whole, resumed)
    for one, other in ((whole.model, resumed.model), (whole.result, resumed.result)):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.momenta(), resumed.momenta(), rtol=1e-5, atol=1e-6)


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
        ("AMP.PRECISION", "fp8", r"SOLVER.AMP.PRECISION is fp8 \(test\), expected fp32 or bf16 or fp16\."),
        ("LOG_PERIOD", 0, r"SOLVER.LOG_PERIOD is 0 \(test\), expected a whole number from 1 "),
        ("EMA_DECAY", 1.0, r"SOLVER.EMA_DECAY is 1.0 \(test\), expected a number of at least 0 and below 1\."),
        ("CUDA_GRAPH", True, "of one GPU, but MODEL.DEVICE is cpu. Set it to False"),
    ],
)
def test_impossible_solver_keys(cfg, key, value, words):
    cfg.SOLVER.AMP.ENABLED = True
    check_solver(cfg)
    set_key(cfg, f"SOLVER.{key}", value, "test")
    with pytest.raises(ConfigError, match=words):
        check_solver(cfg)


def test_what_a_cuda_graph_does_not_go_with(cfg, monkeypatch):
    cfg.SOLVER.CUDA_GRAPH, cfg.MODEL.DEVICE = True, "cuda"
    check_solver(cfg)
    cfg.SOLVER.AMP.PRECISION = "fp16"
    check_solver(cfg)  # it is not enabled
    cfg.SOLVER.AMP.ENABLED = True
    with pytest.raises(ConfigError, match=r"CUDA_GRAPH .*PRECISION is fp16"):
        check_solver(cfg)
    monkeypatch.setattr("resnet_backbone.engine.train.comm.get_world_size", lambda: 4)
    with pytest.raises(ConfigError, match=r"CUDA_GRAPH .* there are 4 processes"):
        check_solver(cfg)


@pytest.mark.parametrize(
    ("images", "processes", "parts", "words"),
    [
        (3, 2, 1, "IMS_PER_BATCH is 3, which is not divisible by 2 processes"),
        (8, 2, 3, "ACCUMULATE is 3, which does not divide the 4 images of a process"),
        (8, 2, 8, "ACCUMULATE is 8, which does not divide the 4 images"),
    ],
)
def test_impossible_batches(cfg, monkeypatch, images, processes, parts, words):
    monkeypatch.setattr("resnet_backbone.engine.train.comm.get_world_size", lambda: processes)
    cfg.SOLVER.ACCUMULATE = 2
    check_batch(cfg)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE = images, parts
    with pytest.raises(ConfigError, match=words):
        check_batch(cfg)
