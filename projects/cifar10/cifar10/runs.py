"""Carry out a plan, run by run or several side by side; what is finished is kept."""

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import wait
from typing import NamedTuple

import torch

from cifar10.dataset import Dataset, open_dataset
from cifar10.plan import Plan
from cifar10.report import write_report
from cifar10.results import make_record, read_curves, write_record
from resnet_backbone import pretraining
from resnet_backbone.engine.config import set_key
from resnet_backbone.engine.output import FINAL, LAST
from resnet_backbone.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError, Interrupted
from resnet_backbone.weights import write_json

logger = logging.getLogger("cifar10")

STATUS_SECONDS = 60.0

Job = tuple[str, int]


def carry_out(plan: Plan) -> str:
    """Train every network with every seed, then write and return the report.

    Raises:
        InputError: the output folder holds an experiment with other arguments, or runs stopped; the others were done.
        Interrupted: a signal asked to leave; the runs under way are saved.
    """
    plan.check()
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s %(name)s] %(message)s", datefmt="%m-%d %H:%M:%S")
    dataset = open_dataset(plan)
    _claim(plan)
    logger.info("%s: %d training and %d test images", dataset.title, *dataset.images)
    jobs = [job for job in plan.jobs() if not plan.record(*job).is_file()]
    logger.info("%d runs, of which %d are finished", len(plan.jobs()), len(plan.jobs()) - len(jobs))
    carry = _one_after_the_other if plan.parallel == 1 else _side_by_side
    failed = carry(plan, dataset, jobs)
    report = write_report(plan.output) if len(failed) < len(plan.jobs()) else ""
    if failed:
        raise InputError(
            f"{len(failed)} of {len(plan.jobs())} runs stopped: {', '.join(map(_title, failed))}. log.txt in each "
            f"one's folder in {plan.output} says why; started again with the same arguments, they go on."
        )
    return report


def carry_out_run(plan: Plan, dataset: Dataset, network: str, seed: int) -> None:
    """Train and evaluate one network with one seed, from its last checkpoint if it was stopped; keep its numbers."""
    folder = plan.folder(network, seed)
    resume = (folder / LAST).is_file() or (folder / FINAL).is_file()
    start = time.perf_counter()
    train, test = dataset.names()
    cfg = plan.config(network, seed=seed)
    set_key(cfg, "DATASETS.TRAIN", (train,), "cifar10")
    set_key(cfg, "DATASETS.TEST", (test,), "cifar10")
    results = pretraining.run(cfg, resume=resume)
    training_top1 = None
    if not cfg.DATASETS.HOLD_OUT:  # with it, what is tested on are the images held out
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


def _one_after_the_other(plan: Plan, dataset: Dataset, jobs: list[Job]) -> list[Job]:
    """Do all jobs in this process; return those that stopped."""
    failed = []
    for number, job in enumerate(jobs, 1):
        logger.info("%s (%d of %d)", _title(job), number, len(jobs))
        try:
            carry_out_run(plan, dataset, *job)
        except InputError as error:
            print(f"error: {_title(job)}: {error}", file=sys.stderr)
            failed.append(job)
    return failed


class _Running(NamedTuple):
    process: multiprocessing.Process
    job: Job
    slot: int


def _side_by_side(plan: Plan, dataset: Dataset, jobs: list[Job]) -> list[Job]:
    """Do `plan.parallel` jobs at a time, each in a process of its own; return those that stopped."""
    context = multiprocessing.get_context("spawn")
    waiting, running, failed = list(jobs), [], []
    left: list[str] = []

    def leave(number: int, _frame: object) -> None:
        left.append(signal.Signals(number).name)
        for other in running:
            other.process.terminate()  # by SIGTERM, on which a run saves and leaves

    former = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        while running or (waiting and not left):
            while waiting and len(running) < plan.parallel and not left:
                job = waiting.pop(0)
                slot = min(set(range(plan.parallel)) - {other.slot for other in running})
                process = context.Process(target=_process, args=(plan, dataset, job, slot))
                process.start()
                running.append(_Running(process, job, slot))
                logger.info("%s begins", _title(job))
            wait([other.process.sentinel for other in running], timeout=STATUS_SECONDS)
            for other in [other for other in running if not other.process.is_alive()]:
                running.remove(other)
                code = other.process.exitcode
                logger.info("%s %s", _title(other.job), f"stopped with exit code {code}" if code else "is finished")
                if code:
                    failed.append(other.job)
            if running and not left:
                logger.info("  ".join(_status(plan, other.job) for other in running))
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if left:
        raise Interrupted(f"{left[0]}: the runs under way were saved.")
    return failed


def _process(plan: Plan, dataset: Dataset, job: Job, slot: int) -> None:
    """One run, in its own process: with its share of the cores or on the GPU of its turn, silent but for errors."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // plan.parallel))
    if torch.cuda.is_available():
        torch.cuda.set_device(slot % torch.cuda.device_count())
    try:
        # Several logs at once are unreadable; each run has its log.txt.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            carry_out_run(plan, dataset, *job)
    except InputError as error:
        print(f"error: {_title(job)}: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except (Interrupted, KeyboardInterrupt):
        sys.exit(EXIT_INTERRUPTED)


def _status(plan: Plan, job: Job) -> str:
    curves = read_curves(plan.folder(*job) / "metrics.json")
    if not curves.training:
        return f"{_title(job)}: preparing"
    iteration, error = curves.training[-1]
    return f"{_title(job)}: {iteration} of {plan.config(job[0], seed=job[1]).SOLVER.MAX_ITER}, error {error:.1f} %"


def _title(job: Job) -> str:
    return f"{job[0]}, seed {job[1]}"


def _claim(plan: Plan) -> None:
    """Note the plan in the output folder; refuse a folder with another one."""
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
