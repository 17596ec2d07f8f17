"""Random samples with a limited share of positives, of fixed size: nothing depends on how many there are."""

import torch
from torch import Tensor


def sample(positive: Tensor, negative: Tensor, number: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Draw `number` entries at random: positives up to their share, then negatives (Faster R-CNN, section 3.1.3).

    The distribution is that of Detectron2's `subsample_labels`: `min(positives, int(number * positive_fraction))`
    positives, and as many negatives as there are and fit in.

    Args:
        positive, negative: `(A,)` bool; an entry in neither is not drawn.

    Returns:
        indices `(S,)` and whether each is drawn `(S,)`, positives first; S is `number`, or A if that is less. Without
        enough entries of either kind, the last ones are not drawn, and their indices are arbitrary.
    """
    keys = torch.rand(positive.shape, device=positive.device)
    most = min(number, len(positive))
    best = keys.masked_fill(~positive, -1).topk(min(int(number * positive_fraction), most))
    others = keys.masked_fill(~negative, -1).topk(most)
    drawn = best.values >= 0
    room = number - drawn.sum()
    others_drawn = (others.values >= 0) & (torch.arange(most, device=keys.device) < room)
    indices, drawn = torch.cat([best.indices, others.indices]), torch.cat([drawn, others_drawn])
    first = drawn.int().argsort(descending=True, stable=True)[:most]
    return indices[first], drawn[first]
