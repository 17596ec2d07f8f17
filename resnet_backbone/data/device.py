"""Decode and augment large JPEGs on the device; the loading processes only read files and draw parameters.

The batches match those of `train_loader` with the same `TrainTransform`: the same images in the same order, with the
same windows, mirroring and color shifts. The pixels differ slightly: each image is resized in float32 and rounded once
at the end (the host rounds after each direction), and on a GPU, nvJPEG and libjpeg convert colors differently.

On a GPU, a second thread queues the work alongside the training thread, and only one of them can run Python at a time.
So a batch's images are augmented together, which makes the number of operations nearly independent of the batch size.
"""

import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from resnet_backbone.data.decode import decode, too_long
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.functional import color_shift, orient
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.resize import resize_each, resize_windows
from resnet_backbone.data.sampler import BatchSampler
from resnet_backbone.data.transfer import to_device
from resnet_backbone.data.transforms import CropParameters, TrainTransform
from resnet_backbone.data.workers import Loader

logger = logging.getLogger(__name__)


class EncodedImage(NamedTuple):
    """A JPEG and its augmentation parameters; without parameters, any other image's finished pixels `(3, h, w)`."""

    data: np.ndarray  # (bytes,) uint8
    parameters: CropParameters | None
    label: int
    position: int
    name: str


class EncodedBatch(NamedTuple):
    """`n` encoded images with their data concatenated in one tensor, so a worker hands over one block of memory."""

    data: torch.Tensor  # (bytes of all,) uint8
    ends: torch.Tensor  # (n,) int64, where each ends in `data`
    parameters: list[CropParameters | None]
    labels: torch.Tensor  # (n,) int64
    positions: list[int]
    names: list[str]


class EncodedDataset(Dataset):
    """`dataset[position, index]` is an `EncodedImage`.

    What the device would not decode like the host (CMYK and RGB-coded JPEGs, PNG, ...) is decoded and augmented here.
    """

    def __init__(self, source: ClassificationSource, transform: TrainTransform, *, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> EncodedImage:
        position, index = key
        data, name = self.source.read(index), self.source.describe(index)
        size = plain_jpeg_size(data)
        if size is None or too_long(*size[::-1]):  # decoding it here raises the error
            parameters = None
            pixels = self.transform(decode(data, what=name), seed=self.seed, position=position)
            array = pixels.numpy().reshape(-1)
        else:
            parameters = self.transform.draw(*size, seed=self.seed, position=position)
            array = np.frombuffer(data, np.uint8)
        return EncodedImage(array, parameters, int(self.source.labels[index]), position, name)


def encoded_loader(
    source: ClassificationSource,
    transform: TrainTransform,
    *,
    batch_size: int,
    seed: int,
    start_iteration: int = 0,
    iterations: int | None = None,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Load one `EncodedBatch` per iteration from `start_iteration` on; arguments as for `train_loader`."""
    sampler = BatchSampler(
        len(source),
        batch_size,
        seed=seed,
        start_iteration=start_iteration,
        iterations=iterations,
        rank=rank,
        world_size=world_size,
    )
    dataset = EncodedDataset(source, transform, seed=seed)
    return Loader(dataset, sampler, workers=workers, collate_fn=_collate)


class DeviceAugment:
    """Turns an `EncodedBatch` into images `(n, 3, *crop)` uint8 and labels `(n,)` int64 on the device.

    `transform` and `seed` must match the batch's loader. An image that the device cannot decode is decoded on the host;
    if that fails too, a DatasetError names it.
    """

    def __init__(self, transform: TrainTransform, *, seed: int, device: torch.device | str) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            # Other threads, such as the prefetcher's, have their own current device.
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._transform = transform
        self._seed = seed
        self._warned = False
        self._resize = resize_each if self.device.type == "cpu" else resize_windows
        try:
            decode_jpeg([encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))], device=self.device)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise DatasetError(
                f"torchvision cannot decode JPEGs on {self.device} ({reason}); decode them in the loading processes"
            ) from None

    def __call__(self, batch: EncodedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        pieces = batch.data.tensor_split(batch.ends[:-1])
        jpegs = [row for row, parameters in enumerate(batch.parameters) if parameters is not None]
        finished = {
            row: pieces[row].view(3, *self._transform.crop)
            for row, parameters in enumerate(batch.parameters)
            if parameters is None
        }
        decoded = {}
        for row, image in zip(jpegs, self._decode([pieces[row] for row in jpegs])):
            if image is None:
                finished[row] = self._on_the_host(batch, row, pieces[row])
            else:
                decoded[row] = image
        parts = []
        if decoded:
            parts.append(self._augment(list(decoded.values()), [batch.parameters[row] for row in decoded]))
        if finished:
            parts.append(to_device(torch.stack(list(finished.values())), self.device))
        images = torch.cat(parts)
        if finished:
            rows = to_device(torch.tensor([*decoded, *finished]), self.device)
            images = torch.empty_like(images).index_copy_(0, rows, images)
        return images, to_device(batch.labels, self.device)

    def _augment(self, images: list[torch.Tensor], parameters: list[CropParameters]) -> torch.Tensor:
        """Augment decoded images `(3, H, W)` uint8 RGB on the device to `(n, 3, *crop)` uint8."""
        windows, flips = [one[:4] for one in parameters], [one.flip for one in parameters]
        pixels = self._resize(images, windows, self._transform.crop, flips).round_()
        weights = np.stack([np.zeros(3) if one.pca_weights is None else one.pca_weights for one in parameters])
        if weights.any():
            shift = torch.tensor(color_shift(weights), dtype=torch.float32)
            pixels += to_device(shift, self.device)[:, :, None, None]
        return orient(pixels.clamp_(0, 255).to(torch.uint8), channel_order=self._transform.channel_order)

    def _decode(self, files: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """Decode each file to `(3, H, W)` uint8 RGB on the device, or None."""
        if not files:
            return []
        if self.device.type == "cuda":
            # torchvision decodes on its own stream without waiting for this one, into memory that work still queued
            # here (for the previous batch) may be reading.
            torch.cuda.current_stream(self.device).synchronize()
        try:
            return decode_jpeg(files, mode=ImageReadMode.RGB, device=self.device)
        except RuntimeError:
            # One failing file discards the others' results.
            return [None] if len(files) == 1 else [self._decode([file])[0] for file in files]

    def _on_the_host(self, batch: EncodedBatch, row: int, file: torch.Tensor) -> torch.Tensor:
        image = decode(file.numpy().tobytes(), what=batch.names[row])
        if not self._warned:
            self._warned = True
            logger.warning("%s: no decoder on %s; such images are decoded on the host", batch.names[row], self.device)
        return self._transform(image, seed=self._seed, position=batch.positions[row])


class DevicePrefetcher:
    """Augments one batch ahead; on a GPU, in a thread, on a stream separate from the training's.

    Iterates over the results of `augment` for each of `batches`.
    """

    def __init__(self, batches: Iterable[EncodedBatch], augment: DeviceAugment) -> None:
        self._batches = batches
        self._augment = augment

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self._augment.device.type != "cuda":
            yield from map(self._augment, self._batches)
            return
        device = self._augment.device
        stream = torch.cuda.Stream(device)
        iterator = iter(self._batches)

        def prepare() -> tuple[tuple[torch.Tensor, torch.Tensor], torch.cuda.Event] | None:
            batch = next(iterator, None)
            if batch is None:
                return None
            with torch.cuda.stream(stream):
                return self._augment(batch), stream.record_event()

        with ThreadPoolExecutor(1) as thread:
            pending = thread.submit(prepare)
            while (prepared := pending.result()) is not None:
                pending = thread.submit(prepare)
                tensors, done = prepared
                training = torch.cuda.current_stream(device)
                training.wait_event(done)
                for tensor in tensors:
                    tensor.record_stream(training)  # its memory is not reused before the training has read it
                yield tensors


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Read a gray or YCbCr JPEG's height and width from its header; None for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                components = [layer[0] for layer in image.layer]
                coded_as_rgb = image.info.get("adobe_transform") == 0 or components == [*b"RGB"]
                plain = image.mode == "L" or (image.mode == "RGB" and not coded_as_rgb)
                return (image.height, image.width) if plain else None
    except Exception:  # Pillow's parsers raise many kinds; the host's decoder says what is wrong
        return None


def _collate(images: list[EncodedImage]) -> EncodedBatch:
    data, parameters, labels, positions, names = zip(*images)
    return EncodedBatch(
        torch.from_numpy(np.concatenate(data)),
        torch.tensor([len(piece) for piece in data]).cumsum(0),
        list(parameters),
        torch.tensor(labels),
        list(positions),
        list(names),
    )
