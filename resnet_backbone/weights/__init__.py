"""Checkpoints that say what they are: metadata, safe reading, atomic writing, loading that counts."""

from resnet_backbone.weights.checkpoint import Checkpoint, CheckpointError, read_checkpoint, write_checkpoint
from resnet_backbone.weights.files import atomic_write, write_json
from resnet_backbone.weights.loading import Coverage, Route, collect, load_state
from resnet_backbone.weights.metadata import Metadata

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Coverage",
    "Metadata",
    "Route",
    "atomic_write",
    "collect",
    "load_state",
    "read_checkpoint",
    "write_checkpoint",
    "write_json",
]
