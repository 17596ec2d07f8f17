"""Carry out a plan, one run at a time or several in parallel; finished runs are kept."""

import json
import logging
import time
from functools import partial

from cifar10.dataset import Dataset, open_dataset
from cifar10.plan import Plan
from cifar10.report import write_report
from cifar10.results import make_record, read_curves, write_record
from resnet_backbone import pretraining
from resnet_backbone.engine.config import set_key
from resnet_backbone.engine.jobs import Job, run_jobs
from resnet_backbone.engine.output import FINAL, LAST
from resnet_backbone.errors import InputError
from resnet_backbone.weights import write_json

logger = logging.getLogger("cifar10")


def carry_out(plan: Plan) -> str:
    """Train every network with every seed, then write and return the report.

    Raises:
        InputError: the output folder holds an experiment with other arguments, or runs failed; the others finished.
        Interrupted: a signal requested exit; the current runs are saved.
    """
    plan.check()
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s %(name)s] %(message)s", datefmt="%m-%d %H:%M:%S")
    dataset = open_dataset(plan)
    _claim(plan)
    logger.info("%s: %d training and %d test images", dataset.title, *dataset.images)
    jobs = [
        Job(
            f"{network}, seed {seed}",
            partial(carry_out_run, plan, dataset, network, seed),
            partial(_status, plan, network, seed),
        )
        for network, seed in plan.jobs()
        if not plan.record(network, seed).is_file()
    ]
    logger.info("%d runs, of which %d are finished", len(plan.jobs()), len(plan.jobs()) - len(jobs))
    stopped = run_jobs(jobs, at_a_time=plan.parallel, logger=logger)
    report = write_report(plan.output) if len(stopped) < len(plan.jobs()) else ""
    if stopped:
        raise InputError(
            f"{len(stopped)} of {len(plan.jobs())} runs stopped: {', '.join(job.title for job in stopped)}. log.txt in "
            f"each one's folder in {plan.output} says why; started again with the same arguments, they go on."
        )
    return report


def carry_out_run(plan: Plan, dataset: Dataset, network: str, seed: int) -> None:
    """Train and evaluate one network with one seed, resuming a stopped run; save its numbers."""
    folder = plan.folder(network, seed)
    resume = (folder / LAST).is_file() or (folder / FINAL).is_file()
    start = time.perf_counter()
    train, test = dataset.names()
    cfg = plan.config(network, seed=seed)
    set_key(cfg, "DATASETS.TRAIN", (train,), "cifar10")
    set_key(cfg, "DATASETS.TEST", (test,), "cifar10")
    results = pretraining.run(cfg, resume=resume)
    training_top1 = None
    if not cfg.DATASETS.HOLD_OUT:  # otherwise the test set is the held-out images
        again = plan.config(network, seed=seed)
        for key, value in (
            ("DATASETS.TRAIN", (train,)),
            ("DATASETS.TEST", (train,)),
            ("MODEL.WEIGHTS", str(folder / FINAL)),
        ):
            set_key(again, key, value, "cifar10")
        training_top1 = pretraining.run(again, eval_only=True)["top1"]
    record = make_record(
        plan,
        dataset,
        cfg,
        curves=read_curves(folder / "metrics.json"),
        test_top1=results["top1"],
        training_top1=training_top1,
        seconds=time.perf_counter() - start,
        resumed=resume,
    )
    write_record(record, plan.record(network, seed))


def _status(plan: Plan, network: str, seed: int) -> str:
    curves = read_curves(plan.folder(network, seed) / "metrics.json")
    if not curves.training:
        return "preparing"
    iteration, error = curves.training[-1]
    return f"{iteration} of {plan.config(network, seed=seed).SOLVER.MAX_ITER}, error {error:.1f}%"


def _claim(plan: Plan) -> None:
    """Record the plan in the output folder; reject a folder with a different one."""
    file = plan.output / "plan.json"
    if not file.is_file():
        try:
            write_json(file, plan.fixed())
        except OSError as error:
            raise InputError(f"--output {plan.output} cannot be written: {error.strerror}. Choose another.") from error
        return
    before = json.loads(file.read_text())
    if differs := [key for key, value in plan.fixed().items() if before.get(key) != value]:
        was = "; ".join(f"{key} was {before.get(key)}, is now {plan.fixed()[key]}" for key in differs)
        raise InputError(f"{plan.output} holds an experiment with other arguments ({was}). Choose another --output.")
