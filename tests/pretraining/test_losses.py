import functools

import torch
from torch import nn

from resnet_backbone.engine.distributed import wrap_for_processes
from resnet_backbone.pretraining.losses import ClassificationLosses
from resnet_backbone.pretraining.preprocessing import Normalize
from tests.engine.tiny import in_two_processes

MEAN, STD = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)


def losses_of(**arguments) -> ClassificationLosses:
    """Of batches that are images and labels already."""
    normalize = Normalize(mean=MEAN, std=STD, device="cpu")
    return ClassificationLosses(images_of=lambda batch: batch, normalize=normalize, **arguments)


def test_smoothed_cross_entropy_and_error_by_hand():
    """Label smoothing (Szegedy et al., arXiv 1512.00567, section 7): (1 - e) of the label's log, e / classes of all."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 1, 0])
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    losses, metrics = losses_of(label_smoothing=0.1)(model, (images, labels))

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    logs = model((images - mean) / std).log_softmax(1)
    expected = -(0.9 * logs[range(5), labels] + 0.1 / 3 * logs.sum(1)).mean()
    torch.testing.assert_close(losses["loss_cls"], expected)
    wrong = sum(int(best != label) for best, label in zip(logs.argmax(1), labels))
    assert round(metrics["top1_error"].item(), 4) == 20 * wrong and wrong


def small() -> tuple[ClassificationLosses, nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    images = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8)
    return losses_of(), model, (images, torch.tensor([0, 1, 2, 1, 0]))


def test_compiled_as_one_from_the_pixels_to_the_loss(compiled):
    """Eager, normalization alone takes four passes over the images."""
    losses, model, batch = small()
    expected = losses(model, batch)[0]["loss_cls"]
    losses.compile()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses(model, batch)
    torch.testing.assert_close(losses(model, batch)[0]["loss_cls"], expected)
    in_bf16, _ = compiled
    inputs = [node.meta["example_value"] for node in in_bf16.graph.nodes if node.op == "placeholder"]
    assert any(value.dtype == torch.uint8 and value.shape == (5, 3, 6, 6) for value in inputs)
    (outputs,) = [node.args[0] for node in in_bf16.graph.nodes if node.op == "output"]
    assert any(node.meta["example_value"].shape == () for node in outputs)
    model.eval()(torch.zeros(1, 3, 6, 6))  # for other uses the network is as it was
    assert len(compiled) == 2


def _gradients() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of this process, without and with compilation; each process has images of its own."""
    found = []
    for compiled in (False, True):
        losses, model, (images, labels) = small()
        if compiled:
            torch.compile = functools.partial(torch.compile, backend="aot_eager")
            losses.compile()
        share = slice(0, 2) if torch.distributed.get_rank() == 0 else slice(2, 4)
        wrapped = wrap_for_processes(model)
        losses(wrapped, (images[share], labels[share]))[0]["loss_cls"].backward()
        found.append([parameter.grad for parameter in model.parameters()])
    return tuple(found)


def test_compiled_in_two_processes(tmp_path):
    """The gradients are averaged over the processes as they are without."""
    (expected, zero), (_, one) = in_two_processes(_gradients, tmp_path)
    for mean, found, other in zip(expected, zero, one, strict=True):
        torch.testing.assert_close(found, mean)
        assert torch.equal(found, other)
