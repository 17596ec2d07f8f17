"""The images shared by all runs of an experiment, and what to call results on them."""

import lzma
import os
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar10.plan import SCALES, Plan
from resnet_backbone.data.generated import write_classification
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.sources import DatasetError, open_source, register_source
from resnet_backbone.data.subset import Subset
from resnet_backbone.errors import InputError

REGISTERED = "cifar10"
GENERATED_IMAGES, GENERATED_SEED = 40, 1
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Training and test images.

    Attributes:
        title: name for results on them.
        entries: training and test entries for `open_source`.
        per_class: for training and test, use only this many first images per class; None: all.
        images: the resulting totals.
    """

    title: str
    entries: tuple[str, str]
    per_class: tuple[int | None, int | None]
    images: tuple[int, int]

    def names(self) -> tuple[str, str]:
        """Names for DATASETS.TRAIN and DATASETS.TEST in this process."""
        return tuple(_register(entry, count) for entry, count in zip(self.entries, self.per_class, strict=True))


def open_dataset(plan: Plan) -> Dataset:
    """Find the plan's data, unpack or generate it if needed, and inspect the images.

    Raises:
        InputError: there is no usable data.
    """
    scale = SCALES[plan.scale]
    entries = _generated(plan.output / "data") if plan.scale == "smoke" else _entries(plan)
    per_class = (scale.train_images, scale.test_images)
    sources = [_first(open_source(entry), count) for entry, count in zip(entries, per_class, strict=True)]
    if plan.scale == "smoke":
        title = "generated shapes"
    elif sources[0].read(0)[:2] == b"\xff\xd8":  # JPEG magic bytes; CIFAR-10 was published as raw pixels
        title = "CIFAR-10 (JPEG copies)"
    else:
        title = "CIFAR-10"
    if any(per_class):
        title += f", the first {per_class[0]:,} training and {per_class[1]:,} test images of each class"
    return Dataset(title=title, entries=entries, per_class=per_class, images=(len(sources[0]), len(sources[1])))


def _entries(plan: Plan) -> tuple[str, str]:
    given = plan.data or REGISTERED
    if given == REGISTERED:
        return f"{REGISTERED}_train", f"{REGISTERED}_test"
    folder = Path(given).expanduser()
    if folder.is_file() and given.endswith(ARCHIVES):
        folder = unpack(folder, plan.output.parent)
    if not folder.is_dir():
        raise InputError(
            f"--data is {given}, which is neither a folder nor an archive ({', '.join(ARCHIVES)}); expected "
            f"{REGISTERED}, or a folder with train and test in it, or an archive of one."
        )
    return str(folder / "train"), str(folder / "test")


def unpack(archive: Path, parent: Path) -> Path:
    """Unpack an archive into a folder of its name in `parent`, unless it exists; return the folder.

    The folder appears only once complete. Members that would land outside it are rejected.
    """
    target = parent / archive.name.partition(".")[0]
    if target.is_dir():
        return target
    print(f"unpacking {archive} to {target}", flush=True)
    parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(dir=parent, prefix=f".{target.name}-")
    try:
        with tarfile.open(archive) as file:
            file.extractall(scratch, filter="data")
        os.rename(scratch, target)
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        raise DatasetError(f"{archive} cannot be unpacked to {target}: {' '.join(str(error).split())}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    target.chmod(0o755)  # mkdtemp's folder is owner-only
    return target


def _generated(folder: Path) -> tuple[str, str]:
    train, test = (
        write_classification(folder / part, images=GENERATED_IMAGES, image_size=32, seed=GENERATED_SEED + offset)
        for part, offset in (("train", 0), ("test", 1000))
    )
    return train, test


def _register(entry: str, count: int | None) -> str:
    if count is None:
        return entry
    name = f"{entry}, first {count} of each class"
    register_source(name, lambda root: _first(open_source(entry), count))
    return name


def _first(source: ClassificationSource, count: int | None) -> ClassificationSource:
    """Keep the first `count` images of each class."""
    if count is None:
        return source
    classes = range(len(source.class_names))
    return Subset(source, np.concatenate([np.flatnonzero(source.labels == number)[:count] for number in classes]))
