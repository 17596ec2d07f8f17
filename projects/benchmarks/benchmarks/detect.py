"""Detector throughput in images per second, training and inference: this package vs. stock Detectron2.

Step time depends on the number of RoIs, which triples within the first steps from random weights. So the weights stay
fixed (the learning rate is 0), every step uses the same images and boxes, and the comparison stops if a side does not
process exactly the requested number of RoIs.
"""

import contextlib
import copy
import functools
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer, TrainerBase
from detectron2.solver import build_optimizer as build_stock_optimizer
from detectron2.utils.events import EventStorage
from torch import nn

from benchmarks.detectors import DetectionWork, Inputs, Pair, build_pair, difference_of_losses
from benchmarks.pretrain import Conduct
from benchmarks.timing import Clock, Comparison, Side
from resnet_backbone.engine.config import CfgNode
from resnet_backbone.engine.optimizer import build_optimizer
from resnet_backbone.engine.precision import autocast
from resnet_backbone.engine.train import train
from resnet_backbone.engine.trainer import Trainer
from resnet_backbone.errors import InputError, Interrupted
from resnet_backbone.networks import accepted_arguments
from resnet_backbone.weights import Metadata

UNIT = "images/s"
OURS, OURS_FLOAT32 = "ours", "ours, float32"
STOCK, TUNED, FP16 = "stock", "stock, tuned", "stock, fp16"
MEANING = {
    OURS: "the package's training loop with its hooks, metrics.json and TensorBoard: accelerated (MODEL.ACCELERATE), "
    "bf16, fused SGD, channels_last and, on a GPU, a compiled backbone (SOLVER.AMP.ENABLED, SOLVER.COMPILE). Inference "
    "in bf16 too. On a CPU, the share of a step that convolutions and matrix products take bounds what is left to gain",
    OURS_FLOAT32: "the same detector in float32, its training steps without the hooks",
    STOCK: "Detectron2's detector, trainer and optimizer, float32, NCHW, by a configuration of its model zoo, which is "
    "ours too. For VGG-16, which Detectron2 lacks, torchvision's convolutions with Detectron2's heads",
    TUNED: "the same in bf16, channels_last and, on a GPU, with a compiled backbone: what a user gets without new code",
    FP16: "the same by Detectron2's own mixed precision, SOLVER.AMP.ENABLED, which needs a GPU",
}

# What torch's profiler calls convolutions and matrix products on a CPU.
LINEAR = {
    f"aten::{name}"
    for name in (
        "mkldnn_convolution",
        "_slow_conv2d_forward",
        "_slow_conv2d_backward",
        "convolution_backward",
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
    )
}

# Keyed by the name of the heads' input boxes in training and in inference.
REMEDIES = {"RoIs": "lower --rois, or give a larger --size", "proposals": "give a larger --size"}


class _Measured(Interrupted):
    """Raised in place of the next batch after all rounds: the loop exits without writing a final checkpoint."""


def compare_detectors(
    names: Sequence[str], work: DetectionWork, conduct: Conduct, configs: Path, report: Callable[[str], object]
) -> Iterator[Comparison]:
    """Compare the sides in MEANING in training, then in inference, one detector of DETECTORS at a time.

    Args:
        configs: folder with faster_rcnn_VGG16.yaml.
        report: gets a line before each detector, and one about its losses.

    Raises:
        InputError: an image has fewer proposals than requested, or the batch does not fit in memory.
    """
    for name in names:
        report(name)
        gc.collect()  # a loop and its hooks form a reference cycle that would keep the last detector's memory
        torch.compiler.reset()  # it limits how many networks one function is compiled for
        try:
            yield from _compare(name, work, conduct, configs, report)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{name}: the GPU's memory does not hold --batch {work.batch}; lower it, --rois or --size"
            ) from error


def _compare(
    name: str, work: DetectionWork, conduct: Conduct, configs: Path, report: Callable[[str], object]
) -> Iterator[Comparison]:
    pair = build_pair(name, work, configs=configs, device=conduct.device)
    difference = f"losses of {name} differ from stock's by {difference_of_losses(pair, work.rois):.0e} of their size"
    report(f"{difference}, in float32")
    tuned = copy.deepcopy(pair.stock).to(memory_format=torch.channels_last)
    if conduct.on_gpu:
        tuned.backbone.compile()
    settings = _settings(pair.cfg)
    settings[OURS_FLOAT32] += f", {difference}"
    strides = "stride_in_1x1" in accepted_arguments(pair.cfg.MODEL.NETWORK.NAME) and not work.stride_in_1x1
    for task, measure in (("training", _train_in_turns), ("inference", _infer_in_turns)):
        clock, notes = measure(name, pair, tuned, work, conduct)
        yield Comparison.of(
            clock,
            task=f"{name}, {task}{', stride in 3×3' if strides else ''}, {'×'.join(map(str, work.shape))}",
            unit=UNIT,
            first=OURS,
            sides={side: Side(f"{settings[side]}, {notes[side]}", work.shape) for side in clock.seconds},
            work=work.batch * work.iterations,
        )


def _settings(cfg: CfgNode) -> dict[str, str]:
    """Describe what sets the sides apart."""
    compiled = ", backbone compiled" if cfg.SOLVER.COMPILE else ""
    return {
        OURS: f"accelerated, bf16, channels_last{compiled}",
        OURS_FLOAT32: f"accelerated, float32, channels_last{compiled}",
        STOCK: "float32, NCHW",
        TUNED: f"bf16, channels_last{compiled}",
        FP16: "fp16, NCHW",
    }


class _Turns:
    """Track the number of RoIs the heads process in each turn, and on a GPU the memory used.

    Args:
        detector: its name, for messages.
        work: its workload.
        rois: required per image.
        what: their name, a key of REMEDIES.
        models: models whose RoI heads are tracked.
        on_gpu: whether to track memory.
    """

    def __init__(
        self, detector: str, work: DetectionWork, rois: int, what: str, models: Sequence[nn.Module], *, on_gpu: bool
    ):
        self._detector = detector
        self._batch = work.batch
        self._asked = rois
        self._what = what
        self._on_gpu = on_gpu
        self._found: set[int] = set()
        self._peaks: dict[str, int] = {}
        self._handles = [
            model.roi_heads.box_predictor.register_forward_pre_hook(
                lambda _, inputs: self._found.add(inputs[0].shape[0])
            )
            for model in models
        ]

    @contextlib.contextmanager
    def turn(self, side: str) -> Iterator[None]:
        """Wrap one turn of a side.

        Raises:
            InputError: its heads did not process the requested number of RoIs.
        """
        self._found.clear()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        yield
        if self._on_gpu:
            self._peaks[side] = torch.cuda.max_memory_allocated() - before
        if wrong := self._found - {self._asked * self._batch}:
            raise InputError(
                f"{self._detector}: {side} worked on {min(wrong) / self._batch:g} {self._what} an image, expected "
                f"{self._asked}; {REMEDIES[self._what]}"
            )

    def note(self, side: str) -> str:
        """Describe the observations."""
        memory = f", {self._peaks[side] / 2**30:.1f} GiB beside the weights at the peak" if self._on_gpu else ""
        return f"{self._asked} {self._what} an image{memory}"

    def close(self) -> None:
        """Remove the hooks from the models."""
        for handle in self._handles:
            handle.remove()


def _train_in_turns(
    name: str, pair: Pair, tuned: nn.Module, work: DetectionWork, conduct: Conduct
) -> tuple[Clock, dict[str, str]]:
    """Time training steps and note what ran; the other sides take turns between turns of the package's loop."""
    clock = Clock(conduct.device, cpu_time=conduct.cpu_time)
    models = (pair.ours, pair.stock, tuned)
    watched = _Turns(name, work, work.rois, "RoIs", models, on_gpu=conduct.on_gpu)
    # A model trained in two precisions shares one optimizer: at learning rate 0 it changes nothing.
    optimizer = build_optimizer(pair.cfg, pair.ours)
    stock_optimizer = build_stock_optimizer(pair.stock_cfg, pair.stock)
    bare = Trainer(
        model=pair.ours,
        optimizer=optimizer,
        batches=lambda _start: repeat(pair.inputs),
        loss_fn=_losses_of,
        images_per_batch=work.batch,
        seed=pair.cfg.SEED,
        log_period=pair.cfg.SOLVER.LOG_PERIOD,
    )
    shares = {} if conduct.on_gpu else _shares(lambda precision: _step(pair, precision))
    trainers: dict[str, TrainerBase] = {
        OURS_FLOAT32: bare,
        STOCK: SimpleTrainer(pair.stock, repeat(pair.inputs), stock_optimizer),
        TUNED: SimpleTrainer(
            _UnderAutocast(tuned, conduct.device), repeat(pair.inputs), build_stock_optimizer(pair.stock_cfg, tuned)
        ),
    }
    if conduct.on_gpu:
        trainers[FP16] = AMPTrainer(pair.stock, repeat(pair.inputs), stock_optimizer)
    others = {side: _Steps(trainer) for side, trainer in trainers.items()}

    def turns() -> Iterator[Inputs]:
        with watched.turn(OURS):
            yield from repeat(pair.inputs, conduct.warm_up)
        for side, run in others.items():
            with watched.turn(side):
                run(conduct.warm_up)
        for _ in range(conduct.rounds):
            with watched.turn(OURS):
                yield from clock.watch(OURS, repeat(pair.inputs, work.iterations))
            for side, run in others.items():
                with watched.turn(side):
                    clock.time(side, functools.partial(run, work.iterations))
        raise _Measured

    _train(pair, optimizer, turns)
    watched.close()
    notes = {side: watched.note(side) + shares.get(side, "") for side in clock.seconds}
    notes[OURS] += ", with hooks"
    return clock, notes


def _train(pair: Pair, optimizer: torch.optim.Optimizer, turns: Callable[[], Iterator[Inputs]]) -> None:
    """Run `engine.train.train`, as the training tool does, on everything `turns` yields."""
    cfg = pair.cfg

    def metadata(_iterations: int) -> Metadata:
        return Metadata(
            kind="detector",
            architecture=cfg.MODEL.NETWORK.NAME,
            arguments={},
            channel_order=cfg.INPUT.FORMAT,
            pixel_mean=tuple(cfg.MODEL.PIXEL_MEAN),
            pixel_std=tuple(cfg.MODEL.PIXEL_STD),
            norm_statistics="never",
            norm_epsilon=None,
            class_names=(),
        )

    task = SimpleNamespace(
        batches=lambda _start: turns(),
        losses=_losses_of,
        compile=lambda model: model.backbone.compile(),
        evaluate=lambda _model: {},
        metadata=metadata,
        image_names=lambda _iteration: (),
        num_images=cfg.SOLVER.IMS_PER_BATCH,
        best_metric="",
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(cfg, task, pair.ours, optimizer, folder=Path(folder), resume_from=None)
        except _Measured:
            pass
        except Interrupted:
            raise Interrupted("stopped by a signal; nothing was written") from None


def _losses_of(model: nn.Module, batch: Inputs) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return model(batch), {}


class _UnderAutocast(nn.Module):
    """Run a model's forward pass in bf16 and leave the backward pass outside autocast, as torch advises."""

    def __init__(self, model: nn.Module, device: str):
        super().__init__()
        self.model = model
        self.device = device

    def forward(self, inputs: Inputs) -> Any:
        with autocast("bf16", self.device):
            return self.model(inputs)


class _Steps:
    """Run a given number of a trainer's (Detectron2's or ours) iterations, just as its own loop does."""

    def __init__(self, trainer: TrainerBase):
        self._trainer = trainer
        trainer.iter = trainer.start_iter = 0
        trainer.max_iter = sys.maxsize
        trainer.storage = EventStorage()
        with trainer.storage:
            trainer.before_train()

    def __call__(self, iterations: int) -> None:
        with self._trainer.storage:
            for _ in range(iterations):
                self._trainer.before_step()
                self._trainer.run_step()
                self._trainer.after_step()
                self._trainer.iter += 1


def _infer_in_turns(
    name: str, pair: Pair, tuned: nn.Module, work: DetectionWork, conduct: Conduct
) -> tuple[Clock, dict[str, str]]:
    """Time detection, from uint8 images to boxes in image coordinates, and note what ran."""
    clock = Clock(conduct.device, cpu_time=conduct.cpu_time)
    models = tuple(model.eval() for model in (pair.ours, pair.stock, tuned))
    _choose_score_threshold(models, pair.inputs)
    proposals = pair.cfg.MODEL.RPN.POST_NMS_TOPK_TEST
    watched = _Turns(name, work, proposals, "proposals", models, on_gpu=conduct.on_gpu)
    precisions = {
        OURS: (pair.ours, "bf16"),
        OURS_FLOAT32: (pair.ours, "fp32"),
        STOCK: (pair.stock, "fp32"),
        TUNED: (tuned, "bf16"),
    }
    if conduct.on_gpu:
        precisions[FP16] = (pair.stock, "fp16")
    sides = {
        side: functools.partial(_detect, model, pair.inputs, precision, conduct.device)
        for side, (model, precision) in precisions.items()
    }
    found = {}
    for side, run in sides.items():
        with watched.turn(side):
            found[side] = run(conduct.warm_up)
    for _ in range(conduct.rounds):
        for side, run in sides.items():
            with watched.turn(side):
                clock.time(side, functools.partial(run, work.iterations))
    watched.close()
    shares = {}
    if not conduct.on_gpu:
        shares = _shares(lambda precision: _detect(pair.ours, pair.inputs, precision, conduct.device, 1))
    return clock, {side: f"{watched.note(side)}{shares.get(side, '')}, {found[side]:g} detections" for side in sides}


def _step(pair: Pair, precision: str) -> None:
    """Run forward and backward of our detector."""
    with EventStorage():
        with autocast(precision, "cpu"):
            losses = pair.ours(pair.inputs)
        sum(losses.values()).backward()
    pair.ours.zero_grad()


def _shares(call: Callable[[str], object]) -> dict[str, str]:
    """Say for our sides how much of a call (given its precision) convolutions and matrix products take."""
    words = {}
    for side, precision in ((OURS, "bf16"), (OURS_FLOAT32, "fp32")):
        call(precision)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            call(precision)
        times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
        share = sum(time for name, time in times.items() if name in LINEAR) / sum(times.values())
        words[side] = f", {share:.0%} of the time in convolutions and matrix products"
    return words


@torch.no_grad()
def _detect(model: nn.Module, inputs: Inputs, precision: str, device: str, iterations: int) -> float:
    """Detect `iterations` times; return detections per image."""
    with autocast(precision, device):
        for _ in range(iterations):
            outputs = model(inputs)
    return sum(len(output["instances"]) for output in outputs) / len(outputs)


@torch.no_grad()
def _choose_score_threshold(models: Sequence[nn.Module], inputs: Inputs) -> None:
    """Let as many (box, class) pairs pass as there are proposals, as a trained detector does.

    With random weights each class scores about 1/81: at Detectron2's threshold of 0.05 none would pass, and at 0 all of
    them would reach non-maximum suppression.
    """
    logits = []
    handle = models[0].roi_heads.box_predictor.register_forward_hook(lambda _, inputs, out: logits.append(out[0]))
    models[0](inputs)
    handle.remove()
    scores = logits[0].softmax(dim=1)[:, :-1]  # without the background
    ranked = scores.flatten().sort(descending=True).values
    threshold = ranked[len(scores) - 1 : len(scores) + 1].mean().item()  # between two scores, so none ties with it
    for model in models:
        model.roi_heads.box_predictor.test_score_thresh = threshold
