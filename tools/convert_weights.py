#!/usr/bin/env python3
"""Convert weights between our checkpoints and other libraries' formats, accounting for every tensor."""

import signal

if __name__ == "__main__":  # Ctrl-C ends the imports below without a stack trace
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import Any

from resnet_backbone.errors import InputError, exit_code
from resnet_backbone.weights.checkpoint import holds_detector
from resnet_backbone.weights.convert import convert
from resnet_backbone.weights.preprocessing import PRESETS
from resnet_backbone.weights.writers import WRITTEN_FORMATS

EXAMPLE = """examples:
  python tools/convert_weights.py resnet50-0676ba61.pth resnet50.pth
  python tools/convert_weights.py R-50.pkl resnet50.safetensors
  python tools/convert_weights.py model_final.pkl backbone.pth --preprocessing msra
  python tools/convert_weights.py output/resnet50/model_final.pth resnet50.pkl

Reads torchvision's, timm's and Detectron2's state dicts (.pth, .safetensors), MSRA's and Caffe2's .pkl, Keras' and
Caffe's names in .npz, and our own. Writes our checkpoint (.pth), torchvision's (.pth with --format torchvision),
Detectron2's (.pkl), .safetensors, or .onnx. docs/weights.md has the table. A detector that tools/train_net.py wrote can
become .onnx, too:

  python tools/convert_weights.py output/detector/model_final.pth detector.onnx --images photographs"""


def boolean(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return word.lower() == "true"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", help="the file to read; its format is found in it, not in its suffix")
    parser.add_argument("target", metavar="DST", help="the file to write; its suffix is the format")
    parser.add_argument(
        "--arch", metavar="NAME", dest="architecture", help="the network, where the tensors fit several"
    )
    parser.add_argument("--format", choices=WRITTEN_FORMATS, help="of DST, where its suffix stands for two")
    parser.add_argument("--preprocessing", choices=tuple(PRESETS), help="how the weights were trained, in one word")
    parser.add_argument("--channel-order", choices=("RGB", "BGR"))
    parser.add_argument("--pixel-mean", type=float, nargs=3, metavar="X", help="in that order, 0…255")
    parser.add_argument("--pixel-std", type=float, nargs=3, metavar="X", help="in that order, 0…255")
    parser.add_argument("--stride-in-1x1", type=boolean, metavar="true|false", help="of the bottlenecks")
    parser.add_argument("--norm-epsilon", type=float, metavar="X", help="of the batch normalization in SRC")
    parser.add_argument(
        "--images", metavar="PATH", help="of a detector for ONNX: images on which it finds something, to compare on"
    )
    return exit_code(functools.partial(report, **vars(parser.parse_args(words))))


def report(images: str | None, **arguments: Any) -> None:
    if arguments["target"].endswith(".onnx") and holds_detector(arguments["source"]):
        from resnet_backbone.detection.export import export_detector  # needs Detectron2, unlike the rest

        if any(value is not None for name, value in arguments.items() if name not in ("source", "target")):
            raise InputError(
                f"{arguments['source']} holds a detector, which becomes ONNX without any flag but --images."
            )
        print(
            f"{arguments['target']}: {export_detector(arguments['source'], arguments['target'], images=images).text()}"
        )
        return
    if images is not None:
        raise InputError(f"--images is about a detector that becomes ONNX, not about {arguments['source']}.")
    conversion, note = convert(**arguments)
    print(conversion.summary())
    print(note or "the result carries this preprocessing in its metadata")


if __name__ == "__main__":
    sys.exit(main())
