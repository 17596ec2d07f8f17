"""Identify the catalogue network that a set of tensors belongs to."""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from resnet_backbone.networks import accepted_arguments, build_network, list_networks
from resnet_backbone.networks.catalogue import CATALOGUE
from resnet_backbone.weights.checkpoint import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

# A file may lack the last layer, or all of VGG's fully connected layers, but no part of one.
_CLASSIFIERS = ("fc.", "classifier.6.", "classifier.")


class MissingMetadata(CheckpointError):
    """A required fact about the weights is in neither the file nor its format.

    Attributes:
        fact: what was found, without advice.
        missing: the `read_weights` arguments that would supply it.
    """

    def __init__(self, fact: str, advice: str, missing: Sequence[str]):
        super().__init__(f"{fact} {advice}")
        self.fact = fact
        self.missing = tuple(missing)


@dataclass(frozen=True)
class Architecture:
    """A catalogue row.

    Attributes:
        name: its catalogue name.
        arguments: those visible in tensor names and shapes: width, plus shortcut where there is a choice.
        num_classes: the classifier's output count; None if the tensors include no classifier.
    """

    name: str
    arguments: Mapping[str, Any]
    num_classes: int | None


@dataclass(frozen=True)
class _Difference:
    """How tensors differ from a network's, as phrases like "lacks fc.bias"; empty if they match."""

    parts: tuple[str, ...]

    def __str__(self) -> str:
        more = f" and {len(self.parts) - 4} more" if len(self.parts) > 4 else ""
        return ", ".join(self.parts[:4]) + more


def find_architecture(model: Mapping[str, torch.Tensor], *, name: str | None, source: str) -> Architecture:
    """Find the network whose tensor names and shapes match exactly.

    Args:
        model: tensors under our names; `num_batches_tracked` is ignored.
        name: the network the user named; None searches the catalogue.
        source: the file's name in messages.

    Raises:
        CheckpointError: no network fits, or the named one does not.
        MissingMetadata: more than one fits.
        InputError: no network has this name.
    """
    shapes = {n: tuple(t.shape) for n, t in model.items() if not n.endswith("num_batches_tracked")}
    names = [name] if name else [row for row in list_networks() if _depths_of(row) == _depths(shapes)]
    tried = [(candidate, _compare(shapes, candidate)) for row in names for candidate in _candidates(row, shapes)]
    fitting = [candidate for candidate, difference in tried if not difference.parts]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise MissingMetadata(
            f"{source} fits {' and '.join(map(_describe, fitting))} alike: these networks have the same tensors and "
            "differ in their shortcuts.",
            f"Say which it is with --arch {' or --arch '.join(c.name for c in fitting)}.",
            ("architecture",),
        )
    if not tried:
        raise CheckpointError(
            f"{source} has stages of {', '.join(map(str, _depths(shapes)))} blocks, which no network in "
            "list_networks() has. Give complete weights of one of those, or name what it should be with --arch."
        )
    nearest, difference = min(tried, key=lambda pair: len(pair[1].parts))
    raise CheckpointError(
        f"{source} {'is not' if name else 'fits no network in list_networks(); the nearest is'} {_describe(nearest)}: "
        f"the file {difference}. Give complete weights of one of these networks, or name another with --arch."
    )


def has_bottleneck_blocks(model: Iterable[str]) -> bool:
    """Whether these tensor names (ours) come from a network where the position of a block's stride is a choice."""
    return any(".conv3." in name for name in model)


def _depths(shapes: Shapes) -> tuple[int, ...]:
    """The number of blocks in each stage; () for a VGG."""
    blocks = {
        (int(name.split(".")[0][len("layer") :]), int(name.split(".")[1]))
        for name in shapes
        if name.startswith("layer")
        and name.split(".")[0][len("layer") :].isdecimal()
        and name.split(".")[1].isdecimal()
    }
    stages = sorted({stage for stage, _ in blocks})
    return tuple(1 + max(block for stage, block in blocks if stage == wanted) for wanted in stages)


def _depths_of(row: str) -> tuple[int, ...]:
    return CATALOGUE[row][1].get("depths", ())


def _candidates(row: str, shapes: Shapes) -> Iterator[Architecture]:
    """Yield this row's networks with the tensors' class count and approximate width."""
    arguments = accepted_arguments(row)
    # Take only the class count from the classifier; the comparison shows whether it is complete.
    classifiers = [shapes[n] for n in ("fc.weight", "classifier.6.weight") if shapes.get(n)]
    num_classes = classifiers[0][0] if classifiers else None
    for shortcut in ("B", "A", "C") if "shortcut" in arguments else (None,):
        chosen = {} if shortcut is None else {"shortcut": shortcut}
        width = _width(_shapes(row, None, **chosen), shapes)
        yield Architecture(row, {"width": width, **chosen}, num_classes)


def _width(full: Shapes, shapes: Shapes) -> float:
    """The width that scales the shapes in `full` to the channels in `shapes`; 1 if no layers match."""
    # These layers' outputs scale with the width, rounded to multiples of 8 before a bottleneck's expansion is
    # applied.
    expansion, last = (4, 3) if "layer1.0.conv3.weight" in full else (1, 2)
    pattern = re.compile(rf"conv1\.weight|layer\d\.0\.conv{last}\.weight|features\.\d+\.weight|classifier\.3\.weight")
    pairs = [(n, full[n], shapes[n]) for n in full if pattern.fullmatch(n) and len(shapes.get(n, ())) == len(full[n])]
    if not pairs:
        return 1.0
    bounds = []
    for name, (ours, *_), (theirs, *_) in pairs:
        step = 8 if name == "conv1.weight" else 8 * expansion
        # At least 8 channels are always kept, so that minimum gives no lower bound on the width.
        bounds.append((max(0, theirs - step / 2) / ours if theirs > step else 0.0, (theirs + step / 2) / ours))
    low, high = max(low for low, _ in bounds), min(high for _, high in bounds)
    # The widest layer's own ratio is more often a round number than the middle of the possible range.
    _, (ours, *_), (theirs, *_) = max(pairs, key=lambda pair: pair[1][0])
    return theirs / ours if low <= theirs / ours < high else (low + high) / 2


def _compare(shapes: Shapes, candidate: Architecture) -> _Difference:
    expected = _shapes(candidate.name, candidate.num_classes, **candidate.arguments)
    missing = [name for name in expected if name not in shapes]
    if candidate.num_classes is None and any(
        missing == [name for name in expected if name.startswith(prefix)] for prefix in _CLASSIFIERS
    ):
        missing = []
    return _Difference(
        (
            *(f"lacks {name}" for name in missing),
            *(f"has {name} besides" for name in shapes if name not in expected),
            *(
                f"has {name} of {_text(shapes[name])} instead of {_text(shape)}"
                for name, shape in expected.items()
                if name in shapes and shapes[name] != shape
            ),
        )
    )


@functools.lru_cache(maxsize=32)
def _shapes(name: str, num_classes: int | None, **arguments: Any) -> Shapes:
    """The shapes of a network's tensors, without allocating them."""
    with torch.device("meta"):
        state = build_network(name, num_classes or 1, **arguments).state_dict()
    return {n: tuple(t.shape) for n, t in state.items() if not n.endswith("num_batches_tracked")}


def _describe(candidate: Architecture) -> str:
    arguments = {k: v for k, v in candidate.arguments.items() if (k, v) not in (("width", 1.0), ("shortcut", "B"))}
    return candidate.name + (
        f" ({', '.join(f'{k}={v:g}' if k == 'width' else f'{k}={v}' for k, v in arguments.items())})"
        if arguments
        else ""
    )


def _text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a single number"
