"""Pretraining: from random weights to a classifier whose checkpoint describes its preprocessing."""

from resnet_backbone import engine  # isort: skip  (first: it says how to install a missing Detectron2)
from resnet_backbone.pretraining.config import get_config
from resnet_backbone.pretraining.task import run

__all__ = ["get_config", "run"]
