"""Copy tensors from a file into a module by name, and count them.

A contiguous run of stages keeps the full network's names, so the same file fills a classifier, a backbone, and part
of an RoI head.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from resnet_backbone.weights.checkpoint import CheckpointError


@dataclass(frozen=True)
class LoadReport:
    """How much of a module came from a file.

    Attributes:
        part: the module's name in messages ("backbone", "roi_heads.res5").
        loaded: the copied tensors' names in the file.
        missing: names that the file was allowed to lack, and does.
    """

    part: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing)
        text = f"{self.part}: {'all ' if not self.missing else ''}{len(self.loaded)} of {total} tensors loaded"
        return text + (f", {_some(self.missing)} left as initialized, as asked" if self.missing else "")


def load_state(
    module: nn.Module,
    state: Mapping[str, torch.Tensor],
    *,
    part: str,
    source: str,
    may_miss: Iterable[str] = (),
) -> LoadReport:
    """Copy `state` into every parameter and buffer of `module`, all or nothing.

    `num_batches_tracked` is copied where both sides have it, but not counted: it affects no output.

    Args:
        module: the module to fill.
        state: names to tensors, as in the file.
        part: the module's name in messages.
        source: the file's name in messages.
        may_miss: prefixes of names that the file may lack or hold in a different shape (say, a predictor for
            other classes); these stay as initialized.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape, or the file has one more for a layer than the layer
            takes, such as batch norm's statistics for a group norm; nothing has been copied.
    """
    may_miss = tuple(may_miss)
    found: list[str] = []
    missing: list[str] = []
    wrong: list[str] = []
    targets = module.state_dict()
    for name, target in targets.items():
        if name not in state:
            if not name.endswith("num_batches_tracked"):
                missing.append(name)
        elif state[name].shape == target.shape:
            found.append(name)
        elif name.startswith(may_miss):
            missing.append(name)
        else:
            wrong.append(f"{name} is {_shape(target)} here, {_shape(state[name])} in the file")
    loaded = tuple(name for name in found if not name.endswith("num_batches_tracked"))
    if wrong:
        raise CheckpointError(
            f"{part}: {len(wrong)} tensors of {source} have another shape ({_some(wrong)}). "
            "The network was built with another name, width or number of classes than the file's. Build it like the "
            "file's, or list the prefixes that may stay as initialized in MODEL.NETWORK.ALLOW_MISSING."
        )
    if refused := [name for name in missing if not name.startswith(may_miss)]:
        raise CheckpointError(
            f"{part}: {len(refused)} of {len(missing) + len(loaded)} tensors are not in {source} "
            f"({_some(refused)}). Give weights of the same network, or list the prefixes that may be missing in "
            "MODEL.NETWORK.ALLOW_MISSING."
        )
    layers = {name.rpartition(".")[0] for name in found} - {""}
    surplus = [name for name in state if name not in targets and name.rpartition(".")[0] in layers]
    surplus = [name for name in surplus if not name.endswith("num_batches_tracked") and not name.startswith(may_miss)]
    if surplus:
        raise CheckpointError(
            f"{part}: {source} has {len(surplus)} tensors more for layers of this network ({_some(surplus)}), so that "
            "these are of another kind. Build them like the file's (norms: MODEL.RESNETS.NORM)."
        )
    with torch.no_grad():
        for name in found:
            targets[name].copy_(state[name])
    return LoadReport(part, loaded, tuple(missing))


def _shape(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a single number"


def _some(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
