"""The baselines, written out: torchvision's reference training loop and its input pipeline.

Both follow `references/classification` in torchvision's repository (train.py, utils.py, presets.py), minus what a
single process with default options does not run.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, PILToTensor, RandomCrop, RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms import functional as F

PRINT_EVERY = 10  # train.py, --print-freq
WINDOW = 20  # utils.py, SmoothedValue


class PlainLoop:
    """`train_one_epoch` of train.py: forward, cross-entropy, zero_grad, backward, unfused SGD, metrics.

    As there, every step waits for the device to read the loss and accuracies.

    Args:
        model: in training mode, on its device.
        lr, momentum, weight_decay: for SGD.
        autocast: low-precision dtype of the forward pass, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        autocast: torch.dtype | None = None,
    ):
        self.model = model.train()
        self.meters: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in ("loss", "lr", "acc1", "acc5")}
        self.line = ""
        self._criterion = nn.CrossEntropyLoss()
        self._optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
        self._device = next(model.parameters()).device
        self._autocast = autocast
        self._steps = 0

    def __call__(self, images: torch.Tensor, target: torch.Tensor, iterations: int) -> None:
        """Train `iterations` times on normalized `(N, 3, H, W)` float32 images and `(N,)` labels."""
        # train.py sets this process-wide; here the sides must not change each other's settings.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
            for _ in range(iterations):
                self._step(images, target)

    def _step(self, images: torch.Tensor, target: torch.Tensor) -> None:
        images, target = images.to(self._device), target.to(self._device)
        with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
            output = self.model(images)
            loss = self._criterion(output, target)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        acc1, acc5 = accuracy(output, target, (1, min(5, output.shape[1])))
        rate = self._optimizer.param_groups[0]["lr"]
        for name, value in (("loss", loss.item()), ("lr", rate), ("acc1", acc1.item()), ("acc5", acc5.item())):
            self.meters[name].append(value)
        if self._steps % PRINT_EVERY == 0:
            self.line = "  ".join(
                f"{name}: {torch.tensor(list(values)).median().item():.4f} ({sum(values) / len(values):.4f})"
                for name, values in self.meters.items()
            )
        self._steps += 1


def accuracy(output: torch.Tensor, target: torch.Tensor, ranks: tuple[int, ...]) -> list[torch.Tensor]:
    """`accuracy` of utils.py: top-k accuracy in percent for each k in `ranks`."""
    with torch.inference_mode():
        _, predicted = output.topk(max(ranks), 1, True, True)
        correct = predicted.t().eq(target[None])
        return [correct[:rank].flatten().sum(dtype=torch.float32) * (100.0 / target.size(0)) for rank in ranks]


def preset_transform(crop: int) -> Callable[[Image.Image], torch.Tensor]:
    """`ClassificationPresetTrain` of presets.py: random resized crop, flip, `(3, crop, crop)` uint8 tensor."""
    return Compose([RandomResizedCrop(crop), RandomHorizontalFlip(), PILToTensor()])


class PaperTransform:
    """The ResNet paper's augmentation (section 3.4) as usually implemented; returns `(3, crop, crop)` uint8.

    torchvision resizes the shorter side, crops and flips; NumPy adds the PCA color shift.

    Args:
        short_side: minimum and maximum length of the resized shorter side.
        pca_std: standard deviation of the color shift's weights.
        values, vectors: of the principal components, as in `data/transforms.py`.
    """

    def __init__(
        self, *, short_side: tuple[int, int], crop: int, pca_std: float, values: np.ndarray, vectors: np.ndarray
    ):
        self.short_side = short_side
        self.pca_std = pca_std
        self.values = values
        self.vectors = vectors
        self._crop_and_flip = Compose([RandomCrop(crop), RandomHorizontalFlip()])

    def __call__(self, image: Image.Image) -> torch.Tensor:
        image = self._crop_and_flip(F.resize(image, random.randint(*self.short_side)))
        shift = self.vectors @ (np.random.normal(0.0, self.pca_std, 3) * self.values)
        pixels = np.asarray(image, np.float32) + shift.astype(np.float32)
        return torch.from_numpy(pixels.round().clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()


def reference_batches(
    folder: Path,
    transform: Callable[[Image.Image], torch.Tensor],
    *,
    batch_size: int,
    batches: int,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield shuffled batches from class folders with ImageFolder (Pillow) and a DataLoader, epoch after epoch."""
    dataset = ImageFolder(str(folder), transform)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=RandomSampler(dataset, num_samples=batch_size * batches),
        num_workers=workers,
        pin_memory=pin_memory,
    )
    return iter(loader)
