"""Export a classifier with its preprocessing to ONNX, and verify the export."""

import json
import os
import warnings

import torch
from torch import Tensor, nn

from resnet_backbone.networks import VGG, build_network
from resnet_backbone.networks.catalogue import find_row
from resnet_backbone.weights.checkpoint import Checkpoint, CheckpointError
from resnet_backbone.weights.files import atomic_write
from resnet_backbone.weights.loading import load_state
from resnet_backbone.weights.metadata import Metadata

# Largest deviation from torch's logits, relative to the largest logit. Reordered sums differ by about 1e-6.
TOLERANCE = 1e-4


class FromPixels(nn.Module):
    """A classifier with preprocessing: RGB images `(N, 3, H, W)` in 0…255 to logits `(N, num_classes)`."""

    def __init__(self, network: nn.Module, metadata: Metadata):
        super().__init__()
        self.network = network
        self.swap_channels = metadata.channel_order == "BGR"
        self.register_buffer("mean", torch.tensor(metadata.pixel_mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(metadata.pixel_std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if self.swap_channels:
            images = images.flip(1)
        return self.network((images - self.mean) / self.std)


def write_onnx(path: str | os.PathLike, checkpoint: Checkpoint) -> float:
    """Write the classifier as ONNX, atomically, once onnxruntime reproduces torch's logits on random images.

    Input `images`: RGB, float32, 0…255, `(N, 3, H, W)` with any N, and any H and W except for VGG, whose fc6 fixes them
    to the training crop. Output `logits`: `(N, num_classes)`. Color order, mean and standard deviation are in the
    graph; the metadata is in the file's properties under `resnet_backbone`.

    Returns:
        The largest logit difference, relative to the largest logit.

    Raises:
        CheckpointError: the checkpoint holds no classifier, onnx or onnxruntime is not installed, or the exported
            network's logits differ; nothing is written.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it and says so less clearly)
    except ImportError as error:
        raise CheckpointError(
            f"writing {path} needs {error.name}, which is not installed. Run: pip install onnx onnxruntime onnxscript"
        ) from error
    network = _build(checkpoint, path)
    model = FromPixels(network, checkpoint.metadata).eval()
    size = find_row(checkpoint.metadata.architecture).image_size
    height, width = checkpoint.metadata.crop or (size, size)
    sizes = {0: "n"} if isinstance(network, VGG) else {0: "n", 2: "h", 3: "w"}
    example = torch.rand(2, 3, height, width) * 255
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own internals
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=(sizes,),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {"resnet_backbone": json.dumps(checkpoint.metadata.to_dict())})
    content = proto.SerializeToString()

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    images = torch.rand(1, 3, height, width) * 255
    with torch.no_grad():
        expected = model(images)
    value = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    error = ((value - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE:
        raise CheckpointError(
            f"{path} was not written: onnxruntime's logits differ from torch's by {error:.1e} of the largest, expected "
            f"at most {TOLERANCE:.0e}. Please report this with the versions of torch and onnxruntime."
        )
    with atomic_write(path) as file:
        file.write(content)
    return error


def _build(checkpoint: Checkpoint, path: str | os.PathLike) -> nn.Module:
    metadata = checkpoint.metadata
    if metadata.kind != "classifier":
        raise CheckpointError(
            f"{path} cannot be written: the weights are those of a {metadata.kind}, and this writes classifiers. "
            "resnet_backbone.detection.export.export_detector writes detectors (docs/weights.md)."
        )
    network = build_network(metadata.architecture, len(metadata.class_names), **metadata.arguments)
    load_state(network, checkpoint.model, part="network", source="the checkpoint")
    return network
