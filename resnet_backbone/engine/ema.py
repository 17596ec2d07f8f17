"""A moving average of the weights (Polyak, Juditsky 1992), which is evaluated and saved in their place."""

import copy

import torch
from torch import nn


class MovingAverage:
    """Keep `average ← decay · average + (1 − decay) · weights`, over parameters and batch norm statistics.

    The first update takes the weights as they are, as `torch.optim.swa_utils.AveragedModel` does.

    Attributes:
        model: a copy of the network that holds the average.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._others = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._started = False

    @torch.no_grad()
    def update(self) -> None:
        """After a step. A handful of kernels for all tensors together."""
        averages, weights = (list(tensors) for tensors in zip(*self._floats, strict=True))
        if self._started:
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        else:
            torch._foreach_copy_(averages, weights)
            self._started = True

    def evaluated(self) -> nn.Module:
        """The averaged network, ready to be used."""
        for average, value in self._others:  # counters, which have no average
            average.copy_(value)
        return self.model

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.evaluated().state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(state)
        self._started = True
