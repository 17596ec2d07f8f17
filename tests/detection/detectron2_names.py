"""Our tensors under Detectron2's names, written down independently of the converter."""

import torch
from torch import nn


def detectron2_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of one of our ResNets, or of some of its stages, under the names of Detectron2's."""
    state = {}

    def take(ours, theirs):
        for key, value in ours.state_dict().items():
            if key != "num_batches_tracked":
                state[f"{theirs}.{key}"] = value

    if hasattr(network, "conv1"):
        take(network.conv1, "stem.conv1")
        take(network.bn1, "stem.conv1.norm")
    for i in range(1, 5):
        for j, block in enumerate(getattr(network, f"layer{i}", ())):
            for part, module in block.named_children():
                if part == "downsample":
                    take(module[0], f"res{i + 1}.{j}.shortcut")
                    take(module[1], f"res{i + 1}.{j}.shortcut.norm")
                elif part.startswith("conv"):
                    take(module, f"res{i + 1}.{j}.{part}")
                elif part.startswith("bn"):
                    take(module, f"res{i + 1}.{j}.conv{part[2:]}.norm")
    return state
