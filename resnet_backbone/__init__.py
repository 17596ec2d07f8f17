"""Residual and VGG networks, from random weights to a Detectron2 detector.

Importing the package needs torch alone; Detectron2 is imported in `engine`, `pretraining` and `detection`.
"""

from resnet_backbone.networks import build_network, list_networks

__version__ = "0.1.0"

__all__ = ["__version__", "build_network", "list_networks"]
