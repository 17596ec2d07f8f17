"""Train twice, once undisturbed and once with accidents, and compare."""

import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_backbone import pretraining
from resnet_backbone.data.generated import write_classification, write_detection
from resnet_backbone.engine.config import load_config
from resnet_backbone.errors import InputError
from resnet_backbone.weights import read_checkpoint
from soak.accidents import ACCIDENTS, FILLER

ROOT = Path(__file__).parents[3]
DISK = 2**30  # bytes of the disk that gets full
LONGEST = 1800  # seconds that a run may take
LATEST = 60  # seconds after which an accident happens at the latest
SMALL = """
MODEL.DEVICE cpu  MODEL.NETWORK.NAME resnet18  MODEL.NETWORK.WIDTH 0.25  SEED 7
MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 32  MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0
MODEL.RPN.PRE_NMS_TOPK_TRAIN 200  MODEL.RPN.POST_NMS_TOPK_TRAIN 100
MODEL.RPN.PRE_NMS_TOPK_TEST 100  MODEL.RPN.POST_NMS_TOPK_TEST 20
INPUT.MIN_SIZE_TRAIN (128,160)  INPUT.MAX_SIZE_TRAIN 256  INPUT.MIN_SIZE_TEST 128  INPUT.MAX_SIZE_TEST 256
SOLVER.REFERENCE_IMS_PER_BATCH 0  SOLVER.IMS_PER_BATCH 4  SOLVER.BASE_LR 0.002  SOLVER.STEPS ()  SOLVER.WARMUP_ITERS 20
SOLVER.EMA_DECAY 0.9  SOLVER.LOG_PERIOD 5  SOLVER.CHECKPOINT_PERIOD 10  SOLVER.CHECKPOINT_KEEP 2  TEST.EVAL_PERIOD 50
DATALOADER.NUM_WORKERS 2
"""
PRETRAIN = """
MODEL.DEVICE cpu  MODEL.NETWORK.NAME resnet18  MODEL.NETWORK.WIDTH 0.25  INPUT.MIN_SIZE_TRAIN (64,64)
INPUT.MIN_SIZE_TEST 64  INPUT.CROP.SIZE (64,64)  SOLVER.IMS_PER_BATCH 16  SOLVER.REFERENCE_IMS_PER_BATCH 0
SOLVER.MAX_ITER 0  SOLVER.STEPS ()  TEST.PRECISE_BN.NUM_ITER 4  SOLVER.AMP.ENABLED False  SEED 7
"""


@dataclass(frozen=True)
class Plan:
    """What is done.

    Attributes:
        output: a new folder.
        data: training and test data, in any form that DATASETS takes; None for generated images.
        iterations: length of the run.
        accidents: their number; further ones do not happen once the run is at its end.
        seed: decides which accidents happen, and when.
    """

    output: Path
    data: tuple[str, str] | None
    iterations: int
    accidents: int
    seed: int


def carry_out(plan: Plan) -> dict[str, Any]:
    """Return what happened and what came of it; raise InputError if a run ended otherwise than it should."""
    if plan.output.exists():
        raise InputError(f"{plan.output} exists. Name a new folder.")
    plan.output.mkdir(parents=True)
    data = plan.data or (str(write_detection(plan.output / "scenes", images=48, image_size=160, seed=1)),) * 2
    keys = [
        *SMALL.split(),
        "DATASETS.TRAIN",
        data[0],
        "DATASETS.TEST",
        data[1],
        "SOLVER.MAX_ITER",
        str(plan.iterations),
    ]
    keys += ["MODEL.WEIGHTS", str(_classifier(plan.output))]
    began = time.monotonic()
    whole = plan.output / "whole"
    undisturbed = Run(whole, keys, plan.output / "whole.txt")
    undisturbed.expect({0})
    length = time.monotonic() - began
    with _disk(plan.output / "disk") as (disk, may_fill):
        rows = list(_disturbed(plan, disk, keys, length, may_fill))
        compared = _compare(whole, disk / "run", keys, plan.output)
    seconds = {"undisturbed": round(length), "all": round(time.monotonic() - began)}
    return {"data": data, "seconds": seconds, "rows": rows, **compared}


class Run:
    """`tools/train_net.py` in two processes, as a process group of its own.

    Args:
        folder: its OUTPUT_DIR.
        log: file for what it prints.
    """

    def __init__(self, folder: Path, words: Sequence[str], log: Path):
        self.log = log
        command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--config-file", "faster_rcnn_R50.yaml"]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--num-gpus", "2", *words, "OUTPUT_DIR", str(folder)],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ends_within(self, seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is not None

    def expect(self, statuses: set[int]) -> tuple[int, str]:
        """Wait for the end; return the exit code and the last line; raise InputError if it is none of `statuses`."""
        status = self.process.wait(LONGEST)
        printed = self.log.read_text()
        if status not in statuses or "Traceback" in printed:
            raise InputError(f"a run ended with exit code {status}, expected {sorted(statuses)}; see {self.log}.")
        return status, (printed.strip().splitlines() or [""])[-1]


def _disturbed(plan: Plan, disk: Path, keys: Sequence[str], length: float, may_fill: bool) -> Iterator[dict[str, Any]]:
    """Train with accidents at random moments, and resume after each; yield a row for each start."""
    rng = random.Random(plan.seed)
    names = [name for name in ACCIDENTS if may_fill or name != "full disk"]
    for number in range(plan.accidents + 1):
        run, begin = Run(disk / "run", [*keys, "--resume"], plan.output / f"run{number:02d}.txt"), time.monotonic()
        name, statuses, moment = "none", {0}, 0.0
        if number < plan.accidents:
            if number % len(names) == 0:  # each kind in turn, in random order
                rng.shuffle(names)
            name, moment = names[number % len(names)], rng.uniform(1, min(0.25 * length, LATEST))
            accident, expected = ACCIDENTS[name]
            if not run.ends_within(moment):  # anywhere from the first import on
                while not accident(run.process, disk, rng) and not run.ends_within(0.5):
                    pass
            statuses = {0, *expected}
        status, last = run.expect(statuses)
        (disk / FILLER).unlink(missing_ok=True)
        for file in (disk / "run").glob("model_*.pth"):
            read_checkpoint(file)  # raises CheckpointError, an InputError, if it is not whole
        row = {"accident": name, "after": round(moment), "seconds": round(time.monotonic() - begin), "exit": status}
        yield {**row, "last line": last.replace(str(plan.output), "…")}
        if status == 0:
            return


def _compare(whole: Path, run: Path, keys: Sequence[str], output: Path) -> dict[str, Any]:
    """Compare the final weights bit by bit, and what the files say of themselves with an evaluation of them."""
    one, other = (read_checkpoint(folder / "model_final.pth") for folder in (whole, run))
    different = [name for name, tensor in one.model.items() if not torch.equal(tensor, other.model[name])]
    reported = {"model_final.pth": json.loads((run / "results.json").read_text())["bbox"]["AP"]}
    reported["model_best.pth"] = read_checkpoint(run / "model_best.pth").metadata.origin["bbox/AP"]
    evaluated = {}
    for name in reported:
        folder = output / f"test_{name.removesuffix('.pth')}"
        Run(folder, [*keys, "MODEL.WEIGHTS", str(run / name), "--eval-only"], folder.with_suffix(".txt")).expect({0})
        lines = (folder / "log.txt").read_text().splitlines()
        line = next(line for line in reversed(lines) if "bbox AP " in line)
        evaluated[name] = float(line.partition("bbox AP ")[2].partition(",")[0])
    # An AP near 0 says little, so the detections themselves, which the run left of its last evaluation.
    own, again = (_detections(folder) for folder in (run, output / "test_model_final"))
    return {
        "tensors": len(one.model),
        "different": different,
        "reported": reported,
        "evaluated": evaluated,
        "detections": len(own),
        "same_detections": own == again,
    }


def _detections(folder: Path) -> list[dict[str, Any]]:
    return json.loads(next(folder.rglob("coco_instances_results.json")).read_text())


def _classifier(output: Path) -> Path:
    """Write a classifier with random weights whose batch norm statistics are those of generated images."""
    pattern = write_classification(output / "shapes", images=64, image_size=72, seed=1)
    words = [*PRETRAIN.split(), "DATASETS.TRAIN", pattern, "DATASETS.TEST", pattern]
    words += ["OUTPUT_DIR", str(output / "classifier")]
    pretraining.run(load_config(pretraining.get_config(), "pretrain/imagenet.yaml", words))
    return output / "classifier" / "model_final.pth"


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Yield a folder to write to, and whether it is a small disk of its own, which may get full."""
    folder.mkdir()
    options = ("-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder))
    mounted = subprocess.run(["mount", *options], capture_output=True).returncode == 0
    try:
        yield folder, mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
