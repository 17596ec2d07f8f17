import random

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_backbone.data.resize import GROUP_BYTES, resize_each, resize_windows

# In gray levels of 0...255. The operator's own float32 differs from its float64 by as much.
TOLERANCE = 0.005

# (image's height and width, window's top, left, height and width)
CASES = {
    "smaller": ((60, 90), (10, 20, 40, 57)),
    "much smaller": ((400, 333), (1, 2, 390, 330)),
    "larger": ((20, 30), (3, 4, 9, 7)),
    "narrower but taller": ((100, 12), (5, 1, 90, 10)),
    "one pixel": ((5, 7), (2, 3, 1, 1)),
    "one row": ((5, 300), (4, 0, 1, 300)),
    "one column": ((300, 5), (0, 4, 300, 1)),
    "two pixels": ((2, 2), (0, 0, 2, 2)),
    "the whole image": ((50, 41), (0, 0, 50, 41)),
    "at the lower right": ((70, 80), (31, 44, 39, 36)),
    "the result's size": ((40, 40), (3, 5, 24, 32)),
    "its height": ((40, 80), (3, 5, 24, 64)),
}
SIZE = 24, 32


class Operators(TorchDispatchMode):
    """Which operators run, views aside, and how many bytes their results take."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes: list[int] = []
        self.zeros = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.names.append(func.name())
            self.bytes += [leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            if func.name() == "aten::zeros":
                self.zeros += result.nbytes
        return result


def random_image(height: int, width: int) -> torch.Tensor:
    return torch.randint(256, (3, height, width), dtype=torch.uint8)


def cases() -> tuple[list[torch.Tensor], list[tuple[int, int, int, int]], list[bool]]:
    """Images, windows and flips: those of `CASES`, plain and mirrored, and some at random; in no order."""
    generator = random.Random(0)
    chosen = [(*case, flip) for case in CASES.values() for flip in (False, True)]
    for _ in range(20):
        height, width = generator.randint(1, 150), generator.randint(1, 150)
        rows, columns = generator.randint(1, height), generator.randint(1, width)
        window = generator.randint(0, height - rows), generator.randint(0, width - columns), rows, columns
        chosen.append(((height, width), window, generator.random() < 0.5))
    generator.shuffle(chosen)
    sizes, windows, flips = zip(*chosen)
    torch.manual_seed(0)
    return [random_image(*size) for size in sizes], list(windows), list(flips)


def expected(images, windows, size, flips, dtype=torch.float64) -> torch.Tensor:
    """torch's own operator, one image at a time."""
    results = []
    for image, (top, left, height, width), flip in zip(images, windows, flips, strict=True):
        window = image[None, :, top : top + height, left : left + width].to(dtype)
        result = functional.interpolate(window, size=size, mode="bilinear", antialias=True)[0]
        results.append(result.flip(2) if flip else result)
    return torch.stack(results)


def same_size(number: int) -> tuple[list[torch.Tensor], list[tuple[int, int, int, int]], list[bool]]:
    images = [random_image(60, 50) for _ in range(number)]
    return images, [(index % 9, index % 7, 41, 35) for index in range(number)], [i % 2 == 0 for i in range(number)]


@pytest.mark.parametrize("resize", [resize_each, resize_windows])
def test_equals_interpolate(resize):
    images, windows, flips = cases()
    result = resize(images, windows, SIZE, flips)
    assert result.dtype == torch.float32 and result.shape == (len(images), 3, *SIZE) and result.is_contiguous()
    difference = (result - expected(images, windows, SIZE, flips)).abs().amax((1, 2, 3))
    print(f"largest {difference.max():.6f}")
    assert difference.max() < TOLERANCE, [windows[index] for index in difference.argsort(descending=True)[:3]]


@pytest.mark.parametrize("resize", [resize_each, resize_windows])
def test_one_window_at_a_time(resize):
    for image, window, flip in zip(*cases(), strict=True):
        result = resize([image], [window], SIZE, [flip])
        torch.testing.assert_close(result, expected([image], [window], SIZE, [flip]).float(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("resize", [resize_each, resize_windows])
@pytest.mark.parametrize("size", [(1, 1), (224, 224), (7, 160)])
def test_sizes_of_the_result(resize, size):
    images, windows, flips = cases()
    result = resize(images, windows, size, flips)
    torch.testing.assert_close(result, expected(images, windows, size, flips).float(), rtol=0, atol=TOLERANCE)


def test_a_window_of_the_result_s_size_is_copied():
    image = random_image(40, 50)
    window = image[:, 3:27, 5:37]
    result = resize_windows([image, image], [(3, 5, 24, 32)] * 2, SIZE, [False, True])
    assert torch.equal(result, torch.stack([window, window.flip(2)]).float())


def test_groups_change_nothing():
    images, windows, flips = cases()
    whole = resize_windows(images, windows, SIZE, flips)
    for group_bytes in (1, 50_000, 1_000_000):
        result = resize_windows(images, windows, SIZE, flips, group_bytes=group_bytes)
        torch.testing.assert_close(result, whole, rtol=0, atol=TOLERANCE)


def test_operators_do_not_grow_with_the_batch():
    counts = []
    for number in (4, 16):
        arguments = same_size(number)
        with Operators() as operators:
            resize_windows(arguments[0], arguments[1], SIZE, arguments[2])
        counts.append(operators.names)
    print(len(counts[0]), counts[0])
    assert counts[0] == counts[1] and counts[0].count("aten::_foreach_copy_") == 1


def test_memory_is_bounded():
    images, windows, flips = same_size(40)
    sizes = {}
    for group_bytes in (GROUP_BYTES, 200_000):
        with Operators() as operators:
            resize_windows(images, windows, (8, 8), flips, group_bytes=group_bytes)
        sizes[group_bytes] = max(operators.bytes)
    canvas = 40 * 3 * 41 * 35 * 4
    assert sizes[GROUP_BYTES] == canvas > 3 * 200_000
    assert 100_000 < sizes[200_000] <= 200_000


def test_an_image_above_the_limit_is_alone():
    images = [random_image(100, 100)] * 3
    with Operators() as operators:
        resize_windows(images, [(0, 0, 100, 100)] * 3, (8, 8), [False] * 3, group_bytes=100)
    assert max(operators.bytes) == 3 * 100 * 100 * 4 and operators.names.count("aten::_foreach_copy_") == 3


@pytest.mark.parametrize("order", ["largest first", "largest last", "largest in the middle"])
def test_small_windows_are_not_padded_to_the_largest(order):
    place = {"largest first": 0, "largest last": 30, "largest in the middle": 15}[order]
    images = [random_image(40, 30) for _ in range(30)]
    images.insert(place, random_image(600, 800))
    windows = [(0, 0, *image.shape[1:]) for image in images]
    with Operators() as operators:
        result = resize_windows(images, windows, (8, 8), [False] * 31)
    assert operators.names.count("aten::_foreach_copy_") == 2
    assert operators.zeros == 3 * (600 * 800 + 30 * 40 * 30) * 4
    torch.testing.assert_close(result, expected(images, windows, (8, 8), [False] * 31).float(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("resize", [resize_each, resize_windows])
def test_autocast_does_not_apply(resize):
    images, windows, flips = cases()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = resize(images, windows, SIZE, flips)
    assert torch.equal(result, resize(images, windows, SIZE, flips))


@pytest.mark.gpu
def test_equals_interpolate_on_a_gpu():
    images, windows, flips = cases()
    on_gpu = [image.cuda() for image in images]
    exact = expected(images, windows, SIZE, flips).float()
    for group_bytes in (GROUP_BYTES, 50_000):
        result = resize_windows(on_gpu, windows, SIZE, flips, group_bytes=group_bytes)
        assert result.is_cuda
        torch.testing.assert_close(result.cpu(), exact, rtol=0, atol=TOLERANCE)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        torch.testing.assert_close(resize_windows(on_gpu, windows, SIZE, flips).cpu(), exact, rtol=0, atol=TOLERANCE)
