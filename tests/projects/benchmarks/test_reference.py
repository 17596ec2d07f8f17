"""The alternative: torchvision's loop step by step, and what its loaders give."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from benchmarks import reference
from benchmarks.reference import (
    PaperTransform,
    PlainLoop,
    accuracy,
    preset_transform,
    reference_batches,
)
from resnet_backbone.data.functional import PCA_VALUES, PCA_VECTORS


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 7, generator=torch.Generator().manual_seed(0)))
        self.types = []

    def forward(self, images):
        scores = images.flatten(1) @ self.weight
        self.types.append(scores.dtype)
        return scores


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, 2, 2, generator=generator), torch.tensor([0, 3, 6, 6, 1])


def test_steps_are_sgds_with_momentum_and_decay():
    images, labels = batch()
    model = Scores()
    weight, velocity, losses = model.weight.detach().clone(), torch.zeros(12, 7), []
    for _ in range(3):
        scores = images.flatten(1) @ weight
        losses.append(F.cross_entropy(scores, labels).item())
        gradient = images.flatten(1).T @ (scores.softmax(1) - F.one_hot(labels, 7)) / 5
        velocity = 0.9 * velocity + gradient + 0.01 * weight
        weight = weight - 0.1 * velocity
    loop = PlainLoop(model, lr=0.1, momentum=0.9, weight_decay=0.01)
    loop(images, labels, 3)
    torch.testing.assert_close(model.weight.detach(), weight)
    assert list(loop.meters["loss"]) == pytest.approx(losses, rel=1e-5)
    assert list(loop.meters["lr"]) == [0.1] * 3 and loop.line.startswith(f"loss: {losses[0]:.4f}")
    assert model.types == [torch.float32] * 3


def test_autocast_reaches_the_forward_pass():
    model = Scores()
    PlainLoop(model, lr=0.1, momentum=0.9, weight_decay=0.0, autocast=torch.bfloat16)(*batch(), 1)
    assert model.types == [torch.bfloat16]


def test_accuracy_counts_rows_whose_label_is_among_the_best():
    scores = torch.tensor([[5.0, 4.0, 3.0], [5.0, 4.0, 3.0], [5.0, 4.0, 3.0], [1.0, 2.0, 3.0]])
    one, two = accuracy(scores, torch.tensor([0, 1, 2, 0]), (1, 2))
    assert (one.item(), two.item()) == (25.0, 50.0)


def image(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def paper(**changes) -> PaperTransform:
    arguments = {"short_side": (24, 24), "crop": 24, "pca_std": 0.1, "values": PCA_VALUES, "vectors": PCA_VECTORS}
    return PaperTransform(**arguments | changes)


def test_the_papers_crop_is_one_of_the_resized_image():
    original = image(40, 40)
    expected = np.asarray(original.resize((24, 24), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    transform, seen = paper(pca_std=0.0), set()
    for _ in range(20):
        cut = transform(original)
        assert cut.dtype == torch.uint8 and cut.shape == (3, 24, 24) and cut.is_contiguous()
        mirrored = np.array_equal(cut, expected[:, :, ::-1])
        assert mirrored or np.array_equal(cut, expected)
        seen.add(mirrored)
    assert seen == {True, False}


def test_the_shorter_side_is_drawn_from_the_whole_range(monkeypatch):
    sizes, resize = set(), reference.F.resize

    def spy(picture, size):
        sizes.add(size)
        return resize(picture, size)

    monkeypatch.setattr(reference.F, "resize", spy)
    transform = paper(short_side=(24, 27))
    for _ in range(60):
        transform(image(40, 60))
    assert sizes == {24, 25, 26, 27}


def test_the_color_shift_follows_the_components(monkeypatch):
    monkeypatch.setattr(np.random, "normal", lambda mean, std, count: np.array([std, 0.0, -std]))
    gray = Image.new("RGB", (24, 24), (100, 254, 1))
    # AlexNet paper, section 4.1: [p1 p2 p3][α1 λ1, α2 λ2, α3 λ3]ᵀ is added to each pixel.
    shift = [0.5 * (PCA_VECTORS[c][0] * PCA_VALUES[0] - PCA_VECTORS[c][2] * PCA_VALUES[2]) for c in range(3)]
    expected = [min(255, max(0, round(value + s))) for value, s in zip((100, 254, 1), shift)]
    assert paper(pca_std=0.5)(gray)[:, 5, 5].tolist() == expected != [100, 254, 1]


def test_the_preset_gives_bytes_of_the_image():
    cut = preset_transform(16)(Image.new("RGB", (60, 40), (10, 20, 30)))
    assert cut.dtype == torch.uint8 and cut.shape == (3, 16, 16)
    assert (cut == torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None]).all()


def test_batches_go_through_the_folder_epoch_after_epoch(tmp_path):
    for number in range(4):
        folder = tmp_path / ("low" if number < 2 else "high")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (60 * number,) * 3).save(folder / f"{number}.png")
    loaded = list(reference_batches(tmp_path, preset_transform(8), batch_size=2, batches=4, workers=0))
    assert [tuple(images.shape) for images, _ in loaded] == [(2, 3, 8, 8)] * 4
    pairs = [(int(i[0, 0, 0]) // 60, int(label)) for images, labels in loaded for i, label in zip(images, labels)]
    # Classes in the order of their names: high 0, low 1. Each image once in four, then again.
    assert sorted(pairs[:4]) == sorted(pairs[4:]) == [(0, 1), (1, 1), (2, 0), (3, 0)]
