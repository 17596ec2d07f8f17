"""Both loaders read the same files and give batches of the same shape."""

import os
from collections import Counter
from pathlib import Path

import cv2
import pytest
import torch
from torchvision.datasets import ImageFolder

from benchmarks.data import (
    DEVICE,
    FROM_FILES,
    FULL,
    IN_MEMORY,
    MAPPER,
    OURS,
    PAPER,
    PRESET,
    SHARD,
    STOCK_MAPPER,
    LoadingWork,
    compare_loading,
    compare_on_gpu,
    compare_training,
)
from benchmarks.photographs import write_photographs
from benchmarks.pretrain import Conduct, Task
from benchmarks.timing import Comparison
from resnet_backbone.data.folders import FolderSource
from resnet_backbone.data.shards import ShardSource
from resnet_backbone.errors import InputError

CONFIG = Path(__file__).parents[3] / "configs" / "pretrain" / "imagenet.yaml"


def tiny(**changes) -> LoadingWork:
    arguments = {"config_file": CONFIG, "sizes": [(48, 64)], "count": 8, "workers": 0, "batch": 4, "crop": 32}
    return LoadingWork(**arguments | {"rounds": 2} | changes)


def count_reads(patch) -> dict[str, Counter]:
    """How often each file is read by our folder source, from our shard, and by torchvision's."""
    reads = {"folder": Counter(), "shard": Counter(), "torchvision": Counter()}
    folder, shard, loader = FolderSource.read, ShardSource.read, ImageFolder.__getitem__

    def from_folder(source, index):
        reads["folder"][os.path.basename(source.describe(index))] += 1
        return folder(source, index)

    def from_shard(source, index):
        reads["shard"][source.describe(index).rpartition(":")[2] + ".jpg"] += 1
        return shard(source, index)

    def from_torchvision(dataset, index):
        reads["torchvision"][os.path.basename(dataset.samples[index][0])] += 1
        return loader(dataset, index)

    patch.setattr(FolderSource, "read", from_folder)
    patch.setattr(ShardSource, "read", from_shard)
    patch.setattr(ImageFolder, "__getitem__", from_torchvision)
    return reads


def test_sides_of_each_comparison(monkeypatch):
    reads, lines = count_reads(monkeypatch), []
    preset, paper, mappers = compare_loading(tiny(), lines.append)
    assert list(preset.rates) == [OURS, FULL, SHARD, PRESET] and list(paper.rates) == [OURS, FULL, PAPER]
    assert (preset.task, paper.task) == ("crop of random area, 64×48", "the paper's crop, 64×48")
    for comparison in (preset, paper):
        assert comparison.unit == "images/s per core" and comparison.work == 24
        assert {side.shape for side in comparison.sides.values()} == {(4, 3, 32, 32)}
        assert all(len(rates) == 2 and min(rates) > 0 for rates in comparison.rates.values())
    assert list(mappers.rates) == [MAPPER, STOCK_MAPPER] and mappers.task == "a detector's images, 64×48"
    assert mappers.work == 24 and {side.shape[0] for side in mappers.sides.values()} == {3}
    assert lines == ["loading 64×48"]
    # Shape, then in each round a batch that is not timed and each file three times; four of our sides read the folder.
    names = {f"{number:04d}.jpg" for number in range(8)}
    for reader, sides in (("folder", 4), ("shard", 1), ("torchvision", 2)):
        assert set(reads[reader]) == names
        assert sum(reads[reader].values()) == sides * (4 + 2 * (4 + 3 * 8))
        assert min(reads[reader].values()) >= sides * 2 * 3


def test_a_core_is_one_thread():
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(2)
    cv2.setNumThreads(2)
    seen = []
    list(compare_loading(tiny(rounds=1), lambda line: seen.append((torch.get_num_threads(), cv2.getNumThreads()))))
    after = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])
    assert seen == [(1, 1)] and after == (2, 2)


def test_a_folder_of_ones_own(tmp_path):
    write_photographs(tmp_path / "album" / "deep", size=(40, 50), count=6)
    preset, paper, _ = compare_loading(tiny(images=tmp_path / "album", rounds=1), print)
    name = f"6 of {tmp_path.name}/album"
    assert (preset.task, paper.task) == (f"crop of random area, {name}", f"the paper's crop, {name}")
    with pytest.raises(InputError, match="nowhere is no folder"):
        list(compare_loading(tiny(images=tmp_path / "nowhere"), print))


def test_workers_share_the_rate():
    preset, *_ = compare_loading(tiny(workers=2, rounds=1), print)
    assert preset.work == 4 * 2 * 4 / 2  # four batches for each worker, of four images, over two cores
    assert {side.shape for side in preset.sides.values()} == {(4, 3, 32, 32)}


def compare(device: str, workers: int) -> Comparison:
    task = Task(network="resnet18", num_classes=1000, config_file=CONFIG, batch=4, size=32, iterations=2)
    return compare_training(task, Conduct(device=device, rounds=2, warm_up=1), tiny(workers=workers), print)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_from_files_and_from_memory(workers):
    comparison = compare("cpu", workers)
    assert list(comparison.rates) == [FROM_FILES, IN_MEMORY] and comparison.work == 8
    assert comparison.task == "training resnet18 on 64×48" and comparison.unit == "images/s"
    assert all(len(rates) == 2 and min(rates) > 0 for rates in comparison.rates.values())


@pytest.mark.gpu
def test_on_a_gpu():
    (comparison,) = compare_on_gpu(tiny(workers=2), print)
    assert list(comparison.rates) == [DEVICE, OURS, PRESET] and comparison.unit == "images/s"
    assert {side.shape for side in comparison.sides.values()} == {(4, 3, 32, 32)}
    trained = compare("cuda", workers=2)
    assert "PIPELINE device" in trained.sides[FROM_FILES].settings
