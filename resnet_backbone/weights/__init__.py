"""Self-describing checkpoints: metadata, safe reading, atomic writing, and loading that counts tensors."""

from resnet_backbone.weights.architectures import MissingMetadata
from resnet_backbone.weights.checkpoint import Checkpoint, CheckpointError, read_checkpoint, write_checkpoint
from resnet_backbone.weights.convert import Conversion, convert, read_weights
from resnet_backbone.weights.files import atomic_write, write_json
from resnet_backbone.weights.loading import LoadReport, load_state
from resnet_backbone.weights.metadata import Metadata
from resnet_backbone.weights.writers import write_weights

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Conversion",
    "LoadReport",
    "Metadata",
    "MissingMetadata",
    "atomic_write",
    "convert",
    "load_state",
    "read_checkpoint",
    "read_weights",
    "write_checkpoint",
    "write_json",
    "write_weights",
]
