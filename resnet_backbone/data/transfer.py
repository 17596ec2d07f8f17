"""Transfer tensors from the host to the device."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy to the device; on a GPU, without waiting for work queued there."""
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from pageable memory, the copy would wait
    return tensor.to(device, non_blocking=True)
