"""Infinite or NaN losses and gradients: keep them out of the model and report where they came from.

The check runs on the device (`NonFiniteGuard`), so no step waits; the host reads the verdict along with the metrics. It
then reruns the batch, which is a function of the iteration, and inspects it layer by layer (`Diagnosis`).
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
    """The loss or a weight is infinite or NaN, almost always because the learning rate is too high."""


class NonFiniteGuard:
    """Watch losses and gradients; from the first bad step on, no step changes the model.

    The verdict is a tensor on the device, so no step waits for it. The optimizer receives it as `found_inf` (torch's
    own way to skip a fused step), and batch norm statistics are restored from a copy.

    Attributes:
        first_bad: the first bad step, counted from `begin()`; -1 if there is none yet. On the device.
        stopped: 0.0 before the first bad step, 1.0 from then on. On the device.

    Args:
        model: the model whose batch norm statistics are protected.
        gradients: whether non-finite gradients count too. False with a loss scaler, which relies on them to find its
            scale.
    """

    def __init__(self, model: nn.Module, *, gradients: bool = True):
        self.gradients = gradients
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        device = next(model.parameters()).device
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad = torch.full_like(self.steps, -1)
        self.stopped = torch.zeros((), device=device)
        # Frozen batch norms never change. Buffers of one dtype share one flat copy, so a few kernels handle them all.
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        buffers = [buffer for norm in norms for buffer in norm.buffers()]
        by_type = {dtype: [b for b in buffers if b.dtype == dtype] for dtype in {b.dtype for b in buffers}}
        self._statistics = [(group, _flat(group)) for group in by_type.values()]

    def judge(self, loss: torch.Tensor) -> None:
        """Check the step's loss and gradients after the backward pass; keep or restore batch norm statistics."""
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
        """Start counting steps, and take the current batch norm statistics as good."""
        self.steps.zero_()
        for buffers, kept in self._statistics:
            kept.copy_(_flat(buffers))


class Diagnosis:
    """Locate where a bad iteration went wrong by rerunning it with the weights that it started from.

    Args:
        model: unwrapped; its weights have not changed since the bad iteration.
        replay: maps an iteration to its micro-batches and a function from a micro-batch to its losses, with the
            iteration's original seed.
        names: maps an iteration to the names of this process's images; None if they have no names.
        rate_at: maps an iteration to its learning rate.
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
        """The error to raise when all processes know that the iteration is bad; they diagnose it together."""
        return self._error(iteration, comm.all_gather(self._look(iteration)))

    def of_this_process(self, iteration: int) -> NonFiniteLossError:
        """The error to raise when only this process knows."""
        return self._error(iteration, [self._look(iteration)])

    def _look(self, iteration: int) -> tuple[str, list[str]]:
        """The cause, and the names of this process's images."""
        micro_batches, losses_of = self._replay(iteration)
        self._model.train()
        with torch.compiler.set_stance("force_eager"):  # a compiled model has no layers to inspect
            cause = find_cause(self._model, micro_batches, losses_of)
        return cause, [] if self._names is None else list(self._names(iteration))

    def _error(self, iteration: int, found: list[tuple[str, list[str]]]) -> NonFiniteLossError:
        # The process that found a cause has the bad image; the others only received its gradient.
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
    """Raise NonFiniteLossError if any tensor of the model is infinite or NaN after `iteration`."""
    state = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    finite = torch.stack([tensor.isfinite().all() for tensor in state.values()]).tolist()
    if not all(finite):
        bad = [name for name, is_finite in zip(state, finite, strict=True) if not is_finite]
        raise NonFiniteLossError(
            f"{len(bad)} of {len(state)} tensors of the model ({bad[0]} …) are infinite or not a number after "
            f"iteration {iteration}, with finite losses. Lower SOLVER.BASE_LR. No checkpoint was written since."
        )


def find_cause(model: nn.Module, micro_batches: Iterable[Any], losses_of: Callable[[Any], Losses]) -> str:
    """Name the first infinite or NaN value in an iteration, leaving the model unchanged.

    Args:
        model: in training mode, with the weights that the iteration started from.
        micro_batches: the iteration's micro-batches.
        losses_of: runs the model on a micro-batch and returns its losses.

    Returns:
        The end of a sentence, such as "the output of layer2.0.conv1".
    """
    watched = _Watch(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)  # existing gradients may already be bad
    try:
        # Run to the end whatever is found: other processes may be waiting for this one in a synchronized layer.
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
    except FloatingPointError as error:  # how Detectron2 rejects NaN boxes
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
    """Find the first non-finite layer output or gradient of one."""

    def __init__(self, model: nn.Module):
        self.found: str | None = None
        leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
        self._handles = [module.register_forward_hook(self._look(name)) for name, module in leaves]

    def note(self, found: Iterable[str]) -> None:
        """Record the first of these, unless something was already found."""
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
