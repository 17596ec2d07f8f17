"""The kernels of non-maximum suppression against torchvision, in Triton's interpreter, and compiled for an H100."""

import pytest
import torch
import torchvision

IMAGES, BOXES = 2, 150  # three words of 64 bits
# Number of boxes, threshold, number wanted; 40 boxes fit one word.
WANTED = [(150, 0.5, 150), (150, 0.7, 150), (150, 0.7, 20), (150, 0.0, 150), (40, 0.5, 40), (64, 0.5, 10)]


@pytest.fixture(scope="module")
def computed(interpret):
    """What the kernels give for thresholds and numbers wanted, with boxes, usable, and classes."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(IMAGES, BOXES, 2, generator=generator) * torch.tensor([60.0, 300.0])[:, None, None]
    boxes = torch.cat([corners, corners + 20 + 30 * torch.rand(IMAGES, BOXES, 2, generator=generator)], dim=2)
    boxes[0, 70:90] = boxes[0, 5]  # many that are equal
    boxes[1, 3, 2:] = boxes[1, 3, :2]  # no area
    usable = torch.rand(IMAGES, BOXES, generator=generator) > 0.1
    classes = torch.randint(2, (IMAGES, BOXES), generator=generator)
    calls = []
    for number, *others in WANTED:
        first = [each[:, :number].contiguous() for each in (boxes, usable, classes)]
        calls.append(("nms_kernels", "nms", (*first, *others)))
    found = interpret(calls)
    return boxes, usable, classes, dict(zip(WANTED, found, strict=True))


@pytest.mark.parametrize("wanted", WANTED)
def test_they_keep_what_torchvision_keeps(computed, wanted):
    boxes, usable, classes, found = computed
    number, threshold, top = wanted
    boxes, usable, classes = (each[:, :number] for each in (boxes, usable, classes))
    places, counts = found[wanted]
    for image in range(IMAGES):
        mine = usable[image].nonzero()[:, 0]
        scores = -torch.arange(len(mine), dtype=torch.float32)
        kept = [
            mine[classes[image, mine] == kind][
                torchvision.ops.nms(
                    boxes[image, mine][classes[image, mine] == kind], scores[classes[image, mine] == kind], threshold
                )
            ]
            for kind in (0, 1)
        ]
        expected = torch.cat(kept).sort().values[:top]
        assert torch.equal(places[image, : counts[image]], expected) and len(expected) > 1


@pytest.mark.parametrize("words", [1, 256])
def test_they_compile_for_a_gpu(compile_kernel, words):
    from resnet_backbone.ops import nms_kernels

    types = {"boxes": "*fp32", "classes": "*i64", "overlaps": "*i64", "threshold": "fp32"}
    types |= {"usable": "*i1", "kept": "*i64", "counts": "*i64"}
    constants, aligned = {"BITS": 64, "WORDS": words}, {*types} - {"threshold"}
    if words == 1:
        constants["words"] = 1  # Triton makes an argument of 1 a constant
    for kernel, warps in ((nms_kernels._overlaps, 8), (nms_kernels._resolve, 4)):
        _, resources = compile_kernel(kernel, constants, types, aligned, warps=warps)
        assert resources["STACK"] == resources["LOCAL"] == 0 and resources["REG"] < 255
