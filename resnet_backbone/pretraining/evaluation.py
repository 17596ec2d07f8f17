"""Accuracy of a classifier."""

from collections.abc import Callable, Iterable

import torch
from detectron2.utils import comm
from torch import nn


@torch.no_grad()
def evaluate_classifier(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    prepare: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in per cent over all images of all processes; each image counts once.

    Args:
        model: images to logits; evaluated in eval mode, its training mode is restored.
        batches: this process's images `(N, 3, H, W)`, uint8, and labels `(N,)`.
        prepare: from uint8 images to what the model is fed, on its device.

    Returns:
        "top1" and "top5" in per cent, and "images", how many were counted.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    counts = torch.zeros(3, dtype=torch.float64, device=device)
    for images, labels in batches:
        logits = model(prepare(images))
        labels = labels.to(device)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        counts += torch.stack([best[:, 0].sum(), best.sum(), torch.tensor(len(labels), device=device)])
    model.train(was_training)
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(counts)
    top1, top5, images = counts.tolist()
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "images": images}
