"""Every Python and shell block of the documentation, as a reader would type it, at a small size.

A block runs in a folder of its own that holds what the documents name. To words that train or evaluate, keys for a
small size are added in front, so those of the document win; a script's DefaultTrainer gets them itself. What runs for
minutes is stopped where its work begins.
A block that no rule covers fails.
"""

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import timm
import torch
import torchvision
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from torch.distributed.run import get_args_parser

from benchmarks.gpu import PARTS
from resnet_backbone import detection
from resnet_backbone.data.generated import CLASS_NAMES, classification_image
from resnet_backbone.networks import list_networks
from tests.conftest import DETECTION_SMALL, PRETRAIN_SMALL
from tests.documented import ROOT, Block, all_blocks, commands, read_blocks, without_variables
from tests.weights.foreign import caffe2s, zoo_detector
from tests.weights.networks import made

COCO = ("coco_2014_train", "coco_2014_valminusminival", "coco_2014_minival", "coco_2014_val")
COCO += ("coco_2017_train", "coco_2017_val")
# Keys for a small size; a detector's number of classes follows from the data.
SMALL = {
    "tools/pretrain.py": PRETRAIN_SMALL.split(),
    "tools/train_net.py": DETECTION_SMALL.replace("MODEL.ROI_HEADS.NUM_CLASSES 8", "").split(),
    "tools/visualize_data.py": DETECTION_SMALL.replace("MODEL.ROI_HEADS.NUM_CLASSES 8", "").split(),
}
# The scripts that the documents call, each with its functions that take long: they are not run, only called correctly.
SCRIPTS = {
    "tools/pretrain.py": (),
    "tools/train_net.py": (),
    "tools/check_dataset.py": (),
    "tools/visualize_data.py": (),
    "tools/convert_weights.py": (),
    "tools/predict.py": (),
    "tools/analyze_model.py": ("analyze_catalogue",),
    "tools/evaluate.py": ("evaluate_files",),
    "tools/benchmark.py": ("run_pretrain", "run_data", "run_detect", "run_evaluate"),
    "tools/check_gpu.py": ("run_parts",),
    "projects/cifar10/run.py": ("carry_out",),
    "projects/coco_transfer/run.py": ("carry_out",),
    "projects/signal_propagation/run.py": ("measure",),
    "projects/soak/run.py": ("carry_out",),
    "projects/equality/run.py": ("compare",),
}
# What is checked of those functions' arguments, by name.
CHECKS = {
    "names": lambda names: set(names) <= set(PARTS),
    "networks": lambda names: set(names or ()) <= set(list_networks()),
    "plan": lambda plan: plan.check() is None if hasattr(plan, "check") else plan.iterations > 0,
}
# What a `…` stands for.
DATA = "--pretrain-data imagenet_train imagenet_val --detection-data coco_2014_train coco_2014_val"
LEFT_OUT = {
    "tools/pretrain.py": "configs/pretrain/imagenet.yaml",
    "tools/train_net.py": "configs/faster_rcnn_R50.yaml",
    "projects/coco_transfer/run.py": f"--output output/subset {DATA}",
}
# Names that a document's Python takes for granted.
GIVEN = {
    "README.md": lambda: {"images": torch.rand(1, 3, 64, 64)},
    "docs/detection.md": lambda: {"cfg": detection.get_config()},
    "docs/performance.md": lambda: {"trainer": SimpleNamespace(model=torch.nn.Conv2d(3, 3, 1))},
}
# A scheduler's programs, and a `python` that keeps how it was called; and the variables that Slurm sets.
STAND_INS = {"srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"', "scontrol": "echo 127.0.0.1"}
STAND_INS["python"] = "env > environment.txt; printf '%s\\n' \"$@\" > words.txt"
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
SLURM |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}

pytestmark = pytest.mark.skipif("DETECTRON2_DATASETS" in os.environ, reason="COCO would be looked for there")


class Reached(BaseException):
    """A script has called a function that takes long."""


@pytest.fixture(scope="module")
def things(scenes, tmp_path_factory) -> Path:
    """A folder with what the documents name: the repository's folders, data sets, an image, foreign weights."""
    folder = tmp_path_factory.mktemp("things")
    for name in ("configs", "tools", "projects", ".ci"):
        (folder / name).symlink_to(ROOT / name)
    for part, count in (("train", 4), ("val", 1)):
        for index in range(2 * count):
            pixels, label = classification_image(1, index % 2 + len(CLASS_NAMES) * (index // 2), 48)
            file = folder / "datasets" / "imagenet" / part / CLASS_NAMES[label] / f"{index}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(file), pixels)
    (folder / "imagenet").symlink_to(folder / "datasets" / "imagenet")
    annotations = json.loads(Path(scenes).read_text())
    for name in COCO:
        metadata = MetadataCatalog.get(name)
        # The scenes' eight categories have COCO's first ids.
        ids = metadata.thing_dataset_id_to_contiguous_id
        categories = [{"id": id_, "name": metadata.thing_classes[place]} for id_, place in ids.items()]
        file, images = folder / metadata.json_file, folder / metadata.image_root
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**annotations, "categories": categories}))
        if not images.exists():
            images.symlink_to(Path(scenes).parent / "images")
    image = next((Path(scenes).parent / "images").iterdir())
    shutil.copy(image, folder / "image.jpg")
    write_voc(folder / "VOC2007", image)
    (folder / "detectron2" / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "stock_train_net.py", folder / "detectron2" / "tools" / "train_net.py")
    caffe2s(folder, width=1.0)
    zoo_detector(folder)
    return folder


def write_voc(folder: Path, image: Path) -> None:
    """Write a set of one image with one object in PASCAL VOC's layout."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    shutil.copy(image, folder / "JPEGImages" / "1.jpg")
    box = "<xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>40</ymax>"
    (folder / "Annotations" / "1.xml").write_text(
        f"<annotation><object><name>cat</name><bndbox>{box}</bndbox></object></annotation>"
    )
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text("1\n")


@pytest.fixture(scope="module")
def detector(things, classifier, detection_config) -> Path:
    """The folder that a run of tools/train_net.py left."""
    folder = things / "output" / "detector"
    data = ("DATASETS.TRAIN", "coco_2014_train", "DATASETS.TEST", "coco_2014_val", "MODEL.ROI_HEADS.NUM_CLASSES", 80)
    network = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", classifier("resnet18"), "SOLVER.MAX_ITER", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(things)
        keys = (*data, *network, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
        detection.run(detection_config("faster_rcnn_R50.yaml", folder, *keys))
    return folder


class World:
    """A folder in which blocks run, and the rules by which they do.

    Attributes:
        printed: what the commands have printed.
    """

    def __init__(self, folder: Path, load_script, monkeypatch, capsys):
        self.folder, self.load_script, self.monkeypatch, self.capsys = folder, load_script, monkeypatch, capsys
        self.printed, self.runs = "", 0

    def run(self, block: Block) -> None:
        """Run everything in a block, and compare what it prints where the document shows that."""
        if block.language == "python":
            names = {"__name__": "__main__", **GIVEN.get(block.document, dict)()}
            exec(compile("\n" * (block.line - 1) + block.text, ROOT / block.document, "exec"), names)
        elif block.text.startswith("#!"):
            self.job(block.text)
        elif block.language in ("", "bash", "sh"):
            for words in commands(block.text):
                self.command(words)
        else:
            pytest.fail(f"no rule of tests/test_docs.py covers a block of {block.language}")
        self.printed += self.capsys.readouterr().out
        assert block.printed in self.printed

    def command(self, words: list[str]) -> None:
        name, *rest = words
        if name.startswith("resnet-backbone-"):
            self.python([f"tools/{name.removeprefix('resnet-backbone-').replace('-', '_')}.py", *rest])
        elif name in PROGRAMS:
            PROGRAMS[name](self, rest)
        else:
            pytest.fail(f"no rule of tests/test_docs.py covers the command {shlex.join(words)}")

    def python(self, words: list[str]) -> None:
        file, *rest = words
        if file == "-c":
            exec(rest[0], {})
        elif words[:2] == ["-m", "resnet_backbone.run"]:  # a process of its own, since it changes Detectron2's defaults
            self.process(sys.executable, *words)
        elif words[:2] == ["-m", "pytest"]:
            assert [word for word in rest if "/" in word and not (ROOT / word).exists()] == []
        elif file in SCRIPTS:
            self.script(file, rest)
        else:
            pytest.fail(f"no rule of tests/test_docs.py covers python {shlex.join(words)}")

    def script(self, file: str, words: list[str]) -> None:
        """Call a script's `main` in this process: an import of everything takes seconds."""
        at_left_out = shlex.split(LEFT_OUT.get(file, "…"))
        words = [word for given in words for word in (at_left_out if given == "…" else [given])]
        if file in SMALL:
            self.runs += 1
            alone = re.sub(r"(--num-gpus|--num-machines) \d+", r"\1 1", shlex.join(words))
            # A folder for each run, unless the document names one; a cluster's (/shared/…) is here.
            words = [*SMALL[file], "OUTPUT_DIR", f"output/run{self.runs}", *shlex.split(alone)]
            words = [word.lstrip("/") for word in words]
        with self.monkeypatch.context() as patch:
            patch.syspath_prepend(str((ROOT / file).parent))  # as Python does
            if file == "tools/check_gpu.py":
                patch.setattr(torch.cuda, "is_available", lambda: True)
            module = self.load_script(ROOT / file)
            for name in SCRIPTS[file]:
                patch.setattr(module, name, begin(getattr(module, name)))
            try:
                code = module.main(words)
            except Reached:
                code = 0
        printed = self.capsys.readouterr()
        assert code == 0, printed.err
        self.printed += printed.out

    def torchrun(self, words: list[str]) -> None:
        given = get_args_parser().parse_args(words)
        self.python([given.training_script, *given.training_script_args])

    def timeout(self, words: list[str]) -> None:
        """A limit of time; the flags are those of the machine's own `timeout`."""
        end = next(place for place, word in enumerate(words) if word.isdigit()) + 1
        self.process("timeout", *words[:end], "true")
        self.command(words[end:])

    def make(self, words: list[str]) -> None:
        """The target's last command, if it is Python's; the others are the installation's and ruff's."""
        for name in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "ARGS"):  # of a make that runs the tests
            self.monkeypatch.delenv(name, raising=False)
        *_, last = self.process("make", "--dry-run", "--no-print-directory", "-C", str(ROOT), *words).splitlines()
        name, *rest = without_variables(shlex.split(last))
        if name == ".venv/bin/python":
            self.python(rest)

    def pip(self, words: list[str]) -> None:
        assert set(words) <= {"install", "--dry-run", "."}  # tests/test_wheel.py installs it

    def ci(self, words: list[str]) -> None:
        assert not words and os.access(".ci/run", os.X_OK)
        self.process("bash", "-n", ".ci/run")

    def job(self, text: str) -> None:
        """A scheduler's script, with the scheduler's programs and `python` as stand-ins; then what it would start."""
        (self.folder / "bin").mkdir()
        for name, body in STAND_INS.items():
            (self.folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (self.folder / "bin" / name).chmod(0o755)
        (self.folder / "script").write_text(text)
        self.process("bash", "script", PATH=f"{self.folder / 'bin'}:{os.environ['PATH']}", **SLURM)
        environment = dict(re.findall(r"^(\w+)=(.*)$", Path("environment.txt").read_text(), re.MULTILINE))
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            self.monkeypatch.setenv(name, environment[name])
        self.python(Path("words.txt").read_text().splitlines())

    def process(self, *words: str, **environment: str) -> str:
        environment = {**os.environ, **environment}
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


PROGRAMS = {
    "python": World.python,
    "torchrun": World.torchrun,
    "timeout": World.timeout,
    "make": World.make,
    "pip": World.pip,
    ".ci/run": World.ci,
}


def begin(work):
    """A function with the signature of `work` that checks what it is called with, and says so."""

    def stop(*arguments, **named):
        for name, value in inspect.signature(work).bind(*arguments, **named).arguments.items():
            assert name not in CHECKS or CHECKS[name](value), f"{name}: {value}"
        raise Reached

    return stop


def is_command(line: str) -> bool:
    first = without_variables(line.split())[:1]
    return bool(first) and (first[0] in PROGRAMS or first[0].startswith("resnet-backbone-"))


@pytest.fixture
def world(things, scenes, load_script, tmp_path, monkeypatch, capsys) -> World:
    """A new folder with links to `things`; networks and trainers are made small."""
    for thing in things.iterdir():
        if thing.name != "output":
            (tmp_path / thing.name).symlink_to(thing)
    (tmp_path / "output").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCENES", scenes)  # for stock_train_net.py
    train = DefaultTrainer.__init__

    def small(self, cfg):
        cfg = cfg.clone()
        # Detectron2's own trainer takes no CHECKPOINT_PERIOD of 0.
        own = ("MODEL.NETWORK.WIDTH", "0.125", "SOLVER.CHECKPOINT_PERIOD", "1")
        cfg.merge_from_list([*SMALL["tools/train_net.py"], *own])
        train(self, cfg)

    monkeypatch.setattr(DefaultTrainer, "__init__", small)
    tv, create = torchvision.models.resnet50, timm.create_model
    monkeypatch.setattr(torchvision.models, "resnet50", lambda *, weights: made(tv))
    monkeypatch.setattr(timm, "create_model", lambda name, *, pretrained: made(create, name))
    known, threads = set(DatasetCatalog), torch.get_num_threads()
    yield World(tmp_path, load_script, monkeypatch, capsys)
    torch.set_num_threads(threads)
    for name in set(DatasetCatalog) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def stand_ins(request, world, things, classifier):
    """The function `(text)` that makes the checkpoints that a block names and does not write itself."""
    data = ("DATASETS.TRAIN", things / "imagenet" / "train", "DATASETS.TEST", things / "imagenet" / "val")

    def make(text: str) -> None:
        for folder in set(re.findall(r"output/(\w+)/", text)):
            if folder == "detector":
                (world.folder / "output" / folder).symlink_to(request.getfixturevalue("detector"))
            elif f"OUTPUT_DIR output/{folder}" not in text and f"output/{folder}/model_final.pth" in text:
                (world.folder / "output" / folder).mkdir()
                network = re.sub(r"_[a-z]$", "", folder)  # resnet152_a, resnet152_b
                (world.folder / "output" / folder / "model_final.pth").symlink_to(classifier(network, *data))

    return make


@pytest.mark.filterwarnings("ignore")  # the tracer's, about Detectron2's own code
@pytest.mark.parametrize("block", all_blocks(is_command), ids=str)
def test_a_block(block, world, stand_ins):
    stand_ins(block.text)
    world.run(block)


@pytest.mark.parametrize(
    ("language", "text", "message"),
    [
        ("", "frobnicate --all\n", "no rule .* frobnicate --all"),
        ("", "pip install .\nfrobnicate\n", "no rule .* frobnicate"),
        ("", "python tools/unknown.py\n", r"no rule .* python tools/unknown\.py"),
        ("yaml", "MODEL:\n", "no rule .* block of yaml"),
        ("python", "cfg.MODEL\n", "cfg"),
        ("bash", "pip uninstall torch\n", "uninstall"),
        ("", "python tools/convert_weights.py R-50.pkl\n", "2"),
        ("", "python tools/convert_weights.py no.pth out.pth\n", r"no\.pth"),
        ("", "python tools/check_gpu.py --parts dta\n", "dta"),
        ("", "python tools/benchmark.py pretrain --networks resnet51\n", "resnet51"),
        ("", "python projects/cifar10/run.py --scale cpu --output out SOLVER.MAX_ITR 1\n", "SOLVER.MAX_ITR"),
        ("", "python tools/train_net.py --config-file … MODEL.NETWRK.NAME resnet50\n", "MODEL.NETWRK.NAME"),
        ("", "make ARGS=no/where test\n", "no/where"),
        ("", "python -m resnet_backbone.run no.py\n", r"no script no\.py"),
    ],
)
def test_a_wrong_block_fails(world, language, text, message):
    with pytest.raises((Exception, SystemExit, pytest.fail.Exception), match=message):
        world.run(Block("docs/made_up.md", 1, language, text))


def test_what_a_block_prints_is_compared(world):
    block = Block("docs/made_up.md", 1, "", "python tools/analyze_model.py resnet18\n", printed="11,689,512")
    world.run(block)
    with pytest.raises(AssertionError):
        world.run(replace(block, printed="11,689,513"))


def test_a_block_is_found_with_its_line_and_what_it_prints():
    text = (
        "words\n\n```\nA=1 pip install \\\n    .  # here\n\nmake test\n```\n\n  ~~~python\nx\n~~~\n```\nprinted\n```\n"
    )
    first, second = read_blocks("docs/made_up.md", is_command, text)
    assert (first.line, first.language, commands(first.text)) == (4, "", [["pip", "install", "."], ["make", "test"]])
    assert (second.line, second.language, second.text, second.printed) == (11, "python", "x\n", "printed\n")
    (alone,) = read_blocks("docs/made_up.md", is_command, "```\nfrobnicate\n```\n")
    assert alone.text == "frobnicate\n"
    with pytest.raises(ValueError, match="line 2 is never closed"):
        read_blocks("docs/made_up.md", is_command, "```\npip\n")
