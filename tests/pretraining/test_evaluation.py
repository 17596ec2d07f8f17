import pytest
import torch
from torch import nn

from resnet_backbone.pretraining.evaluation import evaluate_classifier


@pytest.mark.parametrize("classes", [3, 5, 11])
def test_equals_a_plain_loop_over_single_images(classes):
    generator = torch.Generator().manual_seed(classes)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes), nn.Dropout(0.9)).train()
    images = torch.randint(0, 256, (23, 3, 2, 2), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (23,), generator=generator)
    found = evaluate_classifier(model, zip(images.split(5), labels.split(5)), lambda x: x.float() / 255)
    assert model.training

    model.eval()
    top1 = top5 = 0
    for image, label in zip(images, labels.tolist()):
        order = model(image[None].float() / 255)[0].argsort(descending=True).tolist()
        top1 += order[0] == label
        top5 += label in order[:5]
    assert found == {"top1": pytest.approx(100 * top1 / 23), "top5": pytest.approx(100 * top5 / 23), "images": 23}
    if classes <= 5:
        assert found["top5"] == 100


def test_a_process_without_images_counts_nothing():
    model = nn.Linear(3, 4)
    images, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    batches = [(images[:0], labels[:0]), (images, labels)]
    assert evaluate_classifier(model, batches, lambda x: x)["images"] == 2
