"""Find a network whose tensors carry a prefix, as DataParallel, torch.compile, Lightning and users' own modules give.

`module.`, `_orig_mod.`, `model.backbone.`: no list of prefixes, but whatever stands before a network that is whole.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch

from resnet_backbone.weights.architectures import MissingMetadata
from resnet_backbone.weights.checkpoint import CheckpointError
from resnet_backbone.weights.names import FORMATS, prefix_of, recognize, some
from resnet_backbone.weights.readers import TensorFile

Identified = TypeVar("Identified")


def identify_under_prefix(
    file: TensorFile, source: str, identify: Callable[[TensorFile], Identified]
) -> tuple[str, Identified]:
    """Return the prefix of the file's one network, "" for none, and what `identify` returns without it.

    Args:
        file: the file.
        source: its name in messages.
        identify: raises CheckpointError for tensors that are not exactly one network of the catalogue.

    Raises:
        CheckpointError: there is no network, or one under each of several prefixes.
    """
    if recognize(file.tensors) is not None:
        return "", identify(file)
    whole: dict[str, Identified | MissingMetadata] = {}
    reasons: dict[str, str] = {}
    for prefix in _prefixes(file.tensors):
        under = {name.removeprefix(prefix): t for name, t in file.tensors.items() if name.startswith(prefix)}
        try:
            whole[prefix] = identify(replace(file, tensors=under))
        except MissingMetadata as error:  # more than one network has these tensors
            whole[prefix] = error
        except CheckpointError as error:
            reasons[prefix] = str(error)
    if len(whole) > 1:
        raise CheckpointError(
            f"{source} has a whole network under each of the prefixes {' and '.join(whole)}, and nothing says which is "
            "meant. Save the tensors of one to a file of their own."
        )
    for prefix, found in whole.items():
        if isinstance(found, MissingMetadata):
            raise found
        return prefix, found
    hint = "".join(f" Without the prefix {prefix}: {reason}" for prefix, reason in list(reasons.items())[:2])
    raise CheckpointError(
        f"{source} has tensors with names such as {some(file.tensors)}, which are none of {', '.join(FORMATS)}. "
        f"Give weights of a network in list_networks() in one of these formats.{hint}"
    )


def _prefixes(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The prefixes of what may be a network's first convolution, which takes three channels."""
    found = {prefix_of(name): None for name, tensor in tensors.items() if tensor.dim() == 4 and tensor.shape[1] == 3}
    return [prefix for prefix in found if prefix]
