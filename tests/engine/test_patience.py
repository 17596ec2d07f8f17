"""Early stopping: TEST.PATIENCE ends a run, which resumes exactly."""

import logging
import shutil
import signal

import pytest
from detectron2.utils import comm

from resnet_backbone.engine.hooks import Evaluation
from resnet_backbone.engine.output import read_last_checkpoint
from resnet_backbone.errors import Interrupted
from resnet_backbone.weights import read_checkpoint
from tests.engine import tiny
from tests.engine.test_preemption import send
from tests.engine.tiny import Run, assert_equal, assert_same, assert_same_files, in_two_processes, metrics


class TestPatience:
    """Evaluations every 3 iterations: a best after 6, then none that is higher."""

    SCORES = {3: 3.0, 6: 4.0, 9: 4.0, 12: 3.5, 15: 3.9, 18: 3.0}.get

    def patient(self, cfg, patience):
        cfg = cfg.clone()
        cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, cfg.TEST.PATIENCE = 20, 3, patience
        cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.PLATEAU_PATIENCE = "WarmupPlateauLR", 1
        cfg.SOLVER.EMA_DECAY, cfg.SOLVER.CHECKPOINT_KEEP = 0.7, 1
        return cfg

    @pytest.mark.parametrize(("patience", "iterations"), [(0, 20), (1, 9), (2, 12), (3, 15), (4, 18), (5, 20)])
    def test_ends_the_run_after_so_many_evaluations_without_a_new_best(self, cfg, tmp_path, patience, iterations):
        run = Run(self.patient(cfg, patience), tmp_path, scores=self.SCORES)
        assert run.iterations == iterations and run.evaluated == list(range(3, min(iterations, 18) + 1, 3))
        assert read_last_checkpoint(tmp_path).iteration == iterations - 1
        assert read_checkpoint(tmp_path / "model_best.pth").metadata.origin["iterations"] == 6
        trained = [line["iteration"] for line in metrics(tmp_path) if "total_loss" in line]
        assert max(trained) < iterations
        assert [line["bbox/AP"] for line in metrics(tmp_path) if "bbox/AP" in line] == list(
            map(self.SCORES, run.evaluated)
        )

    def test_counts_from_each_new_best(self, cfg, tmp_path):
        scores = {3: float("nan"), 6: 1.0, 9: 1.0, 12: 2.0, 15: float("nan"), 18: 2.0}.get
        assert Run(self.patient(cfg, 2), tmp_path, scores=scores).iterations == 18

    def test_a_metric_that_is_never_a_number_ends_it_too(self, cfg, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        run = Run(self.patient(cfg, 3), tmp_path, scores=lambda i: float("nan"))
        assert run.iterations == 9
        assert "finished after 9 iterations: bbox/AP has not risen above nothing in 3 evaluations" in caplog.text

    def test_killed_at_any_moment_and_resumed(self, cfg, tmp_path):
        cfg, folder, left = self.patient(cfg, 2), tmp_path / "whole", tmp_path / "left"
        whole = Run(
            cfg,
            folder,
            during_step=lambda i: shutil.copytree(folder, left / f"step {i:02}"),
            during_evaluation=lambda i: shutil.copytree(folder, left / f"evaluation {i:02}"),
            scores=self.SCORES,
        )
        assert len(list(left.iterdir())) == 12 + 4
        for moment in left.iterdir():
            resumed = Run(cfg, moment, resume=True, scores=self.SCORES)
            assert resumed.iterations == 12
            assert_same(whole, resumed)
            assert_same_files(moment, folder)

    def test_a_finished_run_says_so_and_trains_no_more(self, cfg, tmp_path, caplog):
        whole = Run(self.patient(cfg, 2), tmp_path, scores=self.SCORES)
        before = {file.name: file.read_bytes() for file in tmp_path.glob("m*")}
        caplog.set_level(logging.INFO)
        again = Run(self.patient(cfg, 2), tmp_path, resume=True, scores=self.SCORES)
        assert (again.seen, again.evaluated, again.iterations) == ([], [], 12)
        words = "the run is finished after 12 iterations: bbox/AP has not risen above 4 in 2 evaluations"
        assert words in caplog.text
        assert_equal(whole.result.state_dict(), again.result.state_dict())
        assert {file.name: file.read_bytes() for file in tmp_path.glob("m*")} == before

    @pytest.mark.parametrize("patience", [0, 3])
    def test_a_finished_run_goes_on_with_more_patience(self, cfg, tmp_path, patience):
        Run(self.patient(cfg, 2), tmp_path / "parts", scores=self.SCORES)
        resumed = Run(self.patient(cfg, patience), tmp_path / "parts", resume=True, scores=self.SCORES)
        assert resumed.evaluated == ([15] if patience else [15, 18])  # not again after 12
        whole = Run(self.patient(cfg, patience), tmp_path / "whole", scores=self.SCORES)
        assert_same(whole, resumed)
        assert_same_files(tmp_path / "parts", tmp_path / "whole")

    def test_another_metric_begins_anew(self, cfg, tmp_path, caplog):
        cfg = self.patient(cfg, 2)
        with pytest.raises(Interrupted):
            Run(cfg, tmp_path, scores=lambda i: 100.0, during_step=send(signal.SIGTERM, 7))
        before = (tmp_path / "model_best.pth").read_bytes()
        run = Run(cfg, tmp_path, resume=True, scores=lambda i: 100.0, metric="bbox/sum")
        assert "TEST.BEST_METRIC was bbox/AP and is now bbox/sum" in caplog.text
        assert run.evaluated[0] == 9 and len(run.evaluated) > 1
        assert (tmp_path / "model_best.pth").read_bytes() != before

    def test_ends_all_processes_together(self, tmp_path):
        """Only the main process has results."""
        assert in_two_processes(_two_with_patience, tmp_path, seconds=60) == [8, 8]


def _two_with_patience() -> int:
    def evaluate():
        return {"AP": 1.0} if comm.is_main_process() else {}

    trainer = tiny.build(hooks=[Evaluation(evaluate, 2, metric="AP", patience=3)])
    trainer.train(0, 20)
    return trainer.iter
