"""The kernels of RoIAlign against the sparse matrix, in Triton's interpreter, and compiled for an H100."""

import pytest
import torch

from resnet_backbone.ops import roi_align

LEVELS = [(1 / 16, 6, 9), (1 / 32, 3, 5)]  # scale, height, width
ROIS = [
    [0, 8.0, 10.0, 60.0, 70.0],
    [1, 0.0, 0.0, 144.0, 96.0],
    [1, 100.0, 50.0, 103.0, 52.0],
    [0, -30.0, 60.0, 20.0, 130.0],
    [0, 90.0, 80.0, 40.0, 30.0],  # turned around
    [1, 400.0, 300.0, 500.0, 400.0],  # outside
]
CASES = {  # output size, sampling ratio, aligned, step
    "adaptive": ((2, 2), 0, True, 1),
    "adaptive, not aligned": ((2, 3), 0, False, 1),
    "two samples": ((2, 2), 2, True, 1),
    "every other bin": ((3, 3), 0, True, 2),
}


@pytest.fixture(scope="module")
def computed(interpret):
    """For each case: what the kernels give, and what the sparse matrix gives, with its gradients."""
    generator = torch.Generator().manual_seed(0)
    rois, levels = torch.tensor(ROIS), torch.tensor([0, 0, 1, 0, 1, 0])
    scales = [scale for scale, *_ in LEVELS]
    calls, expected = [], []
    for size, ratio, aligned, step in CASES.values():
        features = [torch.randn(2, 3, height, width, generator=generator) for _, height, width in LEVELS]
        features = [f.contiguous(memory_format=torch.channels_last).requires_grad_() for f in features]
        out = roi_align(
            features, rois, size, scales=scales, levels=levels, sampling_ratio=ratio, aligned=aligned, step=step
        )
        gradient = torch.randn(out.shape, generator=generator)
        out.backward(gradient)
        expected.append((out.detach(), [feature.grad for feature in features]))
        common = list(size), scales, ratio, aligned, step
        calls.append(("roi_align_kernels", "forward", ([f.detach() for f in features], rois, levels, *common)))
        rows = gradient.permute(0, 2, 3, 1).reshape(-1, 3)
        shapes = [list(feature.shape) for feature in features]
        calls.append(("roi_align_kernels", "backward", (rows, rois, levels, shapes, *common)))
    found = interpret(calls)
    return dict(zip(CASES, zip(found[::2], found[1::2], expected, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_they_give_what_the_matrix_gives(computed, case):
    out, gradients, (expected, expected_gradients) = computed[case]
    torch.testing.assert_close(out, expected.permute(0, 2, 3, 1).reshape(-1, 3), rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted.permute(0, 2, 3, 1).reshape(-1, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_they_compile_for_a_gpu(compile_kernel, name, ratio, dtype):
    from resnet_backbone.ops import roi_align_kernels

    kernel = getattr(roi_align_kernels, name)
    constants = {"RATIO": ratio, "ALIGNED": True, "CHANNELS": 256, "PIXELS": roi_align_kernels.PIXELS}
    constants |= {"stride_channel": 1}  # in channels_last, as Triton sees at run time
    types = dict.fromkeys(("features", "gradient", "out"), f"*{dtype}") | {"rois": "*fp32", "levels": "*i64"}
    types |= {"scale": "fp32", "offset": "fp32"}
    aligned = {"features", "gradient", "out", "channels", "stride_image", "stride_row", "stride_column"}
    code, resources = compile_kernel(kernel, constants, types, aligned, warps=1)
    assert "ld.global.v4.b32" in code  # 16 bytes for each thread
    assert ("div.rn.f32" in code) == (ratio == 0)  # torchvision's number of samples, to the last bit
    assert resources["STACK"] == resources["LOCAL"] == 0 and resources["REG"] < 255
