"""Normalization layers: frozen batch normalization, and the table that networks choose from."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_backbone.errors import InputError


class FrozenBatchNorm2d(nn.Module):
    """Batch normalization of `(N, C, H, W)` with constant statistics, scale and shift.

    All four are buffers: no optimizer sees them, `train()` has no effect, and gradients flow only to the input.
    State dicts are interchangeable with `nn.BatchNorm2d`'s, except for `num_batches_tracked`, which loading ignores.
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
        """Return a frozen copy of `norm` with the same values, epsilon, device and dtype."""
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
        # `x * scale + shift` would take two passes over memory instead of one, round differently than nn.BatchNorm2d,
        # and under autocast either promote a bf16 map to fp32 or round the scale to bf16. Its one advantage, not saving
        # `x` for the backward pass, is left to a fused kernel.
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # nn.Module passes its own copy of the dict, so this leaves the caller's intact.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Replace each BatchNorm2d and SyncBatchNorm in `module` with a frozen copy; return `module` or its replacement."""
    if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
        return FrozenBatchNorm2d.from_batch_norm(module)
    for name, child in module.named_children():
        setattr(module, name, freeze_batch_norm(child))
    return module


def group_norm(num_channels: int) -> nn.GroupNorm:
    """Return group normalization with 32 groups (Wu and He 2018, Table 3).

    If the channels are not divisible by 32, as in a narrow network, use their greatest common divisor.
    """
    return nn.GroupNorm(math.gcd(32, num_channels), num_channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "FrozenBN": FrozenBatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": group_norm,
}


def norm_factory(norm: str) -> Callable[[int], nn.Module]:
    """Return the function that builds the normalization layer named `norm` for a given number of channels."""
    if norm not in NORMS:
        raise InputError(f"norm is {norm!r}, expected one of {', '.join(NORMS)}")
    return NORMS[norm]
