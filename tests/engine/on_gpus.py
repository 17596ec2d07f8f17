"""What test_nccl.py runs in new processes, each with a GPU of its own."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

IMAGES = 8


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).double()


def images() -> torch.Tensor:
    return torch.randn(IMAGES, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(folder: Path) -> None:
    """A forward and backward pass of this process's share; gradients and statistics go to a file."""
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build()).to(device)
    wrapped = nn.parallel.DistributedDataParallel(model, device_ids=[device.index], broadcast_buffers=False)
    loss = wrapped(images().chunk(size)[rank].to(device)).square().mean()
    loss.backward()
    dist.all_reduce(loss.detach())
    found = {
        "backend": dist.get_backend(),
        "gpu": device.index,
        "loss": loss.item() / size,
        "gradients": [parameter.grad.cpu() for parameter in model.parameters()],
        "mean": model[1].running_mean.cpu(),
    }
    torch.save(found, folder / f"rank{rank}.pt")
