"""Normalization layers: batch normalization with fixed statistics, and the table that networks choose from."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_backbone.errors import InputError


class FrozenBatchNorm2d(nn.Module):
    """Batch normalization of `(N, C, H, W)` whose statistics, scale and shift are constants.

    All four are buffers: no optimizer sees them, `train()` changes nothing, and gradients flow to the input only.
    State dicts are interchangeable with `nn.BatchNorm2d`'s, but for `num_batches_tracked`, which is ignored on loading.
    """

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> "FrozenBatchNorm2d":
        """Return a frozen copy of `norm`: same values, epsilon, device and dtype."""
        if norm.running_mean is None:
            raise InputError(
                "this batch normalization keeps no running statistics, so there is nothing to freeze: "
                "build it with track_running_stats=True"
            )
        frozen = cls(norm.num_features, norm.eps)
        frozen.running_mean = norm.running_mean.detach().clone()
        frozen.running_var = norm.running_var.detach().clone()
        frozen.weight = norm.weight.detach().clone() if norm.affine else torch.ones_like(norm.running_mean)
        frozen.bias = norm.bias.detach().clone() if norm.affine else torch.zeros_like(norm.running_mean)
        return frozen.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        # Not `x * scale + shift`: that is two passes over memory instead of one, rounds otherwise than nn.BatchNorm2d,
        # and under autocast either promotes a bf16 map to fp32 or rounds the scale to bf16. Its one merit, not keeping
        # `x` for the backward pass, is left to a fused kernel.
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # nn.Module hands over its own copy of the dict, so that this takes nothing from the caller's.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Replace each BatchNorm2d and SyncBatchNorm in `module` by its frozen copy; return `module` or its replacement."""
    if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
        return FrozenBatchNorm2d.from_batch_norm(module)
    for name, child in module.named_children():
        setattr(module, name, freeze_batch_norm(child))
    return module


def group_norm(num_channels: int) -> nn.GroupNorm:
    """Group normalization with 32 groups (Wu and He 2018, Table 3).

    Where 32 does not divide the channels, as in a narrow network, with their greatest common divisor.
    """
    return nn.GroupNorm(math.gcd(32, num_channels), num_channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "FrozenBN": FrozenBatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": group_norm,
}


def norm_factory(norm: str) -> Callable[[int], nn.Module]:
    """Return the function that makes a normalization layer of this name from its number of channels."""
    if norm not in NORMS:
        raise InputError(f"norm is {norm!r}, expected one of {', '.join(NORMS)}")
    return NORMS[norm]
