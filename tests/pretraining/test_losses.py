import torch
from torch import nn

from resnet_backbone import pretraining
from resnet_backbone.pretraining.losses import classification_losses


def test_smoothed_cross_entropy_and_error_by_hand():
    """Label smoothing (Szegedy et al., arXiv 1512.00567, section 7): (1 - e) of the label's log, e / classes of all."""
    cfg = pretraining.get_config()
    cfg.MODEL.DEVICE = "cpu"
    cfg.SOLVER.LABEL_SMOOTHING = 0.1
    torch.manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 1, 0])
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    losses, metrics = classification_losses(cfg, lambda batch: batch)(model, (images, labels))

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    logs = model((images - mean) / std).log_softmax(1)
    expected = -(0.9 * logs[range(5), labels] + 0.1 / 3 * logs.sum(1)).mean()
    torch.testing.assert_close(losses["loss_cls"], expected)
    wrong = sum(int(best != label) for best, label in zip(logs.argmax(1), labels))
    assert round(metrics["top1_error"].item(), 4) == 20 * wrong and wrong
