import io
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_backbone.data import device as module
from resnet_backbone.data.decode import decode
from resnet_backbone.data.device import DeviceAugment, DevicePrefetcher, encoded_loader, plain_jpeg_size
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.resize import resize_windows
from resnet_backbone.data.sampler import BatchSampler
from resnet_backbone.data.transforms import TrainTransform

VOC = Path(__file__).parents[2] / ".." / "shared" / "data" / "voc" / "images"
TRANSFORMS = {
    "absolute": TrainTransform(short_side=(96, 128), crop=(88, 80)),
    "random_resized": TrainTransform(crop_type="random_resized", crop=(88, 80), channel_order="BGR"),
    "plain": TrainTransform(short_side=(60, 300), crop=(56, 60), flip=0.0, pca_std=0.0),
}
# Largest mean difference over a batch and largest difference of one value, in gray levels of 0...255. On the host only
# the resizing differs: it rounds to whole levels after each direction. nvJPEG also interpolates color differently.
HOST_TOLERANCE = 0.3, 2
CUDA_TOLERANCE = 2.0, 128


class Files(ClassificationSource):
    def __init__(self, files: list[bytes]) -> None:
        super().__init__(["a", "b", "c"], np.arange(len(files)) % 3)
        self.files = files

    def read(self, index: int) -> bytes:
        return self.files[index]

    def describe(self, index: int) -> str:
        return f"file {index}"


def picture(seed: int, height: int, width: int) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, form: str = "JPEG", **arguments) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **arguments)
    return file.getvalue()


def jpegs() -> list[bytes]:
    """Of several sizes, qualities, color resolutions, gray, progressive, with an orientation that is to be ignored."""
    turned = Image.Exif()
    turned[0x0112] = 6
    return [
        encode(picture(0, 150, 200), quality=90),
        encode(picture(1, 211, 130), quality=75, subsampling=2),
        encode(picture(2, 100, 300), quality=95, subsampling=0),
        encode(picture(3, 160, 160).convert("L"), quality=80),
        encode(picture(4, 333, 240), quality=85, progressive=True),
        encode(picture(5, 140, 180), quality=85, exif=turned),
    ]


def others() -> list[bytes]:
    """What goes through the host's decoder."""
    rgb = encode(picture(8, 130, 140), quality=90, keep_rgb=True)
    assert rgb[6:11] == b"Adobe"  # which says that there is no color transform; so do the components' names alone
    return [
        encode(picture(6, 150, 160), "PNG"),
        encode(picture(7, 120, 170).convert("CMYK"), quality=90),
        rgb,
        rgb[:2] + rgb[18:],
        encode(picture(9, 110, 150), "WEBP", lossless=True),
    ]


def reference(source, transform, *, batch_size, seed, iterations, rank=0, world_size=1):
    """The host's path, from fully decoded images."""
    sampler = BatchSampler(len(source), batch_size, seed=seed, iterations=iterations, rank=rank, world_size=world_size)
    for pairs in sampler:
        images = [
            transform(decode(source.read(index), what=""), seed=seed, position=position) for position, index in pairs
        ]
        yield torch.stack(images), torch.tensor([int(source.labels[index]) for _, index in pairs])


def differences(batches, references, device: str) -> tuple[float, int]:
    """Mean of the worst batch and maximum; labels, shapes and types must be right."""
    means, largest = [], 0
    for (images, labels), (expected, numbers) in zip(batches, references, strict=True):
        assert images.device.type == labels.device.type == device
        assert images.shape == expected.shape and images.dtype == torch.uint8 and torch.equal(labels.cpu(), numbers)
        difference = (images.cpu().int() - expected.int()).abs()
        means.append(difference.float().mean().item())
        largest = max(largest, int(difference.max()))
    return max(means), largest


def check(source, transform, device: str, tolerance: tuple[float, int], **arguments) -> None:
    augment = DeviceAugment(transform, seed=arguments["seed"], device=device)
    batches = DevicePrefetcher(encoded_loader(source, transform, **arguments), augment)
    mean, largest = differences(batches, reference(source, transform, **arguments), device)
    print(f"mean {mean:.3f}, largest {largest}")
    assert mean <= tolerance[0] and largest <= tolerance[1]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_pixels_of_the_host(name):
    check(Files(jpegs()), TRANSFORMS[name], "cpu", HOST_TOLERANCE, batch_size=6, seed=1, iterations=6)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_pixels_of_the_host_resized_together(name, monkeypatch):
    """As on a GPU, where all windows of a batch are resized in a few operations."""
    monkeypatch.setattr(module, "resize_each", resize_windows)
    source = Files(jpegs() + others())
    check(source, TRANSFORMS[name], "cpu", HOST_TOLERANCE, batch_size=11, seed=1, iterations=6)


def test_operators_do_not_grow_with_the_batch(monkeypatch):
    """Each launch from Python delays the training's own. Decoding, with its allocations, is one call."""

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "aten" and not func.is_view and func.name() != "aten::empty.memory_format":
                names.append(func.name())
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(module, "resize_each", resize_windows)
    transform = TrainTransform(short_side=(90, 90), crop=(56, 60), channel_order="BGR")
    counts = []
    for size in (4, 16):
        source = Files([encode(picture(seed, 120, 150), quality=90) for seed in range(size)])
        augment = DeviceAugment(transform, seed=0, device="cpu")
        (batch,) = encoded_loader(source, transform, batch_size=size, seed=0, iterations=1)
        names = []
        with Operators():
            augment(batch)
        counts.append(names)
    print(len(counts[0]), counts[0])
    assert counts[0] == counts[1] and len(counts[0]) < 60


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRANSFORMS)
def test_pixels_on_a_gpu(name):
    source = Files(jpegs() + others())
    check(source, TRANSFORMS[name], "cuda", CUDA_TOLERANCE, batch_size=11, seed=1, iterations=20)


def photographs() -> Files:
    if not VOC.is_dir():
        pytest.skip(f"{VOC} is not there")
    return Files([path.read_bytes() for path in sorted(VOC.iterdir())[:24]])


def test_pixels_of_photographs():
    transform = TrainTransform(short_side=(256, 480), crop=(224, 224))
    check(photographs(), transform, "cpu", HOST_TOLERANCE, batch_size=24, seed=0, iterations=1)


@pytest.mark.gpu
def test_pixels_of_photographs_on_a_gpu():
    transform = TrainTransform(short_side=(256, 480), crop=(224, 224))
    check(photographs(), transform, "cuda", CUDA_TOLERANCE, batch_size=24, seed=0, iterations=4)


def test_what_the_device_cannot_decode_is_exact():
    """PNG, CMYK and RGB-coded JPEGs go through the host's decoder, resizing and all."""
    source = Files(others())
    check(source, TRANSFORMS["absolute"], "cpu", (0, 0), batch_size=5, seed=2, iterations=5)
    mixed = Files(jpegs() + others())
    check(mixed, TRANSFORMS["random_resized"], "cpu", HOST_TOLERANCE, batch_size=7, seed=2, iterations=5)


def test_workers_and_ranks_change_nothing():
    source, transform = Files(jpegs() + others()), TRANSFORMS["absolute"]
    augment = DeviceAugment(transform, seed=4, device="cpu")
    whole = list(map(augment, encoded_loader(source, transform, batch_size=4, seed=4, iterations=6)))
    loader = encoded_loader(source, transform, batch_size=4, seed=4, start_iteration=2, iterations=4, workers=2)
    for (images, labels), expected in zip(map(augment, loader), whole[2:], strict=True):
        assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])
    loader = encoded_loader(source, transform, batch_size=4, seed=4, iterations=6, rank=1, world_size=2)
    for (images, labels), expected in zip(map(augment, loader), whole, strict=True):
        assert torch.equal(images, expected[0][2:]) and torch.equal(labels, expected[1][2:])


def test_a_refusal_on_the_device_falls_back(monkeypatch, caplog):
    """One file that the device refuses takes the others' results with it; all come out right, with one warning."""
    files = jpegs()
    real = module.decode_jpeg

    def refuse(inputs, **arguments):
        if any(len(file) == len(files[2]) for file in inputs):
            raise RuntimeError("Error while decoding JPEG images: unsupported")
        return real(inputs, **arguments)

    monkeypatch.setattr(module, "decode_jpeg", refuse)
    with caplog.at_level(logging.WARNING):
        check(Files(files), TRANSFORMS["absolute"], "cpu", HOST_TOLERANCE, batch_size=6, seed=1, iterations=3)
        check(Files(files[2:3]), TRANSFORMS["absolute"], "cpu", (0, 0), batch_size=2, seed=1, iterations=2)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"file {n}: no decoder on cpu; such images are decoded on the host" for n in (2, 0)]


@pytest.mark.parametrize("damage", [b"", b"no image", "header"])
def test_unreadable_images_are_named(damage):
    files = jpegs()
    files[4] = files[4][:200] if damage == "header" else damage
    augment = DeviceAugment(TRANSFORMS["plain"], seed=0, device="cpu")
    with pytest.raises(DatasetError, match=r"^file 4 is "):
        list(map(augment, encoded_loader(Files(files), TRANSFORMS["plain"], batch_size=6, seed=0, iterations=1)))


def test_no_decoder_on_the_device(monkeypatch):
    def refuse(inputs, **arguments):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\ntrace")

    monkeypatch.setattr(module, "decode_jpeg", refuse)
    with pytest.raises(DatasetError, match=r"cannot decode JPEGs on cpu \(.*nvJPEG support\); decode them in"):
        DeviceAugment(TRANSFORMS["plain"], seed=0, device="cpu")


def test_sizes_from_headers():
    for file in jpegs():
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        assert plain_jpeg_size(file) == cv2.imdecode(np.frombuffer(file, np.uint8), flags).shape[:2]
    assert [plain_jpeg_size(file) for file in (*others(), b"", b"\xff\xd8\xff", b"GIF89a")] == [None] * 8


def test_prefetcher_passes_errors_on():
    def batches():
        yield from encoded_loader(Files(jpegs()), TRANSFORMS["plain"], batch_size=2, seed=0, iterations=2)
        raise DatasetError("file 7 is gone")

    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        iterator = iter(DevicePrefetcher(batches(), DeviceAugment(TRANSFORMS["plain"], seed=0, device=device)))
        assert len(next(iterator)[0]) == len(next(iterator)[0]) == 2
        with pytest.raises(DatasetError, match="file 7 is gone"):
            next(iterator)


@pytest.mark.gpu
def test_prefetched_memory_is_not_overwritten():
    """A slow training step still reads its batch while the next ones are made: the checksums are as without a hurry."""
    source, transform = Files(jpegs()), TRANSFORMS["plain"]
    augment = DeviceAugment(transform, seed=0, device="cuda")
    arguments = dict(batch_size=6, seed=0, iterations=30)
    calm = [augment(batch)[0].clone() for batch in encoded_loader(source, transform, **arguments)]
    busy = torch.randn(4096, 4096, device="cuda")
    copies = []
    for images, _ in DevicePrefetcher(encoded_loader(source, transform, **arguments), augment):
        for _ in range(20):
            busy = (busy @ busy).clamp_(-1, 1)
        copies.append(images.clone())
        del images
    assert all(torch.equal(copy, expected) for copy, expected in zip(copies, calm, strict=True))


def test_a_line_of_pixels_is_refused_as_on_the_host():
    line = encode(Image.new("RGB", (2000, 1)))
    with pytest.raises(DatasetError, match="2000×1 pixels"):
        list(encoded_loader(Files([line]), TRANSFORMS["plain"], batch_size=1, seed=0, iterations=1))
