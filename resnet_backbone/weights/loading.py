"""Copy tensors from a file into a module, by key, counted.

A key mapping says which prefix of the file's keys stands for which prefix of the module's: {"layer4.": ""} takes
ResNet's conv5_x from a classifier to a RoI head, {"classifier.0.": "fc6."} VGG's first fully connected layer, and
`SAME_KEYS` a whole backbone, whose keys stay. The first entry that covers a key counts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from resnet_backbone.weights.checkpoint import CheckpointError

SAME_KEYS: Mapping[str, str] = MappingProxyType({"": ""})


@dataclass(frozen=True)
class LoadReport:
    """How much of a module came from a file.

    Attributes:
        part: what the module is, for messages ("backbone", "roi_heads.res5").
        loaded: names in the file of the tensors that were copied.
        missing: names that the file lacks and was allowed to lack.
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
    key_mapping: Mapping[str, str] = SAME_KEYS,
    may_miss: Iterable[str] = (),
) -> LoadReport:
    """Copy `state` into every parameter and buffer of `module`, all or nothing.

    `num_batches_tracked` is copied where both sides have it but not counted: it does not take part in any output.

    Args:
        module: what to fill.
        state: names to tensors, as in the file.
        part: the module's name in messages.
        source: the file's name in messages.
        key_mapping: prefixes of the file's keys to prefixes of the module's.
        may_miss: prefixes of names, as in the file, that it may lack or hold in another shape (a predictor for other
            classes, say); they stay as initialized.

    Raises:
        CheckpointError: a tensor is missing or has another shape; nothing has been copied then.
    """
    may_miss = tuple(may_miss)
    found: dict[str, str] = {}
    missing: list[str] = []
    wrong: list[str] = []
    targets = module.state_dict()
    for name, target in targets.items():
        source_key = _source_key(name, key_mapping)
        if source_key not in state:
            if not name.endswith("num_batches_tracked"):
                missing.append(name if source_key is None else source_key)
        elif state[source_key].shape == target.shape:
            found[name] = source_key
        elif source_key.startswith(may_miss):
            missing.append(source_key)
        else:
            wrong.append(f"{name} is {_shape(target)} here, {_shape(state[source_key])} in the file")
    if wrong:
        raise CheckpointError(
            f"{part}: {len(wrong)} tensors of {source} have another shape ({_some(wrong)}). "
            "The network was built with another name, width or number of classes than the file's. Build it like the "
            "file's, or list the prefixes that may stay as initialized in MODEL.NETWORK.ALLOW_MISSING."
        )
    if refused := [name for name in missing if not name.startswith(may_miss)]:
        raise CheckpointError(
            f"{part}: {len(refused)} of {len(missing) + _counted(found)} tensors are not in {source} "
            f"({_some(refused)}). Give weights of the same network, or list the prefixes that may be missing in "
            "MODEL.NETWORK.ALLOW_MISSING."
        )
    with torch.no_grad():
        for name, source_key in found.items():
            targets[name].copy_(state[source_key])
    return LoadReport(part, tuple(s for s in found.values() if not s.endswith("num_batches_tracked")), tuple(missing))


def _source_key(key: str, key_mapping: Mapping[str, str]) -> str | None:
    """The file's key for the module's `key`; None if the mapping does not cover it."""
    for source, target in key_mapping.items():
        if key.startswith(target):
            return source + key.removeprefix(target)
    return None


def _counted(found: Mapping[str, str]) -> int:
    return sum(not name.endswith("num_batches_tracked") for name in found)


def _shape(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a single number"


def _some(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
