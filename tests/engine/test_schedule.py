import math
import random

import pytest
import torch
import yaml
from detectron2.solver import build_lr_scheduler

from resnet_backbone.engine.config import ConfigError, load_config, origin, set_key
from resnet_backbone.engine.schedule import (
    Plateau,
    WarmUpUntil,
    build_multiplier,
    build_plateau,
    build_warm_up,
    check_schedule,
    describe_schedule,
    rescale_for_batch,
    set_learning_rate,
)
from tests.engine.tiny import Reads


def rates(cfg) -> list[float]:
    """The learning rate of each iteration."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.SOLVER.BASE_LR)
    multiplier = build_multiplier(cfg)
    result = []
    for iteration in range(cfg.SOLVER.MAX_ITER):
        rate = set_learning_rate(optimizer, multiplier(iteration / cfg.SOLVER.MAX_ITER))
        assert optimizer.param_groups[0]["lr"] == rate
        result.append(rate)
    return result


def set_solver(cfg, **values):
    for key, value in values.items():
        set_key(cfg, f"SOLVER.{key}", value, "test.yaml")
    return cfg


STEPS = dict(BASE_LR=0.1, MAX_ITER=200, STEPS=(100, 150), GAMMA=0.5, WARMUP_ITERS=20, WARMUP_FACTOR=0.01)


def test_steps_with_linear_warm_up(cfg):
    """Each rate by hand: linear from a hundredth to the whole, then halved from iteration 100 and 150 on."""
    expected = []
    for i in range(200):
        if i < 20:
            expected.append(0.1 * (0.01 + (1 - 0.01) * i / 20))
        else:
            expected.append(0.1 if i < 100 else 0.05 if i < 150 else 0.025)
    assert rates(set_solver(cfg, **STEPS)) == pytest.approx(expected, rel=1e-9)


def test_steps_with_constant_warm_up(cfg):
    result = rates(set_solver(cfg, **STEPS, WARMUP_METHOD="constant"))
    assert result[:20] == pytest.approx([0.001] * 20) and result[20] == 0.1


def test_steps_without_warm_up(cfg):
    result = rates(set_solver(cfg, **{**STEPS, "WARMUP_ITERS": 0, "STEPS": (1, 2, 500)}))
    assert result[:4] == pytest.approx([0.1, 0.05, 0.025, 0.025]) and result[-1] == result[3]


def test_a_long_schedule_steps_at_the_exact_iteration(cfg):
    set_solver(cfg, MAX_ITER=450450, STEPS=(150150, 300300), WARMUP_ITERS=1000, BASE_LR=1.0, GAMMA=0.1)
    multiplier = build_multiplier(cfg)
    at = {i: multiplier(i / 450450) for i in (999, 1000, 150149, 150150, 300299, 300300, 450449)}
    assert list(at.values()) == pytest.approx([0.001 + 0.999 * 0.999, 1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-6)


def test_cosine_with_warm_up(cfg):
    set_solver(cfg, BASE_LR=0.1, MAX_ITER=50, LR_SCHEDULER_NAME="WarmupCosineLR", WARMUP_ITERS=10, WARMUP_FACTOR=0.0)

    def cosine(i):
        return 0.1 * (1 + math.cos(math.pi * i / 50)) / 2

    expected = [cosine(10) * i / 10 if i < 10 else cosine(i) for i in range(50)]
    assert rates(cfg) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR"])
def test_as_detectron2s_scheduler(cfg, name):
    set_solver(cfg, **STEPS, LR_SCHEDULER_NAME=name)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    expected = []
    for _ in range(200):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(cfg) == pytest.approx(expected, rel=1e-12)


def test_each_group_keeps_its_own_base_rate(cfg):
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weights[0]], "lr": 0.1}, {"params": [weights[1]], "lr": 0.2}])
    multiplier = build_multiplier(set_solver(cfg, **STEPS))
    for share in (0.9, 0.0, 0.6):
        rate = set_learning_rate(optimizer, multiplier(share))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.1])
    assert rate == pytest.approx(0.05)


def test_a_rate_that_is_a_tensor_is_changed_in_place():
    """As a CUDA graph asks for, which remembers addresses."""
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    for factor in (0.5, 0.1, 1.0):
        assert set_learning_rate(optimizer, factor) == 0.5 * factor
        assert optimizer.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.5 * factor)


def test_a_rate_that_is_a_tensor_is_read_once():
    """Each reading waits for a GPU, so that nothing overlaps with a graph's replay."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=torch.tensor(0.5))
    counts = []
    for factor in (1.0, 0.5, 0.25):
        with Reads() as reads:
            set_learning_rate(optimizer, factor)
        counts.append(reads.count)
    assert counts == [1, 0, 0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"LR_SCHEDULER_NAME": "StepLR"}, ["is 'StepLR'", "WarmupMultiStepLR, WarmupCosineLR, WarmupPlateauLR"]),
        ({"LR_SCHEDULER_NAME": "WarmupPlateauLR"}, ["follows the evaluations", "TEST.EVAL_PERIOD is 0"]),
        ({"WARMUP_METHOD": "exp"}, ["WARMUP_METHOD is 'exp'", "linear, constant"]),
        ({"STEPS": (5, 3)}, ["STEPS is (5, 3)", "increasing"]),
        ({"STEPS": (3, 3)}, ["STEPS is (3, 3)"]),
        ({"STEPS": (0, 3)}, ["STEPS is (0, 3)"]),
        ({"STEPS": (-2,)}, ["STEPS is (-2,)"]),
        ({"LR_SCHEDULER_NAME": "WarmupCosineLR", "WARMUP_ITERS": 10}, ["WARMUP_ITERS is 10 of SOLVER.MAX_ITER 10"]),
    ],
)
def test_impossible_schedules(cfg, values, words):
    with pytest.raises(ConfigError) as caught:
        build_multiplier(set_solver(cfg, **values))
    assert all(word in str(caught.value) for word in words)


class TestPlateau:
    def rates(self, gamma, patience, threshold, scores):
        """Ours, and those of torch, after each score."""
        plateau = Plateau(gamma=gamma, patience=patience, threshold=threshold)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, "max", gamma, patience, threshold, threshold_mode="abs", eps=0
        )
        ours, expected = [], []
        for score in scores:
            plateau.update(score)
            theirs.step(score)
            ours.append(plateau.factor)
            expected.append(optimizer.param_groups[0]["lr"])
        return ours, expected

    @pytest.mark.parametrize("patience", [0, 1, 3])
    @pytest.mark.parametrize("threshold", [0.0, 0.1, 5.0])
    def test_as_torchs(self, patience, threshold):
        rng = random.Random(10 * patience + int(threshold))
        for rising in (0.0, 1.0, -1.0):
            scores = [50 + rising * i + rng.choice([0.0, rng.uniform(-3, 3)]) for i in range(60)]
            ours, expected = self.rates(0.1, patience, threshold, scores)
            assert ours == pytest.approx(expected, rel=1e-9)
            assert rising > 0 or ours[-1] < 1

    def test_by_hand(self):
        """A rise of exactly the threshold is none; after a drop, patience begins anew; what is no number is no rise."""
        plateau = Plateau(gamma=0.5, patience=1, threshold=2.0)
        factors = []
        for score in (10.0, 12.0, 12.5, 12.0, 12.5, math.nan, 11.0):
            plateau.update(score)
            factors.append(plateau.factor)
        assert factors == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25]

    def test_state(self):
        whole = Plateau(gamma=0.1, patience=2, threshold=0.0)
        scores = [1.0, 5.0, 4.0, 4.5, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0]
        factors = [whole.update(score) or whole.factor for score in scores]
        for cut in range(len(scores)):
            first, second = (Plateau(gamma=0.1, patience=2, threshold=0.0) for _ in range(2))
            for score in scores[:cut]:
                first.update(score)
            second.load_state_dict(first.state_dict())
            assert second.factor == first.factor
            assert [second.update(score) or second.factor for score in scores[cut:]] == factors[cut:]
        assert factors[-1] == pytest.approx(1e-3)

    def test_built_by_the_keys(self, cfg):
        assert build_plateau(cfg) is None
        set_key(cfg, "TEST.EVAL_PERIOD", 5, "test")
        values = dict(GAMMA=0.3, PLATEAU_PATIENCE=0, PLATEAU_THRESHOLD=1.0, WARMUP_ITERS=0)
        set_solver(cfg, LR_SCHEDULER_NAME="WarmupPlateauLR", **values)
        plateau = build_plateau(cfg)
        for score in (1.0, 1.9, 2.9):
            plateau.update(score)
        assert plateau.factor == pytest.approx(0.3)
        assert rates(cfg) == [cfg.SOLVER.BASE_LR] * 10
        assert "PLATEAU_PATIENCE" in describe_schedule(cfg, images=80, world_size=1)


class TestWarmUpUntil:
    def test_it_ends_below_the_limit_and_never_returns(self):
        warm_up = WarmUpUntil(metric="top1_error", limit=80.0, low=0.1)
        factors = [warm_up.factor]
        for error in (99.0, math.nan, 80.0, 79.9, 95.0, 10.0):
            warm_up.update(error)
            factors.append(warm_up.factor)
        assert factors == [0.1, 0.1, 0.1, 0.1, 1.0, 1.0, 1.0]
        restored = WarmUpUntil(metric="top1_error", limit=80.0, low=0.1)
        restored.load_state_dict(warm_up.state_dict())
        assert restored.factor == 1.0

    def test_built_by_the_keys_in_place_of_the_warm_up_by_iterations(self, cfg):
        assert build_warm_up(cfg) is None
        set_solver(cfg, WARMUP_UNTIL_ERROR=80.0, WARMUP_FACTOR=0.1, STEPS=())
        warm_up = build_warm_up(cfg)
        assert warm_up.metric == "top1_error" and warm_up.factor == 0.1
        assert rates(cfg) == [cfg.SOLVER.BASE_LR] * 10


class TestRescaling:
    @pytest.fixture
    def paper(self, cfg):
        values = dict(REFERENCE_IMS_PER_BATCH=16, IMS_PER_BATCH=16, BASE_LR=0.02, MAX_ITER=90000, STEPS=(60000, 80000))
        set_solver(cfg, **values, WARMUP_ITERS=1000, CHECKPOINT_PERIOD=5000)
        set_key(cfg, "TEST.EVAL_PERIOD", 10000, "test.yaml")
        return cfg

    def values(self, cfg):
        solver = cfg.SOLVER
        counts = (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS, solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)
        return (pytest.approx(solver.BASE_LR), *counts)

    def test_a_smaller_batch(self, paper):
        """Twice as many iterations of half the images at half the rate: the epochs stay."""
        load_config(paper, None, ["SOLVER.IMS_PER_BATCH", "8"])
        rescale_for_batch(paper)
        assert self.values(paper) == (0.01, 180000, (120000, 160000), 2000, 10000, 20000)
        assert origin(paper, "SOLVER.MAX_ITER") == "rescaled from a batch of 16 to 8"

    def test_a_larger_batch(self, paper):
        load_config(paper, None, ["SOLVER.IMS_PER_BATCH", "64"])
        rescale_for_batch(paper)
        assert self.values(paper) == (0.08, 22500, (15000, 20000), 250, 1250, 2500)

    def test_the_command_line_is_the_last_word(self, paper):
        overrides = ["SOLVER.IMS_PER_BATCH", "8", "SOLVER.BASE_LR", "0.015", "SOLVER.MAX_ITER", "100"]
        load_config(paper, None, overrides)
        rescale_for_batch(paper)
        assert paper.SOLVER.BASE_LR == 0.015 and paper.SOLVER.MAX_ITER == 100
        assert paper.SOLVER.WARMUP_ITERS == 2000
        assert origin(paper, "SOLVER.BASE_LR") == "command line"

    @pytest.mark.parametrize("reference", [0, 16])
    def test_nothing_to_do(self, paper, reference):
        set_solver(paper, REFERENCE_IMS_PER_BATCH=reference)
        before = paper.clone()
        rescale_for_batch(paper)
        assert paper == before and origin(paper, "SOLVER.BASE_LR") == "test.yaml"

    def test_the_same_command_again_gives_the_same(self, paper):
        """As --resume does: the original configuration is loaded and rescaled anew."""
        again = paper.clone()
        for cfg in (paper, again):
            load_config(cfg, None, ["SOLVER.IMS_PER_BATCH", "2"])
            rescale_for_batch(cfg)
        assert paper == again
        rescale_for_batch(again)
        assert paper == again

    def test_the_written_configuration_is_not_rescaled_twice(self, paper, cfg, tmp_path):
        load_config(paper, None, ["SOLVER.IMS_PER_BATCH", "8"])
        rescale_for_batch(paper)
        (tmp_path / "config.yaml").write_text(paper.dump())
        read = load_config(cfg.clone(), tmp_path / "config.yaml")
        rescale_for_batch(read)
        assert yaml.safe_load(read.dump()) == yaml.safe_load(paper.dump())  # YAML knows no tuples in tuples
        read = load_config(cfg.clone(), tmp_path / "config.yaml", ["SOLVER.IMS_PER_BATCH", "16"])
        rescale_for_batch(read)
        assert self.values(read) == (0.02, 90000, (60000, 80000), 1000, 5000, 10000)

    def test_what_is_off_stays_off_and_what_is_on_stays_on(self, paper):
        set_solver(paper, MAX_ITER=0, WARMUP_ITERS=0, CHECKPOINT_PERIOD=0, STEPS=(), IMS_PER_BATCH=8)
        set_key(paper, "TEST.EVAL_PERIOD", 0, "test")
        rescale_for_batch(paper)
        assert self.values(paper) == (0.01, 0, (), 0, 0, 0)
        assert origin(paper, "SOLVER.WARMUP_ITERS") == "test.yaml"
        set_solver(paper, MAX_ITER=1, WARMUP_ITERS=1, CHECKPOINT_PERIOD=1, STEPS=(1,), IMS_PER_BATCH=800)
        set_key(paper, "TEST.EVAL_PERIOD", 1, "test")
        rescale_for_batch(paper)
        assert self.values(paper) == (1.0, 1, (1,), 1, 1, 1)


def test_the_description_says_what_and_where_from(cfg):
    set_solver(cfg, REFERENCE_IMS_PER_BATCH=2)
    load_config(cfg, None, ["SOLVER.MOMENTUM", "0.8"])
    rescale_for_batch(cfg)
    rows = {line.split()[0]: line for line in describe_schedule(cfg, images=80, world_size=2).splitlines()[2:]}
    assert "0.1" in rows["SOLVER.BASE_LR"] and "rescaled from a batch of 2 to 4" in rows["SOLVER.BASE_LR"]
    assert "0.8" in rows["SOLVER.MOMENTUM"] and "command line" in rows["SOLVER.MOMENTUM"]
    assert "default" in rows["SOLVER.WEIGHT_DECAY"] and "(3,)" in rows["SOLVER.STEPS"]
    assert "0.25" in rows["epochs"] and "80 training images" in rows["epochs"]  # 5 iterations of 4 images of 80
    assert rows["images"].split()[:4] == ["images", "a", "process", "2"] and "2 processes" in rows["images"]
    cosine = describe_schedule(set_solver(cfg, LR_SCHEDULER_NAME="WarmupCosineLR"), images=80, world_size=1)
    assert "STEPS" not in cosine and "1 process" in cosine and "1 processes" not in cosine


def test_the_schedule_that_is_checked_is_the_rescaled_one(cfg):
    """Its warm-up is longer than a run of 50 iterations, but not after rescaling from 16 images to 64."""
    keys = ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.MAX_ITER", "50", "SOLVER.IMS_PER_BATCH", "64"]
    load_config(cfg, None, keys)
    set_key(cfg, "SOLVER.WARMUP_ITERS", 100, "a.yaml")
    with pytest.raises(ConfigError, match=r"SOLVER\.WARMUP_ITERS is 100 of SOLVER\.MAX_ITER 50"):
        check_schedule(cfg)
    set_key(cfg, "SOLVER.REFERENCE_IMS_PER_BATCH", 16, "a.yaml")
    check_schedule(cfg)
    assert cfg.SOLVER.WARMUP_ITERS == 100


def test_a_run_of_no_iterations_has_any_schedule(cfg):
    load_config(cfg, None, ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.MAX_ITER", "0"])
    check_schedule(cfg)


@pytest.mark.parametrize(
    ("period", "tests", "words"),
    [(0, ("a",), "TEST.EVAL_PERIOD is 0"), (5, (), "DATASETS.TEST is empty"), (5, ("a",), None)],
)
def test_patience_needs_evaluations(cfg, period, tests, words):
    cfg.TEST.PATIENCE, cfg.TEST.EVAL_PERIOD, cfg.DATASETS.TEST = 3, period, tests
    if words is None:
        check_schedule(cfg)
        assert "TEST.PATIENCE" in describe_schedule(cfg, images=80, world_size=1)
    else:
        with pytest.raises(ConfigError, match=f"TEST.PATIENCE is 3.*, but {words}.*or TEST.PATIENCE to 0"):
            check_schedule(cfg)
