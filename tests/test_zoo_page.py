"""docs/zoo.md: every configuration is in its tables, every command can be given, and the cells are what it would do."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from resnet_backbone import detection, pretraining
from resnet_backbone.detection.task import Detection
from resnet_backbone.engine.config import COMMAND_LINE, get_config_file, load_config, origin
from resnet_backbone.engine.launch import argument_parser
from resnet_backbone.engine.network_config import network_name
from resnet_backbone.pretraining.task import Classification
from tests.documented import ROOT

TEXT = (ROOT / "docs" / "zoo.md").read_text()
TOOLS = {"tools/train_net.py": (detection, Detection), "tools/pretrain.py": (pretraining, Classification)}


@dataclass(frozen=True)
class Row:
    """A row of a table: its cells by the column's name, and the command in the last one."""

    cells: dict[str, str]
    command: str

    def __str__(self) -> str:
        return self.command.partition("--config-file ")[2].partition(" ")[0]


def read_rows() -> list[Row]:
    rows, head = [], []
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif not set(line) <= set("|-: "):
            rows.append(Row(dict(zip(head, cells, strict=True)), cells[-1].strip("`")))
    return [row for row in rows if row.command.startswith("python ")]


ROWS = read_rows()
COMMANDS = re.findall(r"`(python [^`]+)`", TEXT)


def load(command: str):
    """Return the configuration of a command, parsed as its tool parses it, and the tool's task."""
    python, tool, *words = shlex.split(command)
    package, task = TOOLS[tool]
    arguments = argument_parser("", "").parse_args(words)
    assert python == "python" and arguments.config_file
    keys = ["MODEL.DEVICE", "cpu", *arguments.opts]
    return load_config(package.get_config(), arguments.config_file, keys), arguments, task


def test_every_configuration_is_in_a_table():
    listed = {Path(get_config_file(load(row.command)[1].config_file)).resolve() for row in ROWS}
    shipped = {path for path in (ROOT / "configs").rglob("*.yaml") if not path.name.startswith("base_")}
    assert shipped - listed == set()


def test_the_commands_outside_of_tables_are_checked_too():
    assert len(COMMANDS) > len(ROWS) > 15


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_given(command):
    """Its flags parse, its keys exist, and their values are allowed, alone and together; it trains on no test set."""
    cfg, arguments, task = load(command)
    task(cfg).check(eval_only=arguments.eval_only)
    assert not set(cfg.DATASETS.TRAIN) & set(cfg.DATASETS.TEST)


def layout(cfg) -> str:
    """Return what the column says, from the keys that decide about it."""
    masks = "Mask" if cfg.MODEL.MASK_ON else "Faster"
    kind = "RetinaNet" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else f"{masks} R-CNN"
    features = {"res4": "C4", "conv5": "C5"}.get(cfg.MODEL.RPN.IN_FEATURES[0])
    words = [kind, "FPN" if "fpn" in cfg.MODEL.BACKBONE.NAME else features]
    if cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE == "ROIPool":
        words.append("RoIPool")
    if origin(cfg, "MODEL.RESNETS.STRIDE_IN_1X1") == COMMAND_LINE:
        words.append("stride in the 1×1")
    if cfg.MODEL.ROI_HEADS.GLOBAL_CONTEXT and cfg.TEST.BOX_REFINEMENT and cfg.TEST.MULTI_SCALE.MIN_SIZES:
        words.append("[Table 9's options](detection.md#the-papers-options-table-9)")
    return ", ".join(words)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_row_says_what_its_command_does(row):
    cfg, _, task = load(row.command)
    assert row.cells["network"] == f"`{network_name(cfg)}`"
    assert row.cells["schedule"] == f"{cfg.SOLVER.MAX_ITER:,} × {cfg.SOLVER.IMS_PER_BATCH}"
    if task is Classification:
        return
    assert row.cells["layout"] == layout(cfg)
    stride_in_1x1 = origin(cfg, "MODEL.RESNETS.STRIDE_IN_1X1") == COMMAND_LINE
    assert f"output/{network_name(cfg)}{'_1x1' * stride_in_1x1}/model_final.pth" == cfg.MODEL.WEIGHTS
    data = {
        ("coco_2014_train",): "COCO 2014",
        ("coco_2017_train",): "COCO 2017",
        ("voc_2007_trainval", "voc_2012_trainval"): "VOC 07+12",
        ("voc_2007_trainval", "voc_2007_test", "voc_2012_trainval"): "VOC 07++12",
    }
    assert row.cells["data"] == data[cfg.DATASETS.TRAIN]


@pytest.mark.parametrize("row", [row for row in ROWS if str(row).startswith("configs/faster_rcnn_")], ids=str)
def test_published_numbers_are_those_of_the_file(row):
    """A detector's row and the header of its file expect the same."""
    lines = (ROOT / str(row)).read_text().splitlines()
    header = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    numbers = [re.findall(r"\d+\.\d+", text) for text in (row.cells["published"], header.partition("Expected")[2])]
    assert numbers[0] == numbers[1]
