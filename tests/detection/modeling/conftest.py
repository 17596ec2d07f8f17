"""Detectors in double precision."""

import pytest
import torch
import torchvision
from detectron2.structures import Boxes


@pytest.fixture
def double_precision(monkeypatch):
    """Detectron2 rounds boxes to float32, which hides small differences and enlarges others."""
    nms = torchvision.ops.boxes.nms

    def __init__(self, tensor):
        self.tensor = torch.as_tensor(tensor, dtype=torch.float64).reshape(-1, 4)

    monkeypatch.setattr(Boxes, "__init__", __init__)
    monkeypatch.setattr(torchvision.ops.boxes, "nms", lambda b, s, limit: nms(b.double(), s.double(), limit))
