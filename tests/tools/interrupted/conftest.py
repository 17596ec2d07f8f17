"""Tiny data, runs to be interrupted, and a run that nothing disturbs.

All of it belongs to the session: importing everything and training take seconds, and several files need both.
"""

import json
import select
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from resnet_backbone.weights import read_checkpoint
from tests.tools.interrupted.runs import ENVIRONMENT, ROOT, WAIT, Run, command, metrics

# Checkpoints (every 3 iterations), readings of the metrics (4), evaluations (5) and epochs (3.75) all fall apart.
KEYS = """
MODEL.DEVICE cpu  MODEL.NETWORK.NAME vgg16_bn  MODEL.NETWORK.WIDTH 0.0625  MODEL.NETWORK.POOL5 False
INPUT.MIN_SIZE_TRAIN (32,40)  INPUT.MIN_SIZE_TEST 32  INPUT.CROP.SIZE (32,32)  DATALOADER.NUM_WORKERS 2  SEED 5
SOLVER.REFERENCE_IMS_PER_BATCH 0  SOLVER.IMS_PER_BATCH 8  SOLVER.BASE_LR 0.03  SOLVER.MAX_ITER 24
SOLVER.AMP.ENABLED False  SOLVER.EMA_DECAY 0.7  SOLVER.WARMUP_UNTIL_ERROR 60  SOLVER.WARMUP_FACTOR 0.2
SOLVER.LR_SCHEDULER_NAME WarmupPlateauLR  SOLVER.GAMMA 0.5  SOLVER.PLATEAU_PATIENCE 0
SOLVER.CHECKPOINT_PERIOD 3  SOLVER.CHECKPOINT_KEEP 2  SOLVER.LOG_PERIOD 4
TEST.EVAL_PERIOD 5  TEST.PRECISE_BN.NUM_ITER 2
"""


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Folders of three classes of 10 images that differ in brightness, in noise."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("images")
    for label, name in enumerate("abc"):
        (root / name).mkdir()
        for number in range(10):
            image = rng.integers(0, 180, (40, 36 + number, 3)) + 30 * label
            cv2.imwrite(str(root / name / f"{number}.{('jpg', 'png')[number % 2]}"), image.astype(np.uint8))
    return root


@pytest.fixture(scope="session")
def words(images):
    """The function `(output folder, "KEY VALUE …", resume=…)` that gives the words of a command line."""

    def give(folder: Path, keys: str = "", *, resume: bool = True) -> list[str]:
        data = ("DATASETS.TRAIN", images, "DATASETS.TEST", images, "OUTPUT_DIR", folder)
        start = ("--config-file", ROOT / "configs" / "pretrain" / "imagenet.yaml", *(["--resume"] if resume else []))
        return [*map(str, start), *KEYS.split(), *keys.split(), *map(str, data)]

    return give


@pytest.fixture(scope="session")
def start(words, tmp_path_factory):
    """The function `(output folder, accident, …, keys=…)` that starts a run by way of accidents.py."""
    outputs = tmp_path_factory.mktemp("outputs")
    script = Path(__file__).with_name("accidents.py")
    server = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=ENVIRONMENT
    )
    assert server.stdout.readline() == b"ready\n"
    count = 0

    def status(seconds: float) -> int | None:
        return int(server.stdout.readline()) if select.select([server.stdout], [], [], seconds)[0] else None

    def begin(folder: Path, *accident, keys: str = "") -> Run:
        nonlocal count
        count += 1
        output = outputs / f"{count}.txt"
        request = {"words": words(folder, keys), "output": str(output), "accident": accident}
        server.stdin.write(json.dumps(request).encode() + b"\n")
        return Run(int(server.stdout.readline()), output, status)

    yield begin
    server.terminate()  # to close its stdin may not do: whatever another test has forked since holds it open
    server.wait(WAIT)


@pytest.fixture(scope="session")
def finish(start):
    """The function `(output folder, keys=…)` that resumes a run, which must then come to its end."""

    def resume(folder: Path, keys: str = "") -> str:
        status, printed = start(folder, keys=keys).end()
        assert status == 0 and "Traceback" not in printed, printed
        return printed

    return resume


@pytest.fixture(scope="session")
def whole(words, tmp_path_factory) -> Path:
    """The output folder of a run by the command itself, which nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    status, printed = command(folder.with_suffix(".txt"), words(folder, resume=False)).end()
    assert status == 0, printed
    # It has all that a resume could lose.
    trainer = read_checkpoint(folder / "model_0000023.pth").trainer
    assert trainer["plateau"]["drops"] > 0 and trainer["warm_up"] == {"over": True} and trainer["evaluation"]["best"]
    assert trainer["optimizer"]["state"] and trainer["average"]
    scores = [values["top1"] for _, values in sorted(metrics(folder).items()) if "top1" in values]
    assert len(scores) == 4 and scores[0] < max(scores)
    return folder
