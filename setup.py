"""Packaging of resnet_backbone. It runs before torch is installed, so it imports nothing of the project."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

# In the repository these lie beside the package. An installation has them inside it, at the same places to each other.
SHIPPED = {
    "resnet_backbone.configs": "configs",
    "resnet_backbone.tools": "tools",
    "resnet_backbone.projects.benchmarks.benchmarks": "projects/benchmarks/benchmarks",
}
# tools/check_gpu.py has no command: it runs the repository's tests.
COMMANDS = (
    "analyze_model",
    "benchmark",
    "check_dataset",
    "convert_weights",
    "evaluate",
    "install_detectron2",
    "predict",
    "pretrain",
    "train_net",
    "visualize_data",
)


def read_version() -> str:
    """Take __version__ from the package's source; importing the package would need torch."""
    source = HERE / "resnet_backbone" / "__init__.py"
    match = re.search(r'^__version__ = "([^"]+)"$', source.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise RuntimeError(f'{source} has no line of the form __version__ = "1.2.3".')
    return match.group(1)


def read_description() -> str:
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="resnet_backbone",
    version=read_version(),
    description="Residual and VGG networks, from random weights to a Detectron2 detector",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["resnet_backbone", "resnet_backbone.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={"resnet_backbone.configs": ["*.yaml", "pretrain/*.yaml"]},
    entry_points={
        "console_scripts": [
            f"resnet-backbone-{name.replace('_', '-')} = resnet_backbone.tools.{name}:main" for name in COMMANDS
        ]
    },
    # Ranges; requirements.txt holds the versions that the tests ran with. Detectron2 0.6 is not on the package index
    # under its own name: tools/install_detectron2.py installs it after these.
    install_requires=[
        # Without 2.13: CPU-only builds of 2.13.0 are about with which torchvision's wheel cannot load its operators.
        "torch>=2.6,!=2.13.*,<2.15",
        "torchvision>=0.21,!=0.28.*,<0.30",
        "numpy>=2.0,<3",
        "Pillow>=11.0",
        "opencv-python-headless>=4.10",
        "safetensors>=0.4.3",
        "fvcore>=0.1.5,<0.1.6",
        "iopath>=0.1.9,<0.2",
        "yacs>=0.1.8",
        "pycocotools>=2.0.8",
        "shapely>=2.0.6",
        "faster-coco-eval>=1.8",
        "matplotlib>=3.9",
        "tensorboard>=2.17",
        "tabulate>=0.10",
        "tqdm>=4.66",
    ],
    extras_require={
        "export": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.3"],
        "test": ["pytest>=8.2", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "timm>=1.0.11"],
    },
)
