"""The wheel, installed where no clone is in sight: everything is in it, and its commands train."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from resnet_backbone.weights import read_checkpoint
from tests.conftest import DETECTION_SMALL, PRETRAIN_SMALL

ROOT = Path(__file__).parents[1]
PACKED = ("resnet_backbone", "configs", "tools", "projects/benchmarks/benchmarks")
COMMANDS = (
    "analyze-model",
    "benchmark",
    "check-dataset",
    "convert-weights",
    "evaluate",
    "install-detectron2",
    "predict",
    "pretrain",
    "train-net",
    "visualize-data",
)


def run(*words, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built by pip from a copy, since a build writes into the tree, and takes files that an earlier one left there."""
    tree, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in PACKED:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, tree, cwd=folder)
    (path,) = folder.glob("resnet_backbone-*-py3-none-any.whl")
    return path


@pytest.fixture(scope="module")
def commands(wheel, tmp_path_factory) -> Path:
    """The folder of the commands in an environment with the wheel and this one's libraries, but not its packages' .pth.

    A plain path in a .pth file shows a folder's packages without running the .pth files in it, such as that of an
    editable installation of this project.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "libraries.pth").write_text("".join(f"{sysconfig.get_path(name)}\n" for name in ("purelib", "platlib")))
    found = run(python, "-c", "import resnet_backbone.tools; print(*resnet_backbone.__path__)", cwd=folder)
    assert Path(found.strip()) == site / "resnet_backbone"
    return folder / "bin"


def test_the_wheel_holds_what_the_repository_has_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = set()
    for name in PACKED:
        inside = "" if name == "resnet_backbone" else "resnet_backbone/"
        files = (file for file in (ROOT / name).rglob("*") if file.suffix in (".py", ".yaml"))
        expected |= {inside + file.relative_to(ROOT).as_posix() for file in files}
    assert names == expected
    assert "resnet_backbone/configs/pretrain/imagenet.yaml" in names


def test_every_tool_has_its_command(commands):
    assert {file.name for file in commands.glob("resnet-backbone-*")} == {f"resnet-backbone-{n}" for n in COMMANDS}
    tools = {file.stem.replace("_", "-") for file in (ROOT / "tools").glob("[!_]*.py")}
    assert tools - set(COMMANDS) == {"check-gpu"}  # it runs the repository's tests


def test_a_run_of_each_kind_from_another_folder(commands, shapes, scenes, tmp_path):
    pretrain, train_net, analyze = (
        commands / f"resnet-backbone-{name}" for name in ("pretrain", "train-net", "analyze-model")
    )
    network = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.NETWORK.WIDTH", "0.125")
    data = ("DATASETS.TRAIN", shapes, "DATASETS.TEST", shapes, "OUTPUT_DIR", "classifier")
    run(pretrain, "--config-file", "pretrain/imagenet.yaml", *PRETRAIN_SMALL.split(), *network, *data, cwd=tmp_path)
    classifier = tmp_path / "classifier" / "model_final.pth"
    assert read_checkpoint(classifier).metadata.origin["iterations"] == 2

    data = ("DATASETS.TRAIN", scenes, "DATASETS.TEST", scenes, "OUTPUT_DIR", "detector", "MODEL.WEIGHTS", classifier)
    words = (*DETECTION_SMALL.split(), *network, *data, "SOLVER.MAX_ITER", 2)
    run(train_net, "--config-file", "faster_rcnn_R50.yaml", *words, cwd=tmp_path)
    assert read_checkpoint(tmp_path / "detector" / "model_final.pth").metadata.origin["iterations"] == 2
    assert "bbox" in json.loads((tmp_path / "detector" / "results.json").read_text())

    (network,) = json.loads(run(analyze, "resnet50", "--json", cwd=tmp_path))
    assert network["parameters"] == 25_557_032  # as torchvision documents for its resnet50


def test_the_installer_and_the_benchmarks_start(commands, tmp_path):
    assert "sdist" in run(commands / "resnet-backbone-install-detectron2", "--help", cwd=tmp_path)
    assert "{pretrain,data,detect,evaluate}" in run(commands / "resnet-backbone-benchmark", "--help", cwd=tmp_path)
