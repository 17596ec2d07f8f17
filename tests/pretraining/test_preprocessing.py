import torch

from resnet_backbone.pretraining.preprocessing import Normalize


def test_normalize_is_the_formula():
    mean, std = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    expected = (images.double() - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    found = Normalize(mean=mean, std=std, device="cpu")(images)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
