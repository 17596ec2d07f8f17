"""A moving average of the weights (Polyak, Juditsky 1992), evaluated and saved in their place."""

import copy

import torch
from torch import nn


class MovingAverage:
    """Maintain `average ← decay · average + (1 − decay) · weights` over parameters and batch norm statistics.

    The first update copies the weights, as `torch.optim.swa_utils.AveragedModel` does. We don't use that class because
    it also averages (and so truncates) batch norm's counters, and because each update on a GPU copies a number from
    the host and waits for it.

    Attributes:
        model: a copy of the network that holds the average, ready to evaluate.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._started = False

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after a step, with a handful of kernels for all tensors."""
        averages, weights = map(list, zip(*self._floats, strict=True))
        torch._foreach_lerp_(averages, weights, 1 - self.decay if self._started else 1.0)
        if self._counters:
            torch._foreach_copy_(*map(list, zip(*self._counters, strict=True)))
        self._started = True

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(state)
        self._started = True
