"""Residual and VGG networks, from random weights to a Detectron2 detector.

Importing the package needs nothing, its networks torch alone; Detectron2 is imported in `engine`, `pretraining` and
`detection`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnet_backbone.networks import build_network, list_networks

__version__ = "0.1.0"

__all__ = ["__version__", "build_network", "list_networks"]


def __getattr__(name: str) -> Any:
    """Import the networks, and torch with them, when they are asked for."""
    if name in ("build_network", "list_networks"):
        from resnet_backbone import networks

        return getattr(networks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
