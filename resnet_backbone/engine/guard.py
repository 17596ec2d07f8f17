"""Steps whose loss or gradients are not finite change nothing: decided on the device, read by the host now and then."""

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn


class NonFiniteGuard:
    """Watches losses and gradients; from the first bad step on, nothing that a step does reaches the model.

    The decision is a tensor on the device, so no step waits for it. The optimizer takes it as `found_inf` (torch's own
    way to skip a fused step), batch norm statistics are put back from a copy.

    Attributes:
        first_bad: the first bad step, counted from `begin()`; -1 while there is none. On the device.
        stopped: 1.0 from the first bad step on, before that 0.0. On the device.

    Args:
        model: whose batch norm statistics are kept.
        gradients: whether gradients that are not finite count too. Not with a loss scaler, which looks for its scale by
            means of them.
    """

    def __init__(self, model: nn.Module, *, gradients: bool = True):
        self.gradients = gradients
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        device = next(model.parameters()).device
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad = torch.full_like(self.steps, -1)
        self.stopped = torch.zeros((), device=device)
        # Frozen batch norms keep theirs anyway. Buffers of one type go into one flat copy: a few kernels for all.
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        buffers = [buffer for norm in norms for buffer in norm.buffers()]
        by_type = {dtype: [b for b in buffers if b.dtype == dtype] for dtype in {b.dtype for b in buffers}}
        self._statistics = [(group, _flat(group)) for group in by_type.values()]

    def judge(self, loss: torch.Tensor) -> None:
        """After the backward pass: take the step's loss and the gradients into account, and keep statistics or not."""
        bad = ~loss.detach().isfinite()
        if self.gradients:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            bad |= ~nn.utils.get_total_norm(gradients).isfinite()
        bad = bad.float()
        if comm.get_world_size() > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        self.first_bad.copy_(torch.where((bad > 0) & (self.first_bad < 0), self.steps, self.first_bad))
        self.steps += 1
        self.stopped.copy_(self.first_bad >= 0)
        for buffers, kept in self._statistics:
            kept.copy_(torch.where(self.stopped > 0, kept, _flat(buffers)))
            parts = kept.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(parts, buffers, strict=True)])

    def begin(self) -> None:
        """Count steps from here on, and take the batch norm statistics as they are for good ones."""
        self.steps.zero_()
        for buffers, kept in self._statistics:
            kept.copy_(_flat(buffers))


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
