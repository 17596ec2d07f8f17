"""Metric writers besides metrics.json and TensorBoard: progress lines and Weights & Biases."""

import contextlib
import datetime
import logging
import time
from pathlib import Path

from detectron2.utils.events import EventWriter, JSONWriter, get_event_storage

from resnet_backbone.engine.config import ConfigError

logger = logging.getLogger(__name__)


class Progress(EventWriter):
    """Progress line: time left (eta), losses, images per second, fraction of time spent waiting for data.

    Written once per metrics reading. The time left includes evaluations and checkpoints.
    """

    def __init__(self, max_iter: int, start_iter: int):
        self.max_iter = max_iter
        self._start_iter = start_iter
        self._start_time = time.perf_counter()
        self._last = start_iter

    def write(self) -> None:
        stored = get_event_storage().latest()
        done = stored["images_per_second"][1] + 1 if "images_per_second" in stored else self._last
        if done == self._last:
            return
        self._last = done
        seconds = (time.perf_counter() - self._start_time) / (done - self._start_iter)
        latest = {name: value for name, (value, _) in stored.items()}
        # Skip an evaluation's loss, which is older, and the loss scale, which is not a loss.
        read = [name for name, (_, iteration) in stored.items() if iteration == done - 1 and name != "loss_scale"]
        losses = [f"{name} {latest[name]:.3f}" for name in read if "loss" in name]
        others = [f"{name} {latest[name]:.3g}" for name in ("top1_error", "lr") if name in latest]
        rate = f"{latest['images_per_second']:.4g} images/s, waiting for data {latest['data_share']:.0%}"
        eta = datetime.timedelta(seconds=round(seconds * (self.max_iter - done)))
        logger.info("  ".join([f"{done}/{self.max_iter}", f"eta {eta}", *losses, *others, rate]))


class MetricsFile(JSONWriter):
    """Detectron2's metrics.json, closed when a write fails: its buffer would fail again, with a stack trace."""

    def __init__(self, file: Path):
        super().__init__(str(file), window_size=1)  # no smoothing over iterations that a resumed run does not have
        self._file = file

    def write(self) -> None:
        try:
            super().write()
        except OSError as error:
            self.close()
            error.filename = str(self._file)
            raise

    def close(self) -> None:
        with contextlib.suppress(OSError):  # each write has flushed
            super().close()


class WeightsAndBiases(EventWriter):
    """Send each metric once to a Weights & Biases project; a resumed run continues the same W&B run.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self, project: str, folder: Path, config: dict[str, str]):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"WANDB_PROJECT is {project}, but wandb cannot be imported ({error}). pip install wandb, or leave "
                "WANDB_PROJECT empty: metrics.json and TensorBoard have the same numbers."
            ) from error
        note = folder / "wandb_run"
        self._run = wandb.init(
            project=project,
            name=folder.name,
            dir=str(folder),
            config=config,
            id=note.read_text() if note.is_file() else None,
            resume="allow",
        )
        note.write_text(self._run.id)
        self._last = -1

    def write(self) -> None:
        by_iteration: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in get_event_storage().latest().items():
            if iteration > self._last:
                by_iteration.setdefault(iteration, {})[name] = value
        for iteration, values in sorted(by_iteration.items()):
            self._run.log(values, step=iteration)
            self._last = iteration

    def close(self) -> None:
        self._run.finish()
