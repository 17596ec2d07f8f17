"""Losses and gradients that are infinite or not a number: they change nothing, and the run says where they came from.

The device decides (`NonFiniteGuard`), so that no step waits; the host reads the decision with the metrics. Then the
batch, which is a function of the iteration, is run again and looked at layer by layer (`Diagnosis`).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn

from resnet_backbone.errors import InputError

logger = logging.getLogger(__name__)

Losses = dict[str, torch.Tensor]


class NonFiniteLossError(InputError, FloatingPointError):
    """The loss or a weight is infinite or not a number: almost always, the learning rate is too high."""


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


class Diagnosis:
    """Says of a bad iteration where it went wrong, by running it again with the weights that it began with.

    Args:
        model: unwrapped; since the bad iteration, nothing has changed its weights.
        replay: given an iteration, its micro-batches and the function from one to its losses, seeded as it was.
        names: given an iteration, what this process's images are called; None if they have no names.
        rate_at: given an iteration, its learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        replay: Callable[[int], tuple[Iterable[Any], Callable[[Any], Losses]]],
        names: Callable[[int], Sequence[str]] | None,
        rate_at: Callable[[int], float],
    ):
        self._model = model
        self._replay = replay
        self._names = names
        self._rate_at = rate_at

    def of_all(self, iteration: int) -> NonFiniteLossError:
        """The error to raise where all processes know that the iteration is bad; they look at it together."""
        return self._error(iteration, comm.all_gather(self._look(iteration)))

    def of_this_process(self, iteration: int) -> NonFiniteLossError:
        """The error to raise where only this process knows."""
        return self._error(iteration, [self._look(iteration)])

    def _look(self, iteration: int) -> tuple[str, list[str]]:
        """The cause, and the names of this process's images."""
        micro_batches, losses_of = self._replay(iteration)
        self._model.train()
        with torch.compiler.set_stance("force_eager"):  # compiled, it has no layers to look at
            cause = find_cause(self._model, micro_batches, losses_of)
        return cause, [] if self._names is None else list(self._names(iteration))

    def _error(self, iteration: int, found: list[tuple[str, list[str]]]) -> NonFiniteLossError:
        # The process that has a cause knows the image; the others only got its gradient.
        cause, names = next(((c, n) for c, n in found if not c.startswith("nothing")), found[0])
        logger.error("images of iteration %d: %s", iteration, ", ".join(names) or "unknown")
        few = ", ".join(names[:4]) + (f" and {len(names) - 4} more (in the log)" if len(names) > 4 else "")
        return NonFiniteLossError(
            f"iteration {iteration} gave a loss or gradient that is infinite or not a number, at learning rate "
            f"{self._rate_at(iteration):g}. It appeared first in {cause}. {f'Its images: {few}. ' if names else ''}"
            "Nothing of it reached the weights, and the last checkpoint stays. Lower SOLVER.BASE_LR, lengthen "
            "SOLVER.WARMUP_ITERS or clip gradients (SOLVER.CLIP_GRADIENTS.ENABLED True), and check the data."
        )


def check_weights(model: nn.Module, iteration: int) -> None:
    """Raise NonFiniteLossError if a tensor of the model is infinite or not a number after `iteration`."""
    state = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    finite = torch.stack([tensor.isfinite().all() for tensor in state.values()]).tolist()
    if not all(finite):
        bad = [name for name, is_finite in zip(state, finite, strict=True) if not is_finite]
        raise NonFiniteLossError(
            f"{len(bad)} of {len(state)} tensors of the model ({bad[0]} …) are infinite or not a number after "
            f"iteration {iteration}, with finite losses. Lower SOLVER.BASE_LR. No checkpoint was written since."
        )


def find_cause(model: nn.Module, micro_batches: Iterable[Any], losses_of: Callable[[Any], Losses]) -> str:
    """Name the first thing in one iteration that is infinite or not a number; change nothing in the model.

    Args:
        model: with the weights that the iteration began with, in training mode.
        micro_batches: of the iteration's batch.
        losses_of: from a micro-batch to its losses, by way of the model.

    Returns:
        The end of a sentence, for instance "the output of layer2.0.conv1".
    """
    watched = _Watch(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)  # those there are may hold the fault already
    try:
        # To the end, whatever is found: other processes may wait for this one in a layer that works across them.
        for micro_batch in micro_batches:
            losses = losses_of(micro_batch)
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


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
