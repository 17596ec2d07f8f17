"""Where a loss or gradient that is not finite comes from: the batch is run again, and looked at layer by layer."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn


def find_cause(model: nn.Module, parts: Iterable[Any], losses_of: Callable[[Any], dict[str, torch.Tensor]]) -> str:
    """Name the first thing in one iteration that is infinite or not a number; change nothing in the model.

    Args:
        model: with the weights that the iteration began with, in training mode.
        parts: of the batch.
        losses_of: from a part to its losses, by way of the model.

    Returns:
        The end of a sentence, for instance "the output of layer2.0.conv1".
    """
    watched = _Watch(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)  # those there are may hold the fault already
    try:
        # To the end, whatever is found: other processes may wait for this one in a layer that works across them.
        for part in parts:
            losses = losses_of(part)
            watched.note(
                f"the loss {name} (all layers' outputs are finite)" for name, x in losses.items() if not _is_finite(x)
            )
            sum(losses.values()).backward()
            named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
            watched.note(f"the gradient of {name}" for name, gradient in named if not _is_finite(gradient))
            if not _is_finite(nn.utils.get_total_norm([gradient for _, gradient in named])):
                watched.note(["the norm of the gradient, each value of which is finite"])
    except FloatingPointError as error:  # by which Detectron2 refuses boxes that are not numbers
        watched.note([f"what is computed from layers' outputs, all of them finite ({error})"])
    finally:
        watched.remove()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return watched.found or (
        "nothing in a second run of the same batch, so the device or a nondeterministic operation is to blame"
    )


class _Watch:
    """The first output of a layer, or gradient of one, that is not finite."""

    def __init__(self, model: nn.Module):
        self.found: str | None = None
        leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
        self._handles = [module.register_forward_hook(self._look(name)) for name, module in leaves]

    def note(self, found: Iterable[str]) -> None:
        """Take the first of these, unless something was found before."""
        if self.found is None:
            self.found = next(iter(found), None)

    def _look(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            if self.found is not None:
                return
            if not all(_is_finite(tensor) for tensor in _tensors(outputs)):
                whole = all(_is_finite(tensor) for tensor in _tensors(inputs))
                self.found = f"the output of {name}" if whole else f"the input of {name}"
                return
            for tensor in _tensors(outputs):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._look_at_gradient(name, gradient))

        return hook

    def _look_at_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if self.found is None and not _is_finite(gradient):
            self.found = f"the gradient of the output of {name}"

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
