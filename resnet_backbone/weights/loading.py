"""Copy tensors from a file into a module, by name, counted."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from resnet_backbone.weights.checkpoint import CheckpointError


@dataclass(frozen=True)
class Route:
    """Names that start with `source` in the file start with `target` in the module, in both directions.

    ResNet's conv5_x goes from the classifier to a RoI head by `Route("layer4.", "")`, VGG's first fully connected layer
    by `Route("classifier.0.", "fc6.")`, and a whole backbone, whose names stay, by `Route("", "")`.
    """

    source: str
    target: str

    def source_name(self, name: str) -> str | None:
        """The file's name for the module's `name`; None if the route does not cover it."""
        return self.source + name.removeprefix(self.target) if name.startswith(self.target) else None


@dataclass(frozen=True)
class Coverage:
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
        return text + (f", {_some(self.missing)} left as initialised, as asked" if self.missing else "")


def load_state(
    module: nn.Module,
    state: Mapping[str, torch.Tensor],
    *,
    part: str,
    source: str,
    routes: Iterable[Route] = (Route("", ""),),
    may_miss: Iterable[str] = (),
) -> Coverage:
    """Copy `state` into every parameter and buffer of `module`, all or nothing.

    `num_batches_tracked` is copied where both sides have it but not counted: it does not take part in any output.

    Args:
        module: what to fill.
        state: names to tensors, as in the file.
        part: the module's name in messages.
        source: the file's name in messages.
        routes: how names of the module map to names of the file; the first that covers a name counts.
        may_miss: prefixes of names, as in the file, that it may lack or hold in another shape (a predictor for other
            classes, say); they stay as initialised.

    Raises:
        CheckpointError: a tensor is missing or has another shape; nothing has been copied then.
    """
    routes, may_miss = tuple(routes), tuple(may_miss)
    found: dict[str, str] = {}
    missing: list[str] = []
    wrong: list[str] = []
    targets = module.state_dict()
    for name, target in targets.items():
        names = [s for route in routes if (s := route.source_name(name)) is not None]
        if not names or names[0] not in state:
            if not name.endswith("num_batches_tracked"):
                missing.append(names[0] if names else name)
        elif state[names[0]].shape != target.shape and names[0].startswith(may_miss):
            missing.append(names[0])
        elif state[names[0]].shape != target.shape:
            wrong.append(f"{name} is {_shape(target)} here, {_shape(state[names[0]])} in the file")
        else:
            found[name] = names[0]
    if wrong:
        raise CheckpointError(
            f"{part}: {len(wrong)} tensors of {source} have another shape ({_some(wrong)}). "
            "The network was built with another name, width or number of classes than the file's. Build it like the "
            "file's, or list the prefixes that may stay as initialised in MODEL.NETWORK.ALLOW_MISSING."
        )
    if refused := [name for name in missing if not name.startswith(may_miss)]:
        raise CheckpointError(
            f"{part}: {len(refused)} of {len(missing) + _counted(found)} tensors are not in {source} "
            f"({_some(refused)}). Give weights of the same network, or list the prefixes that may be missing in "
            "MODEL.NETWORK.ALLOW_MISSING."
        )
    with torch.no_grad():
        for name, source_name in found.items():
            targets[name].copy_(state[source_name])
    return Coverage(part, tuple(s for s in found.values() if not s.endswith("num_batches_tracked")), tuple(missing))


def collect(module: nn.Module, routes: Iterable[Route] = (Route("", ""),)) -> dict[str, torch.Tensor]:
    """The module's tensors under the file's names: the inverse of `load_state`.

    The tensors are the module's own, not copies. What no route covers is left out.
    """
    routes = tuple(routes)
    state = {}
    for name, tensor in module.state_dict().items():
        names = [s for route in routes if (s := route.source_name(name)) is not None]
        if names:
            state[names[0]] = tensor
    return state


def _counted(found: Mapping[str, str]) -> int:
    return sum(not name.endswith("num_batches_tracked") for name in found)


def _shape(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a single number"


def _some(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
