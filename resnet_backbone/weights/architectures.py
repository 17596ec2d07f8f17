"""Which network of the catalogue a set of tensors belongs to."""

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
    """Something must be known about weights that neither their file nor its format says.

    Attributes:
        fact: what was found, without advice.
        missing: the arguments of `read_weights` that would say it.
    """

    def __init__(self, fact: str, advice: str, missing: Sequence[str]):
        super().__init__(f"{fact} {advice}")
        self.fact = fact
        self.missing = tuple(missing)


@dataclass(frozen=True)
class Architecture:
    """A row of the catalogue.

    Attributes:
        name: in the catalogue.
        arguments: those that show in the tensors' names and shapes: width, and shortcut where it is a choice.
        num_classes: outputs of the classifier; None where the tensors have none.
    """

    name: str
    arguments: Mapping[str, Any]
    num_classes: int | None


@dataclass(frozen=True)
class _Difference:
    """How tensors differ from a network's: a sentence's parts, as "lacks fc.bias"; empty if they do not."""

    parts: tuple[str, ...]

    def __str__(self) -> str:
        more = f" and {len(self.parts) - 4} more" if len(self.parts) > 4 else ""
        return ", ".join(self.parts[:4]) + more


def find_architecture(model: Mapping[str, torch.Tensor], *, name: str | None, source: str) -> Architecture:
    """The network that has exactly these tensors, by names and shapes.

    Args:
        model: tensors under our names; `num_batches_tracked` does not count.
        name: what the user says that it is; None to look through the catalogue.
        source: the file's name in messages.

    Raises:
        CheckpointError: no network fits, or the one named does not.
        MissingMetadata: more than one fits.
        InputError: there is no network of this name.
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
            "list_networks() has. Give whole weights of one of those, or name what it should be with --arch."
        )
    nearest, difference = min(tried, key=lambda pair: len(pair[1].parts))
    raise CheckpointError(
        f"{source} {'is not' if name else 'fits no network in list_networks(); the nearest is'} {_describe(nearest)}: "
        f"the file {difference}. Give whole weights of one of these networks, or name another with --arch."
    )


def has_bottleneck_blocks(model: Iterable[str]) -> bool:
    """Whether tensors of these names, ours, are of a network in which the place of a block's stride is a choice."""
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
    """The networks of this row that have as many classes as the tensors, and about their width."""
    arguments = accepted_arguments(row)
    # From the classifier only the number of classes: whether it is whole shows in the comparison.
    classifiers = [shapes[n] for n in ("fc.weight", "classifier.6.weight") if shapes.get(n)]
    num_classes = classifiers[0][0] if classifiers else None
    for shortcut in ("B", "A", "C") if "shortcut" in arguments else (None,):
        chosen = {} if shortcut is None else {"shortcut": shortcut}
        width = _width(_shapes(row, None, **chosen), shapes)
        yield Architecture(row, {"width": width, **chosen}, num_classes)


def _width(full: Shapes, shapes: Shapes) -> float:
    """The width at which a network of the shapes `full` has the channels of `shapes`; 1 if there is none."""
    # The outputs of these layers are proportional to the width but for the rounding to multiples of 8, before
    # the multiplication by a bottleneck's expansion.
    expansion, last = (4, 3) if "layer1.0.conv3.weight" in full else (1, 2)
    pattern = re.compile(rf"conv1\.weight|layer\d\.0\.conv{last}\.weight|features\.\d+\.weight|classifier\.3\.weight")
    pairs = [(n, full[n], shapes[n]) for n in full if pattern.fullmatch(n) and len(shapes.get(n, ())) == len(full[n])]
    if not pairs:
        return 1.0
    bounds = []
    for name, (ours, *_), (theirs, *_) in pairs:
        step = 8 if name == "conv1.weight" else 8 * expansion
        # At least 8 channels are kept: that many say nothing about how small the width is.
        bounds.append((max(0, theirs - step / 2) / ours if theirs > step else 0.0, (theirs + step / 2) / ours))
    low, high = max(low for low, _ in bounds), min(high for _, high in bounds)
    # The widest layer's own ratio is a round number more often than the middle of what is possible.
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
    """The shapes of a network's tensors, without their memory."""
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
